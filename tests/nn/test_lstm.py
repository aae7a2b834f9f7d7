"""nn.LSTM equals torch.nn.LSTM: outputs, states, gradients, and everything it accepts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from ctxfast import nn as fast
from ctxfast import ops
from ctxfast.ops import _dispatch, _native
from tests.oracle import assert_matches

pytestmark = pytest.mark.skipif(not _native.available(), reason="native module absent")

CASES = {
    "plain": {},
    "projection": {"proj_size": 3},
    "batch_first": {"batch_first": True, "proj_size": 3},
    "no_bias": {"bias": False},
    "both_ways": {"bidirectional": True},
    "deep": {"num_layers": 3, "bidirectional": True, "proj_size": 2, "batch_first": True},
}


def twins(dtype=torch.float64, **options):
    theirs = nn.LSTM(5, 7, dtype=dtype, **options)
    ours = fast.LSTM(5, 7, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(module, *batch):
    rows = module.num_layers * (1 + module.bidirectional)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    dtype = module.weight_ih_l0.dtype
    return tuple(torch.randn(rows, *batch, n, dtype=dtype, requires_grad=True) for n in sizes)


def flat(result):
    output, (h, c) = result
    return [getattr(output, "data", output), h, c]


def assert_same(ours, theirs, x, hx):
    with _dispatch.record() as verdicts:
        found = flat(ours(x, hx))
    assert {v.ran for v in verdicts} == {"native"}
    expected = flat(theirs(x, hx))
    leaves = [*(hx or ())]
    data = getattr(x, "data", x)
    if data.requires_grad:
        leaves.append(data)
    weights = [torch.randn_like(y) for y in expected]
    sums = [
        sum((y * w).sum() for y, w in zip(results, weights, strict=True))
        for results in (found, expected)
    ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    one = torch.autograd.grad(sums[0], [*leaves, *ours.parameters()])
    two = torch.autograd.grad(sums[1], [*leaves, *theirs.parameters()])
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_torch(name, with_state):
    ours, theirs = twins(**CASES[name])
    x = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    batch = 4 if ours.batch_first else 6
    assert_same(ours, theirs, x, states(ours, batch) if with_state else None)


@pytest.mark.parametrize("name", ["projection", "deep"])
def test_unbatched_and_packed_input(name):
    ours, theirs = twins(**CASES[name])
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert_same(ours, theirs, x, states(ours))
    sequences = [torch.randn(n, 5, dtype=torch.float64) for n in (3, 6, 1, 3, 6)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    assert_same(ours, theirs, packed, states(ours, 5))
    result = ours(packed)[0]
    for a, b in zip(result[1:], packed[1:], strict=True):
        assert torch.equal(a, b)


def test_float32_and_bfloat16_match():
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = twins(dtype, proj_size=3)
        x = torch.randn(4, 6, 5, dtype=dtype)
        eager = flat(theirs(x))
        exact = flat(copy.deepcopy(theirs).double()(x.double()))
        for a, b, c in zip(flat(ours(x)), eager, exact, strict=True):
            assert a.dtype == b.dtype
            assert_matches(a, b, c)


def test_dropout_draws_torchs_mask():
    ours, theirs = twins(num_layers=3, dropout=0.4)
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    torch.manual_seed(3)
    found = ours(x)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(found, theirs(x)[0])
    assert torch.equal(ours.eval()(x)[0], ours(x)[0])


def test_packed_weights_live_by_the_rules():
    ours, theirs = twins(torch.float32, num_layers=2, proj_size=3)
    ours.eval()
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        assert fast.packed_bytes(ours) == 0
        ours(x)
        assert fast.packed_bytes(ours) > 0
        ours.weight_hr_l1.mul_(2)
        theirs.weight_hr_l1.mul_(2)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
        for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert fast.packed_bytes(clone) == 0
            assert torch.equal(clone(x)[0], ours(x)[0])
        ours.weight_hh_l0.data[3, 1] += 1  # no version counts this
        theirs.weight_hh_l0.data[3, 1] += 1
        fast.refresh(ours)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    ours(x)
    assert fast.packed_bytes(ours) == 0  # gradients were recorded
    with torch.inference_mode():
        ours(x)
    assert fast.packed_bytes(ours) > 0
    assert fast.packed_bytes(ours.train()) == 0
    fast.set_packing(ours.eval(), False)
    with torch.no_grad():
        ours(x)
    assert fast.packed_bytes(ours) == 0


def test_smaller_weights_on_request():
    ours, theirs = twins(torch.float32, proj_size=3, bidirectional=True)
    x = torch.randn(4, 2, 5)
    ours.eval().weight_dtype = torch.bfloat16
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "weight" in name:
                weight.copy_(weight.bfloat16())
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_what_the_operator_does_not_serve_runs_on_torch():
    ours, theirs = twins(torch.float16)
    x = torch.randn(4, 2, 5, dtype=torch.float16)
    with _dispatch.record() as verdicts:
        assert torch.equal(ours(x)[0], theirs(x)[0])
    assert not verdicts
    with ops.use_backend("reference"):
        ours, theirs = twins()
        torch.testing.assert_close(ours(x.double())[0], theirs(x.double())[0])


@pytest.mark.parametrize(
    ("shape", "state", "error", "message"),
    [
        ((2, 3, 4), None, RuntimeError, "input.size\\(-1\\) must be equal to input_size"),
        ((5,), None, ValueError, "Expected input to be 2D or 3D, got 1D"),
        ((2, 3, 5), (1, 2, 7), RuntimeError, "Expected hidden\\[0\\] size"),
        ((2, 3, 5), (1, 7), RuntimeError, "should also be 3-D"),
        ((2, 5), (1, 1, 7), RuntimeError, "should also be 2-D"),
    ],
)
def test_bad_input_is_refused_in_torchs_words(shape, state, error, message):
    ours, theirs = twins(torch.float32)
    hx = None if state is None else (torch.randn(state), torch.randn(state))
    for module in (theirs, ours):
        with pytest.raises(error, match=message):
            module(torch.randn(shape), hx)


@pytest.mark.unpoisoned
def test_compiles_to_one_graph():
    ours, _ = twins(torch.float32, proj_size=3, bidirectional=True, num_layers=2)
    x = torch.randn(4, 2, 5)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x)[0], ours(x)[0])
