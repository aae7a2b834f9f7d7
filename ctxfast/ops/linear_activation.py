"""A linear layer with its epilogue that keeps what the activation was given: the form that trains on a GPU.

`ops.linear` calls it; its double backward goes through the reference.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ctxfast.ops import _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference
from ctxfast.reference.linear import (
    activation_backward,
    linear_activation_backward,
    linear_backward,
)
from ctxfast.reference.linear import linear_activation as _reference


def _reference_backward(
    grad, pre_activation, input, weight, bias, activation, of_input, of_weight, of_bias
):
    rows = input.shape[:-1].numel()
    dz = activation_backward(grad, pre_activation, activation).reshape(rows, weight.shape[0])
    found = linear_backward(dz, input.reshape(rows, weight.shape[1]), weight)
    dinput, dweight, dbias = (
        g.contiguous() if wanted else g.new_empty(0)
        for g, wanted in zip(found, (of_input, of_weight, of_bias), strict=True)
    )
    return dinput.view(input.shape) if of_input else dinput, dweight, dbias


def _fake(input, weight, bias, activation, residual):
    shape = (*input.shape[:-1], weight.shape[0])
    return input.new_empty(shape), input.new_empty(shape)


def _fake_backward(
    grad, pre_activation, input, weight, bias, activation, of_input, of_weight, of_bias
):
    return (
        input.new_empty(input.shape if of_input else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        weight.new_empty(weight.shape[0] if of_bias else 0),
    )


def _refuses(input, *rest):
    return _triton.elementwise_refuses(input)


linear_activation_operator = Operator(
    "linear_activation",
    Implementation("triton", _triton.linear_activation, _refuses),
    Implementation("reference", _reference, never),
)
linear_activation_backward_operator = Operator(
    "linear_activation_backward",
    Implementation("triton", _triton.linear_activation_backward, _refuses),
    Implementation("reference", _reference_backward, never),
)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, _, input, weight, bias, ctx.activation, *ctx.wanted = inputs
    ctx.save_for_backward(grad, input, weight, bias)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    given = tuple(g if w else None for g, w in zip(grads, ctx.wanted, strict=True))
    dgrad, dinput, dweight, dbias = gradients_through_reference(
        lambda grad, input, weight, bias: linear_activation_backward(
            grad, input, weight, bias, ctx.activation
        ),
        ctx.saved_tensors,
        given,
    )
    return dgrad, None, dinput, dweight, dbias, None, None, None, None


_linear_activation_backward = define(
    "(Tensor grad_output, Tensor pre_activation, Tensor input, Tensor weight, Tensor? bias, str activation, "
    "bool of_input, bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)",
    linear_activation_backward_operator,
    _fake_backward,
    setup_context=_setup_backward,
    backward=_double_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, bias, ctx.activation, residual = inputs
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, weight, bias, output[1])


def _backward(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    input, weight, bias, pre_activation = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = _linear_activation_backward(
        grad, pre_activation, input, weight, bias, ctx.activation, *wanted
    )
    given = (g if w else None for g, w in zip(found, wanted, strict=True))
    return *given, None, grad if ctx.has_residual else None


# activation(input @ weight^T + bias) + residual, and input @ weight^T + bias, which has no gradient of its own.
linear_activation = define(
    "(Tensor input, Tensor weight, Tensor? bias, str activation, Tensor? residual) -> (Tensor, Tensor)",
    linear_activation_operator,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
