"""Matrix products and what surrounds them, between tensors and csrc; the rules of `_native.py` hold here."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast.ops._native import _DTYPES, _aligned, _check, _large, _module, _refusal


def cross_entropy_refuses(*tensors: Tensor | None) -> str | None:
    """Why the native code cannot take the logits of these tensors; the first one has their dtype."""
    reason = _refusal(*tensors)
    first = tensors[0]
    if reason is None and first is not None and first.dtype not in _DTYPES:
        reason = f"dtype {first.dtype}"
    return reason


def cross_entropy_(logits: Tensor, labels: Tensor, scale: float, gradient: bool) -> Tensor:
    """The loss of every row of logits [M, V], contiguous; labels int64 [M], each in [0, V).

    With gradient, logits become (softmax - one_hot) * scale.
    """
    rows, columns = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(rows, dtype=wide)
    labels = labels.contiguous()
    status = _module().cross_entropy(
        _DTYPES[logits.dtype],
        logits.data_ptr(),
        labels.data_ptr(),
        losses.data_ptr(),
        rows,
        columns,
        scale,
        gradient,
        torch.get_num_threads(),
    )
    _check("cross_entropy", status)
    return losses


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] in float32 or float64, either one transposed or not.

    Sums are made of sums over short pieces, so that the error does not grow with a long K as that of a single running
    sum does: what gradients of weights over all steps of all sequences are.
    """
    if 1 not in a.stride() or 0 in a.stride():
        a = a.contiguous()
    if b.stride(1) != 1:
        b = b.contiguous()
    a, b = _aligned(a), _aligned(b)
    result = _large(a.new_empty(a.shape[0], b.shape[1]))
    status = _module().matrix_product(
        _DTYPES[a.dtype],
        *a.shape,
        b.shape[1],
        a.data_ptr(),
        *a.stride(),
        b.data_ptr(),
        b.stride(0),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    _check("matrix_product", status)
    return result
