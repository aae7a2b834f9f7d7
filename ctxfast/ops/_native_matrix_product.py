"""Matrix products in float32 and float64, between tensors and csrc; the rules of `_native.py` hold here."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast.ops._native import (
    _DTYPES,
    _address,
    _aligned,
    _check,
    _float_parts,
    _large,
    _module,
    _refusal,
)

_MOST_DEPTH = 1 << 16  # of a sum that is made of pieces of some hundred, one added to the other


def refuses(*matrices: Tensor | None) -> str | None:
    """Why the native product cannot take these matrices, or is not the fastest for them."""
    reason = _refusal(*matrices)
    if reason is not None:
        return reason
    for x in matrices:
        if x is None:
            continue
        if x.dtype != torch.float32:
            return f"dtype {x.dtype}"
        if x.numel() == 0:
            return "empty input"
    if not _module().isa().startswith(("avx512", "amx")):
        return "its tiles are those of AVX-512"
    return None


def _operand(x: Tensor) -> tuple[Tensor, int, int]:
    """A matrix of which one stride is 1, or a copy that has one, and its strides."""
    rows, columns = x.shape
    down, right = x.stride()
    if right == 1 or columns == 1:
        return _aligned(x), down, 1
    if down == 1 or rows == 1:
        return _aligned(x), 1, right
    return x.contiguous(), columns, 1


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias: [M, K] @ [K, N] -> [M, N], whichever way a and b lie in memory.

    Sums are made of sums over short pieces, so that the error does not grow with K as that of one running sum does.
    """
    return _product(a, b, bias, None)


def product_and_row_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a @ b [M, N], and the sums [M] of the rows of a, taken on the way."""
    sums = a.new_empty(a.shape[0])
    return _product(a, b, None, sums), sums


def _product(a: Tensor, b: Tensor, bias: Tensor | None, sums: Tensor | None) -> Tensor:
    if (depth := a.shape[1]) > _MOST_DEPTH:  # the pieces of a longer sum are many themselves
        half = depth // 2
        rest = None if sums is None else torch.empty_like(sums)
        output = _product(a[:, :half], b[:half], bias, sums)
        output += _product(a[:, half:], b[half:], None, rest)
        if sums is not None and rest is not None:
            sums += rest
        return output
    a, *a_strides = _operand(a)
    b, *b_strides = _operand(b)
    bias = None if bias is None else _aligned(bias.contiguous())
    rows, columns = a.shape[0], b.shape[1]
    if 0 in (rows, columns, a.shape[1]):
        output = a.new_zeros(rows, columns) if bias is None else bias.expand(rows, columns).clone()
        if sums is not None:
            torch.sum(a, 1, out=sums)
        return output
    output = _large(a.new_empty(rows, columns))
    status = _module().matrix_product(
        _DTYPES[a.dtype],
        (a.data_ptr(), *a_strides),
        (b.data_ptr(), *b_strides),
        *map(_address, (bias, output, sums)),
        rows,
        columns,
        a.shape[1],
        _float_parts(a.dtype, rows),
        torch.get_num_threads(),
    )
    _check("matrix_product", status)
    return output
