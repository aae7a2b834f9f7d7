"""linear on weights in panels: few rows and many, odd sizes, every epilogue, against float64."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from ctxfast.ops import _native, _native_linear
from tests.ops.implementations import only
from tests.oracle import assert_matches

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"native module absent: {_native.unavailable_reason()}"
)

ACTIVATIONS = [None, "gelu", "gelu_tanh", "tanh"]


DTYPES = [torch.float32, torch.bfloat16]


def check(
    rows: int, depth: int, columns: int, activation: str | None, dtype: torch.dtype, extras: bool
) -> None:
    x = torch.randn(rows, depth).to(dtype)
    weight = (torch.randn(columns, depth) / depth**0.5).to(dtype)
    bias = torch.randn(columns).to(dtype) if extras else None
    residual = torch.randn(rows, columns + 3).to(dtype)[:, :columns] if extras else None
    packed = _native_linear.pack(weight)
    stand_in = torch.full((1, 1), torch.nan, dtype=dtype).expand(weight.shape)
    with only("native"):
        found = ops.linear(
            x, stand_in, bias, activation=activation, residual=residual, packed=packed
        )
        plain = None
        if _native_linear.linear_refuses(x, weight, bias, "none", residual, None) is None:
            plain = ops.linear(x, weight, bias, activation=activation, residual=residual)
    eager = reference.linear(x, weight, bias, activation=activation, residual=residual)
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    exact = reference.linear(*wide[:3], activation=activation, residual=wide[3])
    # 1 + erf(z) cancels where z is negative: its rounding, times z, stays in the eager result.
    z = reference.linear(*wide[:3])
    gelu = activation in ("gelu", "gelu_tanh")
    rounding = torch.finfo(dtype).eps * z if gelu else None
    assert_matches(found, eager, exact, rounding=rounding)
    if plain is None:
        return
    if _native.isa() == "amx" and dtype == torch.float32 and rows > 48:
        assert_matches(plain, eager, exact, rounding=rounding)  # only packed weights become digits
    else:
        assert torch.equal(plain, found)  # put into panels on the way


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 15, 16, 31, 32, 33, 49, 100, 201, 300, 800])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(rows: int, activation: str | None, dtype: torch.dtype) -> None:
    odd = dtype == torch.float32
    for depth, columns in (
        (2 - odd, 1),
        (38 - odd, 31),
        (64, 32),
        (130 - odd, 97),
        (2048, 40),  # rows that fall into one set of a cache
        (1602 - odd, 65),
    ):
        for extras in (False, True):
            check(rows, depth, columns, activation, dtype, extras)


@pytest.mark.parametrize("rows", [300, 800])
def test_a_weight_larger_than_what_is_split_at_a_time(rows: int) -> None:
    check(rows, 3072, 770, "gelu", torch.float32, True)


FEW, MANY = (1, 2, 13, 14, 15, 32, 33, 48), (50, 64, 65, 97, 300, 513)


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "amx"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, isa: str) -> None:
    """Bit for bit, whatever tile it falls into; on amx float32 in few rows is as in many to rounding."""
    if isa not in _native.available_isas():
        pytest.skip(f"this processor does not run {isa}")
    before = _native.isa()
    _native.set_isa(isa)
    try:
        for counts in (FEW, MANY) if (dtype, isa) == (torch.float32, "amx") else (FEW + MANY,):
            check_neighbours(dtype, counts)
    finally:
        _native.set_isa(before)


def check_neighbours(dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    x, weight = torch.randn(max(counts), 900).to(dtype), torch.randn(70, 900).to(dtype)
    packed = _native_linear.pack(weight)
    whole = ops.linear(x, weight, packed=packed)
    assert_product(whole, x, weight)
    for rows in counts:
        assert torch.equal(ops.linear(x[:rows], weight, packed=packed), whole[:rows])


def assert_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    assert_matches(found, x @ weight.t(), x.double() @ weight.double().t())


def test_threads_strides_and_leading_dimensions() -> None:
    x, weight = torch.randn(4, 5, 44), torch.randn(200, 44)
    packed = _native_linear.pack(weight)
    expected = ops.linear(x, weight, packed=packed)
    assert_product(expected, x, weight)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.linear(x, weight, packed=packed), expected)
    finally:
        torch.set_num_threads(before)
    wide = torch.randn(20, 88)
    for strided in (wide[:, 1::2], torch.randn(44, 7).t()):
        assert_product(ops.linear(strided, weight, packed=packed), strided, weight)


def test_nan_and_infinity_stay_in_their_row() -> None:
    x, weight = torch.randn(5, 8), torch.randn(4, 8)
    x[2, 3], x[4, 0] = torch.nan, torch.inf
    output = ops.linear(x, weight, activation="gelu", packed=_native_linear.pack(weight))
    assert output[2].isnan().all() and output[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "tanh"])
def test_activations_over_their_whole_range(activation: str) -> None:
    x = torch.linspace(-30, 30, 20001).unsqueeze(1)
    packed = _native_linear.pack(torch.ones(1, 1))
    found = ops.linear(x, torch.ones(1, 1), activation=activation, packed=packed)
    exact = reference.linear(x.double(), torch.ones(1, 1).double(), activation=activation)
    assert ((found - exact).abs() <= 2.5e-7 * x.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_gelu_is_as_near_as_it_says(isa: str) -> None:
    """With a weight of zeros the result is the activation of the bias; bounds as csrc/cpu/gelu.h has them."""
    if isa not in _native.available_isas():
        pytest.skip(f"this processor does not run {isa}")
    z = torch.cat(
        [torch.linspace(-12, 12, 400_001), torch.tensor([0.0, -1e-30, 1e-30, -1e30, 3e38])]
    )
    limits = torch.tensor([torch.inf, -torch.inf, torch.nan])
    before = _native.isa()
    _native.set_isa(isa)
    try:
        x, weight = torch.ones(1, 1), torch.zeros(len(z), 1)
        y = ops.linear(x, weight, z, activation="gelu")[0]
        beyond = ops.linear(x, torch.zeros(3, 1), limits, activation="gelu")[0]
    finally:
        _native.set_isa(before)
    exact = torch.special.ndtr(z.double()) * z.double()
    error = (y.double() - exact).abs()
    assert bool((error <= 1.1e-7 * z.double().abs().clamp(min=1)).all())
    vectors = isa in ("avx512", "avx512_bf16", "amx")
    near = (z >= -5) & (z < 0)
    relative = error[near] / exact[near].abs()
    assert relative.max().item() <= (5e-7 if vectors else 1e-6)
    if vectors:
        assert error[z < 0].max().item() <= 2e-8
    assert beyond[0] == torch.inf and beyond[1:].isnan().all()


def panels_of(packed: torch.Tensor, rows: int, depth: int) -> torch.Tensor:
    """What a packed float32 weight begins with, [ceil(rows / 32), depth, 32]."""
    count = -(-rows // 32)
    assert packed.shape == (count * depth * 32 + depth + count * 32,)
    return packed[: count * depth * 32].view(count, depth, 32)


def test_panels_begin_at_a_large_page() -> None:
    """Where they fill one: a stream through small pages waits for their addresses."""
    for rows, aligned in ((1024, True), (1000, True), (256, False)):
        weight = torch.randn(rows, 1024)
        packed = _native_linear.pack(weight)
        assert packed.is_contiguous()
        assert not aligned or packed.data_ptr() % (2 << 20) == 0
        restored = panels_of(packed, rows, 1024).transpose(1, 2).reshape(-1, 1024)
        assert torch.equal(restored[:rows], weight) and not restored[rows:].any()


def test_which_plain_weights_run(isa: str) -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    for given, reason in (
        (weight, None),
        (torch.randn(8, 4).t(), "the weight is not contiguous"),
        (weight.double(), "dtype torch.float64 is neither float32 nor bfloat16"),
    ):
        input = x.to(given.dtype)
        assert _native_linear.linear_refuses(input, given, None, "none", None, None) == reason
    assert (
        _native_linear.linear_refuses(x.expand(128, 3, 8), weight, None, "none", None, None) is None
    )
    for dtype in DTYPES:
        many, plain = x.expand(129, 3, 8).to(dtype), weight.to(dtype)
        reason = _native_linear.linear_refuses(many, plain, None, "none", None, None)
        # Tiles are faster for any number, and so is whatever the library has no instructions for.
        if isa == "amx" or (dtype == torch.bfloat16 and isa != "avx512_bf16"):
            assert reason is None
        else:
            assert reason is not None
            assert reason.startswith("387 rows by a plain weight are faster")
    odd = torch.randn(4, 7).bfloat16()
    refusal = _native_linear.linear_refuses(odd, odd, None, "none", None, None)
    assert refusal is not None and "odd input size of 7" in refusal


def test_what_is_not_packed() -> None:
    assert "odd input size of 5" in _native_linear.pack_refuses(torch.bfloat16, 5)
    assert "float16" in _native_linear.pack_refuses(torch.float16, 6)
    assert _native_linear.pack_refuses(torch.bfloat16, 6) is None


def test_panels_of_pairs() -> None:
    weight = torch.randn(45, 6).bfloat16()
    panels = _native_linear.pack(weight)
    assert panels.shape == (2, 3, 32, 2)
    rows = panels.transpose(1, 2).reshape(64, 6)
    assert torch.equal(rows[:45], weight) and not rows[45:].any()


def test_panels() -> None:
    weight = torch.randn(45, 6)
    panels = panels_of(_native_linear.pack(weight), 45, 6)
    assert torch.equal(panels.transpose(1, 2).reshape(64, 6)[:45], weight)
    assert not panels.transpose(1, 2).reshape(64, 6)[45:].any()


@pytest.mark.parametrize("rows", [12, 300])
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e-38, 3e38])
def test_float32_values_that_parts_do_not_hold(rows: int, value: float) -> None:
    """Many rows may be multiplied in parts of their numbers: what these would lose is not lost."""
    x, weight, bias = torch.randn(rows, 100), torch.randn(70, 100) / 10, torch.randn(70)
    if abs(value) < 1:
        x, bias = x * value, bias * value
    else:
        x[3, 40] = value
    packed = _native_linear.pack(weight)
    with only("native"):
        found = ops.linear(x, weight, bias, packed=packed)
    wide = [t.double() for t in (x, weight, bias)]
    assert_matches(found, reference.linear(x, weight, bias), reference.linear(*wide))
