"""Attention, dense and on packed batches of real lengths."""

from __future__ import annotations

from typing import Any

import pytest

from ctxfast.benchmarks.case import Case
from ctxfast.benchmarks.suite import measure

WORKLOADS = ("attention",)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("peer", "layout"),
    [("ctxfast", None), ("eager", None), ("torch", "padded"), ("torch", "buckets")],
)
def test_attention(benchmark: Any, case: Case, peer: str, layout: str | None, dtype: str) -> None:
    measure(benchmark, case, peer, dtype, layout)
