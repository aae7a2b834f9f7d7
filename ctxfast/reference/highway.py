"""A highway layer (Srivastava et al., 2015): a gate between the input and a transformation of it.

    t, c = split(x W^T + b);   output = g * x + (1 - g) * relu(t),   g = sigmoid(c)

The gate carries the input: where g is 1 the layer does nothing. Arithmetic of the gate is float32 in 16-bit types.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def highway_gate(projected: Tensor, input: Tensor) -> Tensor:
    """projected [..., 2N], input [..., N] -> [..., N]."""
    transform, carry = _wide(projected).chunk(2, -1)
    gate = torch.sigmoid(carry)
    return (gate * _wide(input) + (1 - gate) * torch.relu(transform)).to(input.dtype)


def highway_gate_backward(
    grad_output: Tensor, projected: Tensor, input: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of projected and input."""
    grad = _wide(grad_output)
    transform, carry = _wide(projected).chunk(2, -1)
    gate = torch.sigmoid(carry)
    dcarry = grad * (_wide(input) - torch.relu(transform)) * gate * (1 - gate)
    dtransform = (grad * (1 - gate)).where(transform > 0, 0.0)
    dprojected = torch.cat((dtransform, dcarry), -1).to(projected.dtype)
    return dprojected, (grad * gate).to(input.dtype)


def highway(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """input [..., N], weight [2N, N], bias [2N] -> [..., N]; arguments as `ctxfast.ops.highway`."""
    return highway_gate(F.linear(input, weight, bias), input)
