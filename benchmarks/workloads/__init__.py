"""Named workloads. Each gives its cases at a size; adding one is a function and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..case import BadOption, Case
from . import bert, elmo, lstm, operators

SIZES = ("tiny", "base")


@dataclass(frozen=True)
class Workload:
    """about: one line for a list; cases(size): its problems, made when they are asked for."""

    name: str
    about: str
    cases: Callable[[str], Iterator[Case]]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("bert-inference", "BERT on batches of 32 messages of real length", bert.inference),
        Workload("bert-latency", "BERT on one sentence of 12 tokens", bert.latency),
        Workload("elmo-inference", "ELMo on 32 messages and on one sentence", elmo.inference),
        Workload("attention", "attention, dense and on packed batches", operators.attention),
        Workload("lstm", "bidirectional LSTM with projection, ELMo's sizes", lstm.lstm),
        Workload("linear", "linear with bias and its epilogue", operators.linear),
        Workload("layer-norm", "residual and LayerNorm in one pass", operators.layer_norm),
    )
}


def cases(name: str, size: str = "base") -> Iterator[Case]:
    """The cases of a workload. Raises BadOption for an unknown name or size."""
    if name not in WORKLOADS:
        raise BadOption(f"workload must be one of {', '.join(WORKLOADS)}, got {name!r}")
    if size not in SIZES:
        raise BadOption(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    return WORKLOADS[name].cases(size)
