"""Whole encoder layers across the boundary between tensors and csrc; the rules of `_native.py` hold here.

A layer gives, bit for bit, what the operators of its parts give: attention, residual, norm, feed-forward block,
residual, norm (Vaswani et al., 2017).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctxfast.ops import _dispatch
from ctxfast.ops._native import (
    _DTYPES,
    _NOT_MONOTONE,
    _address,
    _aligned,
    _check,
    _module,
    available,
)
from ctxfast.ops._native_linear import _ACTIVATIONS


def encoder_layer_serves(hidden: Tensor, heads: int) -> bool:
    """Whether layers may run as one call each on hidden [T, N], float32 or bfloat16 on a CPU, unseen.

    Gradients, autocast, compilation, transforms, modes and `explain` look at their parts.
    """
    return (
        not torch.is_grad_enabled()
        and type(hidden) is Tensor
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and hidden.is_cpu
        and hidden.layout is torch.strided
        and hidden.dim() == 2
        and hidden.shape[0] > 0
        and 0 < hidden.shape[1] <= 256 * heads
        and not hidden.is_neg()
        and _dispatch.unobserved()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and available()
    )


class EncoderLayer(NamedTuple):
    """What stays the same from call to call; keeps every tensor alive that it points to."""

    tensors: tuple[Tensor | None, ...]
    addresses: tuple[int, ...]
    shape: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        tensors: tuple[Tensor | None, ...],
        size: int,
        inner: int,
        heads: int,
        activation: str,
        eps1: float,
        eps2: float,
        scale: float,
    ) -> EncoderLayer:
        """tensors: contiguous, of one dtype, float32 or bfloat16. Panels of `_native_linear.pack` and bias of query,
        key and value stacked, of the attention output, and of the two layers of the feed-forward block of `inner`
        units; weight and bias of the norm behind the attention, and of that behind the feed-forward block
        """
        dtype = next(_DTYPES[tensor.dtype] for tensor in tensors if tensor is not None)
        shape = (dtype, size, inner, heads, _ACTIVATIONS[activation], eps1, eps2, scale)
        return cls(tensors, tuple(map(_address, tensors)), shape)


class EncoderRun:
    """Runs layers on packed tokens, one after the other, in one working space."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int) -> None:
        """cu_seqlens, max_seqlen: as `ops.attention_varlen`"""
        self._native = _module()
        self._cu_seqlens = _aligned(cu_seqlens.contiguous())
        self._batch = (cu_seqlens.shape[0] - 1, max_seqlen, torch.get_num_threads())
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def __call__(self, layer: EncoderLayer, hidden: Tensor) -> Tensor:
        """[T, N] -> [T, N], for which `encoder_layer_serves`; errors as `ops.attention_varlen`."""
        hidden = _aligned(hidden.contiguous())
        rows = hidden.shape[0]
        bytes = self._native.encoder_layer_workspace(rows, *layer.shape[:4])
        if self._workspace.shape[0] < bytes:
            self._workspace = torch.empty(bytes, dtype=torch.uint8)
        output = torch.empty_like(hidden)
        status = self._native.encoder_layer(
            layer.addresses,
            layer.shape,
            hidden.data_ptr(),
            self._cu_seqlens.data_ptr(),
            self._workspace.data_ptr(),
            output.data_ptr(),
            rows,
            *self._batch,
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
