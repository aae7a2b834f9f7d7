"""ops.lstm and ops.bilstm: layouts, empty input, dropout, recomputation, smaller weights, messages."""

from __future__ import annotations

import pytest
import torch

import ctxfast
from ctxfast import ops, reference
from ctxfast.ops import _native
from ctxfast.reference.lstm import round_weight
from tests.ops.implementations import only
from tests.ops.lstm_cases import assert_like_float64, call, results_and_gradients, tensors
from tests.oracle import CAPS, assert_matches

CLIPS = {"cell_clip": 0.6, "proj_clip": 0.35}
BACKENDS = ["native", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend):
    dense = tensors(3, 4, 6, 10, 5)
    strided = {
        "input": dense["input"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight_ih": dense["weight_ih"].t().contiguous().t(),
        "weight_hh": dense["weight_hh"].t().contiguous().t(),
        "bias": dense["bias"].repeat_interleave(2)[::2],
        "weight_hr": dense["weight_hr"].t().contiguous().t(),
        "h0": dense["h0"].t().contiguous().t(),
        "c0": torch.cat([dense["c0"]] * 2, 1)[:, :10],
        "residual": torch.cat([dense["residual"]] * 2, 2)[..., :5],
    }
    grads = [torch.tensor(0.5).expand(x.shape) for x in call(ops.lstm, dense)]
    with only(backend):
        found = results_and_gradients(ops.lstm, strided, grads, **CLIPS)
        expected = results_and_gradients(ops.lstm, dense, [g.contiguous() for g in grads], **CLIPS)
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "steps"), [(0, 3), (2, 0), (0, 0)])
def test_empty_input(backend, batch, steps):
    given = tensors(batch, steps, 6, 10, 5)
    grads = [torch.randn(x.shape) for x in call(reference.lstm, given)]
    with only(backend):
        found = results_and_gradients(ops.lstm, given, grads)
    assert found["output"].shape == (batch, steps, 5)
    assert torch.equal(found["h"], given["h0"]) and torch.equal(found["c"], given["c0"])
    assert torch.equal(found["dh0"], grads[1]) and torch.equal(found["dc0"], grads[2])
    assert not found["dweight_hh"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_recurrent_dropout_is_one_mask_for_a_whole_sequence(backend):
    options = {"recurrent_dropout_p": 0.5, "seed": torch.tensor([9])}
    given = tensors(4, 6, 5, 12, 40)
    assert_like_float64(given, backend, **options, **CLIPS)
    given["residual"].zero_()
    output = call(ops.lstm, given, **options)[0]
    dropped = (output == 0).all(1)
    assert torch.equal(dropped, (output == 0).any(1))
    assert 0.3 < dropped.float().mean() < 0.7
    reverse = (call(ops.lstm, given, reverse=True, **options)[0] == 0).all(1)
    assert not torch.equal(reverse, dropped)
    pairs = [(given[n], given[n]) for n in ("weight_ih", "weight_hh", "bias", "weight_hr")]
    both = ops.bilstm(given["input"], *pairs, **options)[0]
    assert torch.equal((both == 0).all(1), torch.cat((dropped, reverse), 1))
    torch.manual_seed(1)
    drawn = call(ops.lstm, given, recurrent_dropout_p=0.5)[0]
    torch.manual_seed(1)
    assert torch.equal(call(ops.lstm, given, recurrent_dropout_p=0.5)[0], drawn)
    assert not torch.equal(drawn, output)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_gives_the_same_gradients(backend):
    given = tensors(3, 5, 4, 9, 6)
    grads = [torch.randn(x.shape) for x in call(ops.lstm, given)]
    with only(backend):
        kept, again = (
            results_and_gradients(ops.lstm, given, grads, recompute=flag, **CLIPS)
            for flag in (False, True)
        )
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 5, 7, 19, 5), (2, 3, 4, 33, 0), (7, 2, 4, 16, 17)])
@pytest.mark.skipif(not _native.available(), reason="native module absent")
def test_smaller_weights(weight_dtype, dtype, sizes):
    """What the rounded weights give, nothing less, on every instruction set, packed before or in the call."""
    given = tensors(*sizes, dtype=dtype)
    expected = call(reference.lstm, given, weight_dtype=weight_dtype)
    exact = call(reference.lstm, given)
    assert not torch.equal(expected[0], exact[0]) or (dtype, weight_dtype) == (torch.bfloat16,) * 2
    held = {
        name: round_weight(x, weight_dtype if name.startswith("weight") else None).double()
        for name, x in given.items()
    }
    truth = call(reference.lstm, held)
    before = _native.isa()
    for isa in _native.available_isas():
        _native.set_isa(isa)
        packed = ops.pack_lstm(
            given["weight_ih"], given["weight_hh"], given.get("weight_hr"), weight_dtype
        )
        for other in _native.available_isas():
            _native.set_isa(other)
            with only("native"):
                for use in (packed, None):
                    found = call(ops.lstm, given, weight_dtype=weight_dtype, packed=use)
                    for a, b, c in zip(found, expected, truth, strict=True):
                        # c is float32, but computed from rounded states.
                        assert_matches(a, b, c, cap=CAPS[dtype])
    _native.set_isa(before)


