"""Where a gain over transformers comes from: padding, torch's default GEMM, and the rest.

    padded batch  -> length buckets      removed padding that sorting by length removes too   (measured)
    buckets       -> minus GEMM excess   time of F.linear less that of oneDNN, same valid tokens (measured alone)
    what remains  -> ctxfast             the padding left in buckets, attention, GELU, norms, overhead

The first step is open to every user of transformers, the second to every user of oneDNN: neither is a kernel
of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from .peers.gemm import DEFAULT_PATH, PACKED_PATH
from .records import CaseResult


@dataclass(frozen=True)
class Split:
    """Seconds after each step; every factor is the one before divided by the one after."""

    padded: float
    buckets: float
    better_gemm: float
    own: float

    @property
    def padding_factor(self) -> float:
        return self.padded / self.buckets

    @property
    def gemm_factor(self) -> float:
        return self.buckets / self.better_gemm

    @property
    def rest_factor(self) -> float:
        return self.better_gemm / self.own

    def lines(self) -> list[str]:
        """The split in words, one step a line."""
        steps = (
            ("transformers sdpa float32, one padded batch", self.padded, ""),
            ("  length-sorted buckets", self.buckets, f"{self.padding_factor:5.2f}x padding"),
            (
                "  with oneDNN's GEMM for F.linear",
                self.better_gemm,
                f"{self.gemm_factor:5.2f}x default GEMM",
            ),
            ("  ctxfast float32", self.own, f"{self.rest_factor:5.2f}x the rest"),
        )
        return [f"{step:44} {seconds:9.4f} s  {factor}".rstrip() for step, seconds, factor in steps]


def split_gain(case: CaseResult) -> Split | None:
    """The split of a BERT case in float32; None where one of its measurements is missing."""
    padded = case.find("transformers sdpa")
    buckets = case.find("transformers sdpa, length buckets")
    default, packed = case.find(DEFAULT_PATH), case.find(PACKED_PATH)
    own = next((r for r in case.own() if r.dtype == "float32"), None)
    seconds = [r.seconds.median for r in (padded, buckets, default, packed, own) if r and r.seconds]
    if len(seconds) != 5:
        return None
    excess = max(0.0, seconds[2] - seconds[3])
    return Split(seconds[0], seconds[1], max(seconds[1] - excess, 1e-12), seconds[4])
