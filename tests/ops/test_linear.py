"""linear against float64: every activation, residual and layout, plain and packed."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from ctxfast.ops import _dispatch, _native_matrix_product, _onednn
from tests.ops.implementations import only
from tests.oracle import assert_matches

SHAPES = [(1, 1, 1), (5, 7, 3), (16, 64, 48), (33, 130, 257)]


def arguments(rows, k, n, dtype):
    shapes = ((rows, k), (n, k), (n,), (rows, n))
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "tanh"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_matches_float64(shape, activation, dtype, packed):
    x, weight, bias, residual = arguments(*shape, dtype)
    copy = (
        _onednn.pack(weight, shape[0]) if packed and _onednn.unavailable_reason() is None else None
    )
    for with_bias in (None, bias):
        for with_residual in (None, residual):
            call = {"activation": activation, "residual": with_residual}
            with only("native"):
                result = ops.linear(x, weight, with_bias, packed=copy, **call)
            eager = reference.linear(x, weight, with_bias, **call)
            call["residual"] = None if with_residual is None else with_residual.double()
            exact = reference.linear(
                x.double(),
                weight.double(),
                None if with_bias is None else with_bias.double(),
                **call,
            )
            z = reference.linear(
                x.double(), weight.double(), None if with_bias is None else with_bias.double()
            )
            # 1 + erf(z) cancels where z is negative: its rounding, times z, stays in the result.
            rounding = torch.finfo(dtype).eps * z if activation in ("gelu", "gelu_tanh") else None
            assert_matches(result, eager, exact, rounding=rounding)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "tanh"])
def test_gradients_match_float64(activation):
    tensors = arguments(33, 130, 57, torch.float32)
    grad = torch.randn(33, 57)

    def gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        *inputs, residual = leaves
        output = function(*inputs, activation=activation, residual=residual)
        return torch.autograd.grad(output, leaves, grad.to(dtype))

    with only("native"):
        found = gradients(ops.linear, torch.float32)
    eager = gradients(reference.linear, torch.float32)
    exact = gradients(reference.linear, torch.float64)
    for name, *three in zip(
        ("input", "weight", "bias", "residual"), found, eager, exact, strict=True
    ):
        assert_matches(*three, name=name)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_frozen_weight_costs_no_product(activation):
    x, weight, bias, _ = arguments(33, 130, 57, torch.float32)
    grad = torch.randn(33, 57)
    results = []
    for frozen in (True, False):
        leaf = x.clone().requires_grad_()
        weight.requires_grad_(not frozen)
        bias.requires_grad_(not frozen)
        with _dispatch.record() as verdicts:
            output = ops.linear(leaf, weight, bias, activation=activation)
            results += torch.autograd.grad(output, leaf, grad, create_graph=True)
        assert ("linear_backward" in [v.operator for v in verdicts]) != frozen
        if activation:
            results += torch.autograd.grad(results[-1].square().sum(), leaf)
    for ours, whole in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("rows", [63, 64, 130])
def test_a_transposed_weight_is_not_copied(rows):
    """The weight of a frozen layer as its gradient meets it: many rows by it run where it lies."""
    x, weight, bias, _ = arguments(rows, 57, 130, torch.float32)
    weight = weight.t().contiguous().t()
    with _dispatch.record() as verdicts:
        found = ops.linear(x.view(1, rows, 57), weight, bias)
    eager = reference.linear(x, weight, bias)
    exact = reference.linear(x.double(), weight.double(), bias.double())
    assert found.shape == (1, rows, 130)
    assert_matches(found[0], eager, exact)
    if _native_matrix_product.refuses(x) is None:
        assert [v.ran == "native" for v in verdicts] == [rows >= 64]


def test_layouts_and_empty_inputs():
    weight, bias = torch.randn(6, 4), torch.randn(6)
    for x in (torch.randn(4, 5).t(), torch.randn(2, 3, 8)[..., ::2], torch.randn(4).expand(3, 4)):
        torch.testing.assert_close(ops.linear(x, weight, bias), x @ weight.t() + bias)
    assert ops.linear(torch.randn(0, 4), weight, bias).shape == (0, 6)
    assert ops.linear(torch.randn(2, 0, 4), weight, bias).shape == (2, 0, 6)
    torch.testing.assert_close(
        ops.linear(torch.randn(2, 0), torch.randn(6, 0), bias), bias.expand(2, 6)
    )
    assert ops.linear(torch.randn(4), weight).shape == (6,)


def test_nan_stays_in_its_row():
    x = torch.randn(5, 8)
    x[2, 3] = float("nan")
    output = ops.linear(x, torch.randn(4, 8), activation="gelu")
    assert output[2].isnan().all() and output[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"activation": "swish"},
            ValueError,
            "activation must be None or one of 'gelu', .* got 'swish'",
        ),
        (
            {"input": torch.ones(2, 5)},
            ValueError,
            r"input must be \[..., 4\] .* got shape \(2, 5\)",
        ),
        ({"input": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "input must be floating point"),
        ({"weight": torch.ones(3, 4).double()}, TypeError, "weight must have the dtype of input"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[3\], got shape \(4,\)"),
        ({"residual": torch.ones(3)}, ValueError, r"residual must be \(2, 3\), got shape \(3,\)"),
    ],
)
def test_bad_input_is_one_clear_error(change, error, message):
    call = {"input": torch.ones(2, 4), "weight": torch.ones(3, 4), **change}
    with pytest.raises(error, match=f"^linear: {message}"):
        ops.linear(call.pop("input"), call.pop("weight"), **call)
