"""Float32 linears of many rows on matrix tiles, by 8-bit digits of rows and columns with units of their own.

The truth is float64, the bound eager float32's error; what digits could lose is made here: elements far larger than
the rest of their row, features in very different units, outputs of very different sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ctxfast import ops
from ctxfast.ops import _native, _native_linear
from tests.oracle import assert_matches


@pytest.fixture(autouse=True)
def tiles() -> Iterator[None]:
    if "amx" not in _native.available_isas():
        pytest.skip("this processor does not run amx")
    before = _native.isa()
    _native.set_isa("amx")
    yield
    _native.set_isa(before)


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, columns: slice = slice(None)
) -> Tensor:
    found = ops.linear(x, weight, bias, packed=_native_linear.pack(weight))
    wide = [t if t is None else t.double() for t in (x, weight, bias)]
    exact = torch.nn.functional.linear(*wide)
    eager = torch.nn.functional.linear(x, weight, bias)
    assert_matches(found[:, columns], eager[:, columns], exact[:, columns])
    return found


@pytest.mark.parametrize("depth", [1, 63, 64, 65, 700, 768, 769, 1537, 3072])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33])
def test_every_size(depth: int, columns: int) -> None:
    x, weight = torch.randn(67, depth), torch.randn(columns, depth)
    found = check(x, weight, torch.randn(columns))
    assert found.shape == (67, columns)


@pytest.mark.parametrize("count", [1, 5, 21, 22, 60])
def test_elements_far_larger_than_the_rest(count: int) -> None:
    x, weight = torch.randn(100, 768), torch.randn(64, 768)
    at = torch.rand(100, 768).argsort(1)[:, :count]
    check(x.scatter(1, at, 1000 * torch.randn(100, count)), weight)


@pytest.mark.parametrize("count", [1, 5, 21])
def test_outputs_that_do_not_use_them_lose_nothing(count: int) -> None:
    x, weight = torch.randn(100, 768), torch.randn(64, 768)
    x[:, :count] *= 1000
    weight[1:, :count] = 0
    check(x, weight, columns=slice(1, None))


def test_elements_far_larger_in_two_sizes() -> None:
    x, weight = torch.randn(100, 768), torch.randn(64, 768)
    x[:, 5] *= 1e5
    x[:, 70:74] *= 300
    weight[:, 5] *= 1e-6
    check(x, weight)


@pytest.mark.parametrize("spread", [2, 8, 16])
def test_features_in_different_units(spread: int) -> None:
    unit = torch.exp2((2 * torch.rand(768) - 1) * spread)
    check(torch.randn(100, 768) * unit, torch.randn(64, 768) / unit)


def test_rows_and_outputs_of_different_sizes() -> None:
    """Each row has its own unit, and each output: powers of two change nothing but the size of results."""
    x, weight = torch.randn(100, 300), torch.randn(64, 300)
    row_size, output_size = torch.exp2(torch.arange(100) // 4), torch.exp2(torch.arange(64) // 3)
    sized = weight * output_size[:, None]
    found = ops.linear(x * row_size[:, None], sized, packed=_native_linear.pack(sized))
    found = found / row_size[:, None] / output_size
    assert_matches(found, x @ weight.T, x.double() @ weight.double().T)


def test_zeros() -> None:
    x, weight = torch.randn(64, 200), torch.randn(40, 200)
    x[7], weight[9] = 0, 0
    weight[:, 3] = 0
    x[:, 3] = 1e6 * torch.randn(64)
    found = check(x, weight)
    assert not found[7].any() and not found[:, 9].any()


def test_bits_do_not_depend_on_threads() -> None:
    x, weight = torch.randn(500, 1000), torch.randn(300, 1000)
    packed = _native_linear.pack(weight)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, weight, packed=packed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, 1e-30])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_what_has_no_digits(value: float, where: str) -> None:
    x, weight = torch.randn(64, 100), torch.randn(40, 100)
    changed = x if where == "input" else weight
    if abs(value) < 1:
        changed *= value
    else:
        changed[3, 40] = value
    check(x, weight)
