"""Linear layers and their losses, across the boundary between tensors and csrc; the rules of `_native.py` hold here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxfast.ops._native import (
    _DTYPES,
    _address,
    _aligned,
    _check,
    _float_parts,
    _module,
    _refusal,
    _rows,
    unavailable_reason,
)
from ctxfast.ops._native_pages import stream

_ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "tanh": 3}  # as in csrc/cpu/activation.h
_PANEL = 32  # columns of a panel in csrc/cpu/linear.h
_MOST_UNITS = 0x7F7F70  # of csrc/cpu/amx_digits.h
_PLAIN_ROWS = 384  # from which on putting a weight into panels on the way hardly pays


def pack_refuses(dtype: torch.dtype, depth: int) -> str | None:
    """Why weights [N, depth] of this dtype are not packed into panels, or None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {dtype} is neither float32 nor bfloat16"
    if dtype == torch.bfloat16 and depth % 2:
        return f"an odd input size of {depth} in bfloat16"
    return unavailable_reason()


def pack(weight: Tensor) -> Tensor:
    """weight [N, K] as panels of 32 rows, padded with 0: in the order in which it is read.

    In float32 flat, [ceil(N / 32) * (K + 1) * 32 + K]: panels [K, 32] and behind them what `_units` gives.
    In bfloat16 [ceil(N / 32), K / 2, 32, 2]: a processor that multiplies it takes neighbours along K in pairs.
    """
    rows, depth = weight.shape
    step = 2 if weight.dtype == torch.bfloat16 else 1
    count = -(-rows // _PANEL)
    shape = (count, depth // step, _PANEL, step)
    size = math.prod(shape)
    tail = depth + count * _PANEL if step == 1 else 0
    packed = stream((size + tail,), weight.dtype)
    panels = packed[:size].view(shape)
    whole, rest = divmod(rows, _PANEL)
    words = weight.detach().reshape(rows, -1, step)
    panels[:whole] = words[: whole * _PANEL].unflatten(0, (whole, _PANEL)).transpose(1, 2)
    if rest:
        panels[whole, :, :rest] = words[whole * _PANEL :].transpose(0, 1)
        panels[whole, :, rest:] = 0
    if step == 2:
        return panels
    features, units = _units(weight.detach())
    packed[size:] = 0
    packed[size : size + depth] = features
    packed[size + depth : size + depth + rows] = units
    return packed


def _units(weight: Tensor) -> tuple[Tensor, Tensor]:
    """For csrc/cpu/amx_digits.h: powers of two that features are multiplied by, [K], and units of rows, [N].

    Features of the weight are brought to one size, those of the input by as much the other way: what digits round
    then has the size of what it contributes to results. The first power is NaN where the weight has no digits.
    """
    size = weight.square().mean(0).sqrt().log2()
    known = size[size.isfinite()]
    typical = known.median() if known.numel() else size.new_zeros(())
    exponent = (size - typical).round().clamp(-24, 24).nan_to_num(0.0)
    features = exponent.exp2()
    largest = (weight / features).abs_().amax(1)
    fits = (largest == 0) | ((largest >= 2.0**-54) & (largest <= 2.0**54))
    if not fits.all():
        features[0] = math.nan
    return features, largest / _MOST_UNITS


def _outruns_library(dtype: torch.dtype) -> bool:
    """Whether it does: on matrix tiles, and where the library computes bfloat16 without instructions for it."""
    isa = _module().isa()
    return isa == "amx" or (dtype == torch.bfloat16 and isa != "avx512_bf16")


def linear_refuses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    packed: Tensor | None,
) -> str | None:
    """Why the native code cannot run this linear, or None."""
    read = weight if packed is None else packed
    if 0 in input.shape or 0 in weight.shape:
        return "empty input"
    if (reason := _refusal(input, read, bias, residual)) is not None:
        return reason
    if packed is not None:
        return None if packed.dtype == input.dtype else f"the weight is packed in {packed.dtype}"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    rows = input.numel() // weight.shape[1]
    if rows > _PLAIN_ROWS and not _outruns_library(weight.dtype):
        return f"{rows} rows by a plain weight are faster through the GEMM library"
    return pack_refuses(weight.dtype, weight.shape[1])


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    packed: Tensor | None,
) -> Tensor:
    """activation(input @ weight^T + bias) + residual; of weight only the shape counts where packed is given."""
    columns, depth = weight.shape
    rows, stride = _rows(input if input.dim() == 2 else input.reshape(-1, depth))
    output = input.new_empty((*input.shape[:-1], columns))
    bias = None if bias is None else bias.contiguous()
    residual_stride = 0
    if residual is not None:
        residual, residual_stride = _rows(residual.reshape(-1, columns))
    plain = _aligned(weight) if packed is None else None
    status = _module().linear(
        _DTYPES[input.dtype],
        rows.data_ptr(),
        stride,
        _address(packed),
        _address(plain),
        _address(bias),
        _address(residual),
        residual_stride,
        output.data_ptr(),
        rows.shape[0],
        depth,
        columns,
        _ACTIVATIONS[activation],
        _float_parts(input.dtype, rows.shape[0]),
        torch.get_num_threads(),
    )
    _check("linear", status)
    return output


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
        _ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    _check("linear_int8", status)
    return output


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
