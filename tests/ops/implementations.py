"""The implementations that an operator test runs, each skipped with its reason where it is absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ctxfast import ops
from ctxfast.ops import _dispatch, _native


@contextmanager
def only(backend: str) -> Iterator[None]:
    """Run a block on one backend and fail if anything else ran an operator."""
    if backend == "native" and not _native.available():
        pytest.skip(f"native module absent: {_native.unavailable_reason()}")
    if backend == "triton":
        pytest.importorskip("triton")
    accepted = {
        "native": {"native", "onednn", "cuda_persistent", "cuda_stepwise"},
        "triton": {"triton", "onednn"},
    }
    with ops.use_backend(backend), _dispatch.record() as verdicts:
        yield
    ran = {(v.operator, v.ran) for v in verdicts}
    wrong = {pair for pair in ran if pair[1] not in accepted.get(backend, {"reference"})}
    assert ran and not wrong, f"{backend} was asked for, ran {sorted(ran)}"
