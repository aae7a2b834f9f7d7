"""What surrounds matrix products, across the boundary between tensors and csrc; the rules of `_native.py` hold here."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast.ops._native import _DTYPES, _address, _check, _module, _refusal, _rows


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


_ACTIVATIONS = ("none", "gelu", "gelu_tanh", "tanh")  # as in csrc/cpu/quantize.h


def quantize_rows(input: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 scales [M] of rows input [M, K], M and K > 0: input is about int8 * scale."""
    input, stride = _rows(input)
    output = torch.empty(input.shape, dtype=torch.int8)
    scales = torch.empty(input.shape[0], dtype=torch.float32)
    status = _module().quantize_rows(
        _DTYPES[input.dtype],
        input.data_ptr(),
        stride,
        output.data_ptr(),
        scales.data_ptr(),
        *input.shape,
        torch.get_num_threads(),
    )
    _check("linear_int8", status)
    return output, scales


def dequantize_rows(
    sums: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """activation(sums * row_scales * column_scales + bias): int32 [M, N], float32 [M], [N] and [N] -> [M, N]."""
    output = torch.empty(sums.shape, dtype=dtype)
    status = _module().dequantize_rows(
        _DTYPES[dtype],
        sums.data_ptr(),
        row_scales.data_ptr(),
        column_scales.data_ptr(),
        _address(bias),
        output.data_ptr(),
        *sums.shape,
        _ACTIVATIONS.index(activation),
        torch.get_num_threads(),
    )
    _check("linear_int8", status)
    return output
