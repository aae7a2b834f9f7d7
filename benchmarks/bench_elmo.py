"""ELMo inference: a batch of messages, and one sentence at a time."""

from __future__ import annotations

from typing import Any

import pytest

from ctxfast.benchmarks.case import Case
from ctxfast.benchmarks.suite import measure

WORKLOADS = ("elmo-inference",)


@pytest.mark.parametrize(
    ("peer", "dtype"), [("ctxfast", "float32"), ("ctxfast", "bfloat16"), ("eager", "float32")]
)
def test_elmo(benchmark: Any, case: Case, peer: str, dtype: str) -> None:
    measure(benchmark, case, peer, dtype)
