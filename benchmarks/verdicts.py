"""Which peer is the one to beat, and where ctxfast is behind: found in the figures, not written by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .case import element_size
from .records import CaseResult, Result, Run
from .timing import Ratio


@dataclass(frozen=True)
class Behind:
    """A peer that is faster than ctxfast beyond noise. ratio: its time / ours, below 1.

    same_type: whether both compute in one type; else the peer's is one that ctxfast does not offer there.
    """

    case: CaseResult
    peer: Result
    own: Result
    ratio: Ratio
    same_type: bool


def rivals(case: CaseResult, own: Result) -> list[Result]:
    """The peers' candidates in the type of one of ctxfast's, fastest first."""
    found = [
        r for r in case.results if not r.ours and r.seconds and not r.part and r.dtype == own.dtype
    ]
    return sorted(found, key=_median)


def fastest_rival(case: CaseResult, own: Result) -> Result | None:
    """The fastest of them that was timed in the same rounds as one of ctxfast's candidates."""
    return next((r for r in rivals(case, own) if own.dtype in r.speedup), None)


def _median(result: Result) -> float:
    return result.seconds.median if result.seconds else float("inf")


def behind(run: Run) -> Iterator[Behind]:
    """Every candidate of a peer whose whole interval lies below ctxfast's time, the farthest ahead first."""
    found: list[Behind] = []
    for case in run.cases:
        own = {r.dtype: r for r in case.own() if not r.part}
        if not own:
            continue
        fastest = min(own.values(), key=_median)
        for result in case.results:
            if result.ours or result.part or not result.seconds:
                continue
            mine = own.get(result.dtype, fastest)
            ratio = result.speedup.get(mine.dtype)
            if ratio is not None and ratio.high < 1.0:
                found.append(Behind(case, result, mine, ratio, result.dtype == mine.dtype))
    return iter(sorted(found, key=lambda b: (not b.same_type, b.ratio.value)))


def _operator(name: str) -> str:
    """A profiler's name without what torch wraps around it; what autograd adds to an operator is said so."""
    name = name.removeprefix("autograd::engine::evaluate_function: ").removeprefix("ctxfast::")
    return re.sub(
        r"^GeneratedBackwardFor_ctxfast_(\w+)_default(Backward)?$", r"\1 in autograd", name
    )


def explanation(item: Behind) -> str:
    """Why, as far as the figures say: the types, how near both come to the limit, and where our time goes."""
    own, peer = item.own, item.peer
    parts = []
    bytes_own, bytes_peer = element_size(own.dtype), element_size(peer.dtype)
    if bytes_peer < bytes_own:
        parts.append(f"its weights have {bytes_peer / bytes_own:.3g} of the bytes")
    if own.of_limit is not None:
        theirs = f", the peer {peer.of_limit:.0%} {peer.limit}" if peer.of_limit is not None else ""
        parts.append(f"we reach {own.of_limit:.0%} of the limit by {own.limit}{theirs}")
    if own.profile:
        shares = (f"{_operator(name)} {share:.0%}" for name, share in own.profile.items())
        parts.append(f"our time in operators: {', '.join(shares)}")
    else:
        parts.append("no pass of ours was profiled")
    return "; ".join(parts)
