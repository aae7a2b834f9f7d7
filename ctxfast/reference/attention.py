"""Scaled dot-product attention (Vaswani et al., 2017), written out.

    scores  = scale * query @ key^T + bias                 [B, H, Sq, Sk]
    lse     = log sum_j exp(scores)          over the keys j that row i may attend
    weights = exp(scores - lse), dropped out afterwards
    output  = weights @ value                              [B, H, Sq, D]

A row without any key gives zero output, zero gradients and lse = -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxfast.reference.dropout import dropout_mask, dropout_scale

Window = tuple[int, int]


def allowed_keys(
    shape: tuple[int, int, int, int],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window_size: Window,
    device: torch.device,
) -> Tensor | None:
    """Bool mask broadcastable to shape [B, H, Sq, Sk], True = attend; None when every key is allowed."""
    _, _, seqlen_q, seqlen_k = shape
    masks = []
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    if attn_mask is not None:
        masks.append(attn_mask)
    left, right = window_size
    if is_causal:
        right = 0 if right < 0 else min(right, 0)
    if left >= 0 or right >= 0:
        i = torch.arange(seqlen_q, device=device)[:, None]
        j = torch.arange(seqlen_k, device=device)[None, :]
        if left >= 0:
            masks.append((j >= i - left)[None, None])
        if right >= 0:
            masks.append((j <= i + right)[None, None])
    if not masks:
        return None
    allowed = masks[0]
    for mask in masks[1:]:
        allowed = allowed & mask
    return allowed


def _weights_and_lse(
    query: Tensor, key: Tensor, bias: Tensor | None, allowed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    scores = (query @ key.transpose(-2, -1)) * scale
    if bias is not None:
        scores = scores + bias
    lse_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf, dtype=lse_dtype)
    if allowed is None:
        return torch.softmax(scores, -1), torch.logsumexp(scores.to(lse_dtype), -1)
    allowed = allowed.expand(scores.shape)
    empty = ~allowed.any(-1, keepdim=True)
    # An empty row keeps finite scores, so that no NaN enters the backward of softmax, and is cleared afterwards.
    scores = scores.masked_fill(~allowed & ~empty, -torch.inf)
    scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores.to(lse_dtype), -1).masked_fill(empty.squeeze(-1), -torch.inf)
    return weights, lse


class _Problem:
    """One padded attention: everything but the values, which differ between forward, weights and backward."""

    def __init__(
        self,
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
        first_sequence: int = 0,
    ):
        shape = (*query.shape[:3], key.shape[-2])
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.valid = None if key_padding_mask is None else key_padding_mask[:, None, :, None]
        self.query, self.key = query, self.fill(key)
        allowed = allowed_keys(
            shape, attn_mask, key_padding_mask, is_causal, window_size, query.device
        )
        if bias is not None:  # a row of -inf attends nothing, as in torch: zero, not NaN
            reached = bias != -torch.inf
            allowed = reached if allowed is None else allowed & reached
        self.weights, self.lse = _weights_and_lse(query, self.key, bias, allowed, self.scale)
        self.factor = None  # what dropout multiplies the weights with
        if dropout_p > 0.0:
            assert seed is not None
            b, h, i, j = (torch.arange(n, device=query.device) for n in shape)
            keep = dropout_mask(
                seed,
                dropout_p,
                i=i[:, None],
                j=j,
                head=h[:, None, None],
                sequence=(b + first_sequence)[:, None, None, None],
            )
            self.factor = keep.double() * dropout_scale(dropout_p)

    def fill(self, x: Tensor) -> Tensor:
        """Keys or values with padding zeroed: what lies there, NaN included, reaches no valid token."""
        return x if self.valid is None else x.where(self.valid, 0.0)

    def drop(self, x: Tensor) -> Tensor:
        return x if self.factor is None else x * self.factor.to(x.dtype)

    def output(self, value: Tensor) -> Tensor:
        return self.drop(self.weights) @ self.fill(value)

    def gradients(self, value: Tensor, grad_output: Tensor, grad_lse: Tensor | None):
        """Gradients of query, key, value and of the scores."""
        dvalue = self.fill(self.drop(self.weights).transpose(-2, -1) @ grad_output)
        dweights = self.drop(grad_output @ self.fill(value).transpose(-2, -1))
        dscores = dweights - (self.weights * dweights).sum(-1, keepdim=True)
        if grad_lse is not None:
            dscores = dscores + grad_lse[..., None].to(dscores.dtype)
        dscores = self.weights * dscores
        dquery = dscores @ self.key * self.scale
        dkey = self.fill(dscores.transpose(-2, -1) @ self.query * self.scale)
        return dquery, dkey, dvalue, dscores


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, **arguments
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Sq, D] and natural-log log-sum-exp [B, H, Sq]; keyword arguments as `ctxfast.ops.attention`."""
    problem = _Problem(query, key, **arguments)
    return problem.output(value), problem.lse


