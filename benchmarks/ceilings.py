"""What this machine can do, measured in the same run: matrix products by dtype, and memory bandwidth.

The GEMM ceiling is the best rate that anyone reaches with a BERT-base linear over several row counts: the oneDNN that
torch carries and `ctxfast.ops.linear`, both with weights packed once, and torch's default path (`F.linear`), which on a
GPU is all there is. The own path is among them because its float32 products on AMX, sums of exact bfloat16 products,
exceed what float32 instructions reach. A workload's limit is the time that its arithmetic takes at the GEMM ceiling or
its memory traffic at the bandwidth, whichever is longer (roofline, Williams et al. 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast import ops
from ctxfast.ops import _native_linear

from .case import CPU, DTYPES
from .timing import clock_of

ROWS = {"cpu": (16, 64, 256, 832), "cuda": (64, 832, 4096, 16384)}
SHAPES = ((3072, 768), (768, 3072))  # [out, in] of BERT-base's feed-forward
# MiB: second-level cache, last-level cache, memory; on a GPU cache and memory
WORKING_SETS = {"cpu": (4, 32, 256), "cuda": (16, 1024)}


@dataclass(frozen=True)
class Ceilings:
    """gemm[dtype][path][rows] in GFLOP/s, paths "ctxfast", "oneDNN" and "torch"; bandwidth[MiB] in GB/s of reads."""

    gemm: dict[str, dict[str, dict[int, float]]]
    bandwidth: dict[int, float]

    def best_gemm(self, dtype: str) -> float | None:
        """The highest rate of a dtype in GFLOP/s; None where it was not measured."""
        paths = self.gemm.get(dtype, {})
        rates = [rate for rows in paths.values() for rate in rows.values()]
        return max(rates, default=None)

    def bandwidth_for(self, size: float) -> float | None:
        """GB/s for a working set of `size` bytes: that of the nearest measured size."""
        if not self.bandwidth:
            return None
        nearest = min(self.bandwidth, key=lambda mib: abs(np.log(mib * 2**20 / max(size, 1.0))))
        return self.bandwidth[nearest]

    def limit_of_steps(
        self, dtype: str, steps: Sequence[tuple[float, float]], element: int
    ) -> tuple[float, str] | None:
        """Sum over steps (FLOP, elements) of the longer of arithmetic and memory, and which is most of it."""
        total, shares = 0.0, {"compute": 0.0, "memory": 0.0}
        bandwidth_size = max(elements for _, elements in steps) * element
        for flop, elements in steps:
            single = self.limit(dtype, flop, elements * element, bandwidth_size)
            if single is None:
                return None
            total += single[0]
            shares[single[1]] = shares.get(single[1], 0.0) + single[0]
        return total, max(shares, key=lambda kind: shares[kind])

    def limit(
        self, dtype: str, flop: float, traffic: float, working_set: float | None = None
    ) -> tuple[float, str] | None:
        """Seconds that the work takes at the ceilings, and which one binds: "compute" or "memory".

        working_set: bytes that are read again and again, by default all of the traffic
        """
        gemm = self.best_gemm(dtype)
        bandwidth = self.bandwidth_for(traffic if working_set is None else working_set)
        if gemm is None or bandwidth is None:
            return None
        compute, memory = flop / (gemm * 1e9), traffic / (bandwidth * 1e9)
        return (compute, "compute") if compute >= memory else (memory, "memory")

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Ceilings:
        """What `to_json` wrote."""
        gemm = {
            dtype: {
                path: {int(rows): rate for rows, rate in rates.items()}
                for path, rates in paths.items()
            }
            for dtype, paths in entry["gemm_gflops"].items()
        }
        return cls(
            gemm, {int(size.split()[0]): rate for size, rate in entry["read_gb_per_s"].items()}
        )

    def to_json(self) -> dict[str, object]:
        gemm = {
            dtype: {
                path: {str(rows): round(rate, 1) for rows, rate in rates.items()}
                for path, rates in paths.items()
            }
            for dtype, paths in self.gemm.items()
        }
        return {
            "gemm_gflops": gemm,
            "read_gb_per_s": {f"{mib} MiB": round(rate, 1) for mib, rate in self.bandwidth.items()},
        }


def onednn_available() -> bool:
    """Whether torch offers oneDNN's linear with packed weights (the operators that Inductor emits)."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def packed_linear(weight: Tensor, bias: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """F.linear by oneDNN with the weight packed once for about `rows` rows; inference only."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, packed, bias, "none", [], "")


