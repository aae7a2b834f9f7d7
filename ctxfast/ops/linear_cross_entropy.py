"""Cross entropy of a projection to the vocabulary, without the logits of the rows that have no label."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import (
    _cross_entropy_chunks,
    _native_linear,
    _native_matrix_product,
    _onednn,
    _triton,
)
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference
from ctxfast.ops._validate import autocast, require_floating, require_same, shape_of

_NO_GRADIENT = (False, False, False)


def _check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    outside = labels[((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)]
    if outside.numel():
        raise ValueError(
            f"linear_cross_entropy: labels must be {ignore_index} or in [0, {vocabulary}), got {int(outside[0])}"
        )


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input @ weight^T + bias by the product that is fastest for these tensors."""
    if _native_matrix_product.refuses(input, weight, bias) is None:
        return _native_matrix_product.product(input, weight.t(), bias)
    arguments = (input, weight, bias, "none", None, None)
    if _onednn.linear_refuses(*arguments) is None:
        return _onednn.linear(*arguments)
    return F.linear(input, weight, bias)


def _logits(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same where a large weight meets few rows: put into panels a piece at a time, it is read from memory once."""
    arguments = (input, weight, bias, "none", None, None)
    if _native_linear.linear_refuses(*arguments) is None:
        return _native_linear.linear(*arguments)
    return _product(input, weight, bias)


def _native(hidden, weight, bias, labels, ignore_index, of_hidden, of_weight, of_bias):
    _check_labels(labels, ignore_index, weight.shape[0])
    return _cross_entropy_chunks.loss_and_gradients(
        hidden,
        weight,
        bias,
        labels,
        ignore_index,
        (of_hidden, of_weight, of_bias),
        _logits,
        _product,
        _native_linear.cross_entropy_,
    )


def _native_refuses(hidden, weight, bias, labels, *rest):
    if 0 in weight.shape:
        return "empty weight"
    return _native_linear.cross_entropy_refuses(hidden, weight, bias, labels)


def _triton_refuses(hidden, weight, *rest):
    return "empty weight" if 0 in weight.shape else _triton.elementwise_refuses(hidden)


def _reference(hidden, weight, bias, labels, ignore_index, of_hidden, of_weight, of_bias):
    if labels.device.type == "cpu":
        _check_labels(labels, ignore_index, weight.shape[0])
    loss = reference.linear_cross_entropy(hidden, weight, bias, labels, ignore_index)
    wanted = (of_hidden, of_weight, of_bias)
    if not any(wanted):
        return (loss, *(hidden.new_empty(0) for _ in wanted))
    gradients = reference.linear_cross_entropy_backward(
        torch.ones_like(loss), hidden, weight, bias, labels, ignore_index
    )
    return (
        loss,
        *(g.contiguous() if w else g.new_empty(0) for g, w in zip(gradients, wanted, strict=True)),
    )


def _fake(hidden, weight, bias, labels, ignore_index, of_hidden, of_weight, of_bias):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        weight.new_empty(weight.shape[0] if of_bias else 0),
    )


def _scaled(grad, hidden, weight, bias, labels, ignore_index, dhidden, dweight, dbias):
    return tuple(g * grad.to(g.dtype) for g in (dhidden, dweight, dbias))


def _fake_scaled(grad, hidden, weight, bias, labels, ignore_index, *gradients):
    return tuple(g.new_empty(g.shape) for g in gradients)


linear_cross_entropy_operator = Operator(
    "linear_cross_entropy",
    Implementation("native", _native, _native_refuses),
    Implementation("triton", _triton.linear_cross_entropy, _triton_refuses),
    Implementation("reference", _reference, never),
)
# One multiplication, the same whichever implementation found the gradients.
linear_cross_entropy_backward_operator = Operator(
    "linear_cross_entropy_backward",
    *(Implementation(name, _scaled, never) for name in ("native", "triton", "reference")),
)

_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index"
_GRADIENTS = "Tensor, Tensor, Tensor"


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.ignore_index, dhidden, dweight, dbias = inputs
    ctx.save_for_backward(*tensors)
    ctx.wanted = [g.numel() > 0 for g in (dhidden, dweight, dbias)]


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, hidden, weight, bias, labels = ctx.saved_tensors
    given = tuple(g if w else None for g, w in zip(grads, ctx.wanted, strict=True))

    def function(grad, hidden, weight, bias):
        return reference.linear_cross_entropy_backward(
            grad, hidden, weight, bias, labels, ctx.ignore_index
        )

    found = gradients_through_reference(function, (grad, hidden, weight, bias), given)
    return *found, None, None, None, None, None


# The gradients that the forward pass found, times the gradient of the loss. The first arguments serve double backward.
_linear_cross_entropy_backward = define(
    f"(Tensor grad_output, {_ARGUMENTS}, Tensor dhidden, Tensor dweight, Tensor dbias) -> ({_GRADIENTS})",
    linear_cross_entropy_backward_operator,
    _fake_scaled,
    setup_context=_setup_backward,
    backward=_double_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, ctx.ignore_index, *ctx.wanted = inputs
    ctx.given_away = False
    ctx.set_materialize_grads(False)  # no zeros as large as weight for what has no gradient
    gradients = output[1:]
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(hidden, weight, bias, labels, *gradients)


def _is_one(grad: Tensor) -> bool:
    """Whether Python may look at the gradient of the loss here, finds 1, and no one differentiates the gradients."""
    return (
        not torch.compiler.is_compiling()
        and type(grad) is Tensor
        and grad.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and grad.item() == 1.0
    )


def _backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    hidden, weight, bias, labels, *gradients = ctx.saved_tensors
    if ctx.given_away:
        # By a graph that is kept: whoever has the gradients may have written to them.
        with torch.no_grad():
            _, *gradients = _linear_cross_entropy(
                hidden, weight, bias, labels, ctx.ignore_index, *ctx.wanted
            )
    if _is_one(grad):
        # The gradient of weight is the largest tensor of a step: no copy of it. `.data`, because what its owner
        # writes must not count as a write to a tensor that the graph keeps.
        ctx.given_away = True
        found = [g.data for g in gradients]
    else:
        found = _linear_cross_entropy_backward(
            grad, hidden, weight, bias, labels, ctx.ignore_index, *gradients
        )
    given = [g if w else None for g, w in zip(found, ctx.wanted, strict=True)]
    return *given, None, None, None, None, None


_linear_cross_entropy = define(
    f"({_ARGUMENTS}, bool of_hidden, bool of_weight, bool of_bias) -> (Tensor, {_GRADIENTS})",
    linear_cross_entropy_operator,
    _fake,
    setup_context=_setup,
    backward=_backward,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
) -> Tensor:
    """cross_entropy(hidden @ weight^T + bias, labels), mean over the labelled rows, which alone are computed.

    hidden: [..., K], floating;  weight: [V, K] and bias: [V] or None, of the same dtype
    labels: int64 or int32 [...], each ignore_index or in [0, V)

    Returns a scalar, float32 (float64 for float64 input). As in torch, it is NaN where no row has a label; the
    gradients are then 0. The logits of at most 2^25 elements exist at a time, whatever the number of rows. Where
    gradients are needed the same call computes them, so that the backward pass is one multiplication.

    Raises TypeError for a wrong dtype and ValueError for a wrong shape or device; on a CPU also for a label outside
    the vocabulary, naming it. On a GPU, where labels are not read on the host, the loss is then NaN. There the host
    waits for the number of labels once a call; under the capture of a CUDA graph all rows are computed instead.
    """
    op = "linear_cross_entropy"
    require_floating(op, "hidden", hidden)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden must be [..., {weight.shape[-1]}] for a weight of {shape_of(weight)}, "
            f"got {shape_of(hidden)}"
        )
    require_same(op, "weight", weight, "hidden", hidden)
    if bias is not None:
        require_same(op, "bias", bias, "hidden", hidden)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {shape_of(bias)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels must be int64 or int32, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1] or labels.device != hidden.device:
        raise ValueError(
            f"{op}: labels must be {tuple(hidden.shape[:-1])} on {hidden.device}, "
            f"got {shape_of(labels)} on {labels.device}"
        )
    wanted = _NO_GRADIENT
    if torch.is_grad_enabled():
        wanted = tuple(t is not None and t.requires_grad for t in (hidden, weight, bias))  # type: ignore[assignment]
    rows = hidden.reshape(-1, hidden.shape[-1])
    return _linear_cross_entropy(rows, weight, bias, labels.reshape(-1), ignore_index, *wanted)[0]
