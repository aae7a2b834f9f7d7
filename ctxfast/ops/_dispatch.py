"""Which implementation of an operator runs, and why the others do not.

Every registered operator is one `Operator`: a list of implementations in order of preference. The first that does not
refuse the call runs; the reference never refuses. `CTXFAST_BACKEND` (or `use_backend`) restricts the choice.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

BACKENDS = ("auto", "native", "triton", "reference")

logger = logging.getLogger("ctxfast")

OPERATORS: dict[str, Operator] = {}

_lock = threading.Lock()
_reported: set[tuple[str, str]] = set()
_recorders: list[list[Verdict]] = []
_surveys: list[dict[str, dict[str, str | None]]] = []


@dataclass(frozen=True)
class Implementation:
    """name: "native" (csrc), "onednn" or "cublas" (the libraries that torch carries), "triton" or "reference".

    refuses(*args) gives the reason why this implementation cannot take the call, or None.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]


@dataclass(frozen=True)
class Verdict:
    """What `explain` says of one operator call: the implementation that ran, and the reasons of those before it."""

    operator: str
    ran: str
    refused: tuple[tuple[str, str], ...]


def _backend_from_environment() -> str:
    name = os.environ.get("CTXFAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"CTXFAST_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = _backend_from_environment()


def backend() -> str:
    """The backend in force: "auto", "native", "triton" or "reference"."""
    return _backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a `with` block, in every thread. Takes the values of CTXFAST_BACKEND."""
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def unobserved() -> bool:
    """Whether every operator takes its native implementation where it has one, and nobody records which one ran."""
    return _backend in ("auto", "native") and not _recorders and not _surveys


def parts_unseen(device_type: str) -> bool:
    """Whether operators may be called together, as one: nobody looks at each of them.

    Gradients, autocast, compilation, tracing, transforms, modes and `explain` do.
    """
    return (
        not torch.is_grad_enabled()
        and unobserved()
        and not torch.is_autocast_enabled(device_type)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


class Operator:
    """An operator and its implementations, in order of preference; the last one is the reference."""

    def __init__(self, name: str, *implementations: Implementation):
        self.name = name
        self.implementations = implementations
        self.calls: Counter[str] = Counter()
        OPERATORS[name] = self

    def _excluded(self, name: str, device_type: str) -> str | None:
        """Why the backend in force rules this implementation out."""
        if name == "triton" and device_type == "cpu" and _backend != "triton":
            return "Triton's interpreter runs on CPU tensors only when CTXFAST_BACKEND=triton asks for it"
        if _backend == "auto":
            return None
        if _backend == "native":
            return "CTXFAST_BACKEND=native" if name == "reference" else None
        if _backend == "triton" and all(i.name != "triton" for i in self.implementations):
            return None  # an operator without a Triton kernel keeps its own order
        return None if name == _backend else f"CTXFAST_BACKEND={_backend}"

    def choose(self, *args: Any) -> tuple[Implementation, tuple[tuple[str, str], ...]]:
        """The implementation that takes this call, and the reasons of those that were preferred to it."""
        refused: list[tuple[str, str]] = []
        for implementation in self.implementations:
            reason = self._excluded(implementation.name, args[0].device.type)
            reason = reason or implementation.refuses(*args)
            if reason is None:
                return implementation, tuple(refused)
            refused.append((implementation.name, reason))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
        raise NotImplementedError(f"{self.name}: no implementation takes this call ({reasons})")

    def survey(self, *args: Any) -> dict[str, str | None]:
        """Every implementation with the reason why it cannot take this call, or None where it can."""
        device_type = args[0].device.type
        return {
            i.name: self._excluded(i.name, device_type) or i.refuses(*args)
            for i in self.implementations
        }

    def __call__(self, *args: Any) -> Any:
        for found in _surveys:
            found[self.name] = self.survey(*args)
        implementation, refused = self.choose(*args)
        self.calls[implementation.name] += 1
        if refused and implementation.name == "reference" and _backend == "auto":
            self._report(refused)
        for recorder in _recorders:
            recorder.append(Verdict(self.name, implementation.name, refused))
        return implementation.run(*args)

    def _report(self, refused: tuple[tuple[str, str], ...]) -> None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
        with _lock:
            if (self.name, reasons) in _reported:
                return
            _reported.add((self.name, reasons))
        logger.warning("%s runs on the eager reference (%s)", self.name, reasons)


def never(*args: Any) -> None:
    """The reference takes every call."""
    return None


@contextmanager
def record() -> Iterator[list[Verdict]]:
    """Collect the verdict of every operator call made inside the block."""
    verdicts: list[Verdict] = []
    _recorders.append(verdicts)
    try:
        yield verdicts
    finally:
        _recorders.remove(verdicts)


@contextmanager
def survey() -> Iterator[dict[str, dict[str, str | None]]]:
    """Collect, for every operator called inside the block, what `Operator.survey` says of its last call."""
    found: dict[str, dict[str, str | None]] = {}
    _surveys.append(found)
    try:
        yield found
    finally:
        _surveys.remove(found)
