"""The LSTM in csrc: see `ctxfast.ops._native` for the rules of the boundary."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ctxfast.ops._lstm import Direction, Gradients, Kept, Recurrence, Sequences
from ctxfast.ops._native import (
    _DTYPES,
    _address,
    _aligned,
    _check,
    _large,
    _module,
    _refusal,
)
from ctxfast.ops._native_matrix_product import product, product_and_row_sums
from ctxfast.ops._native_pages import stream

# Recurrent weights of a call that are packed in it for its steps. Larger ones are read where they lie, so that no call
# needs room for a copy of them: a sentence of 20 steps is done sooner, a batch takes up to twice the time. Training,
# which keeps far more, packs all.
_PACKED_IN_CALLS = 4 << 20
_WEIGHT_TYPES = {None: 0, torch.bfloat16: 1, torch.int8: 2}  # as in csrc/cpu/lstm.h


def refuses(*arguments: Any) -> str | None:
    """Why the native loop cannot run these arguments of the operator, or None."""
    tensors = (x for x in arguments if isinstance(x, Tensor))
    if (reason := _refusal(*tensors)) is not None:
        return reason
    input = arguments[0]
    return None if input.dtype in _DTYPES else f"dtype {input.dtype}"


def _weight_type(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> int:
    if weight_dtype is None and dtype == torch.bfloat16:
        return _WEIGHT_TYPES[torch.bfloat16]
    return 0 if dtype == torch.float64 else _WEIGHT_TYPES[weight_dtype]


def pack(
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    weight_dtype: torch.dtype | None = None,
) -> Tensor:
    """The weights in the layout of the kernels, uint8, for the instruction set in use."""
    weight_ih, weight_hh = _dense(weight_ih.detach()), _dense(weight_hh.detach())
    weight_hr = None if weight_hr is None else _dense(weight_hr.detach())
    rows, features = weight_hh.shape

    def call(packed: int) -> int:
        found = _module().lstm_pack(
            _DTYPES[weight_hh.dtype],
            _weight_type(weight_hh.dtype, weight_dtype),
            weight_ih.shape[1],
            rows // 4,
            features,
            weight_hr is not None,
            weight_ih.data_ptr(),
            weight_hh.data_ptr(),
            _address(weight_hr),
            packed,
            torch.get_num_threads(),
        )
        if not isinstance(found, int):
            _check("lstm", found)
        return found

    packed = stream((call(0),), torch.uint8)
    call(packed.data_ptr())
    return packed


def _fits(packed: Tensor | None, d: Direction, weight_type: int) -> bool:
    """Whether packed was made for these sizes, this type and the instruction set in use."""
    if packed is None or packed.dtype != torch.uint8 or not packed.is_contiguous():
        return False
    return _module().lstm_packed_fits(
        packed.data_ptr(),
        packed.numel(),
        _DTYPES[d.input.dtype],
        weight_type,
        d.weight_ih.shape[1],
        d.weight_hh.shape[0] // 4,
        d.weight_hh.shape[1],
        d.weight_hr is not None,
    )


def _numbers(directions: list[Direction]) -> tuple[int, ...]:
    first = directions[0]
    rows, features = first.weight_hh.shape
    projected = int(first.weight_hr is not None)
    return _DTYPES[first.input.dtype], *first.input.shape, rows // 4, features, projected


def _unit_stride(x: Tensor) -> Tensor:
    return _aligned(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous())


def _dense(x: Tensor) -> Tensor:
    return _aligned(x.contiguous())


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _dense(x)


def _bytes(x: Tensor | None) -> int:
    return 0 if x is None else x.numel() * x.element_size()


def _bound(clip: float | None) -> float:
    return math.inf if clip is None else clip


def _part(x: Tensor, k: int) -> int:
    """Address of x[k] of a contiguous x, 0 where it is empty."""
    return x[k].data_ptr() if x.numel() else 0


def forward(directions: list[Direction], sequences: Sequences, save: bool) -> Kept:
    """The product with the input and the loop of every direction, in one call."""
    # Who does without copies has less memory than time to spare: neither what operators before worked in is held
    # through the call nor its own working space after it.
    frugal = not save and all(d.packed is None for d in directions)
    if frugal:
        _module().release_scratch()
    kept = Kept.allocate(directions, sequences, save)
    for x in kept.tensors():
        _large(x)
    features = sequences.h0.shape[-1]
    weight_type = _weight_type(directions[0].input.dtype, sequences.weight_dtype)
    h0, c0 = _dense(sequences.h0), _dense(sequences.c0)
    mask = _optional(sequences.mask)
    inputs = [_dense(d.input) if save else _unit_stride(d.input) for d in directions]
    weights_ih = [_dense(d.weight_ih) for d in directions]
    biases = [_optional(d.bias) for d in directions]
    packed = [d.packed if _fits(d.packed, d, weight_type) else None for d in directions]
    recurrent = sum(_bytes(d.weight_hh) + _bytes(d.weight_hr) for d in directions)
    if not save and (weight_type or recurrent <= _PACKED_IN_CALLS):  # where it saves, csrc packs
        packed = [
            pack(d.weight_ih, d.weight_hh, d.weight_hr, sequences.weight_dtype) if x is None else x
            for x, d in zip(packed, directions, strict=True)
        ]
    plain = [
        (_dense(d.weight_hh), _optional(d.weight_hr)) if x is None else (None, None)
        for x, d in zip(packed, directions, strict=True)
    ]
    ways = [
        (
            inputs[k].data_ptr(),
            _address(biases[k]),
            _address(packed[k]),
            _part(h0, k),
            _part(c0, k),
            0 if mask is None else _part(mask, k),
            kept.output[..., k * features :].data_ptr(),
            _part(kept.h, k),
            _part(kept.c, k),
            _part(kept.gates, k),
            _part(kept.cells, k),
            _part(kept.projected, k),
            *inputs[k].stride()[:2],
            *kept.output.stride()[:2],
            d.reverse,
            weights_ih[k].data_ptr(),
            *map(_address, plain[k]),
        )
        for k, d in enumerate(directions)
    ]
    lengths = _optional(sequences.lengths)
    status = _module().lstm_forward(
        _numbers(directions),
        _bound(sequences.cell_clip),
        _bound(sequences.proj_clip),
        _address(lengths),
        weight_type,
        ways,
        torch.get_num_threads(),
    )
    _check("lstm", status)
    if frugal:
        _module().release_scratch()
    return kept


def backward(
    directions: list[Direction],
    sequences: Sequences,
    kept: Kept,
    grad_output: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
) -> Gradients:
    """The way back of every direction, in one call."""
    features, rows = sequences.h0.shape[-1], directions[0].weight_hh.shape[0]
    like, many = directions[0].input, directions[0].input.shape[:2]
    grad_output = _unit_stride(grad_output)
    grad_h, grad_c, c0 = _dense(grad_h), _dense(grad_c), _dense(sequences.c0)
    mask = _optional(sequences.mask)
    saved = [_dense(x) for x in (kept.gates, kept.cells, kept.projected)]
    dgates = [_large(like.new_empty(*many, rows)) for _ in directions]
    dprojected = [
        None if d.weight_hr is None else like.new_empty(*many, features) for d in directions
    ]
    full = [
        None if d.weight_hr is None else _large(like.new_empty(*many, rows // 4))
        for d in directions
    ]
    dh0, dc0 = like.new_empty(sequences.h0.shape), c0.new_empty(c0.shape)
    weights = [(_dense(d.weight_hh), _optional(d.weight_hr)) for d in directions]
    ways = [
        (
            grad_output[..., k * features :].data_ptr(),
            _part(grad_h, k),
            _part(grad_c, k),
            *map(_address, weights[k]),
            _part(c0, k),
            0 if mask is None else _part(mask, k),
            *(_part(x, k) for x in saved),
            dgates[k].data_ptr(),
            _address(dprojected[k]),
            _address(full[k]),
            _part(dh0, k),
            _part(dc0, k),
            *grad_output.stride()[:2],
            d.reverse,
        )
        for k, d in enumerate(directions)
    ]
    lengths = _optional(sequences.lengths)
    status = _module().lstm_backward(
        _numbers(directions),
        _bound(sequences.cell_clip),
        _bound(sequences.proj_clip),
        _address(lengths),
        ways,
        torch.get_num_threads(),
    )
    _check("lstm", status)
    return dgates, dprojected, full, dh0, dc0


RECURRENCE = Recurrence(forward, backward, product, product_and_row_sums)
