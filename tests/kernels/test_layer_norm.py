"""The layer normalisation kernels, interpreted, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from ctxfast.ops import _triton, _triton_layer_norm_backward
from tests.kernels.cases import FLOATS
from tests.ops.implementations import only
from tests.oracle import assert_matches


def doubled(*tensors):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors
    ]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("features", [1, 37, 768])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_layer_norm(dtype: torch.dtype, features: int, with_residual: bool) -> None:
    x = (torch.randn(5, 3, features) * 3 + 50).to(dtype)
    residual = torch.randn(3, 5, features).to(dtype).transpose(0, 1) if with_residual else None
    weight, bias = torch.randn(2, features).to(dtype)
    arguments = (x, residual, weight, bias, 1e-5)
    got = _triton.add_layer_norm(*arguments)
    eager = reference.add_layer_norm(*arguments)
    assert_matches(got, eager, reference.add_layer_norm(*doubled(*arguments)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embed_layer_norm(dtype: torch.dtype) -> None:
    ids, types = torch.randint(0, 50, (4, 7)), torch.randint(0, 2, (4, 7))
    positions = torch.arange(7).expand(4, 7)
    tables = [torch.randn(n, 100).to(dtype) for n in (50, 2, 20)]
    weight, bias = torch.randn(2, 100).to(dtype)
    arguments = (ids, types, positions, *tables, weight, bias, 1e-12)
    got = _triton.embed_layer_norm(*arguments)
    eager = reference.embed_layer_norm(*arguments)
    assert_matches(got, eager, reference.embed_layer_norm(*doubled(*arguments)))


def test_an_id_outside_the_table_reads_nothing() -> None:
    """On a GPU ids are not checked on the host: such a token becomes NaN, the others stay as they are."""
    tables = [torch.randn(n, 16) for n in (5, 2, 4)]
    ids = torch.tensor([1, 5, -1, 3])
    zeros = torch.zeros(4, dtype=torch.int64)
    got = _triton.embed_layer_norm(ids, zeros, zeros, *tables, torch.ones(16), torch.zeros(16), 0.0)
    assert got.isnan().all(1).tolist() == [False, True, True, False]


def test_no_rows() -> None:
    weight = torch.ones(8)
    assert _triton.add_layer_norm(torch.empty(0, 8), None, weight, weight, 0.0).shape == (0, 8)


@pytest.fixture(params=[1, 3, 256])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of ranges of rows in the first stage of the parameters' gradients, at most one a row."""
    monkeypatch.setattr(_triton_layer_norm_backward, "_PARTS", request.param)
    return request.param


def gradients(function, *inputs, grad, **call):
    """Of every floating tensor among the inputs."""
    inputs = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    output = function(*inputs, **call)
    return torch.autograd.grad(output, leaves, grad.to(output.dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "p"), [(1, 0.0), (8, 0.3), (70, 0.0)])
def test_add_layer_norm_gradients_in_parts(
    dtype: torch.dtype, rows: int, p: float, parts: int
) -> None:
    """Ranges of different length, more ranges than a block of `column_sum`, and columns past a block."""
    x, residual, grad = (torch.randn(rows, 100).to(dtype) for _ in range(3))
    inputs = (x, residual, *torch.randn(2, 100).to(dtype), 1e-5)
    call = {"dropout_p": p, "seed": torch.tensor([5])}
    with only("triton"):
        found = gradients(ops.add_layer_norm, *inputs, grad=grad, **call)
    call |= {"sequence_ids": torch.zeros(rows, dtype=torch.int64), "positions": torch.arange(rows)}
    eager = gradients(reference.add_layer_norm, *inputs, grad=grad, **call)
    exact = gradients(reference.add_layer_norm, *doubled(*inputs), grad=grad, **call)
    for name, *three in zip(
        ("input", "residual", "weight", "bias"), found, eager, exact, strict=True
    ):
        assert_matches(*three, name=name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embed_layer_norm_gradients_in_parts(
    dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of few rows is summed in parts too; one of its rows is reached by no token, one by a single token."""
    monkeypatch.setattr(_triton_layer_norm_backward, "_SEGMENT_PARTS", 5)
    ids, types = torch.randint(0, 30, (5, 9)), torch.randint(0, 2, (5, 9))
    types[0, 0] = 3
    positions = torch.arange(9).expand(5, 9)
    tables = [torch.randn(n, 140).to(dtype) for n in (30, 4, 20)]
    inputs = (ids, types, positions, *tables, *torch.randn(2, 140).to(dtype), 1e-5)
    grad = torch.randn(5, 9, 140).to(dtype)
    with only("triton"):
        found = gradients(ops.embed_layer_norm, *inputs, grad=grad)
    eager = gradients(reference.embed_layer_norm, *inputs, grad=grad)
    exact = gradients(reference.embed_layer_norm, *doubled(*inputs), grad=grad)
    names = ("word", "token type", "position", "weight", "bias")
    for name, *three in zip(names, found, eager, exact, strict=True):
        assert_matches(*three, name=name)
    assert torch.equal(found[1][2], torch.zeros(140, dtype=dtype))
