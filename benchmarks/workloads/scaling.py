"""Scaling curves: the time against one quantity while the others stay, one case a point."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .. import lengths as length_sets
from ..case import Case
from .bert import SHAPES, make_case
from .operators import attention_case

TEXT = "sms_spam"


@dataclass(frozen=True)
class Axes:
    """lengths: at `batch` sequences; batches: of sequences of `length`; sentences: drawn from real text."""

    lengths: tuple[int, ...]
    batch: int
    batches: tuple[int, ...]
    length: int
    sentences: tuple[int, ...] = ()

    def points(self) -> Iterator[tuple[str, float, list[int]]]:
        """(axis, where on it, lengths of the sequences) of every point but those of the threads."""
        for length in self.lengths:
            yield "length", length, [length] * self.batch
        for batch in self.batches:
            yield "batch", batch, [self.length] * batch
        for sentences in self.sentences:
            drawn = length_sets.draw(TEXT, sentences)
            yield "tokens", sum(drawn), drawn

    def work_for_threads(self) -> list[int]:
        """Lengths of the sequences on which the number of threads is varied."""
        return [self.length] * self.batches[-1]


BERT = {
    "tiny": Axes((8, 16, 32), 2, (1, 2, 4), 16, (2, 4, 8)),
    "base": Axes((16, 32, 64, 128, 256, 512), 4, (1, 2, 4, 8, 16, 32), 32, (4, 8, 16, 32, 64)),
}
ATTENTION = {
    "tiny": Axes((32, 64, 128), 2, (1, 2, 4), 64),
    "base": Axes((64, 128, 256, 512, 1024, 2048), 2, (1, 2, 4, 8, 16, 32), 128),
}


def thread_counts() -> list[int]:
    """1, 2, 4, ... and the number of cores."""
    cores = os.cpu_count() or 1
    return sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})


def _curves(axes: Axes, make: Callable[[str, list[int]], Case]) -> Iterator[Case]:
    for axis, at, lengths in axes.points():
        yield replace(make(f"{axis}-{at}", lengths), curve=axis, at=float(at))
    for threads in thread_counts():
        case = make(f"threads-{threads}", axes.work_for_threads())
        yield replace(case, curve="threads", at=float(threads), threads=threads)


def bert(size: str) -> Iterator[Case]:
    """A BERT of four layers (the curve of any number), float32."""
    shape = {"tiny": "tiny", "base": "short"}[size]
    layers, hidden = SHAPES[shape].num_hidden_layers, SHAPES[shape].hidden_size

    def make(name: str, lengths: list[int]) -> Case:
        about = f"BERT, {layers} layers of {hidden}, {_sequences(lengths)}"
        case = make_case("bert-scaling", name, about, shape, [lengths])
        return replace(case, dtypes=("float32",))

    return _curves(BERT[size], make)


def attention(size: str) -> Iterator[Case]:
    """Attention with the heads of BERT-base, float32."""
    heads, head_dim = {"tiny": (2, 32), "base": (12, 64)}[size]

    def make(name: str, lengths: list[int]) -> Case:
        case = attention_case(name, lengths, heads, head_dim, workload="attention-scaling")
        return replace(case, dtypes=("float32",))

    return _curves(ATTENTION[size], make)


def _sequences(lengths: list[int]) -> str:
    if min(lengths) == max(lengths):
        return f"{len(lengths)} x {lengths[0]} tokens"
    return f"{len(lengths)} sentences with {TEXT} lengths"
