"""embed_layer_norm against float64 and torch.nn.Embedding."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from ctxfast.ops._native_layer_norm import embed_layer_norm_of
from tests.ops.implementations import only
from tests.oracle import assert_matches


def tables(size, dtype=torch.float32):
    return [
        torch.randn(shape).to(dtype)
        for shape in ((11, size), (2, size), (9, size), (size,), (size,))
    ]


def ids(shape, integer=torch.int64):
    return [torch.randint(high, shape, dtype=integer) for high in (11, 2, 9)]


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", [3, 64, 100, 768])
def test_matches_float64(backend, dtype, integer, size):
    numbers, parameters = ids((4, 6), integer), tables(size, dtype)
    with only(backend):
        result = ops.embed_layer_norm(*numbers, *parameters, 1e-12)
    eager = reference.embed_layer_norm(*numbers, *parameters, 1e-12)
    exact = reference.embed_layer_norm(*numbers, *(p.double() for p in parameters), 1e-12)
    assert_matches(result, eager, exact)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_empty_and_strided_ids(backend):
    parameters = tables(8)
    with only(backend):
        assert ops.embed_layer_norm(*ids((0, 3)), *parameters, 1e-12).shape == (0, 3, 8)
        numbers = [x.t() for x in ids((5, 4))]
        expected = reference.embed_layer_norm(*numbers, *parameters, 1e-12)
        torch.testing.assert_close(ops.embed_layer_norm(*numbers, *parameters, 1e-12), expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("which", "value", "message"),
    [
        (0, 11, r"input_ids must be in \[0, 11\), got 11"),
        (0, -1, r"input_ids must be in \[0, 11\), got -1"),
        (1, 2, r"token_type_ids must be in \[0, 2\), got 2"),
        (2, 2**40, rf"position_ids must be in \[0, 9\), got {2**40}"),
    ],
)
def test_ids_outside_their_table_are_named(backend, which, value, message):
    numbers = ids((3, 4))
    numbers[which][1, 2] = value
    with ops.use_backend(backend), pytest.raises(ValueError, match=f"^embed_layer_norm: {message}"):
        ops.embed_layer_norm(*numbers, *tables(8), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_operands_that_lie_as_the_kernel_reads_them_are_read_at_once(dtype, integer):
    operands = (*ids((4, 6), integer), *tables(100, dtype))
    expected = ops.embed_layer_norm(*operands, 1e-12)
    with torch.inference_mode():
        assert torch.equal(embed_layer_norm_of(operands, 1e-12), expected)
        assert torch.equal(ops.embed_layer_norm(*operands, 1e-12), expected)


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("which", "change"),
    [
        (1, lambda x: x.t().contiguous().t()),
        (2, lambda x: x[:, :5]),
        (0, lambda x: x.to(torch.int16)),
        (0, lambda x: x.float()),
        (3, lambda x: x.t().contiguous().t()),
        (4, lambda x: x[:, :7]),
        (5, lambda x: x.double()),
        (5, lambda x: x[0]),
        (7, lambda x: x.bfloat16()),
        (6, lambda x: torch.ones(16)[::2]),
        (6, lambda x: torch._neg_view(-x)),
        (3, lambda x: x.as_subclass(Own)),
        (3, lambda x: x.to("meta")),
        (7, lambda x: None),
    ],
)
def test_other_operands_take_the_checked_way(which, change):
    operands = [*ids((4, 6)), *tables(8)]
    operands[which] = change(operands[which])
    with torch.inference_mode():
        assert embed_layer_norm_of(operands, 1e-12) is None


@pytest.mark.parametrize("which", [0, 1, 2])
def test_ids_outside_their_table_are_named_in_inference_mode(which):
    numbers = ids((3, 4))
    numbers[which][1, 2] = 11
    with torch.inference_mode(), pytest.raises(ValueError, match=r"_ids must be in \[0, .*got 11"):
        ops.embed_layer_norm(*numbers, *tables(8), 1e-12)


def test_gradients_equal_torch_modules():
    numbers, parameters = ids((4, 6)), [p.double().requires_grad_() for p in tables(8)]
    lookups = [
        torch.nn.functional.embedding(i, t) for i, t in zip(numbers, parameters[:3], strict=True)
    ]
    expected = torch.nn.functional.layer_norm(sum(lookups), (8,), *parameters[3:], 1e-12)
    grad = torch.randn(4, 6, 8, dtype=torch.float64)
    found = torch.autograd.grad(
        ops.embed_layer_norm(*numbers, *parameters, 1e-12), parameters, grad
    )
    for a, b in zip(found, torch.autograd.grad(expected, parameters, grad), strict=True):
        torch.testing.assert_close(a, b)
