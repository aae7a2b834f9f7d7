"""What the pytest-benchmark files share: one benchmark is one candidate on one case, checked before it is timed."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from . import checks, peers
from .case import Case
from .environment import describe
from .runner import prepare

SHORTEST_ROUND = 0.01  # seconds


def measure(benchmark: Any, case: Case, peer: str, dtype: str, layout: str | None = None) -> None:
    """Time the first candidate of a peer with this dtype and layout; skips with the reason, fails on wrong numbers."""
    group = [p for p in peers.find([peer]) if p.name in (peer, peers.EAGER)]
    with torch.inference_mode():
        prepared = prepare(case, group, lambda what: None)
        results = [
            result
            for result in prepared.results
            if result.peer == peer
            and result.dtype in (dtype, "")
            and (layout is None or result.layout in (layout, ""))
        ]
        if not results:
            pytest.skip(f"{peer} has no {dtype} candidate for {case.name}")
        result = results[0]
        if result.status == "skipped":
            pytest.skip(result.reason)
        if result.status != "ok":
            pytest.fail(f"{result.key}: {result.status}, {result.reason}")
        candidate = prepared.candidates[result.key]
        benchmark.group = f"{case.workload} {case.name}"
        benchmark.extra_info.update(
            dtype=dtype,
            version=result.version,
            layout=result.layout,
            implementations=result.implementations,
            max_error=result.error.max if result.error else None,
            gflop=case.flop / 1e9,
            **{name: describe()[name] for name in ("device", "threads", "torch", "commit")},
        )
        start = time.perf_counter()
        candidate.run()
        calls = max(1, round(SHORTEST_ROUND / (time.perf_counter() - start)))
        output = benchmark.pedantic(candidate.run, rounds=7, iterations=calls, warmup_rounds=1)
        checks.check(candidate.result(output), prepared.truth, dtype)
