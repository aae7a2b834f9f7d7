"""The sentence nearest to each sentence: python -m ctxfast.examples.sentence_similarity [DIRECTORY]

Without a BERT directory the demo's MiniLM weights are used.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from ctxfast.bert import BertModel, BertTokenizer
from ctxfast.demo import find_weights
from ctxfast.examples.texts import PAIRS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].split(":")[0])
    parser.add_argument(
        "directory", nargs="?", help="of a BERT; default: the demo's MiniLM weights"
    )
    directory = parser.parse_args(arguments).directory or find_weights()
    tokenizer = BertTokenizer.from_pretrained(directory)
    model = BertModel.from_pretrained(directory)

    sentences = [sentence for pair in PAIRS for sentence in pair]
    inputs = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state  # [B, S, D], zero in padding
    mean = hidden.sum(1) / inputs["attention_mask"].sum(1, keepdim=True)  # [B, D]
    unit = torch.nn.functional.normalize(mean, dim=-1)
    similarity = (unit @ unit.T).fill_diagonal_(-1)

    for sentence, row in zip(sentences, similarity, strict=True):
        print(f"{row.max():.2f}  {sentence}  ->  {sentences[int(row.argmax())]}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
