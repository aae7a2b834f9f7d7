"""Which tile of a packed batch each program of the attention kernels takes, longest sequences first."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast.ops import _triton
from ctxfast.ops._dispatch import Implementation, Operator, backend, never
from ctxfast.ops._library import define

_GRANULE = 128  # rows of a tile


def _reference(cu_seqlens: Tensor, rows: int) -> Tensor:
    num_sequences = cu_seqlens.shape[0] - 1
    ends = torch.nn.functional.pad(cu_seqlens[1:], (0, 1), value=rows)
    lengths = ends - cu_seqlens
    order = lengths.argsort(descending=True, stable=True)
    ends = ((lengths[order] + _GRANULE - 1) // _GRANULE).cumsum(0)  # in tiles, longest first
    tile = torch.arange(rows // _GRANULE + num_sequences + 1, device=cu_seqlens.device)
    place = torch.searchsorted(ends, tile, right=True)
    used = place <= num_sequences
    place = place.clamp(max=num_sequences)
    first = torch.nn.functional.pad(ends[:-1], (1, 0))
    tiles = torch.stack([order[place], tile - first[place]], 1)
    unused = torch.tensor([-1, 0], device=cu_seqlens.device)
    return torch.where(used[:, None], tiles, unused).int()


def _fake(cu_seqlens: Tensor, rows: int) -> Tensor:
    return cu_seqlens.new_empty((rows // _GRANULE + cu_seqlens.shape[0], 2))


attention_tile_map_operator = Operator(
    "attention_tile_map",
    Implementation(
        "triton",
        _triton.build_tile_map,
        lambda cu_seqlens, rows: _triton.available(cu_seqlens.device),
    ),
    Implementation("reference", _reference, never),
)
_attention_tile_map = define(
    "(Tensor cu_seqlens, SymInt rows) -> Tensor", attention_tile_map_operator, _fake
)


def attention_tile_map(cu_seqlens: Tensor, rows: int) -> Tensor | None:
    """The tiles of `attention_varlen` over these offsets, built once a batch for all layers and the backward.

    cu_seqlens: int32 [B + 1]; rows: T, those past the last offset included

    Returns int32 [T // 128 + B + 1, 2] of (sequence, block of 128 rows), sequence B past the last offset, (-1, 0) where
    unused; None where the implementation on this device asks for none. Longest sequences come first (Graham, 1969).
    """
    if cu_seqlens.device.type == "cpu" and backend() != "triton":
        return None
    return _attention_tile_map(cu_seqlens, rows)
