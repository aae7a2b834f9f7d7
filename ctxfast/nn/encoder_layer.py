"""Whole encoder layers as native calls, for inference: what to ask before, and what to hand over.

With a short sentence the parts of a layer take as long as Python takes to call them, and the weights that stream
through the caches leave Python nothing of its own there. So all layers are looked at first; then each is one call. The
call runs the kernels of the parts in their order and gives the same numbers; whatever it does not serve, and whoever
wants to see the parts (hooks, adapters, gradients, `explain`), gets the calls of the parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctxfast.nn.packed_copy import PackedCopy
from ctxfast.ops._native_encoder_layer import EncoderLayer, EncoderRun, encoder_layer_serves

__all__ = ["EncoderLayer", "EncoderRun", "encoder_layer_serves", "fuse_layer"]

Norm = tuple[Tensor, Tensor, float]


def _readable(parameter: Tensor, size: int, dtype: torch.dtype) -> bool:
    """Whether a bias or a weight of a norm can be read as it lies."""
    return (
        type(parameter) is nn.Parameter
        and parameter.dtype is dtype
        and parameter.numel() == size
        and parameter.is_cpu
        and parameter.is_contiguous()
    )


def fuse_layer(
    size: int,
    copies: Sequence[PackedCopy | None],
    biases: Sequence[Tensor | None],
    norms: tuple[Norm, Norm],
    activation: str,
    heads: int,
    scale: float,
) -> EncoderLayer | None:
    """A layer of states [T, size] as one call; None where its parts must be called.

    copies: of query, key and value stacked, the attention output, and the two layers of the feed-forward block
    biases: of the last three;  norms: weight, bias and eps behind the attention and behind the feed-forward block
    """
    projection, output, up, down = copies
    if projection is None or output is None or up is None or down is None:
        return None
    inner, dtype = up.plain.shape[0], up.plain.dtype
    if not (
        all(c.in_panels and c.compute == dtype for c in (projection, output, up, down))
        and projection.plain.shape == (3 * size, size)
        and output.plain.shape == (size, size)
        and up.plain.shape == (inner, size)
        and down.plain.shape == (size, inner)
    ):
        return None
    for bias, columns in zip(biases, (size, inner, size), strict=True):
        if bias is not None and not _readable(bias, columns, dtype):
            return None
    (weight1, bias1, eps1), (weight2, bias2, eps2) = norms
    for parameter in (weight1, bias1, weight2, bias2):
        if not _readable(parameter, size, dtype):
            return None
    tensors = (
        *(projection.weight, projection.bias, output.weight, biases[0]),
        *(up.weight, biases[1], down.weight, biases[2], weight1, bias1, weight2, bias2),
    )
    return EncoderLayer.of(tensors, size, inner, heads, activation, eps1, eps2, scale)
