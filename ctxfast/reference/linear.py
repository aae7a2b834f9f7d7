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


def activation_backward(grad_output: Tensor, pre_activation: Tensor, activation: str) -> Tensor:
    """The gradient of what an activation was given."""
    if activation == "none":
        return grad_output
    if activation == "tanh":
        return grad_output * (1 - torch.tanh(pre_activation).square())
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad_output, pre_activation, approximate=approximate)


def linear_activation(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`linear` and what it gave to the activation, both [..., N]."""
    pre_activation = F.linear(input, weight, bias)
    output = ACTIVATIONS[activation](pre_activation)
    return (output if residual is None else output + residual), pre_activation


def linear_activation_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input [..., K], weight and bias, written out; differentiable once more through autograd."""
    dz = activation_backward(grad_output, F.linear(input, weight, bias), activation)
    count = input.shape[:-1].numel()
    rows, inputs = dz.reshape(count, weight.shape[0]), input.reshape(count, weight.shape[1])
    dinput, dweight, dbias = linear_backward(rows, inputs, weight)
    return dinput.view(input.shape), dweight, dbias
