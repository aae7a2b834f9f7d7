"""What a run reports: reasons, implementations, ratios, and what is left after Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from ctxfast.benchmarks import environment, peers, runner, workloads
from ctxfast.benchmarks.case import BadOption, Candidate, Unavailable
from ctxfast.benchmarks.ceilings import Ceilings
from ctxfast.benchmarks.peers import Peer
from ctxfast.ops import _dispatch

CEILINGS = Ceilings({"float32": {"torch": {16: 100.0}}}, {4: 10.0})
OPTIONS = runner.Options(size="tiny", repeats=2)


def layer_norm_case():
    return next(workloads.cases("layer-norm", "tiny"))


def basic():
    return [p for p in peers.find(()) if p.name in (peers.OWN, peers.EAGER)]


def fake_peer(name, candidates):
    module = ModuleType(name)
    module.layer_norm = candidates  # type: ignore[attr-defined]
    return Peer(name, module, version="1.0")


def test_every_outcome_has_its_status_and_reason(monkeypatch):
    monkeypatch.setattr(environment, "multiplies_bfloat16", lambda: True)

    def unavailable(case):
        raise Unavailable("needs a newer library")
        yield

    def broken(case):
        yield Candidate("openvino", "broken", "float32", run=lambda: 1 / 0, result=lambda x: x)

    def wrong(case):
        yield Candidate(
            "torch", "wrong", "float32", run=lambda: torch.zeros(48, 64), result=lambda x: x
        )

    absent = ModuleType("absent")
    absent.layer_norm = broken  # type: ignore[attr-defined]
    found = [
        *basic(),
        fake_peer("onnxruntime", unavailable),
        fake_peer("openvino", broken),
        fake_peer("torch", wrong),
        Peer("transformers", ModuleType("other"), reason="not importable: no such module"),
        Peer("ctranslate2", absent, reason="not importable: no such module"),
    ]
    result = runner.run_case(layer_norm_case(), OPTIONS, found, CEILINGS)
    outcomes = {r.label: (r.status, r.reason) for r in result.results}
    assert outcomes["onnxruntime"] == ("skipped", "needs a newer library")
    assert outcomes["ctranslate2"] == ("skipped", "not importable: no such module")
    assert outcomes["broken"][0] == "failed" and "ZeroDivisionError" in outcomes["broken"][1]
    assert outcomes["wrong"][0] == "refused" and "maximum error" in outcomes["wrong"][1]
    assert outcomes["ctxfast"] == ("ok", "")
    assert "transformers" not in outcomes  # it has no layer norm of its own
    assert [r.label for r in result.results if r.seconds] == [
        "ctxfast",
        "ctxfast",
        "eager",
        "eager",
    ]


@pytest.mark.parametrize(
    ("named", "expected"), [(None, {"buckets"}), (("torch",), {"padded", "buckets"})]
)
def test_lesser_settings_are_those_of_peers_that_were_named(named, expected):
    def padded_and_buckets(case):
        for label, lesser in (("padded", True), ("buckets", False)):
            yield Candidate(
                "torch", label, "float32", case.truth, result=lambda x: x, lesser=lesser
            )

    found = [*basic(), fake_peer("torch", padded_and_buckets)]
    options = replace(OPTIONS, peers=named)
    result = runner.run_case(layer_norm_case(), options, found, CEILINGS)
    timed = {r.label for r in result.results if r.peer == "torch" and r.seconds}
    assert timed == expected


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("named", [None, ("torch",)])
def test_emulated_bfloat16_is_a_lesser_setting(monkeypatch, named, instructions):
    def every_dtype(case):
        for dtype in case.dtypes:
            yield Candidate("torch", "peer", dtype, case.truth, result=lambda x: x)

    monkeypatch.setattr(environment, "multiplies_bfloat16", lambda: instructions)
    found = [*basic(), fake_peer("torch", every_dtype)]
    options = replace(OPTIONS, peers=named)
    result = runner.run_case(layer_norm_case(), options, found, CEILINGS)
    both = {"float32", "bfloat16"}
    of_peer = {r.dtype for r in result.results if r.peer == "torch"}
    assert of_peer == (both if instructions or named else {"float32"})
    assert {r.dtype for r in result.results if r.peer == "ctxfast"} == both
    eager = [r for r in result.results if r.peer == "eager"]
    assert {r.dtype for r in eager} == both and all(r.error for r in eager)
    assert {r.dtype for r in eager if r.seconds} == of_peer


def test_figures_follow_from_the_times():
    result = runner.run_case(layer_norm_case(), OPTIONS, basic(), CEILINGS)
    own, eager = result.find("ctxfast"), result.find("eager")
    assert own is not None and eager is not None and own.seconds and eager.seconds
    ratio = eager.speedup["float32"]
    assert ratio.value == pytest.approx(eager.seconds.median / own.seconds.median)
    assert ratio.low <= ratio.value <= ratio.high
    assert own.speedup["float32"].value == 1.0
    assert own.gflops == pytest.approx(8 * 48 * 64 / own.seconds.median / 1e9)
    traffic = 3 * 4 * 48 * 64
    assert own.limit == "memory"
    assert own.of_limit == pytest.approx(traffic / 10e9 / own.seconds.median)


def test_native_is_what_ran():
    case = layer_norm_case()
    result = runner.run_case(case, OPTIONS, basic(), CEILINGS).find("ctxfast")
    assert result is not None
    ran = set(result.implementations["add_layer_norm"])
    assert result.native == ("reference" not in ran)
    with _dispatch.use_backend("reference"):
        forced = runner.run_case(case, OPTIONS, basic(), CEILINGS).find("ctxfast")
    assert forced is not None and not forced.native
    assert forced.fallbacks() == ["add_layer_norm"]
    assert forced.implementations == {"add_layer_norm": {"reference": 1}}
    assert "CTXFAST_BACKEND=reference" in forced.reasons["add_layer_norm"]


def test_wrong_own_results_are_listed(monkeypatch):
    from ctxfast.benchmarks.peers import own

    monkeypatch.setattr(own.ops, "add_layer_norm", lambda x, *rest: torch.zeros_like(x))
    run = runner.measure(["layer-norm"], runner.Options("tiny", 2, 2, ()))
    assert len(run.wrong) == 2 and "maximum error" in run.wrong[0]


def test_interrupt_between_rounds_keeps_them(monkeypatch):
    from ctxfast.benchmarks.peers import eager

    real, calls = eager.layer_norm, []

    def candidates(case):
        for candidate in real(case):

            def run(run=candidate.run):
                calls.append(1)
                if len(calls) > 60:
                    raise KeyboardInterrupt
                return run()

            yield Candidate("eager", "eager", candidate.dtype, run, candidate.result)

    monkeypatch.setattr(eager, "layer_norm", candidates)
    monkeypatch.setattr(runner, "MIN_SAMPLE", {"tiny": 0.0})
    cases = []
    run = runner.measure(
        ["layer-norm", "linear"], runner.Options("tiny", 2, 1000, ()), on_case=cases.append
    )
    assert run.interrupted and [case.workload for case in cases] == ["layer-norm"]
    assert cases[0].interrupted and 0 < cases[0].repeats < 60
    assert all(len(r.samples) == cases[0].repeats for r in cases[0].results)


def test_interrupt_before_timing_keeps_earlier_cases(monkeypatch):
    def stop(case):
        if case.workload == "linear":
            raise KeyboardInterrupt
        return iter(())

    from ctxfast.benchmarks.peers import eager

    monkeypatch.setattr(eager, "linear", stop)
    run = runner.measure(["layer-norm", "linear"], runner.Options("tiny", 2, 2, ()))
    assert run.interrupted and [case.workload for case in run.cases] == ["layer-norm"]


KEEPING = """
import signal
from ctxfast.benchmarks import runner