def attention(query: Tensor, key: Tensor, value: Tensor, **arguments) -> Tensor:
    """Output [B, H, Sq, D]; keyword arguments as `ctxfast.ops.attention`."""
    return attention_with_lse(query, key, value, **arguments)[0]


def attention_weights(query: Tensor, key: Tensor, **arguments) -> Tensor:
    """The probabilities [B, H, Sq, Sk] that multiply the values, dropout included."""
    problem = _Problem(query, key, **arguments)
    return problem.drop(problem.weights)


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    **arguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias, written out; differentiable once more through autograd.

    With W = exp(scores - lse), M the dropout factors, dW = M * (dO @ V^T):
        dV = (M * W)^T @ dO
        dscores = W * (dW - rowsum(W * dW) + dlse)
        dQ = scale * dscores @ K;   dK = scale * dscores^T @ Q;   dbias = dscores, summed over broadcast dimensions
    """
    problem = _Problem(query, key, bias=bias, **arguments)
    dquery, dkey, dvalue, dscores = problem.gradients(value, grad_output, grad_lse)
    return dquery, dkey, dvalue, None if bias is None else dscores.sum_to_size(bias.shape)


class _Sequences:
    """The sequences of a packed batch, one padded problem of batch size 1 each."""

    def __init__(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, bias: Tensor | None):
        self.starts_q, self.starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        self.bias = None if bias is None else bias[(None,) * (4 - bias.dim())]

    def __len__(self) -> int:
        return len(self.starts_q) - 1

    def queries(self, b: int, x: Tensor) -> Tensor:
        """Rows [Tq, H, D] of sequence b as [1, H, Sq, D]."""
        return x[self.starts_q[b] : self.starts_q[b + 1]].transpose(0, 1)[None]

    def keys(self, b: int, x: Tensor) -> Tensor:
        return x[self.starts_k[b] : self.starts_k[b + 1]].transpose(0, 1)[None]

    def bias_of(self, b: int) -> Tensor | None:
        return None if self.bias is None else self.part(b, self.bias)

    def part(self, b: int, bias: Tensor) -> Tensor:
        """The view of a bias, or of its gradient, that sequence b reads."""
        bias = bias if bias.shape[0] == 1 else bias[b : b + 1]
        if bias.shape[2] != 1:
            bias = bias[:, :, : self.starts_q[b + 1] - self.starts_q[b]]
        if bias.shape[3] != 1:
            bias = bias[..., : self.starts_k[b + 1] - self.starts_k[b]]
        return bias


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None = None,
    **arguments,
) -> tuple[Tensor, Tensor]:
    """Packed sequences: query [Tq, H, D], key and value [Tk, H, D] -> output [Tq, H, D], lse [H, Tq].

    Sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]; rows past the last offset give 0 and lse = -inf.
    bias: broadcastable to [B, H, max_seqlen_q, max_seqlen_k], read at positions inside the sequence.
    """
    sequences = _Sequences(cu_seqlens_q, cu_seqlens_k, bias)
    outputs, lses = [], []
    for b in range(len(sequences)):
        output, lse = attention_with_lse(
            sequences.queries(b, query),
            sequences.keys(b, key),
            sequences.keys(b, value),
            bias=sequences.bias_of(b),
            first_sequence=b,
            **arguments,
        )
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    tail, heads = query.shape[0] - sequences.starts_q[-1], query.shape[1]
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    outputs.append(query.new_zeros(tail, heads, query.shape[2]))
    lses.append(query.new_full((heads, tail), -torch.inf, dtype=lse_dtype))
    return torch.cat(outputs), torch.cat(lses, dim=1)


def attention_varlen_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None = None,
    **arguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias of `attention_varlen`; zero past the last offset."""
    sequences = _Sequences(cu_seqlens_q, cu_seqlens_k, bias)
    dbias = None if sequences.bias is None else torch.zeros_like(sequences.bias)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for b in range(len(sequences)):
        rows = slice(sequences.starts_q[b], sequences.starts_q[b + 1])
        *gradients, part = attention_backward(
            sequences.queries(b, grad_output),
            None if grad_lse is None else grad_lse[None, :, rows],
            sequences.queries(b, query),
            sequences.keys(b, key),
            sequences.keys(b, value),
            bias=sequences.bias_of(b),
            first_sequence=b,
            **arguments,
        )
        for group, gradient in zip(parts, gradients, strict=True):
            group.append(gradient[0].transpose(0, 1))
        if dbias is not None and part is not None:
            sequences.part(b, dbias).add_(part)
    dquery, dkey, dvalue = (
        torch.cat([*group, x.new_zeros(x.shape[0] - sum(map(len, group)), *x.shape[1:])])
        for group, x in zip(parts, (query, key, value), strict=True)
    )
    if dbias is None or bias is None:
        return dquery, dkey, dvalue, None
    return dquery, dkey, dvalue, dbias.view(bias.shape)
