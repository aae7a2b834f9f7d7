"""Linear layers on Triton, interpreted: the pass after the product and its gradients, against float64."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from ctxfast.ops import _dispatch, _triton_linear
from ctxfast.ops.linear_activation import linear_activation
from ctxfast.reference.linear import ACTIVATIONS as reference_activations
from tests.kernels.cases import FLOATS
from tests.ops.implementations import only
from tests.oracle import assert_matches

ACTIVATIONS = [None, "gelu", "gelu_tanh", "tanh"]
NAMES = ("output", "input", "weight", "bias", "residual")


@pytest.fixture(params=["one part", "parts"])
def parts(request, monkeypatch):
    """The bias gradient as one range of rows and as several, the last one shorter, over several column blocks."""
    if request.param == "parts":
        monkeypatch.setattr(_triton_linear, "_PARTS", 3)
        monkeypatch.setattr(_triton_linear, "BLOCK_M", 4)
        monkeypatch.setattr(_triton_linear, "BLOCK_N", 16)
        monkeypatch.setattr(_triton_linear, "BLOCK", 64)


def arguments(rows, k, n, dtype):
    shapes = ((rows, k), (n, k), (n,), (rows, n))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def results(function, tensors, grad, dtype, activation):
    """Output and the gradients of every tensor that is given."""
    x, weight, bias, residual = (
        None if t is None else t.to(dtype).detach().requires_grad_() for t in tensors
    )
    output = function(x, weight, bias, activation=activation, residual=residual)
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    return output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (33, 20, 57)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_inference_matches_float64(shape, activation, dtype, with_residual):
    x, weight, bias, residual = arguments(*shape, dtype)
    call = {"activation": activation, "residual": residual if with_residual else None}
    with only("triton"):
        result = ops.linear(x, weight, bias, **call)
    eager = reference.linear(x, weight, bias, **call)
    z = reference.linear(x.double(), weight.double(), bias.double())
    exact = reference_activations[activation or "none"](z)
    exact = exact + residual.double() if with_residual else exact
    assert_matches(result, eager, exact, rounding=torch.finfo(dtype).eps * z)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("given", ["all", "no bias", "no residual"])
@pytest.mark.usefixtures("parts")
def test_gradients_match_float64(activation, dtype, given):
    tensors = arguments(33, 20, 57, dtype)
    if given != "all":
        tensors[2 if given == "no bias" else 3] = None
    names = [n for n, t in zip(NAMES, [1, *tensors], strict=True) if t is not None]
    grad = torch.randn(33, 57).to(dtype)
    with only("triton"):
        found = results(ops.linear, tensors, grad, dtype, activation)
    eager = results(reference.linear, tensors, grad, dtype, activation)
    exact = results(reference.linear, tensors, grad, torch.float64, activation)
    for name, *three in zip(names, found, eager, exact, strict=True):
        assert_matches(*three, name=name)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("of", ["value", "slope"])
def test_the_whole_range_of_an_activation(activation, of):
    """Relative to each value where tanh is almost its argument; finite and exact where it has long saturated."""
    z = torch.cat([torch.logspace(-8, 2, 400), -torch.logspace(-8, 2, 400), torch.zeros(1)])
    eye, function = torch.eye(1), reference_activations[activation]
    leaf = z[:, None].clone().requires_grad_()
    exact_leaf = leaf.double().detach().requires_grad_()
    exact = function(exact_leaf)
    with only("triton"):
        found = ops.linear(leaf, eye, activation=activation)
        if of == "slope":
            (found,) = torch.autograd.grad(found.sum(), leaf)
            (exact,) = torch.autograd.grad(exact.sum(), exact_leaf)
    size = (
        1.0 if of == "slope" else leaf.double().abs()
    )  # 1 + erf(z) cancels, and is multiplied by z
    if activation == "tanh" and of == "value":
        size = exact.abs()
    assert ((found - exact).abs() <= 6e-7 * size).all()


def test_layouts_and_expanded_gradients():
    weight, bias = torch.randn(6, 4), torch.randn(12)[::2]
    inputs = (torch.randn(4, 5).t(), torch.randn(2, 3, 8)[..., ::2], torch.randn(4))
    for x in inputs:
        shape = (*x.shape[:-1], 6)
        residual = torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
        tensors = (x, weight.t().contiguous().t(), bias, residual)
        for grad in (torch.randn(6).expand(shape), torch.tensor(0.5).expand(shape)):
            with only("triton"):
                found = results(ops.linear, tensors, grad, torch.float32, "gelu")
            expected = results(reference.linear, tensors, grad, torch.float32, "gelu")
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0, 6), (3, 4, 0)])
def test_empty(shape):
    tensors = arguments(*shape, torch.float32)
    grad = torch.randn(shape[0], shape[2])
    with only("triton"):
        found = results(ops.linear, tensors, grad, torch.float32, "gelu")
    expected = results(reference.linear, tensors, grad, torch.float32, "gelu")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_product_is_overwritten_only_where_no_gradient_needs_it():
    x, weight, bias, residual = arguments(5, 4, 6, torch.float32)
    before = residual.clone()
    z = reference.linear(x, weight, bias)
    with only("triton"):
        plain = ops.linear(x, weight, bias, activation="gelu", residual=residual)
        output, kept = linear_activation(x, weight, bias, "gelu", residual)
    assert torch.equal(plain, output) and torch.equal(residual, before)
    torch.testing.assert_close(kept, z)


def test_nan_stays_in_its_row():
    x, weight, bias, _ = arguments(5, 8, 4, torch.float32)
    x[2, 3] = torch.nan
    for activation in ACTIVATIONS[1:]:
        with only("triton"):
            output, dx, _, dbias = results(
                ops.linear, (x, weight, bias, None), torch.ones(5, 4), torch.float32, activation
            )
        for rows in (output, dx):
            assert rows[2].isnan().all() and rows[[0, 1, 3, 4]].isfinite().all()
        assert dbias.isnan().all()


@pytest.mark.parametrize("wanted", range(3))
def test_only_the_wanted_gradient(wanted):
    tensors = arguments(5, 4, 6, torch.float32)[:3]
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    with only("triton"), _dispatch.record() as verdicts:
        found = ops.linear(*leaves, activation="gelu").sum()
        found.backward()
    expected = torch.autograd.grad(
        reference.linear(*leaves, activation="gelu").sum(), leaves[wanted]
    )[0]
    torch.testing.assert_close(leaves[wanted].grad, expected)
    assert [v.operator for v in verdicts] == ["linear_activation", "linear_activation_backward"]


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_registered_operator(activation):
    """The reference in float64 and the kernels in float32: the promises to torch hold for both."""
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((2, 3, 4), (5, 4), (5,), (2, 3, 5))]
    leaves = [t.requires_grad_() for t in tensors]

    def function(x, weight, bias, residual):
        return linear_activation(x, weight, bias, activation, residual)[0]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    x, weight, bias, residual = (t.detach().float().requires_grad_() for t in leaves)
    with ops.use_backend("triton"):
        torch.library.opcheck(
            torch.ops.ctxfast.linear_activation.default, (x, weight, bias, activation, residual)
        )
        per_sample = torch.func.vmap(
            torch.func.grad(lambda *t: function(*t).sum()), (0, None, None, 0)
        )
        found = per_sample(x.detach(), weight, bias, residual)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves[0])[0]
    torch.testing.assert_close(found, expected.float())