def keep(case):
    signal.raise_signal(signal.SIGINT)
    print("kept", case.workload)

run = runner.measure(["layer-norm", "linear"], runner.Options("tiny", 1, 2, ()), on_case=keep)
print(run.interrupted, [case.workload for case in run.cases])
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_interrupt_while_a_case_is_kept_waits_until_it_is():
    done = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["kept layer-norm", "True ['layer-norm']", "True"]


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    seen = []
    run = runner.measure(
        ["layer-norm"],
        runner.Options("tiny", 1, 2, ()),
        on_case=lambda case: seen.append(torch.get_num_threads()),
    )
    assert run.environment["threads"] == 1 and seen == [1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (
            ["bert"],
            runner.Options("tiny"),
            "workload must be one of bert-inference, .*, got 'bert'",
        ),
        (["linear"], runner.Options("huge"), "size must be one of tiny, base, large, got 'huge'"),
        (
            ["linear"],
            runner.Options("large"),
            "size of linear must be one of tiny, base, got 'large'",
        ),
        (["linear"], runner.Options("tiny", threads=0), "threads must be at least 1, got 0"),
        (["linear"], runner.Options("tiny", repeats=0), "repeats must be at least 1, got 0"),
        (["linear"], runner.Options("tiny", peers=("x",)), "peers must be among .*, got 'x'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(names, options, message):
    with pytest.raises(BadOption, match=message):
        runner.measure(names, options, on_start=lambda run: pytest.fail("it started"))
