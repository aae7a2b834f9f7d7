"""BERT inference, in batches and one sentence at a time."""

from __future__ import annotations

from typing import Any

import pytest

from ctxfast.benchmarks.case import Case
from ctxfast.benchmarks.suite import measure

WORKLOADS = ("bert-inference", "bert-latency")


@pytest.mark.parametrize(
    ("peer", "dtype", "layout"),
    [
        ("ctxfast", "float32", "packed"),
        ("ctxfast", "bfloat16", "packed"),
        ("eager", "float32", "padded"),
        ("transformers", "float32", "padded"),
        ("transformers", "float32", "buckets"),
        ("onnxruntime", "float32", "buckets"),
        ("openvino", "float32", "buckets"),
        ("ctranslate2", "float32", "packed"),
    ],
)
def test_bert(benchmark: Any, case: Case, peer: str, dtype: str, layout: str) -> None:
    measure(benchmark, case, peer, dtype, layout)
