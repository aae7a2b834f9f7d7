"""linear and linear_cross_entropy on a CUDA device, at the sizes of BERT: against float64, repeated, in a graph."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from tests.ops.implementations import only
from tests.oracle import CAPS, assert_matches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCABULARY = 30522


def linear_results(function, tensors, grad, dtype, activation):
    x, weight, bias, residual = (t.to(dtype).detach().requires_grad_() for t in tensors)
    output = function(x, weight, bias, activation=activation, residual=residual)
    leaves = (x, weight, bias, residual)
    return output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "tanh"])
def test_linear(activation, dtype):
    shapes = ((1001, 768), (3072, 768), (3072,), (1001, 3072))
    tensors = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
    tensors[1] /= 768**0.5
    grad = torch.randn(1001, 3072, device=DEVICE).to(dtype)
    with only("triton"):
        found, again = (
            linear_results(ops.linear, tensors, grad, dtype, activation) for _ in range(2)
        )
        inference = ops.linear(*tensors[:3], activation=activation, residual=tensors[3])
    assert torch.equal(inference, found[0])
    eager = linear_results(reference.linear, tensors, grad, dtype, activation)
    exact = linear_results(reference.linear, tensors, grad, torch.float64, activation)
    names = ("output", "input", "weight", "bias", "residual")
    for name, *three, twice in zip(names, found, eager, exact, again, strict=True):
        assert_matches(*three, name=name)
        assert torch.equal(three[0], twice), name


def loss_arguments(dtype, rows=2500):
    hidden = torch.randn(rows, 768, device=DEVICE).to(dtype)
    weight = (torch.randn(VOCABULARY, 768, device=DEVICE) / 768**0.5).to(dtype)
    labels = torch.randint(VOCABULARY, (rows,), device=DEVICE)
    labels[torch.rand(rows, device=DEVICE) < 0.3] = -100
    return [hidden, weight, torch.randn(VOCABULARY, device=DEVICE).to(dtype)], labels


def loss_results(function, tensors, labels, dtype):
    leaves = [t.to(dtype).detach().requires_grad_() for t in tensors]
    loss = function(*leaves, labels)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy(dtype):
    """Several buffers of logits."""
    tensors, labels = loss_arguments(dtype)
    with only("triton"):
        found, again = (
            loss_results(ops.linear_cross_entropy, tensors, labels, dtype) for _ in range(2)
        )
    eager = loss_results(reference.linear_cross_entropy, tensors, labels, dtype)
    exact = loss_results(reference.linear_cross_entropy, tensors, labels, torch.float64)
    names = ("loss", "hidden", "weight", "bias")
    for name, *three, twice in zip(names, found, eager, exact, again, strict=True):
        assert_matches(*three, name=name, cap=CAPS[dtype])
        assert torch.equal(three[0], twice), name


def test_a_graph_replays_with_other_labels():
    tensors, labels = loss_arguments(torch.bfloat16, rows=200)
    leaves = [t.requires_grad_() for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile the kernels and start cuBLAS before the recording
        torch.autograd.grad(ops.linear_cross_entropy(*leaves, labels), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ops.linear_cross_entropy(*leaves, labels)
        gradients = torch.autograd.grad(loss, leaves)
    labels.copy_(labels.roll(1))
    labels[:50] = -100
    graph.replay()
    dtype = torch.bfloat16
    eager = loss_results(reference.linear_cross_entropy, tensors, labels, dtype)
    exact = loss_results(reference.linear_cross_entropy, tensors, labels, torch.float64)
    names = ("loss", "hidden", "weight", "bias")
    for name, *three in zip(names, (loss.detach(), *gradients), eager, exact, strict=True):
        assert_matches(*three, name=name, cap=CAPS[dtype])
