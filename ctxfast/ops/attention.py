"""Attention on padded [B, H, S, D] and packed [T, H, D] layouts: FlashAttention (Dao et al., 2022) in Triton and C++."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _attention_autograd as autograd
from ctxfast.ops import _native, _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define
from ctxfast.ops._validate import (
    Window,
    autocast,
    dropout_seed,
    require_broadcastable,
    require_floating,
    require_probability,
    require_same,
    require_tensor,
    require_window,
    shape_of,
)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reference(q, k, v, attn_mask, key_padding_mask, bias, seed, causal, left, right, p, scale):
    output, lse = reference.attention_with_lse(
        q,
        k,
        v,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        bias=bias,
        is_causal=causal,
        window_size=(left, right),
        dropout_p=p,
        scale=scale,
        seed=seed,
    )
    return autograd.sequence_major(output), lse


def _reference_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, bias, seed, causal, left, right, p, scale
):
    return reference.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        bias=bias,
        is_causal=causal,
        window_size=(left, right),
        dropout_p=p,
        scale=scale,
        seed=seed,
    )


def _fake(q, k, v, attn_mask, key_padding_mask, bias, seed, causal, left, right, p, scale):
    batch, heads, seqlen_q, head_dim = q.shape
    output = q.new_empty((batch, seqlen_q, heads, head_dim)).transpose(1, 2)
    return output, q.new_empty((batch, heads, seqlen_q), dtype=_lse_dtype(q.dtype))


def _fake_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, bias, seed, causal, left, right, p, scale
):
    total, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, total), dtype=_lse_dtype(q.dtype))


attention_operator = Operator(
    "attention",
    Implementation("native", _native.attention_forward, _native.attention_refuses),
    Implementation("triton", _triton.attention_forward, _triton.attention_refuses),
    Implementation("reference", _reference, never),
)
attention_varlen_operator = Operator(
    "attention_varlen",
    Implementation("native", _native.attention_varlen_forward, _native.attention_refuses),
    Implementation("triton", _triton.attention_varlen_forward, _triton.attention_refuses),
    Implementation("reference", _reference_varlen, never),
)

_attention = define(
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? bias, "
    "Tensor? seed, bool is_causal, int window_left, int window_right, float dropout_p, float scale) "
    "-> (Tensor, Tensor)",
    attention_operator,
    _fake,
    setup_context=autograd.setup_context,
    backward=autograd.backward,
)
_attention_varlen = define(
    "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? bias, Tensor? seed, bool is_causal, "
    "int window_left, int window_right, float dropout_p, float scale) -> (Tensor, Tensor)",
    attention_varlen_operator,
    _fake_varlen,
    setup_context=autograd.setup_context_varlen,
    backward=autograd.backward_varlen,
)


def _validate_inputs(op: str, query: Tensor, key: Tensor, value: Tensor, layout: str) -> None:
    dims = layout.count(",") + 1
    for name, x in (("query", query), ("key", key), ("value", value)):
        require_floating(op, name, x)
        if x.dim() != dims:
            raise ValueError(f"{op}: {name} must be {layout}, got {shape_of(x)}")
    require_same(op, "key", key, "query", query)
    require_same(op, "value", value, "query", query)
    if key.shape != value.shape:
        raise ValueError(
            f"{op}: value must have the shape of key {tuple(key.shape)}, got {shape_of(value)}"
        )


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window_size: Window = (-1, -1),
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the natural logarithm of the softmax denominator.

    Returns output [B, H, Sq, D] and lse [B, H, Sq], float32 (float64 for float64 inputs), -inf where a row may attend
    nothing; both are differentiable. Arguments and errors: `attention`.
    """
    op = "attention"
    query, key, value = autocast(query, key, value)  # type: ignore[assignment]
    _validate_inputs(op, query, key, value, "[batch, heads, sequence, head size]")
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"{op}: key must match query {tuple(query.shape)} in batch, heads and head size, got {shape_of(key)}"
        )
    scores = (*query.shape[:3], key.shape[2])
    if attn_mask is not None:
        require_tensor(op, "attn_mask", attn_mask)
        require_broadcastable(op, "attn_mask", attn_mask, scores)
        if attn_mask.dtype != torch.bool:
            require_floating(op, "attn_mask", attn_mask)
            bias = attn_mask if bias is None else bias + attn_mask
            attn_mask = None
        else:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if key_padding_mask is not None:
        expected = (key.shape[0], key.shape[2])
        if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != expected:
            raise ValueError(
                f"{op}: key_padding_mask must be bool {expected}, "
                f"got {key_padding_mask.dtype} of {shape_of(key_padding_mask)}"
            )
    if bias is not None:
        require_floating(op, "bias", bias)
        require_broadcastable(op, "bias", bias, scores)
        bias = bias[(None,) * (4 - bias.dim())].to(query.dtype)
    require_probability(op, dropout_p)
    require_window(op, window_size)
    seed = dropout_seed(op, dropout_p, seed, query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _attention(
        query,
        key,
        value,
        attn_mask,
        key_padding_mask,
        bias,
        seed,
        is_causal,
        *window_size,
        dropout_p,
        scale,
    )


def attention(query: Tensor, key: Tensor, value: Tensor, **arguments) -> Tensor:
    """softmax(scale * query @ key^T + bias) @ value, without ever holding the [Sq, Sk] scores (Dao et al., 2022).

    query:  [B, H, Sq, D], key and value: [B, H, Sk, D]; float16, bfloat16, float32 or float64, any strides
    attn_mask: bool, broadcastable to [B, H, Sq, Sk], True = attend; or floating, added to the scores
    key_padding_mask: bool [B, Sk], True = attend; whatever lies at masked keys, NaN included, has no influence
    bias:   floating, broadcastable to [B, H, Sq, Sk], added to the scores; its gradient has its own shape
    is_causal: row i attends keys j <= i (top-left aligned when Sq != Sk)
    window_size: (left, right), row i attends i - left <= j <= i + right; -1 leaves a side open
    dropout_p: probability of dropping a weight, always active when > 0; see `ctxfast.reference.dropout`
    scale:  factor of the scores, by default D ** -0.5
    seed:   int64 [1] on the device of query, by default drawn from torch's generator

    Returns [B, H, Sq, D] in the dtype of query. Rows that may attend nothing are zero, and so are their gradients.
    Raises TypeError for a wrong dtype and ValueError for a wrong shape, device or value.
    """
    return attention_with_lse(query, key, value, **arguments)[0]


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window_size: Window = (-1, -1),
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The weights [B, H, Sq, Sk] of `attention`, dropout included: the one operator that holds them all.

    Arguments as `attention`. Runs in PyTorch and is differentiable any number of times.
    """
    op = "attention_weights"
    query, key = autocast(query, key)  # type: ignore[assignment]
    _validate_inputs(op, query, key, key, "[batch, heads, sequence, head size]")
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        bias = attn_mask if bias is None else bias + attn_mask
        attn_mask = None
    require_probability(op, dropout_p)
    require_window(op, window_size)
    return reference.attention_weights(
        query,
        key,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        bias=bias,
        is_causal=is_causal,
        window_size=window_size,
        dropout_p=dropout_p,
        scale=scale,
        seed=dropout_seed(op, dropout_p, seed, query.device),
    )


def attention_varlen_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window_size: Window = (-1, -1),
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_varlen`, and the natural logarithm of the softmax denominator, [H, Tq], -inf on empty rows."""
    op = "attention_varlen"
    query, key, value = autocast(query, key, value)  # type: ignore[assignment]
    _validate_inputs(op, query, key, value, "[tokens, heads, head size]")
    if key.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"{op}: key must match query {tuple(query.shape)} in heads and head size, got {shape_of(key)}"
        )
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.dtype != torch.int32 or offsets.dim() != 1 or offsets.device != query.device:
            raise ValueError(
                f"{op}: {name} must be int32 [batch + 1] on {query.device}, "
                f"got {offsets.dtype} of {shape_of(offsets)} on {offsets.device}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] == 0:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must both be [batch + 1], "
            f"got {shape_of(cu_seqlens_q)} and {shape_of(cu_seqlens_k)}"
        )
    if bias is not None:
        require_floating(op, "bias", bias)
        scores = (cu_seqlens_q.shape[0] - 1, query.shape[1], max_seqlen_q, max_seqlen_k)
        require_broadcastable(op, "bias", bias, scores)
        bias = bias[(None,) * (4 - bias.dim())].to(query.dtype)
    require_probability(op, dropout_p)
    require_window(op, window_size)
    seed = dropout_seed(op, dropout_p, seed, query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _attention_varlen(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        bias,
        seed,
        is_causal,
        *window_size,
        dropout_p,
        scale,
    )


def attention_varlen(query: Tensor, key: Tensor, value: Tensor, **arguments) -> Tensor:
    """`attention` within each sequence of a packed batch.

    query:  [Tq, H, D], key and value: [Tk, H, D], any strides: slices of a fused projection need no copy
    cu_seqlens_q, cu_seqlens_k: int32 [B + 1]; sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]. Sequences of
            length zero are allowed, at the end too; rows past the last offset are zero in outputs and gradients
    max_seqlen_q, max_seqlen_k: upper bounds of the sequence lengths
    bias:   broadcastable to [B, H, max_seqlen_q, max_seqlen_k], read at positions inside the sequence
    is_causal, window_size, dropout_p, scale, seed: as `attention`; positions count inside the sequence, so that padded
            and packed runs draw the same dropout mask

    Returns [Tq, H, D]. On a CPU the offsets are checked: ValueError unless they rise from 0 within the rows, by no
    more than the stated maximum.
    """
    return attention_varlen_with_lse(query, key, value, **arguments)[0]
