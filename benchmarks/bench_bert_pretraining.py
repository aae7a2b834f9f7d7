"""A pretraining step of BERT."""

from __future__ import annotations

from typing import Any

import pytest

from ctxfast.benchmarks.case import Case
from ctxfast.benchmarks.suite import measure

WORKLOADS = ("bert-pretraining",)


@pytest.mark.parametrize(("peer", "layout"), [("ctxfast", "packed"), ("transformers", "padded")])
def test_bert_pretraining(benchmark: Any, case: Case, peer: str, layout: str) -> None:
    measure(benchmark, case, peer, "float32", layout)
