"""Attention across the boundary between tensors and csrc; the rules of `_native.py` hold here too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxfast.ops._native import (
    _DTYPES,
    _NOT_MONOTONE,
    _address,
    _aligned,
    _check,
    _module,
    _refusal,
)


def _matrix_rows(x: Tensor) -> Tensor:
    """x with unit stride in its last dimension, copied if need be."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return _aligned(x)


def _broadcast(x: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """A mask or bias and its strides: 0 along dimensions of size 1, 0 or 1 along the last."""
    if x is None:
        return None, (0, 0, 0, 0)
    if x.shape[-1] > 1 and x.stride(-1) not in (0, 1):
        x = x.contiguous()
    x = _aligned(x)
    return x, tuple(
        0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)
    )


def attention_refuses(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> str | None:
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    reason = _refusal(query, key, value, *tensors)
    if reason is None and query.dtype not in _DTYPES:
        reason = f"dtype {query.dtype}"
    if reason is None and query.shape[-1] > 256:
        reason = f"head size {query.shape[-1]} is over 256"
    return reason


class _Attention:
    """The arguments that forward and backward of both layouts share, in the order of csrc/bindings_attention.cpp."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        is_causal: bool,
        window_left: int,
        window_right: int,
        dropout_p: float,
        scale: float,
        *,
        cu_seqlens: tuple[Tensor, Tensor] | None = None,
        max_seqlens: tuple[int, int] = (0, 0),
    ):
        query, key, value = _matrix_rows(query), _matrix_rows(key), _matrix_rows(value)
        attn_mask, mask_stride = _broadcast(attn_mask)
        bias, bias_stride = _broadcast(bias)
        padding_stride: tuple[int, ...] = (0, 0)
        if key_padding_mask is not None:
            if key_padding_mask.shape[-1] > 1 and key_padding_mask.stride(-1) != 1:
                key_padding_mask = key_padding_mask.contiguous()
            padding_stride = key_padding_mask.stride()
        if is_causal:
            window_right = 0
        offsets: tuple[Tensor | None, Tensor | None] = (None, None)
        if cu_seqlens is None:
            batch, heads, seqlen_q, head_dim = query.shape
            seqlen_k = key.shape[2]
            strides = [x.stride()[:3] for x in (query, key, value)]
        else:
            offsets = (_aligned(cu_seqlens[0].contiguous()), _aligned(cu_seqlens[1].contiguous()))
            seqlen_q, heads, head_dim = query.shape
            seqlen_k, batch = key.shape[0], offsets[0].shape[0] - 1
            strides = [(0, x.stride(1), x.stride(0)) for x in (query, key, value)]
        self.batch, self.heads, self.head_dim = batch, heads, head_dim
        self.seqlen_q, self.seqlen_k = seqlen_q, seqlen_k
        self.dtype = query.dtype
        self.lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.packed = cu_seqlens is not None
        self.longest_query = max_seqlens[0] if self.packed else seqlen_q
        self.tensors = (query, key, value, attn_mask, key_padding_mask, bias, *offsets)
        self.strides = (*strides, mask_stride, padding_stride, bias_stride)
        self.numbers = (
            _DTYPES[query.dtype],
            0 if bias is None else _DTYPES[bias.dtype],
            batch,
            heads,
            head_dim,
            seqlen_q,
            seqlen_k,
            *max_seqlens,
            window_left,
            window_right,
            int(dropout_p * 65536 + 0.5),
            0 if seed is None else seed.item(),
            torch.get_num_threads(),
            scale,
        )

    def rows(self, seqlen: int) -> tuple[Tensor, tuple[int, int, int]]:
        """An uninitialised [T, H, D], or [B, H, S, D] over [B, S, H, D] memory, and its strides (batch, head, row)."""
        if self.packed:
            x = torch.empty((seqlen, self.heads, self.head_dim), dtype=self.dtype)
            return x, (0, x.stride(1), x.stride(0))
        shape = (self.batch, seqlen, self.heads, self.head_dim)
        x = torch.empty(shape, dtype=self.dtype).transpose(1, 2)
        batch, head, row, _ = x.stride()
        return x, (batch, head, row)

    def check(self, op: str, status: tuple[int, int, int] | None) -> None:
        if status is not None and status[0] == _NOT_MONOTONE:
            name = ("cu_seqlens_q", "cu_seqlens_k")[status[1]]
            offsets, rows = self.tensors[6 + status[1]], (self.seqlen_q, self.seqlen_k)[status[1]]
            longest = self.numbers[7 + status[1]]
            assert offsets is not None
            begin, end = offsets[status[2] : status[2] + 2].tolist()
            raise ValueError(
                f"{op}: {name} must rise from 0 to at most {rows} by at most max_seqlen {longest}, "
                f"got {begin} and {end} for sequence {status[2]}"
            )
        _check(op, status)

    def forward(self, op: str) -> tuple[Tensor, Tensor]:
        output, output_stride = self.rows(self.seqlen_q)
        if self.packed:
            lse = torch.empty((self.heads, self.seqlen_q), dtype=self.lse_dtype)
            lse_stride = (0, self.seqlen_q)
        else:
            lse = torch.empty((self.batch, self.heads, self.seqlen_q), dtype=self.lse_dtype)
            lse_stride = (self.heads * self.seqlen_q, self.seqlen_q)
        status = _module().attention_forward(
            (*map(_address, self.tensors), output.data_ptr(), lse.data_ptr()),
            (*self.strides, output_stride, lse_stride),
            self.numbers,
        )
        self.check(op, status)
        return output, lse

    def row_strides(self, x: Tensor) -> tuple[int, ...]:
        """Strides (batch, head, row) of [B, H, S, ...], of [T, H, D] or of lse [H, T]."""
        if not self.packed:
            return x.stride()[:3]
        return (0, x.stride(1), x.stride(0)) if x.dim() == 3 else (0, x.stride(0), x.stride(1))

    def backward(
        self,
        op: str,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        output: Tensor,
        lse: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_output, output = _matrix_rows(grad_output.to(self.dtype)), _matrix_rows(output)
        lse = _aligned(lse)
        grad_lse = None if grad_lse is None else _aligned(grad_lse.to(self.lse_dtype))
        grads, grad_strides = zip(
            *(self.rows(n) for n in (self.seqlen_q, self.seqlen_k, self.seqlen_k)), strict=True
        )
        grad_bias = partial = None
        bias_strides: tuple[int, ...] = (0, 0, 0, 0)
        length = 0
        if bias is not None:
            grad_bias = torch.zeros(bias.shape, dtype=self.lse_dtype)
            bias_strides = _broadcast(grad_bias)[1]
            if 0 in bias_strides[2:]:
                length = bias.shape[3] if bias_strides[3] else self.longest_query
                partial = torch.zeros((self.batch, self.heads, length), dtype=self.lse_dtype)
        tensors = (*self.tensors, grad_output, grad_lse, output, lse, *grads, grad_bias, partial)
        status = _module().attention_backward(
            tuple(map(_address, tensors)),
            (
                *self.strides,
                self.row_strides(grad_output),
                (0, 0, 0) if grad_lse is None else self.row_strides(grad_lse),
                self.row_strides(output),
                self.row_strides(lse),
                *grad_strides,
                bias_strides,
            ),
            (*self.numbers, length),
        )
        self.check(op, status)
        if bias is None or grad_bias is None:
            return (*grads, torch.empty(0, dtype=self.dtype))
        return (*grads, grad_bias.to(bias.dtype))


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Arguments of the registered operator; output [B, H, Sq, D] over [B, Sq, H, D] memory and lse [B, H, Sq]."""
    return _Attention(query, key, value, *arguments).forward("attention")


def attention_varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    tile_map_q: Tensor | None,
    tile_map_k: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Arguments of the registered operator; output [T, H, D] and lse [H, T]. Checks the offsets."""
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    call = _Attention(
        query, key, value, None, None, *arguments, cu_seqlens=cu_seqlens, max_seqlens=max_seqlens
    )
    return call.forward("attention_varlen")


def attention_backward_refuses(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *arguments: Any,
) -> str | None:
    reason = attention_refuses(query, key, value, *arguments)
    return reason or _refusal(grad_output, grad_lse, output, lse)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    *arguments: Any,
) -> Gradients:
    """Arguments of the registered operator, the last one needs_bias_grad; gradients of query, key, value over
    [B, S, H, D] memory, and of bias, empty where it is not needed."""
    call = _Attention(query, key, value, attn_mask, key_padding_mask, bias, *arguments[:-1])
    needed = bias if arguments[-1] else None
    return call.backward("attention", grad_output, grad_lse, output, lse, needed)


def attention_varlen_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    tile_map_q: Tensor | None,
    tile_map_k: Tensor | None,
    bias: Tensor | None,
    *arguments: Any,
) -> Gradients:
    """As `attention_backward` for packed sequences; gradients [T, H, D], rows past the last offset are zero."""
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    call = _Attention(
        query,
        key,
        value,
        None,
        None,
        bias,
        *arguments[:-1],
        cu_seqlens=cu_seqlens,
        max_seqlens=max_seqlens,
    )
    needed = bias if arguments[-1] else None
    return call.backward("attention_varlen", grad_output, grad_lse, output, lse, needed)
