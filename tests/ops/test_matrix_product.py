"""The products of a linear layer's gradients against float64: every layout of both operands, sizes beside the tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctxfast import ops
from ctxfast.ops import _native, _native_matrix_product
from tests.ops.implementations import only
from tests.oracle import assert_matches

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"native module absent: {_native.unavailable_reason()}"
)

# Rows, columns, depth: one element, tails of every tile, several pieces of the depth and several panels.
SHAPES = [
    (1, 1, 1),
    (7, 5, 3),
    (16, 48, 16),
    (17, 49, 33),
    (40, 130, 500),
    (64, 32, 32),
    (65, 97, 1153),
    (300, 47, 77),
]


def wide_rows(x: Tensor) -> Tensor:
    """The same matrix with NaN between its rows."""
    wide = x.new_full((x.shape[0], x.shape[1] + 3), torch.nan)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "wide rows": wide_rows,
    "wide columns": lambda x: wide_rows(x.t()).t(),
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.fixture(autouse=True)
def poison():
    _native._module().poison_scratch(True)
    yield
    _native._module().poison_scratch(False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("layout_b", LAYOUTS)
def test_matches_float64(shape, layout_a, layout_b):
    rows, columns, depth = shape
    torch.manual_seed(rows)
    a, b, bias = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(columns)
    laid_a, laid_b = LAYOUTS[layout_a](a), LAYOUTS[layout_b](b)
    result = _native_matrix_product.product(laid_a, laid_b, bias)
    assert_matches(result, a @ b + bias, a.double() @ b.double() + bias.double())
    result, sums = _native_matrix_product.product_and_row_sums(laid_a, laid_b)
    assert_matches(result, a @ b, a.double() @ b.double())
    assert_matches(sums, a.sum(1), a.double().sum(1), name="row sums")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64(shape, layout):
    rows, columns, depth = shape
    a, b = torch.randn(rows, depth).double(), torch.randn(depth, columns).double()
    result, sums = _native_matrix_product.product_and_row_sums(LAYOUTS[layout](a), b)
    torch.testing.assert_close(result, a @ b, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums, a.sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0)])
def test_empty(shape):
    rows, columns, depth = shape
    a, b, bias = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(columns)
    assert torch.equal(_native_matrix_product.product(a, b, bias), a @ b + bias)
    result, sums = _native_matrix_product.product_and_row_sums(a, b)
    assert torch.equal(result, a @ b) and torch.equal(sums, a.sum(1))


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set(name):
    if name not in _native.available_isas():
        pytest.skip(f"this processor does not run {name}")
    before = _native.isa()
    _native.set_isa(name)
    try:
        test_matches_float64((40, 130, 500), "columns", "rows")
        test_matches_float64((33, 51, 399), "rows", "columns")
        test_matches_float64((97, 51, 599), "columns", "rows")
        test_float64((33, 51, 399), "columns")
        test_float64((13, 51, 9), "rows")
    finally:
        _native.set_isa(before)


@pytest.mark.parametrize(
    "shape", [(20, 3, 700_001), (70, 4200, 1100), (5, 2100, 20), (300, 1500, 1100)]
)
def test_more_than_is_packed_at_a_time(shape):
    rows, columns, depth = shape
    a, b, bias = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(columns)
    exact = a.double() @ b.double()
    assert_matches(_native_matrix_product.product(a, b, bias), a @ b + bias, exact + bias.double())
    result, sums = _native_matrix_product.product_and_row_sums(a, b)
    assert_matches(result, a @ b, exact)
    assert_matches(sums, a.sum(1), a.double().sum(1), name="row sums")


def test_threads_change_no_bit():
    a, b = torch.randn(300, 800), torch.randn(800, 200)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_native_matrix_product.product(a, b))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("rows", [20, 80])
def test_nan_stays_in_its_row_and_column(rows):
    a, b = torch.randn(rows, 40), torch.randn(40, 60)
    a[3, 4] = b[5, 50] = torch.nan
    result, sums = _native_matrix_product.product_and_row_sums(a, b)
    wrong = result.isnan()
    assert wrong[3].all() and wrong[:, 50].all() and int(wrong.sum()) == 60 + rows - 1
    assert sums.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("place", ["a", "b"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_infinity(place, layout):
    a, b = torch.randn(80, 100), torch.randn(100, 70)
    (a if place == "a" else b)[3, 40] = torch.inf
    result, sums = _native_matrix_product.product_and_row_sums(
        LAYOUTS[layout](a), LAYOUTS[layout](b)
    )
    assert_matches(result, a @ b, a.double() @ b.double())
    assert_matches(sums, a.sum(1), a.double().sum(1), name="row sums")


# Of the first the lower bits are below the normal range, of the second the products.
@pytest.mark.parametrize("powers", [(-120, 0), (0, -120), (-70, -68), (100, 20)])
def test_far_from_one(powers):
    a, b = torch.randn(80, 100) * 2.0 ** powers[0], torch.randn(100, 70) * 2.0 ** powers[1]
    assert_matches(_native_matrix_product.product(a, b), a @ b, a.double() @ b.double())


def test_zero():
    a, b, bias = torch.zeros(80, 100), torch.randn(100, 70), torch.randn(70)
    assert torch.equal(_native_matrix_product.product(a, b, bias), bias.expand(80, 70))


@pytest.mark.parametrize("expanded", [False, True])
def test_gradients_of_a_linear_layer(expanded):
    x, weight = torch.randn(50, 70, requires_grad=True), torch.randn(90, 70, requires_grad=True)
    bias = torch.randn(90, requires_grad=True)
    grad = torch.ones(()).expand(50, 90) if expanded else torch.randn(50, 90)
    with only("native"):
        output = ops.linear(x, weight, bias)
        found = torch.autograd.grad(output, (x, weight, bias), grad)
    wide = [t.detach().double() for t in (grad, x, weight)]
    eager = (grad @ weight, grad.t() @ x, grad.sum(0))
    exact = (wide[0] @ wide[2], wide[0].t() @ wide[1], wide[0].sum(0))
    for name, *three in zip(("input", "weight", "bias"), found, eager, exact, strict=True):
        assert_matches(*(t.detach() for t in three), name=name)
