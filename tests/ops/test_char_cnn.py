"""char_cnn, highway and scalar_mix against float64."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from tests import oracle
from tests.ops.implementations import only

BACKENDS = ["native", "triton"]


def assert_matches(result, eager, exact, **named):
    """In float64 the "exact" result is as good as the one that is tested, and no better."""
    if result.dtype == torch.float64:
        torch.testing.assert_close(result, exact, rtol=1e-13, atol=1e-13)
    else:
        oracle.assert_matches(result, eager, exact, **named)


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def words(tokens: int, characters: int = 12, vocabulary: int = 30) -> torch.Tensor:
    """Ids of random words: a repeated last character behind most of them."""
    ids = torch.randint(1, vocabulary, (tokens, characters))
    for row in range(tokens):
        ids[row, torch.randint(1, characters + 1, (1,)) :] = vocabulary - 1
    return ids


def filters(pairs, channels, dtype):
    weights = [torch.randn(n, channels, width).to(dtype) * 0.3 for width, n in pairs]
    return weights, [torch.randn(n).to(dtype) for _, n in pairs]


def double(x):
    return [t.double() for t in x] if isinstance(x, list) else x.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("pairs", [[(1, 3)], [(1, 4), (3, 70), (12, 5)], [(2, 130)]], ids=str)
def test_char_cnn_matches_float64(backend, dtype, activation, pairs):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernel computes in float32")
    ids, table = words(19), torch.randn(30, 5).to(dtype)
    weights, biases = filters(pairs, 5, dtype)
    with only(backend):
        result = ops.char_cnn(ids, table, weights, biases, activation)
    eager = reference.char_cnn(ids, table, weights, biases, activation)
    exact = reference.char_cnn(ids, double(table), double(weights), double(biases), activation)
    assert_matches(result, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_char_cnn_gradients_match_float64(dtype, activation):
    ids, grad = words(40), torch.randn(40, 75).to(dtype)
    table = torch.randn(30, 5).to(dtype)
    weights, biases = filters([(1, 4), (3, 66), (12, 5)], 5, dtype)

    def gradients(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (table, *weights, *biases)]
        output = function(ids, leaves[0], leaves[1:4], leaves[4:], activation)
        return torch.autograd.grad(output, leaves, grad.to(dtype))

    with only("native"):
        found = gradients(ops.char_cnn, dtype)
    eager = gradients(reference.char_cnn, dtype)
    exact = gradients(reference.char_cnn, torch.float64)
    written_out = gradients_written_out(grad, ids, table, weights, biases, activation)
    names = ["table", *["weights0", "weights1", "weights2", "biases0", "biases1", "biases2"]]
    for name, got, low, high, out in zip(names, found, eager, exact, written_out, strict=True):
        assert_matches(got, low, high, name=name)
        torch.testing.assert_close(out, high)


def gradients_written_out(grad, ids, table, weights, biases, activation):
    arguments = (double(grad), ids, double(table), double(weights), double(biases), activation)
    dtable, dweights, dbiases = reference.char_cnn_backward(*arguments)
    return [dtable, *dweights, *dbiases]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_char_cnn_layouts_empty_and_nan(backend):
    table = torch.randn(30, 5)
    weights, biases = filters([(1, 4), (2, 6)], 5, torch.float32)
    with only(backend):
        ids = words(6)
        expected = reference.char_cnn(ids, table, weights, biases)
        for form in (ids.int(), ids.t().contiguous().t(), ids.repeat(1, 2)[:, :12]):
            torch.testing.assert_close(ops.char_cnn(form, table, weights, biases), expected)
        assert ops.char_cnn(ids.view(2, 3, 12), table, weights, biases).shape == (2, 3, 10)
        assert ops.char_cnn(ids[:0], table, weights, biases).shape == (0, 10)
        bad = table.clone()
        bad[ids[2, 0]] = torch.nan
        result = ops.char_cnn(ids, bad, weights, biases)
        hit = (ids == ids[2, 0]).any(1)
        assert result[hit].isnan().all() and result[~hit].isfinite().all()


def test_char_cnn_is_the_same_from_run_to_run():
    ids, table = words(300), torch.randn(30, 5, requires_grad=True)
    weights, biases = filters([(3, 200)], 5, torch.float32)
    grads = [
        torch.autograd.grad(ops.char_cnn(ids, table, weights, biases).sum(), table)[0]
        for _ in range(3)
    ]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("bad", [-1, 30])
def test_an_id_outside_the_table_is_named(backend, bad):
    ids = words(3)
    ids[1, 4] = bad
    weights, biases = filters([(1, 4)], 5, torch.float32)
    with ops.use_backend(backend), pytest.raises(ValueError, match=rf"\[0, 30\), got {bad}"):
        ops.char_cnn(ids, torch.randn(30, 5), weights, biases)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.ones(2, 4)}, TypeError, "ids must be int64 or int32"),
        ({"embedding": torch.ones(3)}, ValueError, r"embedding must be \[rows, features\]"),
        ({"weights": []}, ValueError, "weights and biases must be as many, at least one, got 0"),
        ({"weights": [torch.ones(2, 4, 1)]}, ValueError, r"weights must be \[filters, 5, width\]"),
        ({"weights": [torch.ones(2, 5, 9)]}, ValueError, "widths must be between 1 and 4"),
        ({"weights": [torch.ones(2, 5, 1).double()]}, TypeError, "weights must have the dtype"),
        ({"biases": [torch.ones(3)]}, ValueError, r"biases must be \[2\], got shape \(3,\)"),
        ({"activation": "gelu"}, ValueError, 'activation must be "relu" or "tanh"'),
    ],
)
def test_char_cnn_bad_input_is_one_clear_error(change, error, message):
    call = {
        "ids": torch.ones(2, 4, dtype=torch.int64),
        "embedding": torch.ones(3, 5),
        "weights": [torch.ones(2, 5, 1)],
        "biases": [torch.ones(2)],
    }
    with pytest.raises(error, match=f"^char_cnn: {message}"):
        ops.char_cnn(**{**call, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 124])
def test_highway_matches_float64(backend, dtype, size):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernel computes in float32")
    if backend == "native" and dtype == torch.float64:
        pytest.skip("no oneDNN product in float64; the gate itself is checked below")
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((2, 9, size), (2 * size, size), 2 * size))
    with only(backend):
        result = ops.highway(x, weight, bias)
    eager = reference.highway(x, weight, bias)
    assert_matches(result, eager, reference.highway(double(x), double(weight), double(bias)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_highway_gate_and_its_gradients(dtype):
    projected, x, grad = (torch.randn(s).to(dtype) for s in ((5, 66), (5, 33), (5, 33)))
    projected[0] *= 200  # gates that are exactly open or shut

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (projected, x)]
        output = function(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))

    from ctxfast.ops.highway import _highway_gate

    with only("native"):
        found = run(_highway_gate, dtype)
    eager = run(reference.highway_gate, dtype)
    exact = run(reference.highway_gate, torch.float64)
    written_out = reference.highway_gate_backward(double(grad), double(projected), double(x))
    for got, low, high in zip(found, eager, exact, strict=True):
        assert_matches(got, low, high)
    for out, high in zip(written_out, exact[1:], strict=True):
        torch.testing.assert_close(out, high)


def test_highway_bad_input_is_one_clear_error():
    with pytest.raises(ValueError, match=r"^highway: weight must be \(8, 4\).*got shape \(4, 4\)"):
        ops.highway(torch.ones(2, 4), torch.ones(4, 4), torch.ones(8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalised", [False, True])
def test_scalar_mix_matches_float64(backend, dtype, normalised):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernel computes in float32")
    layers = (torch.randn(3, 4, 9, 37) * 3 + 1).to(dtype)
    weights, gamma = torch.randn(3), torch.tensor([1.7])
    mask = torch.rand(4, 9) > 0.4 if normalised else None
    with only(backend):
        result = ops.scalar_mix(layers, weights, gamma, mask)
    eager = reference.scalar_mix(layers, weights, gamma, mask)
    exact = reference.scalar_mix(double(layers), double(weights), double(gamma), mask)
    assert_matches(result, eager, exact)


def test_scalar_mix_gradients_and_formula():
    layers = torch.randn(3, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    assert torch.autograd.gradcheck(ops.scalar_mix, (layers, weights, gamma))
    assert torch.autograd.gradcheck(ops.scalar_mix, (layers, weights, gamma, mask))
    mixed = ops.scalar_mix(list(layers.unbind()), weights, gamma)
    s = torch.softmax(weights, 0)
    torch.testing.assert_close(mixed, gamma * sum(s[j] * layers[j] for j in range(3)))


def test_scalar_mix_normalises_over_the_tokens_of_the_whole_batch():
    layers, mask = torch.randn(1, 2, 5, 6) * 4 + 3, torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    layers[0, 1, 3] = torch.nan
    result = ops.scalar_mix(layers, torch.zeros(1), torch.ones(1), mask)[mask]
    assert abs(result.mean().item()) < 1e-6
    torch.testing.assert_close(result.var(correction=0), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(2)}, r"weights must be \[3\]"),
        ({"gamma": torch.ones(2)}, "gamma must be one number"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask must be bool \(2,\)"),
    ],
)
def test_scalar_mix_bad_input_is_one_clear_error(change, message):
    call = {"layers": torch.ones(3, 2, 4), "weights": torch.ones(3), "gamma": torch.ones(1)}
    with pytest.raises(ValueError, match=f"^scalar_mix: {message}"):
        ops.scalar_mix(**{**call, **change})
