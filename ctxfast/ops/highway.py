"""A highway layer (Srivastava et al., 2015): the matrix product of the platform, our gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _native_char_cnn, _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference
from ctxfast.ops._validate import require_floating, shape_of
from ctxfast.ops.linear import linear


def _fake(projected, input):
    return input.new_empty(input.shape)


def _fake_backward(grad, projected, input):
    return projected.new_empty(projected.shape), input.new_empty(input.shape)


highway_gate_operator = Operator(
    "highway_gate",
    Implementation("native", _native_char_cnn.highway_gate, _native_char_cnn.highway_gate_refuses),
    Implementation(
        "triton",
        lambda projected, input: _triton.highway_gate(projected, input),
        lambda projected, input: _triton.elementwise_refuses(input),
    ),
    Implementation("reference", reference.highway_gate, never),
)
highway_gate_backward_operator = Operator(
    "highway_gate_backward",
    Implementation(
        "native",
        _native_char_cnn.highway_gate_backward,
        _native_char_cnn.highway_gate_backward_refuses,
    ),
    Implementation("reference", reference.highway_gate_backward, never),
)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    """Serves the forward and the backward operator."""
    ctx.save_for_backward(*inputs)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return gradients_through_reference(reference.highway_gate_backward, ctx.saved_tensors, grads)


_highway_gate_backward = define(
    "(Tensor grad_output, Tensor projected, Tensor input) -> (Tensor, Tensor)",
    highway_gate_backward_operator,
    _fake_backward,
    setup_context=_setup,
    backward=_double_backward,
)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _highway_gate_backward(grad, *ctx.saved_tensors)


_highway_gate = define(
    "(Tensor projected, Tensor input) -> Tensor",
    highway_gate_operator,
    _fake,
    setup_context=_setup,
    backward=_backward,
)


def highway(input: Tensor, weight: Tensor, bias: Tensor, *, packed: Tensor | None = None) -> Tensor:
    """g * input + (1 - g) * relu(t), with t, c = split(input @ weight^T + bias) and g = sigmoid(c).

    input: [..., N], floating;  weight: [2N, N] and bias: [2N], the transformation before the gate
    packed: a copy of weight as `ctxfast.ops.linear` takes it

    Returns [..., N]. Raises TypeError for a wrong dtype and ValueError for a wrong shape or device.
    """
    op = "highway"
    require_floating(op, "input", input)
    size = input.shape[-1] if input.dim() else 0
    if weight.shape != (2 * size, size):
        raise ValueError(
            f"{op}: weight must be {(2 * size, size)} for an input of {shape_of(input)}, "
            f"got {shape_of(weight)}"
        )
    projected = linear(input, weight, bias, packed=packed)
    return _highway_gate(projected, input.to(projected.dtype))
