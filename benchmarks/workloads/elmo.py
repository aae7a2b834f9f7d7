"""ELMo inference in the published sizes, on a batch of 32 messages and on one sentence of 11 words.

A candidate gets character ids [B, T, 50] without boundaries, as `batch_to_ids` makes them, and gives all layers. States
are zero in every call. The words are those of sms_spam where the data is, else drawn from a Zipf distribution.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import lengths as length_sets
from ..case import CPU, Case
from ..plain_elmo import PlainElmo, Shape, write_weights

SHAPES = {
    "tiny": Shape(64, 16, 1, ((1, 8), (2, 16), (3, 40))),
    "small": Shape(1024, 128, 1),
    "medium": Shape(2048, 256, 1),
    "original": Shape(4096, 512, 2),
}
_ONE = ["The", "bank", "raised", "its", "rates", "after", "the", "flood", "."] + ["It", "held"]


@dataclass(frozen=True)
class ElmoInputs:
    """A published directory, sentences in falling order of length, and their ids on a device."""

    size: str
    sentences: tuple[tuple[str, ...], ...]
    device: torch.device = CPU

    def to(self, device: torch.device) -> ElmoInputs:
        return ElmoInputs(self.size, self.sentences, device)

    @property
    def directory(self) -> Path:
        """Made on first use."""
        return Path(_keep(self.size).name)

    @property
    def lengths(self) -> list[int]:
        """Boundaries counted."""
        return [len(sentence) + 2 for sentence in self.sentences]

    def ids(self) -> Tensor:
        """int64 [B, T, 50] without boundaries."""
        rows = torch.zeros(len(self.sentences), len(self.sentences[0]), 50, dtype=torch.int64)
        for row, sentence in enumerate(self.sentences):
            for place, word in enumerate(sentence):
                rows[row, place] = torch.tensor(_characters([*word.encode()[:48]]))
        return rows.to(self.device)

    def with_boundaries(self) -> Tensor:
        """int64 [B, T + 2, 50]."""
        ids = self.ids().cpu()
        rows = torch.zeros(ids.shape[0], ids.shape[1] + 2, 50, dtype=torch.int64)
        rows[:, 1:-1] = ids
        rows[:, 0] = torch.tensor(_characters([256]))
        for row, length in enumerate(self.lengths):
            rows[row, length - 1] = torch.tensor(_characters([257]))
        return rows.to(self.device)

    def valid(self, layers: Tensor) -> Tensor:
        """[N, (L + 1) * 2P] of the valid positions of layers [L + 1, B, T + 2, 2P]."""
        mask = torch.arange(layers.shape[2]) < torch.tensor(self.lengths)[:, None]
        return layers.permute(1, 2, 0, 3)[mask.to(layers.device)].flatten(1)


def _characters(raw: list[int]) -> list[int]:
    row = [258, *raw, 259]
    return [character + 1 for character in row + [260] * (50 - len(row))]


@cache
def _keep(size: str) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="ctxfast-bench-")
    write_weights(Path(folder.name), SHAPES[size])
    return folder


@cache
def messages(count: int) -> tuple[tuple[tuple[str, ...], ...], str]:
    """`count` tokenised sentences and where they are from."""
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("CTXFAST_TEST_DATA", root.parent / "shared" / "data"))
    file = data / "sms_spam" / "SMSSpamCollection"
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [tuple(line.split("\t", 1)[1].split()) for line in lines[:count]]
        return tuple(found), "sms_spam"
    generator = random.Random("words")
    letters = "etaoinshrdlu"
    vocabulary = [
        "".join(generator.choices(letters, k=generator.randint(1, 9))) for _ in range(5000)
    ]
    ranks = [1 / (rank + 1) for rank in range(5000)]
    drawn = length_sets.draw("sms_spam", count)
    found = [tuple(generator.choices(vocabulary, ranks, k=max(length - 2, 1))) for length in drawn]
    return tuple(found), "Zipf words with sms_spam lengths"


def _case(size: str, name: str, sentences: list[tuple[str, ...]], source: str) -> Case:
    shape = SHAPES[size]
    inputs = ElmoInputs(size, tuple(sorted(sentences, key=len, reverse=True)))
    lengths = inputs.lengths
    distinct = len({word for sentence in sentences for word in sentence}) + 2
    steps = shape.steps(lengths, distinct)

    def truth() -> Tensor:
        with torch.inference_mode():
            layers = PlainElmo(inputs.directory, torch.float64)(inputs.with_boundaries(), lengths)
        return inputs.valid(layers)

    weights = sum(elements for _, elements in steps)
    return Case(
        workload="elmo-inference",
        name=f"{size}-{name}",
        kind="elmo",
        description=f"ELMo {size}, LSTMs of {shape.dim} with projection {shape.projection_dim}, {source}",
        inputs=inputs,
        truth=truth,
        dtypes=("float32", "bfloat16"),
        flop=sum(flop for flop, _ in steps),
        traffic=lambda element: element * weights,
        items=sum(lengths) - 2 * len(lengths),
        unit="tokens",
        facts={"sentences": len(lengths), "tokens": sum(lengths), "distinct": distinct},
        steps=tuple(steps),
    )


def inference(size: str) -> Iterator[Case]:
    """A batch of 32 (tiny: 8) messages and one sentence, in each published size."""
    batch, source = messages({"tiny": 8, "base": 32}[size])
    for name in {"tiny": ("tiny",), "base": ("original", "medium", "small")}[size]:
        yield _case(name, f"b{len(batch)}", list(batch), f"{len(batch)} sentences, {source}")
        yield _case(name, "b1", [tuple(_ONE)], "one sentence of 11 words")
