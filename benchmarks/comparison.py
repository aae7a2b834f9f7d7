"""Two measurements of one workload: is the second slower beyond noise?

Within a run the rounds are interleaved, so a candidate is compared with the peers of its own rounds (the controls,
whose code is the same on both sides): their ratio is free of the drift between two runs. The change is the ratio of
these ratios. The time of a candidate is the mean of the faster half of its rounds: what disturbs a process makes it
slower and never faster (Chen and Revels 2016), so that on a busy machine the median of a few rounds moves with the
disturbance and the fast rounds stay. The standard error of the change comes from the bootstrap (Efron 1979), which
draws whole processes and, inside them, whole rounds; the interval from Student's t, because percentiles of few rounds
are too narrow. A side may hold several runs of one commit, which shows how much one process differs from the next.

The interval is widened for the number of candidates compared (Bonferroni), and a change counts from MARGIN on: the
placement of memory alone makes two processes differ by a percent or two, and rounds of one process cannot show that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from .records import CaseResult, Result, Run
from .timing import Ratio

MARGIN = 0.03  # a change below this is none
VISIBLE = 0.15  # a slow-down that a comparison should be able to see
RESAMPLES = 4000
OWN = "ctxfast"

Identity = tuple[str, str, str, str]  # workload, case, size, key of the candidate
Samples = list[np.ndarray]  # for each run [candidates, rounds], the first row the candidate in hand


@dataclass(frozen=True)
class Change:
    """ratio: time after / time before; controls: the number of peers that it is relative to."""

    identity: Identity
    ratio: Ratio
    controls: int

    @property
    def verdict(self) -> str:
        """ "slower" and "faster" beyond noise; "noisy" where a slow-down of VISIBLE could hide; else "same"."""
        if self.ratio.low > 1.0 + MARGIN:
            return "slower"
        if self.ratio.high < 1.0 - MARGIN:
            return "faster"
        return "noisy" if self.ratio.high >= 1.0 + VISIBLE else "same"


@dataclass
class Comparison:
    """changes: of ctxfast's candidates that both sides timed; lost: those that only the first timed, with the reason.

    notes: differences of the machines, which no code explains.
    """

    changes: list[Change] = field(default_factory=list)
    lost: dict[Identity, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether something became slower, or no longer gets a time."""
        return bool(self.lost) or any(change.verdict == "slower" for change in self.changes)


def compare(before: Sequence[Run], after: Sequence[Run]) -> Comparison:
    """Compare the runs of one side with those of the other. ValueError where they have no case in common."""
    result = Comparison(notes=_notes(before[0], after[0]))
    cases = [_cases(side) for side in (before, after)]
    shared = [identity for identity in cases[0] if identity in cases[1]]
    if not shared:
        raise ValueError("compare: both sides must hold a case in common, got none")
    pairs: list[tuple[Identity, list[Samples], int]] = []
    for identity in shared:
        old, new = (side[identity] for side in cases)
        controls = _controls(old, new)
        for mine in (r for r in old[0].results if r.peer == OWN and r.seconds and not r.part):
            name = (*identity, mine.key)
            missing = next((case for case in new if not _timed(case, mine.key)), None)
            if missing is not None:
                result.lost[name] = _why(missing, mine.key)
            elif all(_timed(case, mine.key) for case in old):
                rows = [mine.key, *controls]
                pairs.append(
                    (name, [[_rows(c, rows) for c in side] for side in (old, new)], len(controls))
                )
    confidence = 1.0 - 0.05 / max(1, len(pairs))
    result.changes = [
        Change(name, change_interval(*samples, confidence=confidence), controls)
        for name, samples, controls in pairs
    ]
    return result


def change_interval(
    before: Samples, after: Samples, *, confidence: float = 0.95, seed: int = 0
) -> Ratio:
    """Time after / time before of the first row, each relative to the geometric mean of the other rows' times.

    before, after: for each process an array [1 + controls, rounds] of seconds.
    """
    generator = np.random.default_rng(seed)
    change = _level(after) - _level(before)
    value = float(np.exp(change))
    freedom = _units(before) + _units(after) - 2
    if min(_units(before), _units(after)) < 2:
        return Ratio(value, 0.0, float("inf"))
    variance = _variance(before, generator) + _variance(after, generator)
    reach = _student(0.5 + confidence / 2.0, freedom) * variance**0.5
    return Ratio(value, float(np.exp(change - reach)), float(np.exp(change + reach)))


def _units(side: Samples) -> int:
    """What the level of a side rests on: processes, or the faster half of the rounds where there is one process."""
    return len(side) if len(side) > 1 else _half(side[0])


