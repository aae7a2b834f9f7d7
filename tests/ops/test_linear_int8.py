"""linear_int8 against its definition in float64, and the error that the quantisation itself makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctxfast import ops, reference
from ctxfast.ops import _native
from ctxfast.reference.linear import ACTIVATIONS
from tests.ops.implementations import only

DTYPES = [torch.float32, torch.bfloat16]
# The first multiplies without instructions for bytes, the last on tiles.
_WIDE = ("avx512", "avx512_vnni", "avx512_bf16", "amx")


def arguments(rows, k, n, dtype=torch.float32):
    """Rows of different size and offset, output channels of different scale."""
    weight = torch.randn(n, k) * torch.logspace(-2, 1, n).unsqueeze(1)
    x = torch.randn(rows, k) * torch.logspace(-1, 1, rows).unsqueeze(1) + torch.randn(rows, 1)
    return x.to(dtype), ops.quantize_weight(weight), torch.randn(n)


def exactly(x: Tensor, weight: ops.QuantizedWeight, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum in float64, and the sum of the magnitudes of the three terms that a float32 result adds up."""
    u, low, step = (t.double() for t in reference.quantize_rows(x))
    n = weight.scales.shape[0]
    q = reference.unpack_weight(weight.panels, n, x.shape[-1]).double()
    product = step.unsqueeze(1) * weight.scales.double() * (u @ q.t())
    offset = low.unsqueeze(1) * (weight.scales.double() * q.sum(1))
    bias = torch.zeros(n).double() if bias is None else bias.double()
    return product + offset + bias, product.abs() + offset.abs() + bias.abs()


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "tanh"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 7, 3), (33, 130, 257), (16, 768, 64), (205, 36, 70)]
)
def test_matches_its_definition(shape, activation, dtype, output, isa):
    x, weight, bias = arguments(*shape, dtype)
    for given in (bias, None):
        z, terms = exactly(x, weight, given)
        exact = ACTIVATIONS[activation or "none"](z)
        # Seven roundings of float32 lead to the sum and no slope of an activation exceeds 1.13; activations of float32
        # have an error of 2e-7 of their argument or of 1; the result is rounded once to its own type.
        bound = 8 * 2.0**-24 * 1.13 * terms + 2e-7 * (1 + z.abs())
        if activation == "gelu" and output == torch.bfloat16:
            bound += 4e-6 + 2.0**-13 * exact.abs()  # as csrc/cpu/gelu.h promises
        bound += torch.finfo(output).eps / 2 * (exact.abs() + bound)
        with only("native"):
            result = ops.linear_int8(x, weight, given, activation=activation, dtype=output)
        eager = reference.linear_int8(x, *weight[:3], given, activation=activation, dtype=output)
        for y in (result, eager):
            assert y.dtype == output
            assert float(((y.double() - exact).abs() / bound).max()) <= 1.0


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 33, 49, 205, 401])
@pytest.mark.parametrize(
    "shape", [(1, 1), (63, 17), (64, 32), (65, 33), (130, 257), (770, 100), (2100, 65)]
)
def test_instructions_for_bytes_change_no_bit(rows, shape, dtype, output):
    """Sums of integers are exact, and all that follows them is the same arithmetic."""
    names = [name for name in _WIDE if _native.available() and name in _native.available_isas()]
    if len(names) < 2:
        pytest.skip("this processor multiplies no bytes")
    x, weight, bias = arguments(rows, *shape, dtype)
    before = _native.isa()
    try:
        for activation in (None, "gelu", "gelu_tanh", "tanh"):
            found = []
            for name in names:
                _native.set_isa(name)
                with only("native"):
                    y = ops.linear_int8(x, weight, bias, activation=activation, dtype=output)
                found.append(y)
            for name, y in zip(names[1:], found[1:], strict=True):
                assert torch.equal(y, found[0]), name
    finally:
        _native.set_isa(before)


def test_narrow_gelu_over_its_range(isa):
    """With a weight of zeros the result is the activation of the bias."""
    z = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([0.0, -1e30, 1e30, 3e38])])
    weight = ops.quantize_weight(torch.zeros(len(z), 1))
    with only("native"):
        y = ops.linear_int8(torch.ones(1, 1), weight, z, activation="gelu", dtype=torch.bfloat16)
    exact = torch.special.ndtr(z.double()) * z.double()
    vectors = isa in ("avx512", "avx512_bf16", "amx")
    bound = 6e-7 + 2.0**-23 * exact.abs() if vectors else 4e-6 + 2.0**-13 * exact.abs()
    bound += torch.finfo(torch.bfloat16).eps / 2 * (exact.abs() + bound)
    assert float(((y[0].double() - exact).abs() / bound).max()) <= 1.0
    assert y[0, z == 0].eq(0).all()
    inf = torch.tensor([float("-inf"), float("nan"), float("inf")])
    weight = ops.quantize_weight(torch.zeros(3, 1))
    y = ops.linear_int8(torch.ones(1, 1), weight, inf, activation="gelu", dtype=torch.bfloat16)
    assert y[0, :2].isnan().all() and y[0, 2].isinf()


