"""Linear layers with a fused epilogue: csrc on packed weights, else the GEMM library of the platform.

On a GPU that library is cuBLAS, and one Triton pass over what it wrote does the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _dispatch, _native_linear, _native_matrix_product, _onednn, _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference
from ctxfast.ops._validate import (
    autocast,
    require_floating,
    require_same,
    shape_of,
)
from ctxfast.ops.linear_activation import linear_activation
from ctxfast.reference.linear import ACTIVATIONS, activation_backward

_TRANSPOSED_ROWS = 64  # from which on the product that takes weights as they lie is the faster


def _reference(input, weight, bias, activation, residual, packed):
    return reference.linear(input, weight, bias, activation=activation, residual=residual)


def _fake(input, weight, bias, activation, residual, packed):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_backward(grad, input, weight):
    return (
        input.new_empty(input.shape),
        weight.new_empty(weight.shape),
        grad.new_empty(weight.shape[0]),
    )


def _is_transposed(weight, packed):
    """Whether the weight is the transpose of one that lies in rows, as it meets gradients."""
    return packed is None and weight.t().is_contiguous() and not weight.is_contiguous()


def _native(input, weight, bias, activation, residual, packed):
    if _is_transposed(weight, packed):
        rows = input.reshape(-1, weight.shape[1])
        output = _native_matrix_product.product(rows, weight.t(), bias)
        return output.view(*input.shape[:-1], weight.shape[0])
    return _native_linear.linear(input, weight, bias, activation, residual, packed)


def _native_refuses(input, weight, bias, activation, residual, packed):
    if _is_transposed(weight, packed) and activation == "none" and residual is None:
        if input.numel() < _TRANSPOSED_ROWS * weight.shape[1]:
            return "few rows by a transposed weight are faster through the GEMM library"
        return _native_matrix_product.refuses(input, weight, bias)
    return _native_linear.linear_refuses(input, weight, bias, activation, residual, packed)


def _native_backward(grad, input, weight):
    dinput = _native_matrix_product.product(grad, weight)
    return dinput, *_native_matrix_product.product_and_row_sums(grad.t(), input)


def _triton_refuses(input, *rest):
    return _triton.elementwise_refuses(input)


def _cublas_refuses(grad, input, weight):
    return None if grad.is_cuda else f"device {grad.device}"


linear_operator = Operator(
    "linear",
    Implementation("native", _native, _native_refuses),
    Implementation("onednn", _onednn.linear, _onednn.linear_refuses),
    Implementation("triton", _triton.linear, _triton_refuses),
    Implementation("reference", _reference, never),
)
linear_backward_operator = Operator(
    "linear_backward",
    Implementation("native", _native_backward, _native_matrix_product.refuses),
    Implementation("onednn", _onednn.linear_backward, _onednn.linear_backward_refuses),
    Implementation("cublas", reference.linear_backward, _cublas_refuses),
    Implementation("reference", reference.linear_backward, never),
)


def _setup_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return gradients_through_reference(reference.linear_backward, ctx.saved_tensors, grads)


_linear_backward = define(
    "(Tensor grad_output, Tensor input, Tensor weight) -> (Tensor, Tensor, Tensor)",
    linear_backward_operator,
    _fake_backward,
    setup_context=_setup_backward,
    backward=_double_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, ctx.activation, residual, _ = inputs
    ctx.save_for_backward(input, weight, bias)
    ctx.has_residual = residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias = ctx.saved_tensors
    pre_activation_grad = grad
    if ctx.activation != "none":
        z = _linear(input, weight, bias, "none", None, None)
        pre_activation_grad = activation_backward(grad, z, ctx.activation)
    rows = pre_activation_grad.reshape(-1, weight.shape[0])
    if any(ctx.needs_input_grad[1:3]):
        dinput, dweight, dbias = _linear_backward(rows, input.reshape(-1, weight.shape[1]), weight)
    else:  # frozen, as under adapters: one product instead of two
        dinput, dweight, dbias = _linear(rows, weight.t(), None, "none", None, None), None, None
    return (
        dinput.view(input.shape),
        dweight,
        None if bias is None else dbias,
        None,
        grad if ctx.has_residual else None,
        None,
    )


_linear = define(
    "(Tensor input, Tensor weight, Tensor? bias, str activation, Tensor? residual, Tensor? packed) -> Tensor",
    linear_operator,
    _fake,
    setup_context=_setup,
    backward=_backward,
    also=("MkldnnCPU",),  # the layout of a packed weight
)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """activation(input @ weight^T + bias) + residual in one pass.

    input:  [..., K] and weight [N, K], of one floating dtype;  bias: [N];  residual: [..., N]
    activation: None, "gelu" (exact, with erf), "gelu_tanh" or "tanh"
    packed: a copy of weight in the layout of csrc or of the GEMM library, from `ctxfast.nn.PackedLinear`; inference
            only. The caller vouches that it holds the values of weight

    Returns [..., N]. With gradients what the activation was given is kept and not recomputed. On processors with AMX a
    float32 product of many rows is a sum of bfloat16 products of exact parts, as accurate as one of float32 (Henry,
    Tang and Heinecke 2019).
    Raises TypeError for a wrong dtype and ValueError for a wrong shape, device or name.
    """
    op = "linear"
    require_floating(op, "input", input)
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS if name != "none")
        raise ValueError(f"{op}: activation must be None or one of {names}, got {activation!r}")
    if torch.is_autocast_enabled(input.device.type):
        input, weight, bias, residual = autocast(input, weight, bias, residual)  # type: ignore[assignment]
        packed = packed if packed is not None and packed.dtype == input.dtype else None
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: input must be [..., {weight.shape[-1]}] for a weight of {shape_of(weight)}, got {shape_of(input)}"
        )
    require_same(op, "weight", weight, "input", input)
    output_shape = (*input.shape[:-1], weight.shape[0])
    if bias is not None:
        require_same(op, "bias", bias, "input", input)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {shape_of(bias)}")
    if residual is not None:
        require_same(op, "residual", residual, "input", input)
        if residual.shape != output_shape:
            raise ValueError(f"{op}: residual must be {output_shape}, got {shape_of(residual)}")
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, weight, bias, residual)
    )
    if not needs_grad:
        return _linear(input, weight, bias, activation or "none", residual, packed)
    if input.is_cuda or _dispatch.backend() == "triton":
        if activation is None:
            return _linear(input, weight, bias, "none", residual, None)
        return linear_activation(input, weight, bias, activation, residual)[0]
    output = _linear(input, weight, bias, "none", None, None)
    output = ACTIVATIONS[activation or "none"](output)
    return output if residual is None else output + residual
