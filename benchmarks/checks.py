"""Correctness before speed: a candidate whose numbers are wrong gets no time.

The truth is float64. ctxfast's own results must lie within 2 x (error of the eager path of the same dtype + one ulp of
the largest output), in maximum and in root mean square, and under a cap a dtype; peers must lie under the cap, which
is relative to the largest output of the truth. For int8 and TF32 the eager path emulates its products exactly, and
the ulp is that of float32, in which everything else is computed there. Fresh memory is filled with NaN during the
check, so that a row that was never written cannot pass as a row left over from an earlier call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest accepted error of a BERT-base forward or a single operator, relative to the largest output.
CAPS = {
    "float64": 1e-10,
    "float32": 2e-5,
    "tf32": 1e-2,
    "bfloat16": 6e-2,
    "float16": 1e-2,
    "int8": 2.5e-1,
}
_TORCH = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
    "tf32": torch.float32,
}
_ANGLED = ("int8",)  # the dtypes whose error is large enough for an angle to say more


class WrongResult(Exception):
    """The numbers of a candidate are wrong; its time must not be reported."""


@dataclass(frozen=True)
class Deviation:
    """Maximum and root mean square of the difference to the truth; for int8 also the least and the mean cosine between
    a row (a token) and its truth.
    """

    max: float
    rms: float
    cosine_min: float | None = None
    cosine_mean: float | None = None


def deviation(result: Tensor, truth: Tensor, *, angles: bool = False) -> Deviation:
    """The error of a result, with cosines where `angles` asks; WrongResult for another shape or values not finite."""
    if result.shape != truth.shape:
        raise WrongResult(f"shape {tuple(result.shape)} instead of {tuple(truth.shape)}")
    difference = result.to(truth.device).double() - truth.double()
    rows = difference.reshape(difference.shape[0], -1)
    wrong = (~torch.isfinite(rows)).any(1)
    if wrong.any():
        raise WrongResult(
            f"{int(wrong.sum())} of {len(rows)} rows are not finite, the first is row {int(wrong.nonzero()[0])}"
        )
    largest, rms = float(difference.abs().max()), float(difference.square().mean().sqrt())
    if not angles:
        return Deviation(largest, rms)
    expected = truth.double().reshape(len(truth), -1)
    cosines = torch.cosine_similarity(expected + rows, expected, dim=1)
    return Deviation(largest, rms, float(cosines.min()), float(cosines.mean()))


def check(
    result: Tensor, truth: Tensor, dtype: str, *, eager: Deviation | None = None
) -> Deviation:
    """The error of `result` [rows, ...], or WrongResult if it exceeds what its dtype allows.

    eager: the error of the eager path in the same dtype; given, the strict rule applies as well as the cap.
    """
    error = deviation(result, truth, angles=dtype in _ANGLED)
    largest = float(truth.abs().max())
    cap = CAPS[dtype] * largest
    if error.max > cap:
        raise WrongResult(f"maximum error {error.max:.2e}, at most {cap:.2e} is right for {dtype}")
    if eager is not None:
        ulp = torch.finfo(_TORCH[dtype]).eps * largest
        for name in ("max", "rms"):
            allowed = 2.0 * (getattr(eager, name) + ulp)
            if getattr(error, name) > allowed:
                raise WrongResult(
                    f"{name} error {getattr(error, name):.2e}, at most {allowed:.2e} "
                    f"(twice that of the eager path) is right for {dtype}"
                )
    return error


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN (integers: the largest value) inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # includes the filling, unless switched off
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
