"""Layer normalisation fused with what comes before it: residual additions, dropout, embedding lookups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _native_layer_norm, _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference
from ctxfast.ops._validate import (
    dropout_seed,
    require_floating,
    require_probability,
    require_same,
    shape_of,
)


def _reference(input, residual, weight, bias, eps, p, seed, sequence_ids, positions):
    return reference.add_layer_norm(
        input,
        residual,
        weight,
        bias,
        eps,
        dropout_p=p,
        seed=seed,
        sequence_ids=sequence_ids,
        positions=positions,
    )


def _reference_backward(grad, input, residual, weight, bias, eps, p, seed, sequence_ids, positions):
    dinput, dresidual, dweight, dbias = reference.add_layer_norm_backward(
        grad,
        input,
        residual,
        weight,
        eps,
        dropout_p=p,
        seed=seed,
        sequence_ids=sequence_ids,
        positions=positions,
    )
    if residual is None or p == 0.0:  # without dropout it is the gradient of input
        dresidual = input.new_empty(0)
    return dinput.contiguous(), dresidual.contiguous(), dweight, dbias


def _fake(input, residual, weight, bias, eps, p, seed, sequence_ids, positions):
    return input.new_empty(input.shape)


def _fake_backward(grad, input, residual, weight, bias, eps, p, *rest):
    dresidual = input.new_empty(0 if residual is None or p == 0.0 else input.shape)
    return (
        input.new_empty(input.shape),
        dresidual,
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


def _native_refuses(input, residual, weight, bias, eps, p, seed, sequence_ids, positions):
    return _native_layer_norm.add_layer_norm_refuses(input, residual, weight, bias)


def _native_backward_refuses(grad, input, residual, weight, bias, *rest):
    return _native_layer_norm.add_layer_norm_refuses(
        input, residual, weight, bias
    ) or _native_layer_norm.add_layer_norm_refuses(input, grad, None, None)


def _triton_refuses(input, *rest):
    return _triton.layer_norm_refuses(input)


def _triton_backward_refuses(grad, input, *rest):
    return _triton.layer_norm_backward_refuses(input)


add_layer_norm_operator = Operator(
    "add_layer_norm",
    Implementation("native", _native_layer_norm.add_layer_norm, _native_refuses),
    Implementation("triton", _triton.add_layer_norm, _triton_refuses),
    Implementation("reference", _reference, never),
)
add_layer_norm_backward_operator = Operator(
    "add_layer_norm_backward",
    Implementation("native", _native_layer_norm.add_layer_norm_backward, _native_backward_refuses),
    Implementation("triton", _triton.add_layer_norm_backward, _triton_backward_refuses),
    Implementation("reference", _reference_backward, never),
)

_NARROW = (torch.bfloat16, torch.float16)
_ARGUMENTS = (
    "Tensor input, Tensor? residual, Tensor weight, Tensor bias, float eps, float dropout_p, "
    "Tensor? seed, Tensor? sequence_ids, Tensor? positions)"
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Serves the forward and the backward operator: every input is kept."""
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.arguments = [None if isinstance(x, Tensor) else x for x in inputs]


def _restore(ctx: Any) -> list[Any]:
    arguments = list(ctx.arguments)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        arguments[place] = tensor
    return arguments


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    arguments = _restore(ctx)
    tensors, rest = arguments[:5], arguments[5:]
    found = gradients_through_reference(
        lambda *inputs: _reference_backward(*inputs, *rest), tuple(tensors), grads
    )
    return *found, *(None,) * len(rest)


_add_layer_norm_backward = define(
    f"(Tensor grad_output, {_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor)",
    add_layer_norm_backward_operator,
    _fake_backward,
    setup_context=_setup,
    backward=_double_backward,
)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = _restore(ctx)
    dinput, dresidual, dweight, dbias = _add_layer_norm_backward(grad, *arguments)
    residual, dropout_p = arguments[1], arguments[5]
    if residual is None:
        return dinput, None, dweight, dbias, *(None,) * 5
    return dinput, dinput if dropout_p == 0.0 else dresidual, dweight, dbias, *(None,) * 5


_add_layer_norm = define(
    f"({_ARGUMENTS} -> Tensor",
    add_layer_norm_operator,
    _fake,
    setup_context=_setup,
    backward=_backward,
)


def _row_coordinates(input: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence and position of every row of [..., S, N]: the last leading dimension counts positions."""
    leading = input.shape[:-1]
    length = leading[-1] if leading else 1
    rows = torch.arange(leading.numel(), device=input.device).view(leading)
    return rows // max(length, 1), rows % max(length, 1)


def add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(input) + residual) in one pass over memory (Ba et al., 2016), statistics in float32.

    input:  [..., N], floating;  residual: the same shape and dtype, or None
    weight and bias: [N]; float32 stays so beside a narrower input, others are cast to the dtype of input
    dropout_p: active when > 0, mask as in `ctxfast.reference.dropout` with these coordinates of each row:
    sequence_ids, positions: integers [...]; by default the last leading dimension counts positions, the others
            sequences
    seed:   int64 [1] on the device of input, by default drawn from torch's generator

    Returns [..., N]. Raises TypeError for a wrong dtype and ValueError for a wrong shape, device or value.
    """
    op = "add_layer_norm"
    require_floating(op, "input", input)
    if torch.is_autocast_enabled(input.device.type) and residual is not None:
        wide = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(wide), residual.to(wide)
    size = input.shape[-1:]
    if input.dim() == 0:
        raise ValueError(f"{op}: input must be [..., features], got a scalar")
    if residual is not None:
        require_same(op, "residual", residual, "input", input)
        if residual.shape != input.shape:
            raise ValueError(
                f"{op}: residual must be {tuple(input.shape)}, got {shape_of(residual)}"
            )
    for name, parameter in (("weight", weight), ("bias", bias)):
        require_floating(op, name, parameter)
        if parameter.shape != size:
            raise ValueError(f"{op}: {name} must be {tuple(size)}, got {shape_of(parameter)}")
        if parameter.device != input.device:
            raise ValueError(f"{op}: {name} must be on {input.device}, got {parameter.device}")
    exact = weight.dtype == bias.dtype == torch.float32 and input.dtype in _NARROW
    if not exact:
        weight, bias = weight.to(input.dtype), bias.to(input.dtype)
    require_probability(op, dropout_p)
    seed = dropout_seed(op, dropout_p, seed, input.device)
    if dropout_p > 0.0:
        own = _row_coordinates(input)
        sequence_ids = own[0] if sequence_ids is None else sequence_ids
        positions = own[1] if positions is None else positions
        for name, rows in (("sequence_ids", sequence_ids), ("positions", positions)):
            if rows.shape != input.shape[:-1] or rows.is_floating_point():
                raise ValueError(
                    f"{op}: {name} must be integers {tuple(input.shape[:-1])}, "
                    f"got {rows.dtype} of {shape_of(rows)}"
                )
    else:
        sequence_ids = positions = None
    return _add_layer_norm(
        input, residual, weight, bias, eps, dropout_p, seed, sequence_ids, positions
    )
