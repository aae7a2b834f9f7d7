"""add_layer_norm against float64."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from tests.ops.implementations import only
from tests.oracle import assert_matches

BACKENDS = ["native", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 16, 100, 768, 1029])
@pytest.mark.parametrize("with_residual", [False, True])
def test_matches_float64(backend, dtype, size, with_residual):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernel computes in float32")
    x, residual = (torch.randn(7, size).to(dtype) for _ in range(2))
    weight, bias = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    residual = residual if with_residual else None
    with only(backend):
        result = ops.add_layer_norm(x, residual, weight, bias, 1e-12)
    eager = reference.add_layer_norm(x, residual, weight, bias, 1e-12)
    exact = reference.add_layer_norm(
        x.double(),
        None if residual is None else residual.double(),
        weight.double(),
        bias.double(),
        1e-12,
    )
    if size == 1:  # the variance is exactly 0, the result exactly the bias
        assert torch.equal(result, bias.expand(7, 1))
        return
    assert_matches(result, eager, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", ["weight", "bias", "both"])
def test_float32_parameters_beside_bfloat16(backend, wide):
    x, residual = (torch.randn(7, 100, dtype=torch.bfloat16) for _ in range(2))
    parameters = [torch.randn(100, requires_grad=True) for _ in range(2)]
    held = [
        p if wide in (name, "both") else p.bfloat16()
        for p, name in zip(parameters, ("weight", "bias"), strict=True)
    ]
    with only(backend):
        result = ops.add_layer_norm(x, residual, *held, 1e-12)
        result.float().square().sum().backward()
    if wide != "both":  # cast, as ever
        held = [p.bfloat16() for p in parameters]
    exact = torch.nn.functional.layer_norm(
        x.double() + residual.double(), (100,), *(p.detach().double() for p in held), 1e-12
    )
    # No error but that of rounding the result: half a unit of bfloat16 in the last place, and what float32 leaves.
    assert ((result - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_offsets_do_not_cancel(backend):
    x = torch.randn(4, 256) * 1e-3 + 1000
    weight, bias = torch.ones(256), torch.zeros(256)
    with only(backend):
        result = ops.add_layer_norm(x, None, weight, bias, 1e-12)
    eager = reference.add_layer_norm(x, None, weight, bias, 1e-12)
    exact = reference.add_layer_norm(x.double(), None, weight.double(), bias.double(), 1e-12)
    assert_matches(result, eager, exact, cap=1e-1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_empty_rows_and_nan(backend):
    weight, bias = torch.randn(6), torch.randn(6)
    with only(backend):
        for x in (
            torch.randn(6, 5).t(),
            torch.randn(2, 3, 12)[..., ::2],
            torch.randn(6).expand(3, 6),
        ):
            residual = torch.randn(x.shape)
            expected = reference.add_layer_norm(x, residual, weight, bias, 1e-5)
            torch.testing.assert_close(
                ops.add_layer_norm(x, residual, weight, bias, 1e-5), expected
            )
        assert ops.add_layer_norm(torch.randn(0, 6), None, weight, bias, 1e-5).shape == (0, 6)
        x = torch.randn(4, 6)
        x[1, 2] = float("nan")
        result = ops.add_layer_norm(x, None, weight, bias, 1e-5)
        assert result[1].isnan().all() and result[[0, 2, 3]].isfinite().all()


def test_dropout_depends_on_coordinates_alone():
    """A packed run drops what the padded run drops."""
    x, weight, bias = torch.randn(2, 5, 96), torch.ones(96), torch.zeros(96)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    seed = torch.tensor([11])
    padded = ops.add_layer_norm(x, x, weight, bias, 1e-5, dropout_p=0.3, seed=seed)
    sequence, position = mask.nonzero().unbind(1)
    packed = ops.add_layer_norm(
        x[mask], x[mask], weight, bias, 1e-5,
        dropout_p=0.3, seed=seed, sequence_ids=sequence, positions=position,
    )  # fmt: skip
    assert torch.equal(padded[mask], packed)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"residual": torch.ones(2, 5)},
            ValueError,
            r"residual must be \(2, 4\), got shape \(2, 5\)",
        ),
        ({"weight": torch.ones(5)}, ValueError, r"weight must be \(4,\), got shape \(5,\)"),
        ({"input": torch.ones(2, 4, dtype=torch.int32)}, TypeError, "input must be floating point"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
        (
            {"dropout_p": 0.5, "seed": torch.ones(2)},
            ValueError,
            r"seed must be an int64 tensor \[1\]",
        ),
        (
            {"dropout_p": 0.5, "positions": torch.ones(3)},
            ValueError,
            r"positions must be integers \(2,\)",
        ),
    ],
)
def test_bad_input_is_one_clear_error(change, error, message):
    call = {
        "input": torch.ones(2, 4),
        "residual": None,
        "weight": torch.ones(4),
        "bias": torch.ones(4),
    }
    with pytest.raises(error, match=f"^add_layer_norm: {message}"):
        ops.add_layer_norm(**{**call, "eps": 1e-5, **change})
