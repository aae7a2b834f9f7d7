"""Registration of the LSTM operator, one direction or two, and its gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ctxfast.ops import _lstm, _native_lstm
from ctxfast.ops import _native_lstm_paths as _cuda
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference

# What a gradient flows to: everything up to c0.
_DIFFERENTIABLE = 12
_ARGUMENTS = 20  # without save
_INPUTS = (
    "Tensor input, Tensor? input_reverse, Tensor weight_ih, Tensor? weight_ih_reverse, "
    "Tensor weight_hh, Tensor? weight_hh_reverse, Tensor? bias, Tensor? bias_reverse, "
    "Tensor? weight_hr, Tensor? weight_hr_reverse, Tensor h0, Tensor c0, Tensor? lengths, "
    "Tensor? mask, Tensor? packed, Tensor? packed_reverse, bool reverse, float? cell_clip, "
    "float? proj_clip, ScalarType? weight_dtype"
)


def implementation(name: str, recurrence: _lstm.Recurrence, refuses: Any) -> Implementation:
    """refuses(*arguments of the operator, save) gives the reason why the recurrence cannot run them, or None."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        return _lstm.forward(recurrence, arguments[:-1], arguments[-1]).tensors()

    return Implementation(name, run, refuses)


def implementation_backward(
    name: str, recurrence: _lstm.Recurrence, refuses: Any
) -> Implementation:
    """refuses as for `implementation`, without save."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        grads, inputs, kept = arguments[:3], arguments[3:-6], _lstm.Kept(*arguments[-6:])
        return _lstm.backward(recurrence, grads, inputs, kept)

    return Implementation(name, run, lambda *arguments: refuses(*arguments[3:-6]))


lstm_operator = Operator(
    "lstm",
    implementation("cuda_persistent", _cuda.PERSISTENT, _cuda.persistent_refuses),
    implementation("cuda_stepwise", _cuda.STEPWISE, _cuda.stepwise_refuses),
    implementation("native", _native_lstm.RECURRENCE, _native_lstm.refuses),
    implementation("reference", _lstm.REFERENCE, never),
)
lstm_backward_operator = Operator(
    "lstm_backward",
    implementation_backward(
        "cuda_persistent", _cuda.PERSISTENT, partial(_cuda.persistent_refuses, backward=True)
    ),
    implementation_backward("cuda_stepwise", _cuda.STEPWISE, _cuda.stepwise_refuses),
    implementation_backward("native", _native_lstm.RECURRENCE, _native_lstm.refuses),
    implementation_backward("reference", _lstm.REFERENCE, never),
)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    directions, sequences = _lstm.parse(*arguments[:-1])
    return _lstm.Kept.allocate(directions, sequences, arguments[-1]).tensors()


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = arguments[3 : 3 + _DIFFERENTIABLE]
    return tuple(inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)  # zeros for the gates that are kept would be large
    _keep(ctx, (*inputs[:-1], *output))


def _keep(ctx: Any, values: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*(x for x in values if isinstance(x, Tensor)))
    ctx.places = [i for i, x in enumerate(values) if isinstance(x, Tensor)]
    ctx.arguments = [None if isinstance(x, Tensor) else x for x in values]


def _restore(ctx: Any) -> list[Any]:
    arguments = list(ctx.arguments)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        arguments[place] = tensor
    return arguments


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep(ctx, inputs)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiates the reference twice; the gradients of what is absent do not exist."""
    arguments = _restore(ctx)
    tensors, rest = arguments[: 3 + _DIFFERENTIABLE], arguments[3 + _DIFFERENTIABLE : -6]

    def first(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients_through_reference(
            lambda *values: _lstm.eager(*values, *rest), inputs[3:], inputs[:3]
        )

    present = (None if x is None else g for x, g in zip(tensors[3:], grads, strict=True))
    found = gradients_through_reference(first, tuple(tensors), tuple(present))
    return *found, *(None,) * (len(arguments) - len(found))


_lstm_backward = define(
    f"(Tensor grad_output, Tensor grad_h, Tensor grad_c, {_INPUTS}, Tensor output, Tensor h, Tensor c, "
    f"Tensor gates, Tensor cells, Tensor projected) -> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
    lstm_backward_operator,
    _fake_backward,
    setup_context=_setup_backward,
    backward=_double_backward,
)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    arguments = _restore(ctx)
    results = arguments[_ARGUMENTS : _ARGUMENTS + 3]
    present = (
        x.new_zeros(x.shape) if g is None else g for x, g in zip(results, grads, strict=False)
    )
    found = _lstm_backward(*present, *arguments)
    inputs = arguments[:_DIFFERENTIABLE]
    results = [None if x is None else g for x, g in zip(inputs, found, strict=True)]
    return *results, *(None,) * 9


lstm = define(
    f"({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lstm_operator,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