def _variance(side: Samples, generator: np.random.Generator) -> float:
    """Of the level of a side; a bootstrap over n units shows (n - 1) / n of it."""
    units = _units(side)
    return float(np.var(_resampled(side, generator))) * units / (units - 1)


def _student(probability: float, freedom: int) -> float:
    """The quantile of Student's t, by the expansion of Cornish and Fisher (1938) about that of the normal."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def _undisturbed(run: np.ndarray) -> np.ndarray:
    """The mean of the faster half along the last axis, the rounds."""
    return np.sort(run, axis=-1)[..., : _half(run)].mean(-1)


def _half(run: np.ndarray) -> int:
    return (run.shape[-1] + 1) // 2


def _relative(times: np.ndarray) -> np.ndarray:
    """log(first row) - mean log(the others); times [rows, ...]."""
    logs = np.log(times)
    return logs[0] - logs[1:].mean(0) if len(logs) > 1 else logs[0]


def _level(side: Samples) -> float:
    return float(np.mean([_relative(_undisturbed(run)) for run in side]))


def _resampled(side: Samples, generator: np.random.Generator) -> np.ndarray:
    """[RESAMPLES]: the level of one side with processes and rounds drawn anew."""
    levels = []
    for run in side:
        rounds = generator.integers(0, run.shape[1], size=(RESAMPLES, run.shape[1]))
        levels.append(_relative(_undisturbed(run[:, rounds])))
    drawn = generator.integers(0, len(side), size=(RESAMPLES, len(side)))
    return np.take_along_axis(np.stack(levels, 1), drawn, 1).mean(1)


def _cases(side: Sequence[Run]) -> dict[tuple[str, str, str], list[CaseResult]]:
    """The cases that every run of a side holds."""
    found: dict[tuple[str, str, str], list[CaseResult]] = {}
    for run in side:
        for case in run.cases:
            found.setdefault(case.identity, []).append(case)
    return {identity: cases for identity, cases in found.items() if len(cases) == len(side)}


def _timed(case: CaseResult, key: str) -> Result | None:
    return next((r for r in case.results if r.key == key and r.seconds), None)


def _why(case: CaseResult, key: str) -> str:
    result = next((r for r in case.results if r.key == key), None)
    return f"{result.status}: {result.reason}" if result else "not there"


def _controls(before: Sequence[CaseResult], after: Sequence[CaseResult]) -> list[str]:
    """Candidates of peers that every run timed in one version."""
    cases = [*before, *after]
    keys = []
    for result in before[0].results:
        timed = [_timed(case, result.key) for case in cases]
        one_version = len({r.version for r in timed if r is not None}) == 1
        if not result.ours and not result.part and all(timed) and one_version:
            keys.append(result.key)
    return keys


def _rows(case: CaseResult, keys: Sequence[str]) -> np.ndarray:
    found = [_timed(case, key) for key in keys]
    return np.array([result.samples for result in found if result is not None])


def _notes(before: Run, after: Run) -> list[str]:
    notes = []
    for name in ("device", "threads", "torch", "settings"):
        old, new = before.environment.get(name), after.environment.get(name)
        if old != new:
            notes.append(f"another {name}: {old} before, {new} after")
    return notes


def lines(result: Comparison, before: str, after: str) -> list[str]:
    """The comparison in words: a row a candidate, then what to make of it."""
    text = [
        f"before: {before}",
        f"after:  {after}",
        *(f"warning: {note}" for note in result.notes),
        "",
    ]
    names = [
        f"{workload} {case} ({size}) {key}" for workload, case, size, key in _identities(result)
    ]
    width = max(map(len, names), default=0)
    for change, name in zip(result.changes, names, strict=True):
        ratio = change.ratio
        text.append(
            f"{name:{width}}  {ratio.value:6.3f}x the time [{ratio.low:.3f}, {ratio.high:.3f}]  "
            f"{change.verdict}"
        )
    for (workload, case, size, key), reason in result.lost.items():
        text.append(f"{workload} {case} ({size}) {key}: no time any more, {reason}")
    count = {v: sum(c.verdict == v for c in result.changes) for v in ("slower", "faster", "noisy")}
    text += [
        "",
        f"{len(result.changes)} candidates compared: {count['slower']} slower, {count['faster']} faster "
        f"beyond noise and {MARGIN:.0%}; intervals hold for all of them together at 95 %.",
    ]
    if count["noisy"]:
        text.append(
            f"{count['noisy']} too noisy to exclude a slow-down of {VISIBLE:.0%}: measure with more --repeats."
        )
    if any(not change.controls for change in result.changes):
        text.append(
            "No peer in common: a drift of the machine between the runs counts as a change."
        )
    return text


def _identities(result: Comparison) -> list[Identity]:
    return [change.identity for change in result.changes]
