"""Layer normalisation (Ba et al., 2016) with what surrounds it in a transformer.

    output = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias,   x = dropout(input) + residual

Statistics are taken in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast.reference.dropout import hidden_dropout


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum(
    input: Tensor,
    residual: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """dropout(input) + residual, in the dtype of the statistics."""
    x = input.to(_statistics_dtype(input.dtype))
    if dropout_p > 0.0:
        assert seed is not None and sequence_ids is not None and positions is not None
        x = hidden_dropout(x, dropout_p, seed, sequence_ids, positions)
    return x if residual is None else x + residual.to(x.dtype)


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
    """[..., N] -> [..., N]; arguments as `ctxfast.ops.add_layer_norm`."""
    x = _sum(input, residual, dropout_p, seed, sequence_ids, positions)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(input.dtype)


def add_layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, residual, weight and bias, written out; differentiable once more through autograd.

    With n = (x - mean) / sqrt(var + eps) and g = weight * grad:  dx = (g - mean(g) - n * mean(g * n)) / sqrt(var + eps)
    """
    x = _sum(input, residual, dropout_p, seed, sequence_ids, positions)
    grad = grad_output.to(x.dtype)
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised = centred * rstd
    g = grad * weight.to(x.dtype)
    projection = (g * normalised).mean(-1, keepdim=True)
    dresidual = (g - g.mean(-1, keepdim=True) - normalised * projection) * rstd
    dinput = dresidual
    if dropout_p > 0.0:
        assert seed is not None and sequence_ids is not None and positions is not None
        dinput = hidden_dropout(dresidual, dropout_p, seed, sequence_ids, positions)
    dweight = (grad * normalised).flatten(0, -2).sum(0) if x.dim() > 1 else grad * normalised
    dbias = grad.flatten(0, -2).sum(0) if x.dim() > 1 else grad
    dtype = input.dtype
    return dinput.to(dtype), dresidual.to(dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


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
) -> Tensor:
    """ids [...] -> [..., N]: word + token type + position, then layer normalisation."""
    tables = (word_embeddings, token_type_embeddings, position_embeddings)
    x = _lookup((input_ids, token_type_ids, position_ids), tables)
    return add_layer_norm(x, None, weight, bias, eps)


def _lookup(ids: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    word, token_type, position = (
        F.embedding(i, table) for i, table in zip(ids, tables, strict=True)
    )
    return word + token_type + position


def embed_layer_norm_backward(
    grad_output: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word_embeddings: Tensor,
    token_type_embeddings: Tensor,
    position_embeddings: Tensor,
    weight: Tensor,
    eps: float,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three tables, weight and bias; row padding_idx of the word table receives none."""
    ids = (input_ids, token_type_ids, position_ids)
    tables = (word_embeddings, token_type_embeddings, position_embeddings)
    x = _lookup(ids, tables)
    dx, _, dweight, dbias = add_layer_norm_backward(grad_output, x, None, weight, eps)
    rows = dx.reshape(-1, dx.shape[-1])
    dword_rows = rows
    if padding_idx is not None:
        dword_rows = rows.masked_fill((input_ids == padding_idx).reshape(-1, 1), 0.0)
    dtables = [
        torch.zeros_like(table).index_add(0, i.reshape(-1), r.to(table.dtype))
        for i, table, r in zip(ids, tables, (dword_rows, rows, rows), strict=True)
    ]
    return dtables[0], dtables[1], dtables[2], dweight, dbias
