"""LSTM layers with projection."""

from __future__ import annotations

from typing import Any

import pytest

from ctxfast.benchmarks.case import Case
from ctxfast.benchmarks.suite import measure

WORKLOADS = ("lstm",)


@pytest.mark.parametrize("peer", ["ctxfast", "eager", "torch"])
def test_lstm(benchmark: Any, case: Case, peer: str) -> None:
    measure(benchmark, case, peer, "float32")
