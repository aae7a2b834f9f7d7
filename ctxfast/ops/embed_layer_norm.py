"""The embedding layer of BERT (Devlin et al., 2019): three lookups, their sum, layer normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _dispatch, _native_layer_norm, _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference
from ctxfast.ops._validate import require_floating, require_same, shape_of


def _reference(ids, types, positions, word, token_type, position, weight, bias, eps, padding_idx):
    if ids.device.type == "cpu":
        _check_ids("input_ids", ids, word)
        _check_ids("token_type_ids", types, token_type)
        _check_ids("position_ids", positions, position)
    return reference.embed_layer_norm(
        ids, types, positions, word, token_type, position, weight, bias, eps
    )


def _check_ids(name: str, ids: Tensor, table: Tensor) -> None:
    outside = ids[(ids < 0) | (ids >= table.shape[0])]
    if outside.numel():
        raise ValueError(
            f"embed_layer_norm: {name} must be in [0, {table.shape[0]}), got {int(outside[0])}"
        )


def _native_forward(ids, types, positions, word, token_type, position, weight, bias, eps, _):
    return _native_layer_norm.embed_layer_norm(
        ids, types, positions, word, token_type, position, weight, bias, eps
    )


def _native_refuses(ids, types, positions, word, token_type, position, weight, bias, eps, _):
    return _native_layer_norm.embed_layer_norm_refuses(ids, word, weight)


def _native_backward_refuses(grad, ids, types, positions, word, *rest):
    return _native_layer_norm.embed_layer_norm_refuses(
        ids, word, rest[2]
    ) or _native_layer_norm.embed_layer_norm_refuses(ids, grad, None)


def _triton_forward(ids, types, positions, word, token_type, position, weight, bias, eps, _):
    return _triton.embed_layer_norm(
        ids, types, positions, word, token_type, position, weight, bias, eps
    )


def _triton_refuses(ids, types, positions, word, token_type, position, weight, bias, eps, _):
    return _triton.layer_norm_refuses(word)


def _triton_backward_refuses(grad, ids, types, positions, word, *rest):
    return _triton.layer_norm_backward_refuses(word)


def _fake(ids, types, positions, word, token_type, position, weight, bias, eps, padding_idx):
    return word.new_empty((*ids.shape, word.shape[1]))


def _reference_backward(
    grad, ids, types, positions, word, token_type, position, weight, bias, eps, padding_idx
):
    return reference.embed_layer_norm_backward(
        grad,
        ids,
        types,
        positions,
        word,
        token_type,
        position,
        weight,
        eps,
        None if padding_idx < 0 else padding_idx,
    )


def _fake_backward(grad, ids, types, positions, *arguments):
    return tuple(table.new_empty(table.shape) for table in arguments[:5])


embed_layer_norm_operator = Operator(
    "embed_layer_norm",
    Implementation("native", _native_forward, _native_refuses),
    Implementation("triton", _triton_forward, _triton_refuses),
    Implementation("reference", _reference, never),
)
embed_layer_norm_backward_operator = Operator(
    "embed_layer_norm_backward",
    Implementation(
        "native", _native_layer_norm.embed_layer_norm_backward, _native_backward_refuses
    ),
    Implementation("triton", _triton.embed_layer_norm_backward, _triton_backward_refuses),
    Implementation("reference", _reference_backward, never),
)

_ARGUMENTS = (
    "Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor word_embeddings, "
    "Tensor token_type_embeddings, Tensor position_embeddings, Tensor weight, Tensor bias, "
    "float eps, int padding_idx)"
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, ctx.padding_idx = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, ids, types, positions, *tables = ctx.saved_tensors

    def function(grad, *tables):
        return _reference_backward(grad, ids, types, positions, *tables, ctx.eps, ctx.padding_idx)

    dgrad, *dtables = gradients_through_reference(function, (grad, *tables), grads)
    return dgrad, None, None, None, *dtables, None, None


_embed_layer_norm_backward = define(
    f"(Tensor grad_output, {_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    embed_layer_norm_backward_operator,
    _fake_backward,
    setup_context=_setup,
    backward=_double_backward,
)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _embed_layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.padding_idx)
    return None, None, None, *gradients, None, None


_embed_layer_norm = define(
    f"({_ARGUMENTS} -> Tensor",
    embed_layer_norm_operator,
    _fake,
    setup_context=_setup,
    backward=_backward,
)


def embed_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word_embeddings: Tensor,
    token_type_embeddings: Tensor,
    position_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]) in one pass.

    input_ids, token_type_ids, position_ids: int64 or int32 of one shape [...]
    word_embeddings [V, N], token_type_embeddings [C, N], position_embeddings [P, N], weight [N], bias [N]: one dtype
    padding_idx: the row of word_embeddings that receives no gradient, as in `torch.nn.Embedding`

    Returns [..., N]. Raises TypeError for a wrong dtype and ValueError for a wrong shape or device; on a CPU also for
    an id outside its table, naming it.
    """
    op = "embed_layer_norm"
    operands = (
        input_ids,
        token_type_ids,
        position_ids,
        word_embeddings,
        token_type_embeddings,
        position_embeddings,
        weight,
        bias,
    )
    if _dispatch.parts_unseen("cpu"):
        output = _native_layer_norm.embed_layer_norm_of(operands, eps)
        if output is not None:
            return output
    tables = (
        ("word_embeddings", word_embeddings, input_ids, "input_ids"),
        ("token_type_embeddings", token_type_embeddings, token_type_ids, "token_type_ids"),
        ("position_embeddings", position_embeddings, position_ids, "position_ids"),
    )
    size = word_embeddings.shape[-1]
    for name, table, ids, ids_name in tables:
        require_floating(op, name, table)
        require_same(op, name, table, "word_embeddings", word_embeddings)
        if table.dim() != 2 or table.shape[1] != size:
            raise ValueError(f"{op}: {name} must be [rows, {size}], got {shape_of(table)}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: {ids_name} must be int64 or int32, got {ids.dtype}")
        if ids.shape != input_ids.shape or ids.device != table.device:
            raise ValueError(
                f"{op}: {ids_name} must be {tuple(input_ids.shape)} on {table.device}, "
                f"got {shape_of(ids)} on {ids.device}"
            )
    for name, parameter in (("weight", weight), ("bias", bias)):
        require_same(op, name, parameter, "word_embeddings", word_embeddings)
        if parameter.shape != (size,):
            raise ValueError(f"{op}: {name} must be [{size}], got {shape_of(parameter)}")
    return _embed_layer_norm(*operands, eps, -1 if padding_idx is None else padding_idx)