def test_packed_weights_of_another_model_are_not_believed():
    given, other = tensors(2, 3, 4, 16, 5), tensors(2, 3, 4, 16, 6)
    packed = ops.pack_lstm(*(other[f"weight_{name}"] for name in ("ih", "hh", "hr")))
    expected = call(ops.lstm, given)
    for wrong in (packed, packed[:40], torch.zeros(7), torch.zeros(0, dtype=torch.uint8)):
        for a, b in zip(call(ops.lstm, given, packed=wrong), expected, strict=True):
            assert torch.equal(a, b)


def test_autocast_keeps_the_cell_in_float32():
    given = tensors(2, 3, 4, 16, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output, h, c = call(ops.lstm, given)
    assert (output.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_explain_names_what_runs():
    given = tensors(2, 3, 4, 16, 5)
    backend = "native" if _native.available() else "reference"
    assert ctxfast.explain(lambda: call(ops.lstm, given)).ran("lstm") == {backend}
    half = {name: x.half() for name, x in given.items()}
    explanation = ctxfast.explain(lambda: call(ops.lstm, half))
    assert explanation.ran("lstm") == {"reference"}
    if backend == "native":
        assert explanation.reasons["lstm", "native"] == "dtype torch.float16"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 4)}, ValueError, r"input must be \[B, T, K\], got shape \(2, 4\)"),
        ({"input": torch.ones(2, 3, 4).int()}, TypeError, "input must be floating point, got"),
        ({"weight_ih": torch.ones(8, 5)}, ValueError, r"weight_ih must be \(8, 4\), got"),
        ({"weight_hh": torch.ones(9, 3)}, ValueError, r"weight_hh must be \[4 \* H, P\], got"),
        ({"weight_hh": torch.ones(8, 3).double()}, TypeError, "weight_hh must have the dtype of"),
        ({"bias": torch.ones(7)}, ValueError, r"bias must be \(8,\), got"),
        ({"weight_hr": torch.ones(2, 2)}, ValueError, r"weight_hr must be \(3, 2\), got"),
        ({"weight_hr": None}, ValueError, r"weight_hh must be \[4 \* H, H\] without weight_hr"),
        ({"lengths": [1, 4]}, ValueError, r"lengths must be in \[0, 3\], got 4"),
        ({"lengths": [-1, 3]}, ValueError, r"lengths must be in \[0, 3\], got -1"),
        ({"lengths": [1]}, ValueError, r"lengths must be \(2,\), got shape \(1,\)"),
        ({"lengths": torch.ones(2)}, TypeError, "lengths must be integers, got torch.float32"),
        ({"cell_clip": 0.0}, ValueError, "cell_clip must be positive or None, got 0.0"),
        ({"proj_clip": "3"}, TypeError, "proj_clip must be a number, got str"),
        ({"initial_state": torch.ones(2)}, TypeError, r"initial_state must be a pair \(h, c\)"),
        (
            {"initial_state": (torch.ones(2, 2), torch.ones(2, 2))},
            ValueError,
            r"h of initial_state must be \(2, 3\), got shape \(2, 2\)",
        ),
        ({"residual": torch.ones(2, 3, 4)}, ValueError, r"residual must be \(2, 3, 3\), got"),
        ({"recurrent_dropout_p": 1.5}, ValueError, r"recurrent_dropout_p must be in \[0, 1\]"),
        ({"reverse": 1}, TypeError, "reverse must be True or False, got 1"),
        ({"weight_dtype": torch.float16}, ValueError, "weight_dtype must be None, torch.bfloat16"),
    ],
)
def test_bad_input_is_one_clear_error(change, error, message):
    arguments = {
        "input": torch.ones(2, 3, 4),
        "weight_ih": torch.ones(8, 4),
        "weight_hh": torch.ones(8, 3),
        "bias": torch.ones(8),
        "weight_hr": torch.ones(3, 2),
    }
    with pytest.raises(error, match=f"^lstm: {message}"):
        ops.lstm(**{**arguments, **change})


def test_more_errors():
    x, w = torch.ones(2, 3, 4), torch.ones(8, 4)
    square = torch.ones(8, 2)
    with pytest.raises(ValueError, match="^lstm: proj_clip must be None without weight_hr, got 3"):
        ops.lstm(x, w, square, proj_clip=3)
    with pytest.raises(ValueError, match="^lstm: weight_dtype serves inference"):
        ops.lstm(x, w.requires_grad_(), square, weight_dtype=torch.int8)
    with pytest.raises(TypeError, match="^bilstm: weight_ih must be a pair"):
        ops.bilstm(x, w, square)
    with pytest.raises(ValueError, match="^bilstm: both inputs must be"):
        ops.bilstm((x, x[:1]), (w, w), (square, square))
