"""ELMo's character convolutions with their maximum over positions (Peters et al., 2018; Kim et al., 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _native_char_cnn, _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference
from ctxfast.ops._validate import require_floating, require_same, require_tensor, shape_of
from ctxfast.reference.char_cnn import ACTIVATIONS


def _split(
    embedding: Tensor, weight: Tensor, bias: Tensor, widths: Sequence[int], counts: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The operator's one weight and bias as torch's: [n, C, width] and [n] of each width."""
    channels = embedding.shape[1]
    sizes = [n * width * channels for n, width in zip(counts, widths, strict=True)]
    weights = [
        part.view(n, width, channels).transpose(1, 2)
        for part, n, width in zip(weight.split(sizes), counts, widths, strict=True)
    ]
    return weights, list(bias.split(list(counts)))


def _join(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([weight.transpose(1, 2).reshape(-1) for weight in weights])


def _reference(ids, embedding, weight, bias, widths, counts, activation):
    if ids.device.type == "cpu":
        outside = ids[(ids < 0) | (ids >= embedding.shape[0])]
        if outside.numel():
            raise ValueError(
                f"char_cnn: ids must be in [0, {embedding.shape[0]}), got {int(outside[0])}"
            )
    filters = _split(embedding, weight, bias, widths, counts)
    return reference.char_cnn(ids, embedding, *filters, activation)


def _reference_backward(grad, ids, embedding, weight, bias, widths, counts, activation):
    filters = _split(embedding, weight, bias, widths, counts)
    dembedding, dweights, dbiases = reference.char_cnn_backward(
        grad, ids, embedding, *filters, activation
    )
    return dembedding, _join(dweights), torch.cat(dbiases)


def _fake(ids, embedding, weight, bias, widths, counts, activation):
    return embedding.new_empty((*ids.shape[:-1], bias.shape[0]))


def _fake_backward(grad, ids, embedding, weight, bias, *rest):
    return tuple(x.new_empty(x.shape) for x in (embedding, weight, bias))


char_cnn_operator = Operator(
    "char_cnn",
    Implementation(
        "native",
        _native_char_cnn.char_cnn,
        lambda *arguments: _native_char_cnn.char_cnn_refuses(*arguments[:5]),
    ),
    Implementation(
        "triton",
        lambda *arguments: _triton.char_cnn(*arguments),
        lambda *arguments: _triton.char_cnn_refuses(arguments[1]),
    ),
    Implementation("reference", _reference, never),
)
char_cnn_backward_operator = Operator(
    "char_cnn_backward",
    Implementation(
        "native",
        _native_char_cnn.char_cnn_backward,
        lambda *arguments: _native_char_cnn.char_cnn_backward_refuses(*arguments[1:6]),
    ),
    Implementation("reference", _reference_backward, never),
)

_ARGUMENTS = (
    "Tensor ids, Tensor embedding, Tensor weight, Tensor bias, int[] widths, int[] counts, "
    "str activation)"
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Serves the forward and the backward operator: every tensor is kept."""
    *tensors, ctx.widths, ctx.counts, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, ids, *parameters = ctx.saved_tensors
    rest = ctx.widths, ctx.counts, ctx.activation

    def function(grad, *parameters):
        return _reference_backward(grad, ids, *parameters, *rest)

    dgrad, *found = gradients_through_reference(function, (grad, *parameters), grads)
    return dgrad, None, *found, None, None, None


_char_cnn_backward = define(
    f"(Tensor grad_output, {_ARGUMENTS} -> (Tensor, Tensor, Tensor)",
    char_cnn_backward_operator,
    _fake_backward,
    setup_context=_setup,
    backward=_double_backward,
)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = _char_cnn_backward(grad, *ctx.saved_tensors, ctx.widths, ctx.counts, ctx.activation)
    return None, *found, None, None, None


_char_cnn = define(
    f"({_ARGUMENTS} -> Tensor",
    char_cnn_operator,
    _fake,
    setup_context=_setup,
    backward=_backward,
)


def char_cnn(
    ids: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str = "relu",
) -> Tensor:
    """activation(max over positions of the convolutions of embedding[ids]), all widths in one pass.

    ids:       int64 or int32 [..., M], M characters a token
    embedding: [V, C];  weights: one [n, C, width] for each width, 1 <= width <= M;  biases: one [n] for each
    activation: "relu" or "tanh"

    Returns [..., sum of n], the widths in the order given. Of equal windows the first gets the gradient. Raises
    TypeError for a wrong dtype and ValueError for a wrong shape, device or name; on a CPU also for an id outside the
    table, naming it.
    """
    op = "char_cnn"
    require_tensor(op, "ids", ids)
    require_floating(op, "embedding", embedding)
    if activation not in ACTIVATIONS:
        raise ValueError(f'{op}: activation must be "relu" or "tanh", got {activation!r}')
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: ids must be int64 or int32, got {ids.dtype}")
    if ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(f"{op}: ids must be [..., characters], got {shape_of(ids)}")
    if ids.device != embedding.device:
        raise ValueError(f"{op}: ids must be on {embedding.device}, got {ids.device}")
    if embedding.dim() != 2 or 0 in embedding.shape:
        raise ValueError(f"{op}: embedding must be [rows, features], got {shape_of(embedding)}")
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"{op}: weights and biases must be as many, at least one, got {len(weights)} and {len(biases)}"
        )
    for weight, bias in zip(weights, biases, strict=True):
        require_same(op, "weights", weight, "embedding", embedding)
        require_same(op, "biases", bias, "embedding", embedding)
        if weight.dim() != 3 or weight.shape[1] != embedding.shape[1] or weight.shape[0] == 0:
            raise ValueError(
                f"{op}: weights must be [filters, {embedding.shape[1]}, width], got {shape_of(weight)}"
            )
        if not 1 <= weight.shape[2] <= ids.shape[-1]:
            raise ValueError(
                f"{op}: widths must be between 1 and {ids.shape[-1]}, the characters of a token, "
                f"got {weight.shape[2]}"
            )
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: biases must be [{weight.shape[0]}], got {shape_of(bias)}")
    return _char_cnn(
        ids,
        embedding,
        _join(weights),
        torch.cat(list(biases)),
        [weight.shape[2] for weight in weights],
        [weight.shape[0] for weight in weights],
        activation,
    )
