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


_ACTIVATIONS = ("none", "gelu", "gelu_tanh", "tanh")  # as in csrc/cpu/activation.h


def linear_int8(
    input: Tensor,
    panels: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """[..., N]; arguments of the registered operator, nothing empty."""
    rows, stride = _rows(input.reshape(-1, input.shape[-1]))
    output = torch.empty((*input.shape[:-1], scales.shape[0]), dtype=dtype)
    panels, scales, sums = panels.contiguous(), scales.contiguous(), sums.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    status = _module().linear_int8(
        _DTYPES[input.dtype],
        _DTYPES[dtype],
        rows.data_ptr(),
        stride,
        panels.data_ptr(),
        scales.data_ptr(),
        sums.data_ptr(),
        _address(bias),
        output.data_ptr(),
        *rows.shape,
        scales.shape[0],
        _ACTIVATIONS.index(activation),
        torch.get_num_threads(),
    )
    _check("linear_int8", status)
    return output
