"""Interleaving, summaries and the interval of a ratio, with a clock that the test turns."""

from __future__ import annotations

import numpy as np
import pytest

from ctxfast.benchmarks import timing


class Clock:
    """Time passes only when a function says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def function(self, label: str, *seconds: float):
        steps = iter(seconds)
        last = seconds[-1]

        def run() -> str:
            self.calls.append(label)
            self.now += next(steps, last)
            return label

        return run


def test_rounds_are_interleaved_and_warm_up_is_not_counted():
    clock = Clock()
    functions = {"a": clock.function("a", 9.0, 1.0, 2.0), "b": clock.function("b", 7.0, 3.0, 4.0)}
    samples = timing.interleave(functions, timing.Schedule(repeats=2), clock=clock)
    assert clock.calls == ["a", "b", "a", "b", "a", "b"]
    assert samples.seconds == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert samples.last == {"a": "a", "b": "b"} and not samples.interrupted


def test_short_calls_fill_a_sample_after_as_many_that_warm_up():
    clock = Clock()
    schedule = timing.Schedule(repeats=1, min_sample=1.0)
    samples = timing.interleave({"a": clock.function("a", 0.25)}, schedule, clock=clock)
    assert len(clock.calls) == 1 + 4 + 4
    assert samples.seconds == {"a": [0.25]}


@pytest.mark.parametrize(
    ("budget", "rounds"), [(None, 9), (100.0, 9), (13.0, 4), (1.0, 3), (0.0, 3)]
)
def test_a_budget_leaves_out_rounds_but_never_the_last_three(budget, rounds):
    clock, planned = Clock(), []
    functions = {"a": clock.function("a", 1.0), "b": clock.function("b", 2.0)}
    schedule = timing.Schedule(repeats=9, budget=budget)
    samples = timing.interleave(functions, schedule, clock=clock, planned=planned.append)
    assert planned == [rounds] and {len(times) for times in samples.seconds.values()} == {rounds}


def test_a_function_that_fails_leaves_the_others():
    clock = Clock()

    def broken() -> None:
        clock.now += 1.0
        if len(clock.calls) > 2:
            raise RuntimeError("no more")

    functions = {"broken": broken, "a": clock.function("a", 1.0)}
    samples = timing.interleave(functions, timing.Schedule(repeats=3), clock=clock)
    assert samples.failures == {"broken": "RuntimeError: no more"}
    assert samples.seconds == {"a": [1.0, 1.0, 1.0]}


def test_interrupt_keeps_complete_rounds():
    clock = Clock()

    def stops() -> None:
        clock.now += 1.0
        if len(clock.calls) == 4:  # warm-up and three rounds of a
            raise KeyboardInterrupt

    functions = {"a": clock.function("a", 1.0), "b": stops}
    samples = timing.interleave(functions, timing.Schedule(repeats=5), clock=clock)
    assert samples.interrupted
    assert samples.seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_summary_and_noise_mark():
    summary = timing.summarise([1.0, 1.01, 1.02, 1.03, 1.04])
    assert summary == timing.Summary(1.02, pytest.approx(1.008), pytest.approx(1.032))
    assert not summary.noisy
    assert timing.summarise([1.0, 1.2, 1.4]).noisy
    with pytest.raises(ValueError, match="non-empty"):
        timing.summarise([])


def test_ratio_of_constant_times_is_exact():
    assert timing.ratio_interval([3.0] * 5, [2.0] * 5) == timing.Ratio(1.5, 1.5, 1.5)


def test_a_drift_of_the_machine_does_not_widen_the_interval():
    drift = np.linspace(1.0, 2.0, 9)
    ratio = timing.ratio_interval(4.0 * drift, 2.0 * drift)
    assert ratio.low == pytest.approx(2.0) and ratio.high == pytest.approx(2.0)


def test_one_round_has_no_interval():
    ratio = timing.ratio_interval([3.0], [2.0])
    assert (ratio.value, ratio.low, ratio.high) == (1.5, 0.0, float("inf"))


@pytest.mark.parametrize("rounds", [3, 5, 7, 9])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(rounds):
    """To five points: a medians' bootstrap undercovers a little."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        slower = 2.0 * generator.lognormal(0.0, 0.05, rounds)
        faster = generator.lognormal(0.0, 0.05, rounds)
        ratio = timing.ratio_interval(slower, faster, resamples=500, seed=seed)
        covered += ratio.low <= 2.0 <= ratio.high
    assert covered / 300 == pytest.approx(timing.reachable_confidence(rounds), abs=0.05)


def test_ratio_needs_the_same_rounds():
    with pytest.raises(ValueError, match="the same rounds, got 2 and 3"):
        timing.ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0])


def test_foreign_load_is_seen():
    """Another process that computes for a second takes a visible share of the CPU."""
    import subprocess
    import sys
    import time

    load = timing._CpuLoad()
    if load._now() is None:
        pytest.skip("no /proc/stat")
    code = "import time; end = time.time() + 1.0\nwhile time.time() < end: pass"
    load.start()
    with subprocess.Popen([sys.executable, "-c", code]):
        time.sleep(0.8)
        share = load.foreign_share()
    assert share is not None and share > 0.1