def test_native_rounds_rows_as_specified(isa):
    """With the identity as weight the result is the rounded input itself."""
    k = 100
    x = torch.randn(9, k)
    x[3], x[4, 5], x[5] = 0.0, 1e4, 2.5
    identity = ops.quantize_weight(torch.eye(k))
    u, low, step = reference.quantize_rows(x)
    found = ops.linear_int8(x, identity)
    levels = (found - low.unsqueeze(1)) / step.clamp_min(1e-30).unsqueeze(1)
    # A value in the middle of two levels, to rounding, may go to either.
    assert (levels - u).abs().max() < 1.01
    assert ((levels - u).abs() > 0.01).float().mean() < 0.01
    assert (found - x).abs().le(0.501 * step.unsqueeze(1) + 1e-5 * x.abs()).all()
    torch.testing.assert_close(found[[3, 5]], x[[3, 5]])


def test_quantisation_error_is_half_a_step():
    x, weight = torch.randn(40, 256), torch.randn(64, 256)
    result = ops.linear_int8(x, ops.quantize_weight(weight))
    exact = x.double() @ weight.double().t()
    error = (result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < error < 0.015


def test_extreme_values_do_not_saturate(isa):
    k = 512
    x, weight = torch.full((4, k), 127.0), torch.full((8, k), -127.0)
    x[:, 0] = -127.0  # all others are at the highest level
    result = ops.linear_int8(x, ops.quantize_weight(weight))
    torch.testing.assert_close(result, x @ weight.t())


def test_a_deep_sum_stays_in_range():
    """Where 32-bit sums could overflow the reference runs, exactly."""
    k = 70_000
    x, weight = torch.ones(1, k), torch.ones(2, k)
    x[0, 0] = 0.0
    result = ops.linear_int8(x, ops.quantize_weight(weight))
    torch.testing.assert_close(result, torch.full((1, 2), k - 1.0))


def test_layouts_empty_and_nan(isa):
    _, weight, bias = arguments(1, 8, 5)
    for x in (torch.randn(8, 6).t(), torch.randn(2, 3, 16)[..., ::2], torch.randn(8)):
        expected = reference.linear_int8(x, *weight[:3], bias)
        torch.testing.assert_close(ops.linear_int8(x, weight, bias), expected)
    assert ops.linear_int8(torch.randn(0, 8), weight).shape == (0, 5)
    assert ops.linear_int8(torch.randn(3, 8), ops.quantize_weight(torch.empty(0, 8))).numel() == 0
    x = torch.randn(4, 8)
    x[1, 2], x[2, 7] = float("nan"), float("inf")
    for dtype in DTYPES:
        output = ops.linear_int8(x, weight, bias, activation="gelu", dtype=dtype)
        assert output[1:3].isnan().all() and output[[0, 3]].isfinite().all()
    bad = torch.ones(3, 8)
    bad[1, 4] = float("nan")
    output = ops.linear_int8(torch.randn(2, 8), ops.quantize_weight(bad))
    assert output[:, 1].isnan().all() and output[:, [0, 2]].isfinite().all()


def test_the_number_of_threads_changes_nothing():
    x, weight, bias = arguments(300, 64, 200)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(ops.linear_int8(x, weight, bias, activation="gelu"))
            results.append(ops.linear_int8(x[:7], weight, bias, activation="gelu"))
    finally:
        torch.set_num_threads(before)
    for i, result in enumerate(results):
        assert torch.equal(result, results[0][: len(result)] if i % 2 else results[0])


@pytest.mark.unpoisoned
def test_opcheck():
    x, weight, bias = arguments(3, 8, 5)
    call = (x, *weight[:3], bias, "gelu", torch.bfloat16)
    results = torch.library.opcheck(torch.ops.ctxfast.linear_int8.default, call)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(3, 4)}, TypeError, "weight must come from quantize_weight"),
        ({"input": torch.ones(2, 5)}, ValueError, r"input must be \[..., 4\] .* shape \(2, 5\)"),
        ({"input": torch.ones(2, 4).int()}, TypeError, "input must be floating point"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[3\], got shape \(4,\)"),
        ({"activation": "swish"}, ValueError, "activation must be None or one of .* got 'swish'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be floating point, got torch.int8"),
    ],
)
def test_bad_input_is_one_clear_error(change, error, message):
    call = {
        "input": torch.ones(2, 4),
        "weight": ops.quantize_weight(torch.ones(3, 4)),
        **change,
    }
    with pytest.raises(error, match=f"^linear_int8: {message}"):
        ops.linear_int8(**call)


def test_bad_weight_is_one_clear_error():
    with pytest.raises(ValueError, match=r"^quantize_weight: weight must be \[N, K\], K > 0"):
        ops.quantize_weight(torch.ones(3))
    with pytest.raises(TypeError, match="^quantize_weight: weight must be floating point"):
        ops.quantize_weight(torch.ones(3, 4).int())


@pytest.mark.skipif(not _native.available(), reason="native module absent")
def test_large_panels_fill_pages_of_their_own():
    for n, k in ((2304, 1024), (70, 30)):
        weight = torch.randn(n, k)
        panels = ops.quantize_weight(weight).panels
        assert torch.equal(panels, reference.pack_weight(reference.quantize_weight(weight)[0]))
        assert n < 2304 or panels.data_ptr() % (2 << 20) == 0
