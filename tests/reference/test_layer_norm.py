"""The layer norm reference against torch's own modules and autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ctxfast import reference

DOUBLE = torch.float64


def test_written_out_backward_equals_autograd():
    x, residual = (torch.randn(2, 4, 6, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(6, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, 4, 6, dtype=DOUBLE)
    rows = {
        "dropout_p": 0.4,
        "seed": torch.tensor([3]),
        "sequence_ids": torch.arange(2)[:, None].expand(2, 4),
        "positions": torch.arange(4).expand(2, 4),
    }
    output = reference.add_layer_norm(x, residual, weight, bias, 1e-5, **rows)
    expected = torch.autograd.grad(output, (x, residual, weight, bias), grad)
    gradients = reference.add_layer_norm_backward(grad, x, residual, weight, 1e-5, **rows)
    for gradient, reference_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference_gradient)


def test_embedding_gradients_equal_torch_modules():
    ids, types, positions = (
        torch.tensor([[0, 3, 3]]),
        torch.tensor([[0, 1, 0]]),
        torch.arange(3)[None],
    )
    word = torch.nn.Embedding(5, 4, padding_idx=0, dtype=DOUBLE)
    token_type, position = (torch.nn.Embedding(n, 4, dtype=DOUBLE) for n in (2, 6))
    norm = torch.nn.LayerNorm(4, 1e-12, dtype=DOUBLE)
    expected = norm(word(ids) + token_type(types) + position(positions))
    parameters = (word.weight, token_type.weight, position.weight, norm.weight, norm.bias)
    output = reference.embed_layer_norm(ids, types, positions, *parameters, 1e-12)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    gradients = reference.embed_layer_norm_backward(
        grad, ids, types, positions, *parameters[:4], 1e-12, padding_idx=0
    )
    for gradient, other in zip(
        gradients, torch.autograd.grad(expected, parameters, grad), strict=True
    ):
        torch.testing.assert_close(gradient, other)


def test_bfloat16_statistics_are_float32():
    x = (torch.randn(3, 512) + 100).bfloat16()
    weight, bias = torch.ones(512).bfloat16(), torch.zeros(512).bfloat16()
    exact = F.layer_norm(x.double(), (512,))
    output = reference.add_layer_norm(x, None, weight, bias, 1e-12)
    # Half a unit of bfloat16, and sums of 512 values near 100 in float32; bfloat16 sums would be off by 0.25 and more.
    sums = torch.finfo(torch.float32).eps * 100 * 9  # nine halvings
    torch.testing.assert_close(output.double(), exact, atol=sums, rtol=2**-8)
