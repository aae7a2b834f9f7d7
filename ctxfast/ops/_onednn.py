"""Linear layers through the oneDNN that torch carries, by the operators that torch's own compiler emits.

On processors whose default GEMM library is slow (MKL on AMD: a factor of two to three) this is the fast path for plain
and for packed weights, in float32 and bfloat16, forward and backward.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_ACTIVATION = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "tanh": ("tanh", ""),
}


@functools.cache
def unavailable_reason() -> str | None:
    """Why torch's oneDNN operators cannot be used here, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this torch build has no oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"torch {torch.__version__} has no mkldnn._linear_pointwise"
    return None


@functools.cache
def _bfloat16_supported() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _refuses_tensors(*tensors: Tensor | None) -> str | None:
    first = tensors[0]
    if first is None or first.device.type != "cpu":
        return "oneDNN serves CPU tensors"
    if first.dtype == torch.bfloat16:
        if not _bfloat16_supported():
            return "this processor has no bfloat16 instructions that oneDNN uses"
    elif first.dtype != torch.float32:
        return f"dtype {first.dtype} is not float32 or bfloat16"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn is disabled"
    return unavailable_reason()


def linear_refuses(input, weight, bias, activation, residual, packed) -> str | None:
    """Reason why oneDNN cannot run this linear, or None."""
    if 0 in input.shape or 0 in weight.shape:
        return "empty input"
    return _refuses_tensors(input)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    packed: Tensor | None,
) -> Tensor:
    """activation(input @ weight^T + bias) + residual; arguments validated by `ctxfast.ops.linear`."""
    rows = input.reshape(-1, input.shape[-1])
    if packed is not None and packed.layout is not torch.strided:  # else it is csrc's
        weight = packed
    pointwise = torch.ops.mkldnn._linear_pointwise
    if residual is not None and activation == "none":
        addend = residual.reshape(-1, residual.shape[-1])
        output = pointwise.binary(rows, addend, weight, bias, "add")
    else:
        name, algorithm = _ACTIVATION[activation]
        output = pointwise.default(rows, weight, bias, name, [], algorithm)
        if residual is not None:
            output += residual.reshape(-1, residual.shape[-1])
    return output.view(*input.shape[:-1], -1)


def linear_backward_refuses(grad, input, weight) -> str | None:
    """Reason why oneDNN cannot run this backward, or None."""
    if 0 in grad.shape or 0 in weight.shape:
        return "empty input"
    return _refuses_tensors(grad)


def linear_backward(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dX = dY @ W and dW = dY^T @ X, both as linear layers, and db: gradients of rows [M, N] and [M, K]."""
    pointwise = torch.ops.mkldnn._linear_pointwise.default
    dinput = pointwise(grad, weight.t(), None, "none", [], "")
    dweight = pointwise(grad.t(), input.t(), None, "none", [], "")
    return dinput, dweight, grad.sum(0)


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy of weight [N, K] in oneDNN's layout, chosen for inputs of about `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
