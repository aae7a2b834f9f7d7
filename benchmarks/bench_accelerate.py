"""Models of transformers and sentence-transformers, accelerated and as they are."""

from __future__ import annotations

from typing import Any

import pytest

from ctxfast.benchmarks.case import Case
from ctxfast.benchmarks.suite import measure

WORKLOADS = ("accelerate",)


@pytest.mark.parametrize("peer", ["ctxfast", "transformers", "sentence-transformers"])
def test_accelerate(benchmark: Any, case: Case, peer: str) -> None:
    measure(benchmark, case, peer, "float32")
