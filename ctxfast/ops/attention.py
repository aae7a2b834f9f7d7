"""Attention on padded [B, H, S, D] and packed [T, H, D] layouts: FlashAttention (Dao et al., 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _attention_autograd as autograd
from ctxfast.ops import _native_attention, _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define
from ctxfast.ops._validate import (
    Window,
    autocast,
    dropout_seed,
    require_bool,
    require_broadcastable,
    require_device,
    require_floating,
    require_number,
    require_probability,
    require_same,
    require_tensor,
    require_window,
    shape_of,
)

_PADDED = "[batch, heads, sequence, head size]"


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


def _require_offsets(name: str, offsets: Tensor, rows: int, longest: int) -> None:
    """What the native operator checks as well; both read the offsets on the host."""
    values = offsets.tolist()
    for b, (begin, end) in enumerate(zip(values, values[1:], strict=False)):
        if (b == 0 and begin != 0) or not begin <= end <= min(rows, begin + longest):
            raise ValueError(
                f"attention_varlen: {name} must rise from 0 to at most {rows} by at most max_seqlen {longest}, "
                f"got {begin} and {end} for sequence {b}"
            )


def _reference_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, tiles_q, tiles_k, *arguments
):
    bias, seed, causal, left, right, p, scale = arguments
    _require_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_q)
    _require_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_k)
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


def _fake_varlen(q, *arguments):
    total, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, total), dtype=_lse_dtype(q.dtype))


attention_operator = Operator(
    "attention",
    Implementation(
        "native", _native_attention.attention_forward, _native_attention.attention_refuses
    ),
    Implementation("triton", _triton.attention_forward, _triton.attention_refuses),
    Implementation("reference", _reference, never),
)
attention_varlen_operator = Operator(
    "attention_varlen",
    Implementation(
        "native", _native_attention.attention_varlen_forward, _native_attention.attention_refuses
    ),
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
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? tile_map_q, Tensor? tile_map_k, Tensor? bias, "
    "Tensor? seed, bool is_causal, "
    "int window_left, int window_right, float dropout_p, float scale) -> (Tensor, Tensor)",
    attention_varlen_operator,
    _fake_varlen,
    setup_context=autograd.setup_context_varlen,
    backward=autograd.backward_varlen,
)


def _inputs(op: str, layout: str, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value (by default the key), checked and in autocast's dtype."""
    for name, x in zip(("query", "key", "value"), tensors, strict=False):
        require_floating(op, name, x)
    cast: tuple[Tensor, ...] = autocast(*tensors)  # type: ignore[assignment]
    query, key, value = (*cast, cast[1])[:3]
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != layout.count(",") + 1:
            raise ValueError(f"{op}: {name} must be {layout}, got {shape_of(x)}")
    if query.shape[-1] == 0:
        raise ValueError(f"{op}: query must have a head size of at least 1, got {shape_of(query)}")
    require_same(op, "key", key, "query", query)
    require_same(op, "value", value, "query", query)
    if key.shape != value.shape:
        raise ValueError(
            f"{op}: value must have the shape of key {tuple(key.shape)}, got {shape_of(value)}"
        )
    return query, key, value


def _bias(op: str, name: str, bias: Tensor | None, query: Tensor, scores: tuple[int, ...]):
    """bias with four dimensions."""
    if bias is None:
        return None
    require_floating(op, name, bias)
    require_device(op, name, bias, query.device)
    require_broadcastable(op, name, bias, scores)
    return bias[(None,) * (4 - bias.dim())]


