"""`--compare`: a planted slow-down is found, noise and a drift of the machine are not."""

from __future__ import annotations

import numpy as np
import pytest

from ctxfast.benchmarks import comparison, records
from ctxfast.cli import main

from . import made_up

CANDIDATES = 12


def measured(
    seed, *, noise=0.02, slow=None, factor=1.15, drift=1.0, rounds=7, controls=2, disturbed=0.0
):
    """A run of twelve cases; ctxfast on case `slow` takes `factor` as long, and everything `drift`.

    disturbed: the share of the rounds that something else makes slower, by 30 % on average.
    """
    generator = np.random.default_rng(seed)

    def times(seconds):
        found = drift * seconds * generator.lognormal(0.0, noise, rounds)
        hit = generator.random(rounds) < disturbed
        return (found * (1.0 + hit * generator.exponential(0.3, rounds))).tolist()

    cases = []
    for i in range(CANDIDATES):
        own = factor if i == slow else 1.0
        results = [made_up.candidate("ctxfast", "ctxfast", times(own), case=str(i))]
        for peer in ("eager", "torch")[:controls]:
            results.append(made_up.candidate(peer, peer, times(2.0), case=str(i)))
        cases.append(made_up.case(results, name=str(i), ratios=False))
    return made_up.run(*cases)


def slower(result):
    return [change.identity[1] for change in result.changes if change.verdict == "slower"]


def test_a_slow_down_of_15_percent_is_flagged():
    found = [
        slower(comparison.compare([measured(2 * s)], [measured(2 * s + 1, slow=5)]))
        for s in range(20)
    ]
    assert sum("5" in names for names in found) >= 19
    assert all(set(names) <= {"5"} for names in found)


def test_rounds_that_something_disturbed_hide_no_slow_down():
    """Three rounds in ten of every candidate are slower, as on a machine that others use too."""
    busy = {"disturbed": 0.3, "rounds": 15}
    found = [
        slower(comparison.compare([measured(2 * s, **busy)], [measured(2 * s + 1, slow=5, **busy)]))
        for s in range(10)
    ]
    assert sum("5" in names for names in found) >= 9
    assert all(set(names) <= {"5"} for names in found)


def test_a_gain_is_no_failure():
    result = comparison.compare([measured(0)], [measured(1, slow=3, factor=0.8)])
    assert [c.identity[1] for c in result.changes if c.verdict == "faster"] == ["3"]
    assert not result.failed


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15])
def test_two_runs_of_one_code_agree_within_the_intervals(noise):
    """Twelve intervals at a time hold 1 together in at least nine of ten comparisons, and nothing is flagged."""
    together = 0
    for seed in range(30):
        result = comparison.compare(
            [measured(2 * seed, noise=noise)], [measured(2 * seed + 1, noise=noise)]
        )
        assert not result.failed
        together += all(change.ratio.low <= 1.0 <= change.ratio.high for change in result.changes)
    assert together >= 27


def test_a_drift_of_the_machine_is_no_change():
    assert not comparison.compare([measured(0)], [measured(1, drift=1.4)]).failed


def test_without_peers_a_drift_counts_and_that_is_said():
    result = comparison.compare([measured(0, controls=0)], [measured(1, drift=1.4, controls=0)])
    assert len(slower(result)) == CANDIDATES
    assert "No peer in common" in "\n".join(comparison.lines(result, "a", "b"))


def test_a_peer_of_another_version_is_no_control():
    after = measured(1)
    for case in after.cases:
        case.results[1].version = "2.0"
    result = comparison.compare([measured(0)], [after])
    assert {change.controls for change in result.changes} == {1}


def test_noise_that_hides_a_slow_down_is_said():
    result = comparison.compare([measured(0, noise=0.3)], [measured(1, noise=0.3)])
    assert not result.failed and any(change.verdict == "noisy" for change in result.changes)
    assert "too noisy to exclude a slow-down of 15%" in "\n".join(
        comparison.lines(result, "a", "b")
    )


def test_processes_that_differ_widen_the_interval():
    """Three processes a side, each with its own level: rounds alone would call that a change."""
    levels = np.random.default_rng(0).lognormal(0.0, 0.1, 6)

    def side(numbers):
        return [[np.array([level * np.ones(7), np.ones(7)])] for level in levels[numbers]]

    before, after = ([array for (array,) in side(n)] for n in (slice(0, 3), slice(3, 6)))
    together = comparison.change_interval(before, after)
    alone = comparison.change_interval(before[:1], after[:1])
    assert alone.low == pytest.approx(alone.high) == pytest.approx(levels[3] / levels[0])
    assert together.high / together.low > 1.05


def test_one_round_shows_nothing():
    result = comparison.compare([measured(0, rounds=1)], [measured(1, rounds=1, slow=2)])
    assert {change.verdict for change in result.changes} == {"noisy"} and not result.failed


@pytest.mark.parametrize(
    ("probability", "freedom"), [(0.975, 8), (0.998, 12), (0.9996, 12), (0.975, 100)]
)
def test_quantiles_of_student(probability, freedom):
    from scipy import stats

    expected = stats.t.ppf(probability, freedom)
    assert comparison._student(probability, freedom) == pytest.approx(expected, rel=0.02)


def test_a_candidate_that_loses_its_time_is_a_failure():
    after = measured(1)
    wrong = after.cases[4].results[0]
    wrong.seconds, wrong.samples, wrong.status, wrong.reason = None, [], "refused", "wrong result"
    result = comparison.compare([measured(0)], [after])
    assert result.failed and not slower(result)
    assert list(result.lost.values()) == ["refused: wrong result"]


def test_another_machine_is_noted():
    after = measured(1)
    after.environment["threads"] = 4
    assert comparison.compare([measured(0)], [after]).notes == [
        "another threads: 2 before, 4 after"
    ]


def test_nothing_in_common():
    after = measured(1)
    after.cases = []
    with pytest.raises(ValueError, match="must hold a case in common"):
        comparison.compare([measured(0)], [after])


@pytest.mark.parametrize(("slow", "status"), [(None, 0), (7, 1)])
def test_command(tmp_path, capsys, slow, status):
    for name, run in (("a", measured(0)), ("b", measured(1, slow=slow))):
        records.rewrite(tmp_path / name, run)
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == status
    text = capsys.readouterr().out
    assert text.count("slower\n") == status
    assert f"12 candidates compared: {status} slower, 0 faster" in text


def test_neither_file_nor_commit(tmp_path, capsys):
    records.rewrite(tmp_path / "a", measured(0))
    assert main(["bench", "--compare", str(tmp_path / "a"), "no-such-commit"]) == 2
    assert (
        "takes files of JSON lines and git commits, got 'no-such-commit'" in capsys.readouterr().err
    )
