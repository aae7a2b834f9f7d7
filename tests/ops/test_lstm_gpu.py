"""The LSTM on a CUDA device: both paths against float64, graphs, streams, the watchdog."""

from __future__ import annotations

import pytest
import torch

import ctxfast
from ctxfast import ops
from ctxfast.ops import _native, _native_lstm_cuda
from ctxfast.ops import _native_lstm_paths as paths
from tests.oracle import assert_matches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not _native.cuda_available(), reason=f"CUDA module: {_native.cuda_unavailable_reason()}"
    ),
]

SIZES = [(4096, 512), (2048, 256), (1024, 128)]
BF16 = torch.bfloat16


@pytest.fixture(params=["persistent", "stepwise"])
def path(request, monkeypatch):
    monkeypatch.setenv("CTXFAST_LSTM", request.param)
    return request.param


def make(hidden, features, dtype, batch, steps, project=True, seed=0):
    """input, and for both directions weight_ih, weight_hh, bias, weight_hr, on the device; lengths."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to("cuda", dtype)

    def both(*shape, scale=1.0):
        return normal(*shape, scale=scale), normal(*shape, scale=scale)

    weights = [
        both(4 * hidden, 64, scale=0.1),
        both(4 * hidden, features, scale=features**-0.5),
        both(4 * hidden),
        both(features, hidden, scale=3 * hidden**-0.5) if project else None,
    ]
    lengths = torch.randint(0, steps + 1, (batch,), generator=generator)
    lengths[: min(2, batch)] = torch.tensor([steps, 1])[:batch]
    return normal(batch, steps, 64), weights, lengths.cuda()


def run(x, weights, lengths, dtype, backward=True):
    """Results, and gradients of everything, of the operator in a dtype."""
    leaves = [x.detach().to(dtype).requires_grad_()]
    pairs = []
    for pair in weights:
        pairs.append(
            None if pair is None else tuple(w.detach().to(dtype).requires_grad_() for w in pair)
        )
        leaves += pairs[-1] or ()
    results = ops.bilstm(leaves[0], *pairs, lengths=lengths, cell_clip=2.0, proj_clip=1.0)
    if not backward:
        return [r.detach() for r in results]
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(r.shape, generator=generator).to(r.device, r.dtype) for r in results]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, grads)]


def ran(x, weights, lengths):
    return ctxfast.explain(ops.bilstm, x, *weights, lengths=lengths).ran("lstm")


@pytest.mark.parametrize("hidden, features", SIZES)
@pytest.mark.parametrize("batch", [1, 8, 21])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_results_against_float64(path, hidden, features, batch, dtype):
    """Forward. Beside a clip two roundings take different gradients, so those are compared between the paths below."""
    x, weights, lengths = make(hidden, features, dtype, batch, 7)
    if path == "persistent" and ran(x, weights, lengths) != {"cuda_persistent"}:
        pytest.skip("the device does not hold this size")
    assert ran(x, weights, lengths) == {f"cuda_{path}"}
    found = run(x, weights, lengths, dtype, backward=False)
    with ops.use_backend("reference"):
        eager = run(x, weights, lengths, dtype, backward=False)
        exact = run(x, weights, lengths, torch.float64, backward=False)
    for name, *three in zip(("output", "h", "c"), found, eager, exact, strict=True):
        assert_matches(*three, name=name, cap=0.1)
    ctxfast.synchronize()


@pytest.mark.parametrize("hidden, features", SIZES)
@pytest.mark.parametrize("batch", [3, 17])
def test_both_paths_agree_on_gradients(monkeypatch, hidden, features, batch):
    """The paths round at the same places, so they differ by sums in another order alone."""
    x, weights, lengths = make(hidden, features, BF16, batch, 6)
    results = {}
    for name in ("stepwise", "persistent"):
        monkeypatch.setenv("CTXFAST_LSTM", name)
        if ran(x, weights, lengths) != {f"cuda_{name}"}:
            pytest.skip("the device does not hold this size")
        results[name] = run(x, weights, lengths, BF16)
    for a, b in zip(*results.values(), strict=True):
        scale = a.float().abs().max().clamp(min=1e-6)
        assert (a.float() - b.float()).square().mean().sqrt() < 0.02 * scale


@pytest.mark.parametrize(
    "hidden, features, project", [(33, 9, True), (64, 64, False), (512, 128, True)]
)
@pytest.mark.parametrize("batch", [3, 40])
def test_float32_of_any_size(monkeypatch, hidden, features, project, batch):
    monkeypatch.setenv("CTXFAST_LSTM", "stepwise")
    x, weights, lengths = make(hidden, features, torch.float32, batch, 5, project)
    found = run(x, weights, lengths, torch.float32, backward=False)
    with ops.use_backend("reference"):
        exact = run(x, weights, lengths, torch.float64, backward=False)
        eager = run(x, weights, lengths, torch.float32, backward=False)
    for three in zip(found, eager, exact, strict=True):
        assert_matches(*three)


@pytest.mark.parametrize("hidden, features", SIZES)
def test_the_same_bits_every_time(path, hidden, features):
    x, weights, lengths = make(hidden, features, BF16, 5, 9)
    first = run(x, weights, lengths, BF16)
    for _ in range(100):
        for a, b in zip(first, run(x, weights, lengths, BF16), strict=True):
            assert torch.equal(a, b)


def test_a_thousand_replays_of_a_graph(path):
    x, weights, lengths = make(1024, 128, BF16, 4, 8)
    expected = run(x, weights, lengths, BF16, backward=False)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = ops.bilstm(x, *weights, lengths=lengths, cell_clip=2.0, proj_clip=1.0)
    for _ in range(1000):
        graph.replay()
    ctxfast.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def test_beside_another_stream(path):
    """A busy second stream delays the launch; results stay."""
    x, weights, lengths = make(2048, 256, BF16, 4, 8)
    expected = run(x, weights, lengths, BF16, backward=False)
    other = torch.cuda.Stream()
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        with torch.cuda.stream(other):
            big = (big @ big).clamp(-1, 1)
            there = run(x, weights, lengths, BF16, backward=False)
        here = run(x, weights, lengths, BF16, backward=False)
        other.synchronize()
        for a, b, c in zip(expected, here, there, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
    ctxfast.synchronize()


def test_watchdog(monkeypatch):
    """With no patience at all the kernel ends, and the next look at it raises."""
    monkeypatch.setenv("CTXFAST_LSTM", "persistent")
    monkeypatch.setattr(_native_lstm_cuda, "TIMEOUT_NANOSECONDS", 0)
    x, weights, lengths = make(4096, 512, BF16, 2, 20)
    if ran(x, weights, lengths) != {"cuda_persistent"}:
        pytest.skip("the device does not hold this size")
    with pytest.raises(RuntimeError, match="waited too long"):
        for _ in range(20):
            run(x, weights, lengths, BF16, backward=False)
            ctxfast.synchronize()


def test_the_occupancy_query_decides():
    """Every kernel of the table: what the device holds is a whole number of groups, none where clusters are missing."""
    major = torch.cuda.get_device_capability()[0]
    for kernel in paths.kernels():
        groups = paths.resident_groups(0, kernel.key, False)
        assert groups >= 0
        if kernel.cluster > 1 and major < 9:
            assert groups == 0
