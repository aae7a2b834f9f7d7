"""A linear layer with its epilogue: activation(input @ weight^T + bias) + residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,  # exact, with erf (Hendrycks and Gimpel, 2016)
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """input [..., K], weight [N, K] -> [..., N]; arguments as `ctxfast.ops.linear`."""
    output = ACTIVATIONS[activation or "none"](F.linear(input, weight, bias))
    return output if residual is None else output + residual


def linear_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input [M, K], weight [N, K] and bias [N] for rows grad_output [M, N], before any activation."""
    return grad_output @ weight, grad_output.t() @ input, grad_output.sum(0)
