"""Layer normalisation across the boundary between tensors and csrc; the rules of `_native.py` hold here too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctxfast.ops._native import (
    _DTYPES,
    _INDEX_OUT_OF_RANGE,
    _PLAIN,
    _TABLE,
    _address,
    _aligned,
    _check,
    _float_refusal,
    _module,
    _refusal,
    _rows,
    available,
)
from ctxfast.reference.dropout import dropout_scale, dropout_threshold


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else _aligned(x.contiguous())


def _parameter_dtype(input: Tensor, *parameters: Tensor | None) -> int:
    return _DTYPES[next((p.dtype for p in parameters if p is not None), input.dtype)]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parameter_sums(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Working space for the sums of the blocks of rows, the gradients of weight and bias."""
    partials = torch.empty((_module().row_blocks, 2, columns), dtype=dtype)
    return partials, torch.empty(columns, dtype=dtype), torch.empty(columns, dtype=dtype)


def add_layer_norm_refuses(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> str | None:
    return _refusal(input, residual, weight, bias) or _float_refusal(input, weight, bias)


class _AddLayerNorm:
    """The arguments that forward and backward share, in the order of csrc/bindings_layer_norm.cpp.

    Keeps every tensor alive that they point to.
    """

    def __init__(
        self,
        output: Tensor | None,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dropout_p: float,
        seed: Tensor | None,
        sequence_ids: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        self.columns = input.shape[-1]
        input, input_stride = _rows(input)
        residual_stride = 0
        if residual is not None:
            residual, residual_stride = _rows(residual)
        weight, bias = _plain(weight), _plain(bias)
        self.dropout: tuple[Any, ...] = ()
        coordinates: tuple[Tensor, ...] = ()
        if dropout_p > 0.0:
            assert seed is not None and sequence_ids is not None and positions is not None
            coordinates = tuple(
                _aligned(x.to(torch.int64).contiguous()) for x in (sequence_ids, positions)
            )
            self.dropout = (
                *(x.data_ptr() for x in coordinates),
                int(seed),
                dropout_threshold(dropout_p),
                dropout_scale(dropout_p),
            )
        self.alive = (input, residual, weight, bias, output, coordinates)
        self.forward = (
            _DTYPES[input.dtype],
            _parameter_dtype(input, weight, bias),
            *map(_address, (input, residual, weight, bias, output)),
            input.numel() // self.columns,
            self.columns,
            input_stride,
            residual_stride,
            eps,
            torch.get_num_threads(),
        )


def add_layer_norm(input: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    """LayerNorm(dropout(input) + residual) [..., N]; arguments of the registered operator.

    weight and bias may be None, or float32 beside bfloat16.
    """
    output = torch.empty(input.shape, dtype=input.dtype)
    if output.numel() > 0:
        call = _AddLayerNorm(output, input, residual, *arguments)
        _check("add_layer_norm", _module().add_layer_norm(call.forward, call.dropout))
    return output


def add_layer_norm_backward(
    grad: Tensor, input: Tensor, residual: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, residual, weight and bias.

    That of residual is empty where there is none, and where it is the one of input, without dropout.
    """
    dinput = torch.empty(input.shape, dtype=input.dtype)
    if input.numel() == 0:
        return dinput, input.new_empty(0), torch.zeros_like(weight), torch.zeros_like(weight)
    call = _AddLayerNorm(None, input, residual, weight, *rest)
    dresidual = (
        torch.empty(input.shape, dtype=input.dtype)
        if residual is not None and call.dropout
        else None
    )
    grad, grad_stride = _rows(grad)
    partials, dweight, dbias = _parameter_sums(call.columns, _compute_dtype(input.dtype))
    status = _module().add_layer_norm_backward(
        call.forward,
        call.dropout,
        grad.data_ptr(),
        grad_stride,
        dinput.data_ptr(),
        _address(dresidual),
        partials.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
    )
    _check("add_layer_norm_backward", status)
    empty = input.new_empty(0)
    dtype = weight.dtype
    return dinput, empty if dresidual is None else dresidual, dweight.to(dtype), dbias.to(dtype)


def embed_layer_norm_refuses(
    input_ids: Tensor, word_embeddings: Tensor, weight: Tensor | None
) -> str | None:
    return _refusal(input_ids, word_embeddings, weight) or _float_refusal(word_embeddings, weight)


Three = tuple[Tensor | None, Tensor | None, Tensor | None]


class _EmbedLayerNorm:
    """The arguments that forward and backward share; keeps every tensor alive that they point to."""

    def __init__(
        self,
        ids: Three,
        tables: Three,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        output: Tensor | None = None,
    ) -> None:
        ids_given = tuple(map(_plain, ids))
        self.tables = tuple(map(_plain, tables))
        word = self.tables[0]
        assert word is not None and ids_given[0] is not None
        weight, bias = _plain(weight), _plain(bias)
        self.columns = word.shape[-1]
        self.alive = (ids_given, weight, bias, output)
        self.forward = (
            _DTYPES[word.dtype],
            _parameter_dtype(word, weight, bias),
            tuple(map(_address, ids_given)),
            tuple(x is not None and x.dtype == torch.int64 for x in ids_given),
            tuple(map(_address, self.tables)),
            tuple(0 if x is None else x.shape[0] for x in self.tables),
            *map(_address, (weight, bias, output)),
            ids_given[0].numel(),
            self.columns,
            eps,
            torch.get_num_threads(),
        )

    def check(self, op: str, status: tuple[int, int, int] | None) -> None:
        if status is not None and status[0] == _INDEX_OUT_OF_RANGE:
            name = ("input_ids", "token_type_ids", "position_ids")[status[1]]
            table = self.tables[status[1]]
            rows = 0 if table is None else table.shape[0]
            raise ValueError(f"embed_layer_norm: {name} must be in [0, {rows}), got {status[2]}")
        _check(op, status)


def embed_layer_norm_of(tensors: Sequence[Any], eps: float) -> Tensor | None:
    """`embed_layer_norm` of ids, tables, weight and bias, eight, where csrc reads them as they are and finds that they
    fit; None where something has to be said, or done before.

    Python takes longer to look at eight tensors than a short sentence takes.
    """
    if _TABLE is None or not available() or not set(map(type, tensors)).issubset(_PLAIN):
        return None
    ids, word = tensors[0], tensors[3]
    if word.dim() != 2 or any(map(Tensor.is_neg, tensors)):
        return None
    output = torch.empty((*ids.shape, word.shape[1]), dtype=word.dtype)
    operands = (*tensors, output)
    served = _module().embed_layer_norm_of(_TABLE, operands, eps, torch.get_num_threads()) is None
    return output if served else None


def embed_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    word_embeddings: Tensor,
    token_type_embeddings: Tensor | None,
    position_embeddings: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """LayerNorm(word[ids] + token_type[ids] + position[ids]), ids int64 or int32 [...] -> [..., N].

    A table that is None is not added. Without token_type_ids all are 0. Raises ValueError for an id outside its table.
    """
    output = torch.empty((*input_ids.shape, word_embeddings.shape[-1]), dtype=word_embeddings.dtype)
    if output.numel() > 0:
        ids = (input_ids, token_type_ids, position_ids)
        tables = (word_embeddings, token_type_embeddings, position_embeddings)
        call = _EmbedLayerNorm(ids, tables, weight, bias, eps, output)
        call.check("embed_layer_norm", _module().embed_layer_norm(call.forward))
    return output


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros whose pages stay untouched until they are used: a batch reaches few rows of a vocabulary."""
    numbers = np.zeros(tuple(shape), np.float64 if dtype == torch.float64 else np.float32)
    return torch.from_numpy(numbers)


def embed_layer_norm_backward(
    grad: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word_embeddings: Tensor,
    token_type_embeddings: Tensor,
    position_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int,
) -> tuple[Tensor, ...]:
    """Gradients of the three tables, weight and bias, summed in float32 (float64 for float64)."""
    tables = (word_embeddings, token_type_embeddings, position_embeddings)
    compute = _compute_dtype(word_embeddings.dtype)
    dtables = [_zeros(table.shape, compute) for table in tables]
    if grad.numel() == 0:
        sums = [torch.zeros_like(weight, dtype=compute) for _ in range(2)]
    else:
        ids = (input_ids, token_type_ids, position_ids)
        call = _EmbedLayerNorm(ids, tables, weight, bias, eps)
        grad, grad_stride = _rows(grad)
        partials, *sums = _parameter_sums(call.columns, compute)
        rows = torch.empty((input_ids.numel(), call.columns), dtype=compute)
        status = _module().embed_layer_norm_backward(
            call.forward,
            grad.data_ptr(),
            grad_stride,
            padding_idx,
            rows.data_ptr(),
            tuple(table.data_ptr() for table in dtables),
            partials.data_ptr(),
            *(x.data_ptr() for x in sums),
        )
        call.check("embed_layer_norm_backward", status)
    return tuple(
        x.to(like.dtype) for x, like in zip([*dtables, *sums], [*tables, weight, bias], strict=True)
    )
