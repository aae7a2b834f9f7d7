"""When a fused result passes: no worse than twice the eager path in the same dtype, both measured in float64."""

from __future__ import annotations

import torch
from torch import Tensor

# Absolute caps, so that a bad eager path cannot hide a bad kernel; relative to the largest exact value.
CAPS = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def ulp(dtype: torch.dtype, value: float) -> float:
    """The spacing of dtype at value; below the normal range it is constant."""
    info = torch.finfo(dtype)
    return info.eps * max(value, info.smallest_normal)


def errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference, in float64."""
    if exact.numel() == 0:
        return 0.0, 0.0
    difference = (result.double() - exact.double()).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def assert_matches(
    result: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    name: str = "result",
    cap: float | None = None,
    rounding: Tensor | None = None,
) -> None:
    """result against exact (float64), by the error that eager (the dtype of result) makes.

    cap: bound of the error relative to the largest exact value, by default one for each dtype.
    rounding: for results that are small differences of large terms, what rounding those terms once leaves in each
        element; it counts beside the ulp of the result.
    """
    assert result.shape == exact.shape, (
        f"{name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    )
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(result), finite), (
        f"{name}: finite where it should not be, or the reverse"
    )
    same = (result.double() == exact.double()) | (result.isnan() & exact.isnan())
    assert bool((same | finite).all()), f"{name}: infinities or NaN differ"
    result, eager, exact = (x.masked_fill(~finite, 0.0) for x in (result, eager, exact))
    largest = exact.abs().max().item() if exact.numel() else 0.0
    unit = ulp(result.dtype, largest)
    got, allowed = errors(result, exact), errors(eager.nan_to_num(), exact)
    inherited = (0.0, 0.0) if rounding is None else errors(rounding, torch.zeros_like(exact))
    bound = CAPS[result.dtype] if cap is None else cap
    for kind, error, baseline, terms in zip(("max", "RMS"), got, allowed, inherited, strict=True):
        least = unit + terms
        limit = min(2 * (baseline + least), bound * max(largest, 1e-30) + 2 * least)
        assert error <= limit, (
            f"{name}: {kind} error {error:.3e} over {limit:.3e} (eager {baseline:.3e}, ulp {unit:.3e}, "
            f"rounding of terms {terms:.3e})"
        )
