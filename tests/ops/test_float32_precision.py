"""Products of float32 under torch's own switch for their precision: as exact as it asks, and untouched otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ctxfast import ops
from ctxfast.bert import BertConfig, BertModel
from ctxfast.ops import _native, _native_linear, _native_matrix_product
from tests.oracle import assert_matches

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"native module absent: {_native.unavailable_reason()}"
)

# Of a product of two numbers, relative: both lose what their parts leave out, 2^-18 or 2^-9, and two parts the product
# of what the first ones leave out, 2^-18.
ERRORS = {"high": 3 * 2.0**-18, "medium": 2 * 2.0**-9 + 2.0**-18}
SHAPES = [(64, 32, 32), (65, 97, 1153), (300, 47, 77), (832, 96, 768)]


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    _native._module().poison_scratch(True)
    yield
    _native._module().poison_scratch(False)
    torch.set_float32_matmul_precision(before)


def assert_within(
    found: Tensor, a: Tensor, b: Tensor, level: str, bias: Tensor | None = None
) -> None:
    """found = a @ b (+ bias) but for what `level` allows of each product, and the rounding of sums."""
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = (ERRORS[level] + a.shape[1] * 2.0**-24) * size
    assert bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("level", ERRORS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_products(level: str, shape: tuple[int, int, int], transposed: bool) -> None:
    rows, columns, depth = shape
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    torch.set_float32_matmul_precision(level)
    found, sums = _native_matrix_product.product_and_row_sums(a, b)
    assert_within(found, a, b, level)
    assert_matches(sums, a.sum(1), a.double().sum(1))  # of the numbers, not of their parts


@pytest.mark.parametrize("level", ERRORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(level: str, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    torch.set_float32_matmul_precision(level)
    for packed in (None, _native_linear.pack(weight)):
        found = ops.linear(x, weight, bias, packed=packed)
        assert_within(found, x, weight.t(), level, bias)


@pytest.mark.skipif(
    not _native.available() or _native.isa() != "amx", reason="products run on matrix tiles only"
)
def test_each_level_reads_as_much_as_it_says() -> None:
    """A number of 24 bits, of which one part holds 8 and two hold 16."""
    x, weight = torch.zeros(64, 32), torch.zeros(1024, 32)
    x[:, 0] = 1 + 2.0**-7 + 2.0**-14 + 2.0**-23
    weight[:, 0] = 1
    expected = {
        "highest": 1 + 2.0**-7 + 2.0**-14 + 2.0**-23,
        "high": 1 + 2.0**-7 + 2.0**-14,
        "medium": 1 + 2.0**-7,
    }
    for level, value in expected.items():
        torch.set_float32_matmul_precision(level)
        found = ops.linear(x, weight, packed=_native_linear.pack(weight))
        assert found.unique().tolist() == [value]


def test_the_newer_switch_of_torch_is_obeyed_too() -> None:
    x, weight = torch.randn(128, 256), torch.randn(64, 256)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    found = {}
    try:
        for name, level in (("ieee", "highest"), ("tf32", "high"), ("bf16", "medium")):
            settings.fp32_precision = name
            found[level] = ops.linear(x, weight)
    finally:
        settings.fp32_precision = before
    for level, expected in found.items():
        torch.set_float32_matmul_precision(level)
        assert torch.equal(ops.linear(x, weight), expected)


@pytest.mark.parametrize("level", ERRORS)
@pytest.mark.parametrize("place", ["input", "weight"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan, torch.finfo(torch.float32).max, 1e-41])
def test_numbers_that_parts_do_not_hold(level: str, place: str, value: float) -> None:
    x, weight = torch.rand(64, 200) * 1e-3, torch.rand(96, 200) * 1e-3
    if value == 1e-41:
        x, weight = x * 1e-30, weight * 1e30
    (x if place == "input" else weight)[3, 50] = value
    torch.set_float32_matmul_precision(level)
    found = ops.linear(x, weight)
    exact = x.double() @ weight.double().t()
    finite = exact.isfinite()
    torch.testing.assert_close(
        found[finite].double(), exact[finite], rtol=ERRORS[level] + 1e-5, atol=0
    )
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.isinf(), exact.isinf())


@pytest.mark.parametrize("level", ERRORS)
def test_gradients(level: str) -> None:
    x = torch.randn(130, 96, requires_grad=True)
    weight = torch.randn(160, 96, requires_grad=True)
    grad = torch.randn(130, 160)
    torch.set_float32_matmul_precision(level)
    ops.linear(x, weight).backward(grad)
    assert x.grad is not None and weight.grad is not None
    assert_within(x.grad, grad, weight.detach(), level)
    assert_within(weight.grad, grad.t(), x.detach(), level)


def test_a_model_follows_the_switch_at_each_call() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=99,
    )
    model = BertModel(config).eval()
    ids = torch.randint(1, 99, (4, 40))
    with torch.inference_mode():
        exact = model(ids).last_hidden_state
        for level, most in (("high", 1e-4), ("medium", 3e-2)):
            torch.set_float32_matmul_precision(level)
            difference = (model(ids).last_hidden_state - exact).abs().max().item()
            assert difference < most
            assert (difference > 0) == (_native.isa() == "amx")
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(model(ids).last_hidden_state, exact)
