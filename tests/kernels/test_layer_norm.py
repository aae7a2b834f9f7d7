"""The layer normalisation kernels, interpreted, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from ctxfast import reference
from ctxfast.ops import _triton
from tests.kernels.cases import FLOATS
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
