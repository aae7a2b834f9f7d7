"""Scaling curves of a run: the cases of a workload along one axis, with the exponent of time ~ axis ** exponent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .records import CaseResult, Result, Run
from .timing import Ratio

RESAMPLES = 1000


@dataclass(frozen=True)
class Curve:
    """A candidate along an axis: points (where, median seconds), and the fitted exponent with its interval."""

    workload: str
    axis: str
    peer: str
    label: str
    dtype: str
    points: tuple[tuple[float, float], ...]
    exponent: Ratio

    @property
    def key(self) -> str:
        return f"{self.label} · {self.dtype}"


def fit(at: Sequence[float], samples: Sequence[Sequence[float]], *, seed: int = 0) -> Ratio:
    """The slope of log time over log axis by least squares on the medians, with a bootstrap interval over rounds.

    Raises ValueError with fewer than two different places.
    """
    x = np.log(np.asarray(at, dtype=np.float64))
    if len(set(at)) < 2:
        raise ValueError(f"fit: at must hold two different places, got {list(at)}")
    x = x - x.mean()
    generator = np.random.default_rng(seed)
    drawn = np.empty((len(samples), RESAMPLES))
    for row, times in enumerate(samples):
        rounds = generator.integers(0, len(times), size=(RESAMPLES, len(times)))
        drawn[row] = np.log(np.median(np.asarray(times)[rounds], axis=1))
    medians = np.log([np.median(times) for times in samples])
    slopes = x @ drawn / (x @ x)
    low, high = np.quantile(slopes, [0.025, 0.975])
    return Ratio(float(x @ medians / (x @ x)), float(low), float(high))


def find(run: Run) -> Iterator[Curve]:
    """Every curve of a run: of each candidate that was timed at two places at least."""
    axes: dict[tuple[str, str], list[CaseResult]] = {}
    for case in run.cases:
        if case.curve:
            axes.setdefault((case.workload, case.curve), []).append(case)
    for (workload, axis), cases in axes.items():
        series: dict[str, list[tuple[float, Result]]] = {}
        for case in cases:
            for result in case.results:
                if result.seconds and not result.part:
                    series.setdefault(result.key, []).append((case.at, result))
        for points in series.values():
            points.sort(key=lambda point: point[0])
            at, results = [place for place, _ in points], [result for _, result in points]
            if len(set(at)) >= 2:
                medians = [r.seconds.median for r in results if r.seconds]
                yield Curve(
                    workload,
                    axis,
                    results[0].peer,
                    results[0].label,
                    results[0].dtype,
                    tuple(zip(at, medians, strict=True)),
                    fit(at, [result.samples for result in results]),
                )
