"""The attention reference against torch's own scaled_dot_product_attention, gradcheck and elementary properties."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ctxfast import reference

DOUBLE = torch.float64


def inputs(batch=2, heads=3, seqlen_q=7, seqlen_k=9, head_dim=5):
    return (
        torch.randn(batch, heads, seqlen_q, head_dim, dtype=DOUBLE),
        torch.randn(batch, heads, seqlen_k, head_dim, dtype=DOUBLE),
        torch.randn(batch, heads, seqlen_k, head_dim, dtype=DOUBLE),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [4, 7, 9])
def test_causal_and_scale_mean_what_torch_means(causal, seqlen_k):
    q, k, v = inputs(seqlen_k=seqlen_k)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.7)
    torch.testing.assert_close(reference.attention(q, k, v, is_causal=causal, scale=0.7), expected)


@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 1, 7, 9), (2, 1, 1, 9), (3, 7, 1), (7, 9)])
def test_masks_and_bias_mean_what_torch_means(shape):
    q, k, v = inputs()
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    bias = torch.randn(shape, dtype=DOUBLE)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(reference.attention(q, k, v, attn_mask=mask), expected)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(reference.attention(q, k, v, bias=bias), expected)


@pytest.mark.parametrize("window", [(2, 1), (0, 0), (-1, 2), (3, -1)])
def test_window_is_inclusive(window):
    q, k, v = inputs()
    left, right = window
    i, j = torch.arange(7)[:, None], torch.arange(9)
    mask = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(reference.attention(q, k, v, window_size=window), expected)


def test_padding_has_no_influence_and_empty_rows_are_zero():
    q, k, v = inputs()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, :4] = True  # the second sequence attends nothing
    k[0, :, 4:] = v[0, :, 4:] = float("nan")
    k[1] = v[1] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    output, lse = reference.attention_with_lse(*leaves, key_padding_mask=mask)
    expected = F.scaled_dot_product_attention(q[:1], k[:1, :, :4], v[:1, :, :4])
    torch.testing.assert_close(output[:1], expected)
    assert (output[1] == 0).all() and (lse[1] == -torch.inf).all()
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert torch.isfinite(gradient).all() and (gradient[1] == 0).all()


def test_lse_is_the_logarithm_of_the_denominator():
    q, k, v = inputs()
    scores = q @ k.transpose(-2, -1) * 5**-0.5
    torch.testing.assert_close(reference.attention_with_lse(q, k, v)[1], scores.logsumexp(-1))


def test_weights_times_values_is_the_output():
    q, k, v = inputs()
    arguments = {"dropout_p": 0.4, "seed": torch.tensor([5]), "window_size": (3, 3)}
    weights = reference.attention_weights(q, k, **arguments)
    torch.testing.assert_close(weights @ v, reference.attention(q, k, v, **arguments))


@pytest.mark.parametrize("bias_shape", [(2, 2, 4, 5), (1, 2, 4, 5), (2, 1, 1, 5), (1, 1, 4, 1)])
def test_written_out_backward_equals_autograd(bias_shape):
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 4, 5, 3))
    bias = torch.randn(bias_shape, dtype=DOUBLE, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True], [False] * 5])
    arguments = {
        "key_padding_mask": mask,
        "dropout_p": 0.3,
        "seed": torch.tensor([8]),
        "bias": bias,
    }
    output, lse = reference.attention_with_lse(q, k, v, **arguments)
    grad_output, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    expected = torch.autograd.grad(
        (output * grad_output).sum() + (finite * grad_lse).sum(), (q, k, v, bias)
    )
    gradients = reference.attention_backward(grad_output, grad_lse, q, k, v, **arguments)
    for gradient, reference_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference_gradient)


def test_varlen_equals_each_sequence_alone():
    lengths_q, lengths_k = [3, 0, 5], [4, 2, 0]
    offsets = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    q = torch.randn(10, 2, 4, dtype=DOUBLE)  # two rows past the last offset
    k, v = torch.randn(2, 7, 2, 4, dtype=DOUBLE)
    bias = torch.randn(3, 2, 5, 4, dtype=DOUBLE)
    arguments = {"is_causal": True, "dropout_p": 0.2, "seed": torch.tensor([3])}
    output, lse = reference.attention_varlen(
        q, k, v, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], bias=bias, **arguments
    )
    padded = reference.attention(
        *(x.transpose(0, 1)[None].expand(1, -1, -1, -1) for x in (q[:3], k[:4], v[:4])),
        bias=bias[:1, :, :3, :4],
        **arguments,
    )
    torch.testing.assert_close(output[:3].transpose(0, 1)[None], padded)
    assert (output[3:] == 0).all() and (lse[:, 3:] == -torch.inf).all()
    grads = torch.randn_like(output)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    output, _ = reference.attention_varlen(
        *leaves[:3], cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], bias=bias, **arguments
    )
    expected = torch.autograd.grad(output, leaves, grads)
    gradients = reference.attention_varlen_backward(
        grads,
        None,
        *leaves[:3],
        cu_seqlens_q=offsets[0],
        cu_seqlens_k=offsets[1],
        bias=bias,
        **arguments,
    )
    for gradient, reference_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference_gradient)
