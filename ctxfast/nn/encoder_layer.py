"""Whole encoder layers as native calls, for inference: what to ask before, and what to hand over.

With a short sentence the parts of a layer take as long as Python takes to call them, and the weights that stream
through the caches leave Python nothing of its own there. So all layers are looked at first; then they are one call. The
call runs the kernels of the parts in their order and gives the same numbers; whatever it does not serve, and whoever
wants to see the parts (hooks, adapters, gradients, `explain`), gets the calls of the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctxfast.nn.certificate import Snapshot
from ctxfast.nn.packed_copy import PackedCopy
from ctxfast.ops._native_encoder_layer import (
    EncoderLayer,
    EncoderRun,
    PackedWeight,
    encoder_layer_serves,
)

__all__ = [
    "EncoderLayer",
    "EncoderRun",
    "EncoderStack",
    "FusedLayer",
    "encoder_layer_serves",
    "fuse_layer",
    "stack_layers",
]

Norm = tuple[Tensor, Tensor, float]
FusedLayer = tuple[EncoderLayer, Sequence[PackedCopy]]  # and the copies that it was made of


def _readable(parameter: Tensor, size: int, dtype: torch.dtype) -> bool:
    """Whether a bias or a weight of a norm can be read as it lies."""
    return (
        type(parameter) is nn.Parameter
        and parameter.dtype is dtype
        and parameter.numel() == size
        and parameter.is_cpu
        and parameter.is_contiguous()
    )


def _packed_weight(
    copy: PackedCopy | None, bias: Tensor | None, columns: int, depth: int, dtype: torch.dtype
) -> PackedWeight | None:
    """The copy of a layer between states of that dtype, and its bias where the copy has none, if csrc can read them."""
    if copy is None or copy.plain.shape != (columns, depth):
        return None
    if copy.bias is not None:
        bias = copy.bias
    elif bias is not None and not _readable(bias, columns, copy.held):
        return None
    if copy.compute == torch.int8:
        panels, scales, sums, _ = copy.weight
        return PackedWeight(panels, bias, scales, sums)
    if not copy.in_panels or copy.compute != dtype:
        return None
    return PackedWeight(copy.weight, bias)


def fuse_layer(
    size: int,
    copies: Sequence[PackedCopy | None],
    biases: Sequence[Tensor | None],
    norms: tuple[Norm, Norm],
    activation: str,
    heads: int,
    scale: float,
    dtype: torch.dtype,
) -> FusedLayer | None:
    """A layer of states [T, size] as one call; None where its parts must be called.

    copies: of query, key and value stacked, the attention output, and the two layers of the feed-forward block
    biases: of the last three;  norms: weight, bias and eps behind the attention and behind the feed-forward block
    dtype: of the states
    """
    held_copies = [copy for copy in copies if copy is not None]
    if len(held_copies) < len(copies):
        return None
    inner = held_copies[2].plain.shape[0]
    shapes = ((3 * size, size), (size, size), (inner, size), (size, inner))
    linears = [
        _packed_weight(copy, bias, *shape, dtype)
        for copy, bias, shape in zip(held_copies, (None, *biases), shapes, strict=True)
    ]
    ready = [linear for linear in linears if linear is not None]
    if len(ready) < 4 or len({linear.scales is None for linear in ready}) > 1:
        return None
    held = norms[0][0].dtype
    if held not in (dtype, torch.float32) or not all(
        _readable(parameter, size, held) for norm in norms for parameter in norm[:2]
    ):
        return None
    layer = EncoderLayer(ready, norms, dtype, size, inner, heads, activation, scale)
    return layer, held_copies


class EncoderStack(NamedTuple):
    """Layers as native calls on states of one dtype, and what their modules were when these were made."""

    dtype: torch.dtype
    layers: list[EncoderLayer]
    snapshot: Snapshot


def stack_layers(
    modules: Sequence[nn.Module], fused: Iterable[FusedLayer | None], dtype: torch.dtype
) -> EncoderStack | None:
    """The modules, each fused on states of that dtype; None where one of them is not, or computes in another type."""
    layers: list[EncoderLayer] = []
    copies: list[PackedCopy] = []
    for found in fused:
        if found is None:
            return None
        layers.append(found[0])
        copies += found[1]
    if len({layer.kind for layer in layers}) > 1:
        return None
    fingerprints = [fingerprint for copy in copies for fingerprint in copy.fingerprints]
    return EncoderStack(dtype, layers, Snapshot(modules, fingerprints))
