"""Timing of several candidates in one run: warm-up, then interleaved rounds (A B C, A B C, ...).

On a GPU the clock waits for it before it is read: a sample is the time of the device or of its launches, whichever is
longer, with the second-level cache as the calls before left it.

Every candidate meets the same state of the machine, so ratios are taken round by round: `ratio_interval` resamples
whole rounds (bootstrap, Efron 1979). Times are seconds a call. A result whose rounds spread too far is marked noisy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

NOISY_SPREAD = 0.10  # (p80 - p20) / median above which one candidate's times are marked
FEWEST = 3  # rounds below which a median and its interval say little
NOISY_FOREIGN = (
    0.05  # share of the machine's CPU time taken by other processes above which a run is marked
)


@dataclass(frozen=True)
class Schedule:
    """How to sample.

    warmup: untimed calls of each candidate before the first round.
    repeats: rounds.
    min_sample: seconds; a shorter call is repeated inside one sample.
    settle: seconds of rest before each sample, in which the threads of the candidate before stop spinning.
    budget: seconds in which the rounds should end; fewer than `repeats` are run for it, but never fewer than FEWEST.
    """

    warmup: int = 1
    repeats: int = 7
    min_sample: float = 0.05
    settle: float = 0.0
    budget: float | None = None

    def rounds(self, round_seconds: float) -> int:
        """How many rounds to run if one takes so long."""
        if self.budget is None:
            return self.repeats
        fitting = int(self.budget / max(round_seconds, 1e-9))
        return min(self.repeats, max(FEWEST, fitting))


@dataclass
class Samples:
    """seconds[label][round]; `foreign` is the share of CPU time that other processes took, None where unknown."""

    seconds: dict[str, list[float]]
    failures: dict[str, str] = field(default_factory=dict)
    last: dict[str, object] = field(default_factory=dict)
    foreign: float | None = None
    interrupted: bool = False


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds; read once everything queued on the device is done."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def interleave(
    functions: Mapping[str, Callable[[], object]],
    schedule: Schedule,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] = lambda label: None,
    planned: Callable[[int], None] = lambda rounds: None,
) -> Samples:
    """Time the functions in interleaved rounds.

    A function that raises leaves the run with its error; the others go on. Ctrl-C ends the run and keeps the complete
    rounds. `progress` is called with the label after every warm-up and sample, `planned` with the number of rounds
    once the warm-up has shown what a round takes.
    """
    samples = Samples({label: [] for label in functions})
    active = dict(functions)
    calls: dict[str, int] = {}
    expected: dict[str, float] = {}  # seconds of a sample
    load = _CpuLoad()

    def attempt(action: Callable[[str], None], label: str) -> None:
        try:
            action(label)
        except Exception as error:  # a peer's failure must not end the run of the others
            samples.failures[label] = f"{type(error).__name__}: {error}"
            del active[label], samples.seconds[label]
        progress(label)

    def warm(label: str) -> None:
        start = clock()
        for _ in range(max(1, schedule.warmup)):
            start = clock()
            functions[label]()
        once = max(clock() - start, 1e-9)
        calls[label] = max(1, round(schedule.min_sample / once))
        expected[label] = schedule.settle + once * (calls[label] + warm_calls(label))

    def warm_calls(label: str) -> int:
        """As long as the sample: after a rest or another candidate, caches and threads take tens of milliseconds to be
        where a run of such calls finds them. A call as long as a sample has that in itself.
        """
        return calls[label] if calls[label] > 1 else 0

    def sample(label: str) -> None:
        time.sleep(schedule.settle)
        for _ in range(warm_calls(label)):
            functions[label]()
        start = clock()
        for _ in range(calls[label]):
            samples.last[label] = functions[label]()
        samples.seconds[label].append((clock() - start) / calls[label])

    try:
        for label in list(active):
            attempt(warm, label)
        rounds = schedule.rounds(sum(expected[label] for label in active))
        planned(rounds)
        load.start()
        for _ in range(rounds):
            for label in list(active):
                attempt(sample, label)
    except KeyboardInterrupt:
        samples.interrupted = True
    samples.foreign = load.foreign_share()
    complete = min((len(times) for times in samples.seconds.values()), default=0)
    samples.seconds = {label: times[:complete] for label, times in samples.seconds.items()}
    return samples


class _CpuLoad:
    """CPU time that other processes took since `start`, from /proc/stat (Linux)."""

    def __init__(self) -> None:
        self._begin: tuple[float, float, float] | None = None

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of CPU: all of the machine, its busy part, and this process."""
        try:
            with Path("/proc/stat").open(encoding="ascii") as stat:
                ticks = [int(value) for value in stat.readline().split()[1:9]]
            hertz = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None
        own = os.times()
        idle = ticks[3] + ticks[4]
        return sum(ticks) / hertz, (sum(ticks) - idle) / hertz, own.user + own.system

    def start(self) -> None:
        self._begin = self._now()

    def foreign_share(self) -> float | None:
        end = self._now()
        if self._begin is None or end is None:
            return None
        total, busy, own = (b - a for a, b in zip(self._begin, end, strict=True))
        return max(0.0, busy - own) / total if total > 0.5 else None


@dataclass(frozen=True)
class Summary:
    """Median and the 20th and 80th percentile of the samples of one candidate, seconds."""

    median: float
    p20: float
    p80: float

    @property
    def spread(self) -> float:
        return (self.p80 - self.p20) / self.median

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY_SPREAD


def summarise(seconds: Sequence[float]) -> Summary:
    """Raises ValueError without samples."""
    if not seconds:
        raise ValueError("summarise: seconds must be a non-empty sequence, got none")
    p20, median, p80 = np.quantile(np.asarray(seconds, dtype=np.float64), [0.2, 0.5, 0.8])
    return Summary(float(median), float(p20), float(p80))


@dataclass(frozen=True)
class Ratio:
    """How many times as long the first takes as the second, with the bounds of its interval."""

    value: float
    low: float
    high: float


CONFIDENCE = 0.95  # of an interval over rounds enough for it


def reachable_confidence(rounds: int) -> float:
    """The confidence of `ratio_interval` over so many rounds, at most CONFIDENCE.

    No interval that ends at the least and the largest of n samples holds their true median more often than
    1 - 2^(1 - n): all of them lie on one side of it otherwise.
    """
    return min(CONFIDENCE, 1.0 - 2.0 ** (1 - rounds))


def ratio_interval(
    slower: Sequence[float],
    faster: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = 4000,
    seed: int = 0,
) -> Ratio:
    """median(slower) / median(faster) with a bootstrap interval over rounds.

    Both sequences hold one time a round, from the same rounds: a round is drawn with both its times, so a drift of the
    machine that slows both does not widen the interval. Few rounds do not reach `confidence`: see
    `reachable_confidence`. With one round the interval is the whole line.
    """
    if len(slower) != len(faster) or len(slower) == 0:
        raise ValueError(
            "ratio_interval: slower and faster must hold one time for each of the same rounds, got "
            f"{len(slower)} and {len(faster)}"
        )
    above, below = (np.asarray(times, dtype=np.float64) for times in (slower, faster))
    value = float(np.median(above) / np.median(below))
    if len(above) == 1:
        return Ratio(value, 0.0, float("inf"))
    rounds = np.random.default_rng(seed).integers(0, len(above), size=(resamples, len(above)))
    ratios = np.median(above[rounds], axis=1) / np.median(below[rounds], axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail])
    return Ratio(value, float(low), float(high))
