"""One line for the models that people already have: python -m ctxfast.examples.accelerate_models [DIRECTORY]

Vectors of sentences as the card of a sentence-transformers model computes them, with transformers and, where it is
installed, with sentence-transformers; before and after `ctxfast.accelerate`. Without a directory the demo's MiniLM
weights are used.
"""

import argparse
import sys
import time

import torch

import ctxfast
from ctxfast.demo import find_weights
from ctxfast.examples.texts import generate_sentences


def mean_pooling(output, attention_mask):
    mask = attention_mask.unsqueeze(-1).expand(output[0].size()).float()
    return (output[0] * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def timed(encode):
    encode()
    start = time.perf_counter()
    return encode(), time.perf_counter() - start


def compare(title, encode, model):
    before, slow = timed(encode)
    ctxfast.accelerate(model)  # the one line
    after, fast = timed(encode)
    difference = (after - before).abs().max()
    print(
        f"{title:24}{slow:7.2f} s ->{fast:7.2f} s  {slow / fast:4.1f}x  difference {difference:.0e}"
    )
    print(*ctxfast.explain(model).notes, sep="\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument(
        "directory", nargs="?", help="of a sentence-transformers model; default: the demo's weights"
    )
    directory = str(parser.parse_args(arguments).directory or find_weights())
    sentences = generate_sentences(128)

    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory)

    def embed():
        encoded = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return mean_pooling(model(**encoded), encoded["attention_mask"])

    compare("transformers", embed, model)

    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        print(f"sentence-transformers: {error}")
        return
    encoder = SentenceTransformer(directory, device="cpu")
    compare(
        "sentence-transformers", lambda: encoder.encode(sentences, convert_to_tensor=True), encoder
    )


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(str(error))
