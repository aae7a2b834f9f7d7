"""The two things that a run is made of: a case (one problem with its truth) and a candidate (one way to solve it)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")


class Unavailable(Exception):
    """Why a peer, or one of its candidates, cannot run here; shown beside its name."""


class BadOption(ValueError):
    """A workload, size, peer or number that `bench` cannot take."""


@dataclass(frozen=True)
class Case:
    """One problem of a workload.

    workload: the name that `ctxfast bench` knows; name: which problem of it, unique within the workload and size.
    kind: the function that a peer module offers for such problems, for example "bert".
    inputs: what the candidates work on, in float32; `inputs.to(device)` moves them.
    truth: the right answer, float64 [rows, ...], valid tokens only.
    dtypes: the compute types in which ctxfast and the peers run it.
    flop: floating-point operations of valid tokens, multiply and add counted as two.
    traffic: bytes that must move at least once, by bytes an element.
    items, unit: what a user counts, for a rate: 64, "sentences".
    steps: FLOP and elements read of parts that must follow each other, each bounded on its own; none: one part.
    facts: figures that describe the inputs, such as tokens and padded tokens.
    curve, at: for a point of a scaling curve, the axis ("length") and where on it; the cases of a workload that name
    one axis are one curve.
    threads: what the case runs with, where that differs from the run.
    device: where the inputs are; the truth is on the CPU.
    """

    workload: str
    name: str
    kind: str
    description: str
    inputs: Any
    truth: Callable[[], Tensor]
    dtypes: tuple[str, ...]
    flop: float
    traffic: Callable[[int], float]
    items: int
    unit: str
    facts: dict[str, float | int | str] = field(default_factory=dict)
    steps: tuple[tuple[float, float], ...] = ()
    curve: str = ""
    at: float = 0.0
    threads: int | None = None
    device: torch.device = CPU

    def on(self, device: torch.device) -> Case:
        """The same case with its inputs on another device, in float16 too where that is a GPU."""
        if device == self.device:
            return self
        dtypes = self.dtypes
        if device.type != "cpu" and "bfloat16" in dtypes:
            dtypes = (*dtypes, "float16")
        return replace(self, inputs=self.inputs.to(device), dtypes=dtypes, device=device)


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work.

    peer: the name of the peer module; label: what a table shows, unique within a case together with dtype.
    run: does the whole work once; result: makes the output of run comparable, [rows, ...] of valid tokens.
    layout: "padded", "buckets" or "packed": what happens to padding.
    part: measures a share of the work (the linears alone) for the split of the gain; it has no result to check.
    flop: operations of a part, where they are fewer than those of the case.
    timed: False for one that is only run for its error.
    lesser: not the best setting of its peer, measured only where the peers are named (`Options.every_setting`).
    """

    peer: str
    label: str
    dtype: str
    run: Callable[[], Any]
    result: Callable[[Any], Tensor]
    layout: str = "packed"
    detail: str = ""
    part: bool = False
    flop: float | None = None
    timed: bool = True
    lesser: bool = False

    @property
    def key(self) -> str:
        return f"{self.label} · {self.dtype}"


def element_size(dtype: str) -> int:
    """Bytes of one element of a compute type."""
    return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "tf32": 4}[dtype]