def _padded_inputs(
    op: str,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """A bool mask and a bias in the dtype of query, both of four dimensions, of a padded operator."""
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"{op}: key must match query {tuple(query.shape)} in batch, heads and head size, got {shape_of(key)}"
        )
    scores = (*query.shape[:3], key.shape[2])
    bias = _bias(op, "bias", bias, query, scores)
    if attn_mask is not None:
        require_tensor(op, "attn_mask", attn_mask)
        if attn_mask.dtype != torch.bool:
            added = _bias(op, "attn_mask", attn_mask, query, scores)
            attn_mask, bias = None, added if bias is None else bias + added
        else:
            require_device(op, "attn_mask", attn_mask, query.device)
            require_broadcastable(op, "attn_mask", attn_mask, scores)
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if key_padding_mask is not None:
        require_tensor(op, "key_padding_mask", key_padding_mask)
        require_device(op, "key_padding_mask", key_padding_mask, query.device)
        expected = (key.shape[0], key.shape[2])
        if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != expected:
            raise ValueError(
                f"{op}: key_padding_mask must be bool {expected}, "
                f"got {key_padding_mask.dtype} of {shape_of(key_padding_mask)}"
            )
    return attn_mask, None if bias is None else bias.to(query.dtype)


def _scale(
    op: str,
    query: Tensor,
    is_causal: bool,
    window_size: Window,
    dropout_p: float,
    scale: float | None,
) -> float:
    """The factor of the scores; checks the arguments that are no tensors."""
    require_bool(op, "is_causal", is_causal)
    require_window(op, window_size)
    require_probability(op, dropout_p)
    if scale is None:
        return query.shape[-1] ** -0.5
    require_number(op, "scale", scale)
    return scale


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
    query, key, value = _inputs(op, _PADDED, query, key, value)
    attn_mask, bias = _padded_inputs(op, query, key, attn_mask, key_padding_mask, bias)
    scale = _scale(op, query, is_causal, window_size, dropout_p, scale)
    seed = dropout_seed(op, dropout_p, seed, query.device)
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
    query, key, _ = _inputs(op, _PADDED, query, key)
    attn_mask, bias = _padded_inputs(op, query, key, attn_mask, key_padding_mask, bias)
    scale = _scale(op, query, is_causal, window_size, dropout_p, scale)
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
    tile_map_q: Tensor | None = None,
    tile_map_k: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window_size: Window = (-1, -1),
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_varlen`, and the natural logarithm of the softmax denominator, [H, Tq], -inf on empty rows."""
    op = "attention_varlen"
    query, key, value = _inputs(op, "[tokens, heads, head size]", query, key, value)
    if key.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"{op}: key must match query {tuple(query.shape)} in heads and head size, got {shape_of(key)}"
        )
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        require_tensor(op, name, offsets)
        require_device(op, name, offsets, query.device)
        if offsets.dtype != torch.int32 or offsets.dim() != 1:
            raise ValueError(
                f"{op}: {name} must be int32 [batch + 1], got {offsets.dtype} of {shape_of(offsets)}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] == 0:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must both be [batch + 1], "
            f"got {shape_of(cu_seqlens_q)} and {shape_of(cu_seqlens_k)}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, int | torch.SymInt):
            raise TypeError(f"{op}: {name} must be an integer, got {type(longest).__name__}")
    scores = (cu_seqlens_q.shape[0] - 1, query.shape[1], max_seqlen_q, max_seqlen_k)
    bias = _bias(op, "bias", bias, query, scores)
    bias = None if bias is None else bias.to(query.dtype)
    scale = _scale(op, query, is_causal, window_size, dropout_p, scale)
    seed = dropout_seed(op, dropout_p, seed, query.device)
    return _attention_varlen(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        tile_map_q,
        tile_map_k,
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
    tile_map_q, tile_map_k: `attention_tile_map` of the offsets, so that the layers of a model share them
    bias:   broadcastable to [B, H, max_seqlen_q, max_seqlen_k], read at positions inside the sequence
    is_causal, window_size, dropout_p, scale, seed: as `attention`; positions count inside the sequence, so that padded
            and packed runs draw the same dropout mask

    Returns [Tq, H, D]. On a CPU the offsets are checked: ValueError unless they rise from 0 within the rows, by no
    more than the stated maximum.
    """
    return attention_varlen_with_lse(query, key, value, **arguments)[0]
