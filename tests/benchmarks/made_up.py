"""Runs with times chosen by hand."""

from __future__ import annotations

from ctxfast.benchmarks.checks import Deviation
from ctxfast.benchmarks.records import CaseResult, Memory, Result, Run
from ctxfast.benchmarks.timing import ratio_interval, summarise

ENVIRONMENT = {
    "device": "Some CPU",
    "threads": 2,
    "cores": 2,
    "cpu_flags": ["avx2"],
    "torch": "2.13.0",
    "libraries": {"oneDNN": "3.12"},
    "ctxfast": "0.1.0",
    "commit": "abc",
    "time": "now",
}
CEILINGS = {
    "gemm_gflops": {
        "float32": {"torch": {"16": 90.0}, "oneDNN": {"16": 210.0}},
        "bfloat16": {"torch": {"16": 400.0}},
    },
    "read_gb_per_s": {"4 MiB": 130.0, "256 MiB": 33.0},
}


def candidate(
    peer, label, samples, *, dtype="float32", workload="bert-inference", case="a", **more
):
    summary = summarise(samples)
    more.setdefault("error", Deviation(4e-6, 5e-7))
    return Result(
        workload,
        case,
        peer,
        label,
        dtype,
        version="1.0",
        seconds=summary,
        samples=list(samples),
        gflops=1.0 / summary.median,
        intensity=50.0,
        of_limit=0.5,
        limit="compute",
        **more,
    )


def untimed(peer, label, dtype, status, reason):
    return Result("bert-inference", "a", peer, label, dtype, status=status, reason=reason)


def case(results, *, workload="bert-inference", name="a", ratios=True, **more):
    """A case; ratios: those of ctxfast over every candidate are filled in."""
    own = [r for r in results if r.peer == "ctxfast" and r.seconds]
    for result in results:
        if ratios and result.seconds and not result.part:
            result.speedup = {m.dtype: ratio_interval(result.samples, m.samples) for m in own}
    return CaseResult(
        workload=workload,
        case=name,
        size="base",
        description=f"some work, {name}",
        items=64,
        unit="sentences",
        gflop=240.0,
        facts={"tokens": 1414},
        results=results,
        repeats=max((len(r.samples) for r in results), default=0),
        **more,
    )


def run(*cases, **environment):
    return Run(ENVIRONMENT | environment, {"ctxfast": "0.1.0"}, CEILINGS, list(cases))


def whole_run():
    """Something of everything: two types, a faster peer, a refused one, a skipped one, memory, a curve."""
    memory = Memory(100 * 2**20, 150 * 2**20)
    results = [
        candidate(
            "ctxfast",
            "ctxfast",
            [0.50, 0.51, 0.52],
            memory=memory,
            profile={"linear": 0.8, "other": 0.2},
        ),
        candidate("ctxfast", "ctxfast", [0.30, 0.31, 0.29], dtype="bfloat16"),
        candidate(
            "transformers", "transformers sdpa", [1.5, 1.6, 1.4], layout="padded", memory=memory
        ),
        candidate(
            "transformers", "transformers sdpa, length buckets", [0.9, 0.8, 0.9], layout="buckets"
        ),
        candidate("onnxruntime", "ONNX <Runtime> & co", [0.40, 0.41, 0.39]),
        candidate("ctranslate2", "CTranslate2", [0.20, 0.21, 0.20], dtype="int8"),
        Result(
            "bert-inference",
            "a",
            "openvino",
            "OpenVINO",
            "float32",
            status="refused",
            reason="wrong result: 1 < 2",
        ),
        Result("bert-inference", "a", "x", "absent", "", status="skipped", reason="not importable"),
    ]
    curve = [
        case(
            [
                candidate(
                    "ctxfast", "ctxfast", [t, 1.01 * t, 0.99 * t], workload="s", case=f"length-{n}"
                ),
                candidate(
                    "eager", "eager", [2 * t, 2 * t, 2 * t], workload="s", case=f"length-{n}"
                ),
            ],
            workload="s",
            name=f"length-{n}",
            curve="length",
            at=float(n),
        )
        for n, t in ((16, 0.016), (32, 0.032), (64, 0.064))
    ]
    return run(case(results), *curve)
