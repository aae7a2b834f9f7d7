"""A linear layer on 8-bit integers: a scale for each output channel of the weight, a range for each row of the input.

    weight[n, k] = scale[n] * q[n, k],          scale = max|weight[n]| / 127,            q in [-127, 127]
    input[m, k]  = low[m] + step[m] * u[m, k],  step = (max input[m] - low[m]) / 255,    u in [0, 255]

    output = activation(step * scale * (u @ q^T) + low * (scale * sum_k q) + bias)

This is the vector-wise quantisation of Dettmers et al., "LLM.int8()" (2022), with the whole range of a row in place of
its largest magnitude: activations behind a GELU are hardly ever negative, so that their steps are half as large.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast.reference.linear import ACTIVATIONS

_COLUMNS, _DEPTH = 32, 4  # of a panel; neighbours along the depth, which one instruction multiplies


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 [N, K] and scale float32 [N] of weight [N, K], K > 0. A row that is not finite has the scale NaN."""
    weight = weight.float()
    largest = _finite(weight).abs().amax(1)
    inverse = torch.where(largest > 1e-30, 127.0 / largest, 0.0)
    scale = torch.where(largest > 1e-30, largest / 127.0, 0.0) + (weight - weight).sum(1)
    return (_finite(weight) * inverse.unsqueeze(1)).round().to(torch.int8), scale


def pack_weight(q: Tensor) -> Tensor:
    """q [N, K] in the order in which a CPU reads it: [N / 32, K / 4, 32, 4], both rounded up, padded with 0."""
    n, k = q.shape
    padded = F.pad(q, (0, -k % _DEPTH, 0, -n % _COLUMNS))
    panels = padded.view(-1, _COLUMNS, padded.shape[1] // _DEPTH, _DEPTH)
    return panels.transpose(1, 2).contiguous()


def unpack_weight(panels: Tensor, n: int, k: int) -> Tensor:
    """What `pack_weight` was given."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * _COLUMNS, -1)[:n, :k]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u uint8 [M, K], low and step float32 [M] of x [M, K], K > 0. A row that is not finite has the step NaN."""
    x = x.float()
    finite = _finite(x)
    low, high = finite.amin(1), finite.amax(1)
    span = high - low
    inverse = torch.where(span > 1e-30, span.new_tensor(255.0) / span, 0.0)
    step = torch.where(span > 1e-30, span / 255.0, 0.0) + (x - x).sum(1)
    levels = (finite - low.unsqueeze(1)) * inverse.unsqueeze(1)
    return levels.round().to(torch.uint8), low, step


def linear_int8(
    input: Tensor,
    panels: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """input [..., K] -> [..., N]; panels from `pack_weight`, scales [N], sums [N] = scale * sum_k q."""
    depth, columns = input.shape[-1], scales.shape[0]
    weight = unpack_weight(panels, columns, depth)
    u, low, step = quantize_rows(input.reshape(-1, depth))
    products = (u.double() @ weight.double().t()).float()  # exact: below 2^53
    output = products * (step.unsqueeze(1) * scales) + low.unsqueeze(1) * sums
    output = ACTIVATIONS[activation or "none"](output if bias is None else output + bias.float())
    return output.to(dtype or input.dtype).view(*input.shape[:-1], columns)
