"""linear_cross_entropy against float64: loss and every gradient, few and many rows, no label at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ctxfast import ops, reference
from ctxfast.ops import _cross_entropy_chunks
from tests.ops.implementations import only
from tests.oracle import CAPS, assert_matches

SHAPES = [(1, 1, 2), (5, 7, 33), (40, 48, 100), (70, 33, 1029)]


def arguments(rows, k, vocabulary, dtype):
    hidden, weight = torch.randn(rows, k).to(dtype), torch.randn(vocabulary, k).to(dtype) / k**0.5
    labels = torch.randint(vocabulary, (rows,))
    labels[torch.rand(rows) < 0.6] = -100
    labels[0] = vocabulary - 1
    return hidden, weight, torch.randn(vocabulary).to(dtype), labels


def loss_and_gradients(function, tensors, labels, dtype, grad=0.7, **call):
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors if x is not None]
    hidden, weight, *bias = leaves
    loss = function(hidden, weight, bias[0] if bias else None, labels, **call)
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(grad, dtype=loss.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("buffer", [1 << 25, 4096])
def test_matches_float64(monkeypatch, shape, dtype, with_bias, buffer):
    monkeypatch.setattr(_cross_entropy_chunks, "_BUFFER", buffer)
    monkeypatch.setattr(_cross_entropy_chunks, "_BLOCK", 64)
    *tensors, labels = arguments(*shape, dtype)
    tensors = tensors if with_bias else tensors[:2]
    with only("native"):
        found = loss_and_gradients(ops.linear_cross_entropy, tensors, labels, dtype)
    eager = loss_and_gradients(reference.linear_cross_entropy, tensors, labels, dtype)
    exact = loss_and_gradients(reference.linear_cross_entropy, tensors, labels, torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
        return
    names = ("loss", "hidden", "weight", "bias")
    for name, *three in zip(names, found, eager, exact, strict=False):
        assert_matches(*three, name=name, cap=CAPS[dtype])  # the loss is float32


def test_only_the_wanted_gradients_and_the_loss_alone():
    hidden, weight, bias, labels = arguments(40, 48, 100, torch.float32)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    with only("native"):
        torch.testing.assert_close(ops.linear_cross_entropy(hidden, weight, bias, labels), expected)
        bias.requires_grad_()
        ops.linear_cross_entropy(hidden, weight, bias, labels).backward()
    gradient = bias.grad.clone()
    bias.grad = None
    F.cross_entropy(F.linear(hidden, weight, bias), labels).backward()
    torch.testing.assert_close(gradient, bias.grad)


def test_no_label_gives_nan_and_no_gradient_as_torch_does():
    hidden, weight, bias, labels = arguments(6, 5, 9, torch.float32)
    labels.fill_(-100)
    for function in (ops.linear_cross_entropy, reference.linear_cross_entropy):
        loss, *gradients = loss_and_gradients(
            function, (hidden, weight, bias), labels, torch.float32
        )
        assert loss.isnan()
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    assert ops.linear_cross_entropy(hidden[:0], weight, bias, labels[:0]).isnan()


def test_layouts_index_types_and_ignored_values():
    hidden, weight, bias, labels = arguments(24, 6, 11, torch.float32)
    labels[labels == 4] = 5
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    assert_close = torch.testing.assert_close
    strided = torch.stack([hidden, hidden], -1)[..., 0].view(2, 12, 6)
    assert_close(ops.linear_cross_entropy(strided, weight, bias, labels.view(2, 12)), expected)
    assert_close(
        ops.linear_cross_entropy(hidden, weight.t().contiguous().t(), bias, labels), expected
    )
    assert_close(ops.linear_cross_entropy(hidden, weight, bias, labels.int()), expected)
    fours = labels.where(labels != -100, 4)
    assert_close(ops.linear_cross_entropy(hidden, weight, bias, fours, ignore_index=4), expected)


def test_nan_in_a_row_without_label_is_not_seen_and_in_a_labelled_row_is():
    hidden, weight, bias, labels = arguments(24, 6, 33, torch.float32)
    ignored = int((labels == -100).nonzero()[0])
    hidden[ignored] = float("nan")
    loss, dhidden, dweight, _ = loss_and_gradients(
        ops.linear_cross_entropy, (hidden, weight, bias), labels, torch.float32
    )
    assert loss.isfinite() and dweight.isfinite().all()
    assert torch.equal(dhidden[ignored], torch.zeros(6))
    for column in (0, 32):
        poisoned = bias.clone()
        poisoned[column] = float("nan")
        assert ops.linear_cross_entropy(hidden, weight, poisoned, labels).isnan()


def test_large_and_infinite_logits():
    weight, labels = torch.eye(40), torch.tensor([0, 17])
    hidden = torch.zeros(2, 40)
    hidden[0, 0], hidden[1, 17] = 1e4, -1e4
    hidden[:, 39] = -torch.inf
    bias = torch.zeros(40)
    bias[38] = -torch.inf
    x = hidden.nan_to_num(neginf=-1e30)
    loss = ops.linear_cross_entropy(x, weight, bias, labels)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight, bias), labels))


def test_the_same_bits_with_any_number_of_threads():
    hidden, weight, bias, labels = arguments(70, 33, 1029, torch.float32)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(
            loss_and_gradients(
                ops.linear_cross_entropy, (hidden, weight, bias), labels, torch.float32
            )
        )
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
    for a, b in zip(results[1], results[2], strict=True):
        assert torch.equal(a, b)


def test_memory_does_not_grow_with_rows(monkeypatch):
    """The product never sees more rows than the buffer holds."""
    monkeypatch.setattr(_cross_entropy_chunks, "_BUFFER", 64 * 100)
    sizes = []
    product = ops.linear_cross_entropy.__globals__["_product"]

    def watched(*args):
        result = product(*args)
        sizes.append(result.numel())
        return result

    monkeypatch.setitem(ops.linear_cross_entropy.__globals__, "_product", watched)
    hidden, weight, bias, labels = arguments(1000, 8, 100, torch.float32)
    hidden.requires_grad_()
    ops.linear_cross_entropy(hidden, weight, bias, labels).backward()
    assert len(sizes) > 6 and max(sizes) <= 64 * 100


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(2, 5)}, ValueError, r"hidden must be \[..., 4\] .* shape \(2, 5\)"),
        ({"hidden": torch.ones(2, 4).int()}, TypeError, "hidden must be floating point"),
        ({"weight": torch.ones(3, 4).double()}, TypeError, "weight must have the dtype of hidden"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[3\], got shape \(4,\)"),
        ({"labels": torch.ones(2)}, TypeError, "labels must be int64 or int32, got torch.float32"),
        (
            {"labels": torch.ones(3).long()},
            ValueError,
            r"labels must be \(2,\) on cpu, got shape \(3,\)",
        ),
        (
            {"labels": torch.tensor([0, 3])},
            ValueError,
            r"labels must be -100 or in \[0, 3\), got 3",
        ),
        (
            {"labels": torch.tensor([-1, 0])},
            ValueError,
            r"labels must be -100 or in \[0, 3\), got -1",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input_is_one_clear_error(change, error, message, backend):
    call = {
        "hidden": torch.ones(2, 4),
        "weight": torch.ones(3, 4),
        "bias": torch.ones(3),
        "labels": torch.tensor([0, -100]),
    }
    with ops.use_backend(backend), pytest.raises(error, match=f"^linear_cross_entropy: {message}"):
        ops.linear_cross_entropy(**{**call, **change})


def test_gradients_belong_to_the_caller():
    """The ones of a loss that is differentiated as it is are those that the forward pass found, not copies."""
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((6, 8), (11, 8), (11,))]
    labels = torch.tensor([3, -100, 0, 10, 5, -100])

    def backward(factor):
        for leaf in leaves:
            leaf.grad = None
        (ops.linear_cross_entropy(*leaves, labels) * factor).backward()
        return [leaf.grad for leaf in leaves]

    once, doubled = backward(1.0), backward(2.0)
    for one, two in zip(once, doubled, strict=True):
        torch.testing.assert_close(one * 2, two)
    loss = ops.linear_cross_entropy(*leaves, labels)
    for leaf in leaves:
        leaf.grad = None
    loss.backward(retain_graph=True)
    for leaf in leaves:
        leaf.grad.zero_()  # the graph is kept, the gradients are the caller's
    loss.backward()
    for leaf, one in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, one)


def test_backward_makes_no_zeros_for_outputs_without_a_gradient():
    """Autograd would make a gradient of zeros of the size of the vocabulary's weight."""

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.zeros_like):
                made.append(tuple(result.shape))
            return result

    made: list[tuple[int, ...]] = []
    *tensors, labels = arguments(5, 7, 33, torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    loss = ops.linear_cross_entropy(*leaves, labels)
    with Made():
        loss.backward()
    assert not {tuple(x.shape) for x in tensors} & set(made)
