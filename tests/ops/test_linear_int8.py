"""linear_int8 against its definition in float64, and the error that the quantisation itself makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctxfast import ops, reference
from ctxfast.ops import _native_linear
from ctxfast.ops.linear_int8 import int8_unavailable_reason
from ctxfast.reference.linear import ACTIVATIONS
from tests.ops.implementations import only

needs_vnni = pytest.mark.skipif(
    int8_unavailable_reason() is not None, reason=str(int8_unavailable_reason())
)


def arguments(rows, k, n, dtype=torch.float32):
    weight = torch.randn(n, k) * torch.logspace(-2, 1, n).unsqueeze(1)
    return torch.randn(rows, k).to(dtype), *ops.quantize_weight(weight), torch.randn(n)


def exactly(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, activation: str | None):
    rows, row_scales = reference.quantize_rows(x)
    z = (rows.double() * row_scales.double().unsqueeze(1)) @ (
        weight * scales.double().unsqueeze(1)
    ).t()
    return ACTIVATIONS[activation or "none"](z if bias is None else z + bias.double())


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "tanh"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (33, 130, 257), (16, 768, 64)])
def test_matches_its_definition(shape, activation, dtype):
    x, weight, scales, bias = arguments(*shape, dtype)
    for given in (bias, None):
        with only("native"):
            result = ops.linear_int8(x, weight, scales, given, activation=activation)
        exact = exactly(x, weight, scales, given, activation)
        z = exactly(x, weight, scales, given, None)
        # A few roundings of the largest term, once in the dtype of the result.
        bound = 1e-6 * (1 + z.abs().max()) + torch.finfo(dtype).eps * exact.abs()
        assert result.dtype == dtype and bool(((result.double() - exact).abs() <= bound).all())
        eager = reference.linear_int8(x, weight, scales, given, activation=activation)
        assert bool(((eager.double() - exact).abs() <= bound).all())


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_quantised_as_specified(dtype):
    x = torch.randn(9, 100).to(dtype)
    x[3], x[4, 5] = 0.0, 1e4
    found, expected = _native_linear.quantize_rows(x), reference.quantize_rows(x)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)
    # A value may lie on the boundary of two integers.
    assert (found[0].int() - expected[0].int()).abs().max() <= 1
    assert (found[0] != expected[0]).float().mean() < 0.01


def test_quantisation_error_is_half_a_step():
    x, weight = torch.randn(40, 256), torch.randn(64, 256)
    result = ops.linear_int8(x, *ops.quantize_weight(weight))
    exact = x.double() @ weight.double().t()
    error = (result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < error < 0.02


def test_extreme_values_do_not_saturate():
    x, weight = torch.full((4, 512), 127.0), torch.full((8, 512), -127.0)
    result = ops.linear_int8(x, *ops.quantize_weight(weight))
    torch.testing.assert_close(result, x @ weight.t())


def test_layouts_empty_and_nan():
    _, weight, scales, bias = arguments(1, 8, 5)
    for x in (torch.randn(8, 6).t(), torch.randn(2, 3, 16)[..., ::2], torch.randn(8)):
        expected = reference.linear_int8(x, weight, scales, bias)
        torch.testing.assert_close(ops.linear_int8(x, weight, scales, bias), expected)
    assert ops.linear_int8(torch.randn(0, 8), weight, scales).shape == (0, 5)
    x = torch.randn(4, 8)
    x[1, 2], x[2, 7] = float("nan"), float("inf")
    output = ops.linear_int8(x, weight, scales, bias, activation="gelu")
    assert output[1:3].isnan().all() and output[[0, 3]].isfinite().all()


@pytest.mark.unpoisoned
def test_opcheck():
    x, weight, scales, bias = arguments(3, 8, 5)
    results = torch.library.opcheck(
        torch.ops.ctxfast.linear_int8.default, (x, weight, scales, bias, "gelu")
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(3, 4)}, TypeError, "weight must be int8, got torch.float32"),
        ({"input": torch.ones(2, 5)}, ValueError, r"input must be \[..., 4\] .* shape \(2, 5\)"),
        ({"input": torch.ones(2, 4).int()}, TypeError, "input must be floating point"),
        ({"weight_scales": torch.ones(4)}, ValueError, r"weight_scales must be \[3\]"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[3\], got shape \(4,\)"),
        ({"activation": "swish"}, ValueError, "activation must be None or one of .* got 'swish'"),
    ],
)
def test_bad_input_is_one_clear_error(change, error, message):
    call = {
        "input": torch.ones(2, 4),
        "weight": torch.ones(3, 4, dtype=torch.int8),
        "weight_scales": torch.ones(3),
        **change,
    }
    with pytest.raises(error, match=f"^linear_int8: {message}"):
        ops.linear_int8(**call)
