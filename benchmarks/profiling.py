"""Where a pass of ctxfast spends its time, by operator: what a report shows where a peer is faster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile

from ctxfast.ops import _dispatch

SHOWN = 6
OTHER = "other"


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler inside torch writes its start and stop to the descriptor of stderr, whatever its log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def shares(run: Callable[[], object]) -> dict[str, float]:
    """Operator -> share of the time in operators of one profiled pass, largest first; small ones together as "other".

    A layer that is one call is not seen by torch's profiler. Under the record it is the calls of its parts.
    """
    activities = [ProfilerActivity.CPU]
    with _silent_stderr(), _dispatch.record(), profile(activities=activities) as profiler:
        run()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    if not total:
        return {}
    ordered = sorted(times.items(), key=lambda item: -item[1])
    found = {name: round(time / total, 4) for name, time in ordered[:SHOWN] if time > 0}
    rest = 1.0 - sum(found.values())
    return found | ({OTHER: round(rest, 4)} if rest > 0.001 else {})
