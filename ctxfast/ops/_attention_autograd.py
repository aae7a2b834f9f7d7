"""Gradients of the attention operators: fused backward operators, and double backward through the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxfast import reference
from ctxfast.ops import _native_attention, _triton
from ctxfast.ops._dispatch import Implementation, Operator, never
from ctxfast.ops._library import define, gradients_through_reference


def _differentiate(inputs, attn_mask, key_padding_mask, seed, causal, left, right, p, scale):
    """The reference's backward; inputs: grad_output, grad_lse, query, key, value, bias."""
    *tensors, bias = inputs
    return reference.attention_backward(
        *tensors,
        bias=bias,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=causal,
        window_size=(left, right),
        dropout_p=p,
        scale=scale,
        seed=seed,
    )


def _differentiate_varlen(inputs, cu_seqlens_q, cu_seqlens_k, seed, causal, left, right, p, scale):
    *tensors, bias = inputs
    return reference.attention_varlen_backward(
        *tensors,
        bias=bias,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        is_causal=causal,
        window_size=(left, right),
        dropout_p=p,
        scale=scale,
        seed=seed,
    )


def _results(
    gradients: tuple[Tensor, Tensor, Tensor, Tensor | None], like: Tensor, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four tensors; an empty one stands for a bias gradient that nobody asked for.

    Padded gradients lie in [B, S, H, D] memory, like the output; packed ones [T, H, D] are contiguous.
    """
    dq, dk, dv, dbias = gradients
    dbias = like.new_empty(0) if not needs_bias_grad or dbias is None else dbias.contiguous()
    return sequence_major(dq), sequence_major(dk), sequence_major(dv), dbias


def sequence_major(x: Tensor) -> Tensor:
    """Packed [T, H, D] contiguous; padded [B, H, S, D] over [B, S, H, D] memory, free to reshape to [B, S, H * D]."""
    return x.contiguous() if x.dim() == 3 else x.transpose(1, 2).contiguous().transpose(1, 2)


def _reference_backward(
    grad_output,
    grad_lse,
    query,
    key,
    value,
    output,
    lse,
    attn_mask,
    key_padding_mask,
    bias,
    seed,
    causal,
    left,
    right,
    p,
    scale,
    needs_bias_grad,
):
    inputs = (grad_output, grad_lse, query, key, value, bias)
    gradients = _differentiate(
        inputs, attn_mask, key_padding_mask, seed, causal, left, right, p, scale
    )
    return _results(gradients, query, needs_bias_grad)


def _reference_varlen_backward(
    grad_output,
    grad_lse,
    query,
    key,
    value,
    output,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    max_q,
    max_k,
    tile_map_q,
    tile_map_k,
    bias,
    seed,
    causal,
    left,
    right,
    p,
    scale,
    needs_bias_grad,
):
    inputs = (grad_output, grad_lse, query, key, value, bias)
    gradients = _differentiate_varlen(
        inputs, cu_seqlens_q, cu_seqlens_k, seed, causal, left, right, p, scale
    )
    return _results(gradients, query, needs_bias_grad)


def _like(x: Tensor) -> Tensor:
    if x.dim() != 4:
        return x.new_empty(x.shape)
    batch, heads, seqlen, head_dim = x.shape
    return x.new_empty((batch, seqlen, heads, head_dim)).transpose(1, 2)


def _fake_backward(grad_output, grad_lse, query, key, value, *arguments):
    bias, needs_bias_grad = arguments[-8], arguments[-1]
    dbias = query.new_empty(bias.shape if needs_bias_grad else 0)
    return _like(query), _like(key), _like(value), dbias


_BACKWARD_ARGUMENTS = (
    "Tensor? bias, Tensor? seed, bool is_causal, int window_left, int window_right, float dropout_p, "
    "float scale, bool needs_bias_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_INPUTS = (
    "(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor output, Tensor lse, "
)

attention_backward_operator = Operator(
    "attention_backward",
    Implementation(
        "native", _native_attention.attention_backward, _native_attention.attention_backward_refuses
    ),
    Implementation("triton", _triton.attention_backward, _triton.attention_backward_refuses),
    Implementation("reference", _reference_backward, never),
)
attention_varlen_backward_operator = Operator(
    "attention_varlen_backward",
    Implementation(
        "native",
        _native_attention.attention_varlen_backward,
        _native_attention.attention_backward_refuses,
    ),
    Implementation("triton", _triton.attention_varlen_backward, _triton.attention_backward_refuses),
    Implementation("reference", _reference_varlen_backward, never),
)


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.positions = [index for index, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.arguments = [None if isinstance(x, Tensor) else x for x in inputs]


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiates the reference's own backward with respect to every tensor that it reads."""
    arguments = list(ctx.arguments)
    for index, tensor in zip(ctx.positions, ctx.saved_tensors, strict=True):
        arguments[index] = tensor
    varlen = len(arguments) == _VARLEN_ARITY
    differentiate, bias_place = (_differentiate_varlen, 13) if varlen else (_differentiate, 9)
    places = (0, 1, 2, 3, 4, bias_place)
    rest = (*arguments[7:9], *arguments[bias_place + 1 : -1])
    if not arguments[-1]:  # no bias gradient was produced, so none flows back
        grads = (*grads[:3], None)
    found = gradients_through_reference(
        lambda *inputs: differentiate(inputs, *rest),
        tuple(arguments[place] for place in places),
        grads,
    )
    results: list[Tensor | None] = [None] * len(arguments)
    for place, gradient in zip(places, found, strict=True):
        results[place] = gradient
    return tuple(results)


_VARLEN_ARITY = 21

_attention_backward = define(
    _BACKWARD_INPUTS + "Tensor? attn_mask, Tensor? key_padding_mask, " + _BACKWARD_ARGUMENTS,
    attention_backward_operator,
    _fake_backward,
    setup_context=_setup_double,
    backward=_double_backward,
)
_attention_varlen_backward = define(
    _BACKWARD_INPUTS
    + "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? tile_map_q, Tensor? tile_map_k, " + _BACKWARD_ARGUMENTS,
    attention_varlen_backward_operator,
    _fake_backward,
    setup_context=_setup_double,
    backward=_double_backward,
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, attn_mask, key_padding_mask, bias, seed, *ctx.arguments = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, attn_mask, key_padding_mask, bias, seed)


def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None):
    query, key, value, output, lse, attn_mask, key_padding_mask, bias, seed = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    needs_bias_grad = bias is not None and ctx.needs_input_grad[5]
    dq, dk, dv, dbias = _attention_backward(
        grad_output,
        grad_lse,
        query,
        key,
        value,
        output,
        lse,
        attn_mask,
        key_padding_mask,
        bias,
        seed,
        *ctx.arguments,
        needs_bias_grad,
    )
    return dq, dk, dv, None, None, dbias if needs_bias_grad else None, *(None,) * 6


def setup_context_varlen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *plan, bias, seed = inputs[:11]
    cu_q, cu_k, *ctx.max_seqlens, tiles_q, tiles_k = plan
    ctx.arguments = inputs[11:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, cu_q, cu_k, tiles_q, tiles_k, bias, seed)


def backward_varlen(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None):
    query, key, value, output, lse, *plan, bias, seed = ctx.saved_tensors
    cu_q, cu_k, tiles_q, tiles_k = plan
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    needs_bias_grad = bias is not None and ctx.needs_input_grad[9]
    dq, dk, dv, dbias = _attention_varlen_backward(
        grad_output,
        grad_lse,
        query,
        key,
        value,
        output,
        lse,
        cu_q,
        cu_k,
        *ctx.max_seqlens,
        tiles_q,
        tiles_k,
        bias,
        seed,
        *ctx.arguments,
        needs_bias_grad,
    )
    return dq, dk, dv, *(None,) * 6, dbias if needs_bias_grad else None, *(None,) * 6