def own_linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """F.linear by ctxfast with the weight packed once; inference only."""
    packed = _native_linear.pack(weight)
    return lambda x: ops.linear(x, weight, bias, packed=packed)


def measure(device: torch.device = CPU, *, quick: bool = False) -> Ceilings:
    """Measure every ceiling with torch's present number of threads; quick: fewer and shorter measurements."""
    on_cpu = device.type == "cpu"
    counts, sets = ROWS[device.type], WORKING_SETS[device.type]
    seconds = 0.02 if quick else 0.15
    gemm: dict[str, dict[str, dict[int, float]]] = {}
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            if on_cpu and dtype == torch.float16:
                continue
            rates: dict[str, dict[int, float]] = {"torch": {}}
            if on_cpu and onednn_available():
                rates["oneDNN"] = {}
            if on_cpu and all(_native_linear.pack_refuses(dtype, k) is None for _, k in SHAPES):
                rates["ctxfast"] = {}
            for rows in counts[:2] if quick else counts:
                for path, by_rows in rates.items():
                    by_rows[rows] = max(
                        _gemm_rate(path, rows, shape, dtype, seconds / len(SHAPES), device)
                        for shape in SHAPES
                    )
            gemm[name] = rates
        if on_cpu and int8_available():
            by_rows = {
                rows: _int8_rate(rows, seconds) for rows in (counts[:2] if quick else counts)
            }
            gemm["int8"] = {"oneDNN": by_rows}
        bandwidth = {mib: _read_rate(mib, seconds, device) for mib in (sets[:2] if quick else sets)}
    return Ceilings(gemm, bandwidth)


def _gemm_rate(
    path: str,
    rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    seconds: float,
    device: torch.device,
) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    bias = torch.zeros(shape[0], dtype=dtype, device=device)
    x = torch.randn(rows, shape[1], generator=generator).to(device, dtype)
    linear: Callable[[Tensor], Tensor]
    if path == "oneDNN":
        linear = packed_linear(weight, bias, rows)
    elif path == "ctxfast":
        linear = own_linear(weight, bias)
    else:
        linear = partial(F.linear, weight=weight, bias=bias)
    best = _best_time(lambda: linear(x), seconds, device)
    return 2.0 * rows * shape[0] * shape[1] / best / 1e9


def int8_available() -> bool:
    """Whether oneDNN's products of 8-bit integers are exact and fast here."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    return vnni is not None and vnni() and hasattr(torch.ops.onednn, "qlinear_pointwise")


def _int8_rate(rows: int, seconds: float) -> float:
    """10^9 operations a second of unsigned by signed bytes, sums scaled to float32, weight packed once."""
    rates = []
    for n, k in SHAPES:
        x = torch.randint(256, (rows, k), dtype=torch.uint8)
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(weight, [rows, k])
        scales, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int32)
        quantised = (x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32)
        run = partial(torch.ops.onednn.qlinear_pointwise, *quantised, "none", [], "")
        rates.append(2.0 * rows * n * k / _best_time(run, seconds / len(SHAPES), CPU) / 1e9)
    return max(rates)


def _read_rate(mib: int, seconds: float, device: torch.device) -> float:
    data = torch.ones(mib * 2**18, dtype=torch.float32, device=device)
    return mib * 2**20 / _best_time(data.sum, seconds, device) / 1e9


def _best_time(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    """The shortest of the samples that fit into `seconds`, at least three: a ceiling is what undisturbed calls reach.

    A sample is one call; on a GPU it is as many as hide the launch of the first.
    """
    clock, calls = clock_of(device), 1 if device.type == "cpu" else 20
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) * calls < seconds:
        start = clock()
        for _ in range(calls):
            run()
        times.append((clock() - start) / calls)
    return min(times)
