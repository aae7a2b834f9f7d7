"""A linear layer on 8-bit integers: one scale for each output channel of the weight, one for each row of the input.

    q = round(x * 127 / max|x|),   s = max|x| / 127,   output = activation((q_x @ q_w^T) * s_x * s_w + bias)

The quantisation is symmetric, so that zero stays zero and no column sums are needed (Dettmers et al., "LLM.int8()",
2022, call it vector-wise).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast.reference.linear import ACTIVATIONS


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 scales [M] of x [M, K]. A row with a NaN or an infinity has the scale NaN."""
    x = x.float()
    largest = x.abs().nan_to_num(0.0).amax(1)
    inverse = torch.where(largest > 1e-30, 127.0 / largest, 0.0)
    scales = largest / 127.0 + (x - x).sum(1)
    return (x * inverse.unsqueeze(1)).nan_to_num(0.0).round().clamp(-127, 127).to(
        torch.int8
    ), scales


def linear_int8(
    input: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """input [..., K], weight int8 [N, K], weight_scales [N] -> [..., N]; arguments as `ctxfast.ops.linear_int8`."""
    rows, scales = quantize_rows(input.reshape(-1, input.shape[-1]))
    sums = (rows.double() @ weight.double().t()).float()  # exact: below 2^53
    output = sums * scales.unsqueeze(1) * weight_scales
    output = ACTIVATIONS[activation or "none"](output if bias is None else output + bias.float())
    return output.to(input.dtype).view(*input.shape[:-1], weight.shape[0])
