"""Residual and LayerNorm in one pass."""

from __future__ import annotations

from typing import Any

import pytest

from ctxfast.benchmarks.case import Case
from ctxfast.benchmarks.suite import measure

WORKLOADS = ("layer-norm",)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["ctxfast", "eager"])
def test_layer_norm(benchmark: Any, case: Case, peer: str, dtype: str) -> None:
    measure(benchmark, case, peer, dtype)
