"""The specification of linear_cross_entropy against torch's own loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ctxfast import reference


def test_gradients_are_those_of_torch():
    hidden, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 5), (9, 5), (9,))
    )
    labels = torch.tensor([3, -100, 0, 8, -100, 3])
    loss = reference.linear_cross_entropy(hidden, weight, bias, labels)
    logits = hidden @ weight.t() + bias
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    grad = torch.tensor(0.7, dtype=torch.float64)
    expected = torch.autograd.grad(loss, (hidden, weight, bias), grad)
    found = reference.linear_cross_entropy_backward(grad, hidden, weight, bias, labels)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
