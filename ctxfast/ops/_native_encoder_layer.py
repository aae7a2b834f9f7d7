"""Whole encoder layers across the boundary between tensors and csrc; the rules of `_native.py` hold here.

A layer gives, bit for bit, what the operators of its parts give: attention, residual, norm, feed-forward block,
residual, norm (Vaswani et al., 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ctxfast.ops import _dispatch
from ctxfast.ops._native import (
    _DTYPES,
    _NOT_MONOTONE,
    _address,
    _aligned,
    _check,
    _float_parts,
    _module,
    available,
)
from ctxfast.ops._native_linear import _ACTIVATIONS


def encoder_layer_serves(hidden: Tensor, heads: int) -> bool:
    """Whether layers may run as one call each on hidden [T, N], float32 or bfloat16 on a CPU, unseen."""
    return (
        _dispatch.parts_unseen("cpu")
        and type(hidden) is Tensor
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and hidden.is_cpu
        and hidden.layout is torch.strided
        and hidden.dim() == 2
        and hidden.shape[0] > 0
        and 0 < hidden.shape[1] <= 256 * heads
        and not hidden.is_neg()
        and available()
    )


class PackedWeight(NamedTuple):
    """A packed linear layer: panels of `_native_linear.pack` and a bias of their dtype, or the parts of an
    `ops.QuantizedWeight` and a float32 bias."""

    panels: Tensor
    bias: Tensor | None
    scales: Tensor | None = None
    sums: Tensor | None = None


class EncoderLayer:
    """One layer, ready to run; keeps every tensor alive that it points to.

    kind: dtypes and sizes, which layers of one call have in common
    """

    __slots__ = ("kind", "native", "tensors")

    def __init__(
        self,
        linears: Sequence[PackedWeight],
        norms: Sequence[tuple[Tensor, Tensor, float]],
        dtype: torch.dtype,
        size: int,
        inner: int,
        heads: int,
        activation: str,
        scale: float,
    ) -> None:
        """Everything is contiguous.

        linears: of query, key and value stacked, the attention output, and the two of the feed-forward block of `inner`
            units: all in panels of `dtype`, or all of 8 bits with float32 biases
        norms: weight, bias and eps behind the attention and behind the feed-forward block, in `dtype` or float32
        dtype: float32 or bfloat16, of the states [T, size]
        """
        eight = linears[0].scales is not None
        dtypes = (dtype, torch.bfloat16 if eight else dtype, norms[0][0].dtype)
        self.kind = (*(_DTYPES[x] for x in dtypes), size, inner, heads)
        self.tensors = [x for linear in linears for x in linear]
        self.tensors += [x for weight, bias, _ in norms for x in (weight, bias)]
        eps = [eps for _, _, eps in norms]
        self.native = _module().EncoderLayer(
            tuple(map(_address, self.tensors)),
            self.kind[:3],
            (size, inner, heads, _ACTIVATIONS[activation], *eps, scale),
        )


class EncoderRun:
    """Runs layers on packed tokens in one working space."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int) -> None:
        """cu_seqlens, max_seqlen: as `ops.attention_varlen`"""
        self._native = _module()
        self._cu_seqlens = _aligned(cu_seqlens.contiguous())
        self._batch = (cu_seqlens.shape[0] - 1, max_seqlen)
        self._workspace: Tensor | None = None

    def stack(self, layers: Sequence[EncoderLayer], hidden: Tensor) -> Tensor:
        """[T, N] -> [T, N] through one or more layers of one kind, for which `encoder_layer_serves`; errors as
        `ops.attention_varlen`.
        """
        hidden = _aligned(hidden.contiguous())
        rows = hidden.shape[0]
        natives = [layer.native for layer in layers]
        bytes = self._native.encoder_workspace(natives[0], rows)
        if self._workspace is None or self._workspace.shape[0] < bytes:
            self._workspace = torch.empty(bytes, dtype=torch.uint8)
        output = torch.empty_like(hidden)
        status = self._native.encoder_layers(
            natives,
            hidden.data_ptr(),
            self._cu_seqlens.data_ptr(),
            self._workspace.data_ptr(),
            output.data_ptr(),
            rows,
            *self._batch,
            _float_parts(hidden.dtype, rows),
            torch.get_num_threads(),
        )
        if status is not None:
            self._fail(status, rows)
        return output

    def _fail(self, status: tuple[int, int, int], rows: int) -> None:
        if status[0] == _NOT_MONOTONE:
            begin, end = self._cu_seqlens[status[2] : status[2] + 2].tolist()
            raise ValueError(
                f"attention_varlen: cu_seqlens_q must rise from 0 to at most {rows} by at most max_seqlen "
                f"{self._batch[1]}, got {begin} and {end} for sequence {status[2]}"
            )
        _check("encoder_layer", status)
