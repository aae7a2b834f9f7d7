"""Gradients of add_layer_norm and embed_layer_norm, and dropout in both directions, against float64."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from tests.ops.implementations import only
from tests.oracle import CAPS, assert_matches

BACKENDS = ["native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def skip_float64(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")


def compare(names, found, eager, exact, dtype):
    """The parameters' gradients are sums that float32 keeps: their own ulp is what bounds them."""
    for name, *three in zip(names, found, eager, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(three[0], three[2], rtol=1e-12, atol=1e-12)
        else:
            assert_matches(*three, name=name, cap=CAPS[dtype])


def norm_results(function, tensors, grad, dtype, **call):
    leaves = [None if x is None else x.to(dtype).detach().requires_grad_() for x in tensors]
    output = function(*leaves, 1e-5, **call)
    given = [x for x in leaves if x is not None]
    return output.detach(), *torch.autograd.grad(output, given, grad.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (9, 100), (70, 768), (33, 1029)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_matches_float64(backend, dtype, shape, with_residual, p):
    skip_float64(backend, dtype)
    rows, size = shape
    if backend == "triton" and rows == 70:
        rows = 9  # the interpreter takes its time
    x, residual, grad = (torch.randn(rows, size).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(size).to(dtype) for _ in range(2))
    call = {"dropout_p": p}
    if p > 0.0:
        call |= {"seed": torch.tensor([2**40 + 9]), "sequence_ids": torch.randint(5, (rows,))}
        call |= {"positions": torch.randint(512, (rows,))}
    tensors = (x, residual if with_residual else None, weight, bias)
    with only(backend):
        found = norm_results(ops.add_layer_norm, tensors, grad, dtype, **call)
    eager = norm_results(reference.add_layer_norm, tensors, grad, dtype, **call)
    exact = norm_results(reference.add_layer_norm, tensors, grad, torch.float64, **call)
    names = ["output", "input", *(["residual"] if with_residual else []), "weight", "bias"]
    compare(names, found, eager, exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_or_nothing_dropped(backend):
    x, residual, weight, bias = (torch.randn(s) for s in ((4, 70), (4, 70), (70,), (70,)))
    with only(backend):
        dropped = ops.add_layer_norm(x, residual, weight, bias, 1e-5, dropout_p=1.0)
        plain = ops.add_layer_norm(residual, None, weight, bias, 1e-5)
    assert torch.equal(dropped, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_empty_rows_and_nan(backend):
    weight, bias = torch.randn(6), torch.randn(6)
    with only(backend):
        for x in (torch.randn(6, 5).t(), torch.randn(2, 3, 12)[..., ::2], torch.randn(6)):
            grad = torch.randn(6).expand(x.shape)
            found = norm_results(ops.add_layer_norm, (x, x, weight, bias), grad, torch.float32)
            expected = norm_results(
                reference.add_layer_norm, (x, x, weight, bias), grad, torch.float32
            )
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
        empty = torch.randn(0, 6)
        found = norm_results(ops.add_layer_norm, (empty, None, weight, bias), empty, torch.float32)
        assert found[1].shape == (0, 6) and torch.equal(found[2], torch.zeros(6))
        x = torch.randn(4, 6)
        x[1, 2] = float("nan")
        _, dinput, dweight, _ = norm_results(
            ops.add_layer_norm, (x, None, weight, bias), torch.randn(4, 6), torch.float32
        )
        assert dinput[1].isnan().all() and dinput[[0, 2, 3]].isfinite().all()
        assert dweight.isnan().all()


def test_the_same_bits_with_any_number_of_threads():
    x, residual, grad = (torch.randn(301, 256) for _ in range(3))
    tensors = (x, residual, torch.randn(256), torch.randn(256))
    ids = torch.randint(40, (301,))
    call = {"dropout_p": 0.1, "seed": torch.tensor([3]), "sequence_ids": ids, "positions": ids}
    table = torch.randn(40, 256)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with only("native"):
            norm = norm_results(ops.add_layer_norm, tensors, grad, torch.float32, **call)
            embedding = embed_results(
                ops.embed_layer_norm, ids, [table] * 3, tensors[2:], grad, torch.float32
            )
        results.append([*norm, *embedding])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def embed_results(function, ids, tables, parameters, grad, dtype, **call):
    leaves = [x.to(dtype).detach().requires_grad_() for x in (*tables, *parameters)]
    output = function(ids, ids % 2, ids % 3, *leaves, 1e-12, **call)
    return output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 64, 200])
def test_embedding_gradients_match_float64(backend, dtype, size):
    skip_float64(backend, dtype)
    ids = torch.randint(9, (4, 13))
    tables = [torch.randn(rows, size).to(dtype) for rows in (9, 2, 20)]
    parameters = [torch.randn(size).to(dtype) for _ in range(2)]
    grad = torch.randn(4, 13, size).to(dtype)
    with only(backend):
        found = embed_results(ops.embed_layer_norm, ids, tables, parameters, grad, dtype)
    eager = embed_results(reference.embed_layer_norm, ids, tables, parameters, grad, dtype)
    exact = embed_results(reference.embed_layer_norm, ids, tables, parameters, grad, torch.float64)
    names = ("output", "word", "token type", "position", "weight", "bias")
    compare(names, found, eager, exact, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_row_and_int32_ids(backend):
    ids = torch.tensor([[0, 3, 0], [3, 1, 2]], dtype=torch.int32)
    tables, parameters = [torch.randn(4, 70) for _ in range(3)], [torch.randn(70) for _ in range(2)]
    grad = torch.randn(2, 3, 70)
    dtype = torch.float32
    with only(backend):
        found = embed_results(
            ops.embed_layer_norm, ids, tables, parameters, grad, dtype, padding_idx=3
        )
    expected = embed_results(reference.embed_layer_norm, ids, tables, parameters, grad, dtype)
    assert torch.equal(found[1][3], torch.zeros(70))
    torch.testing.assert_close(found[1][:3], expected[1][:3])
    torch.testing.assert_close(found[2:], expected[2:])
