"""Training of the C++ LSTM on batches of the size at which matrix tiles take over, against float64."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from ctxfast.ops import _native
from tests.ops.implementations import only
from tests.ops.lstm_cases import assert_like_float64, call, results_and_gradients, tensors
from tests.oracle import CAPS, assert_matches

pytestmark = pytest.mark.skipif(not _native.available(), reason="native module absent")

CLIPS = {"cell_clip": 0.6, "proj_clip": 0.35}
# batch, steps, inputs, hidden, features (0: no projection): whole tiles, and sizes that no tile divides
SIZES = [(32, 4, 64, 128, 64), (40, 5, 37, 150, 70), (17, 3, 40, 37, 0), (70, 2, 33, 20, 9)]


@pytest.mark.parametrize("sizes", SIZES)
def test_float32_matches(isa, sizes):
    batch, steps, _, _, features = sizes
    clips = CLIPS if features else {"cell_clip": 0.6}
    given = tensors(*sizes)
    assert_like_float64(given)
    dropout = {"recurrent_dropout_p": 0.4, "seed": torch.tensor([3])}
    lengths = torch.randint(0, steps + 1, (batch,))
    assert_like_float64(given, lengths=lengths, reverse=True, **clips, **dropout)


@pytest.mark.parametrize("sizes", SIZES[:3])
def test_bfloat16_matches(isa, sizes):
    given = tensors(*sizes, dtype=torch.bfloat16)
    lengths = torch.randint(0, sizes[1] + 1, (sizes[0],))
    assert_like_float64(given, cap=CAPS[torch.bfloat16], lengths=lengths)


def test_long_sums():
    """Many chunks of units, and a depth in pieces."""
    assert_like_float64(tensors(20, 3, 64, 1100, 200))


LARGE = (20, 2, 40, 2010, 790)  # weights that no cache of a core holds, and that no tile divides


@pytest.mark.parametrize("scale", [1.0, 1e-34, 1e34])
def test_large_weights(isa, scale):
    """Split into parts where there are tiles; gradients far from one too."""
    given = tensors(*LARGE)
    del given["residual"]
    lengths = torch.randint(0, LARGE[1] + 1, (LARGE[0],))
    lengths[0] = LARGE[1]
    options = {"lengths": lengths, "reverse": True, **CLIPS}
    grads = [torch.randn(x.shape) * scale for x in call(reference.lstm, given, **options)]
    with only("native"):
        found = results_and_gradients(ops.lstm, given, grads, **options)
    eager = results_and_gradients(reference.lstm, given, grads, **options)
    double = {name: x.double() for name, x in given.items()}
    exact = results_and_gradients(reference.lstm, double, [x.double() for x in grads], **options)
    for name, value in found.items():
        assert_matches(value, eager[name], exact[name], name=name)


def test_large_weights_whatever_the_threads():
    given = tensors(*LARGE)
    grads = [torch.randn(x.shape) for x in call(reference.lstm, given)]
    results = []
    with only("native"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(results_and_gradients(ops.lstm, given, grads))
    for result in results[1:]:
        assert all(torch.equal(result[name], x) for name, x in results[0].items())


@pytest.mark.parametrize("of", ["weight_hh", "weight_hr"])
def test_a_large_weight_that_is_infinite(of):
    given = tensors(*LARGE)
    given[of][3, 5] = float("inf")
    grads = [torch.randn(x.shape) for x in call(reference.lstm, given)]
    expected = results_and_gradients(reference.lstm, given, grads)
    with only("native"):
        found = results_and_gradients(ops.lstm, given, grads)
    for name in ("output", "h", "c"):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("rows", [16, 33])
@pytest.mark.parametrize("of", ["weight_hh", "weight_hr", "input", "h0", "grad"])
@pytest.mark.parametrize("scale", [1e-34, 1e-12, 1e12, 1e33])
def test_numbers_far_from_one(isa, rows, of, scale):
    """Parts of tiny numbers must not be lost, and those of large ones must not overflow."""
    given = tensors(rows, 2, 40, 48, 32)
    del given["residual"]
    if of != "grad":
        given[of] = given[of] * scale
    grads = [
        torch.randn(x.shape) * (scale if of == "grad" else 1) for x in call(reference.lstm, given)
    ]
    with only("native"):
        found = results_and_gradients(ops.lstm, given, grads)
    eager = results_and_gradients(reference.lstm, given, grads)
    exact = results_and_gradients(
        reference.lstm,
        {name: x.double() for name, x in given.items()},
        [x.double() for x in grads],
    )
    for name, value in found.items():
        if eager[name].isfinite().all():
            assert_matches(value, eager[name], exact[name], name=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["weight_hh", "weight_hr"])
def test_a_weight_that_is_not_finite_shows_in_results_and_gradients(isa, bad, of):
    given = tensors(20, 3, 40, 48, 32)
    given[of][3, 5] = bad
    grads = [torch.randn(x.shape) for x in call(reference.lstm, given)]
    expected = results_and_gradients(reference.lstm, given, grads)
    with only("native"):
        found = results_and_gradients(ops.lstm, given, grads)
    for name, value in found.items():
        if name != "dc0":  # which stops at a cell that is NaN
            assert torch.equal(value.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_in_its_row(isa, bad):
    given = tensors(20, 3, 40, 48, 32)
    grads = [torch.randn(x.shape) for x in call(reference.lstm, given)]
    with only("native"):
        clean = results_and_gradients(ops.lstm, given, grads)
        grads[0][4, 1, 7] = bad
        found = results_and_gradients(ops.lstm, given, grads)
    others = torch.arange(20) != 4
    for name in ("dinput", "dh0", "dc0"):
        assert not found[name][4].isfinite().all()
        torch.testing.assert_close(found[name][others], clean[name][others])


def test_padding_that_is_no_number_changes_nothing(isa):
    given = tensors(20, 4, 40, 48, 32)
    lengths = torch.randint(0, 4, (20,))
    padding = torch.arange(4) >= lengths.unsqueeze(1)
    grads = [torch.randn(x.shape) for x in call(reference.lstm, given)]
    with only("native"):
        clean = results_and_gradients(ops.lstm, given, grads, lengths=lengths)
        given["input"][padding] = float("nan")
        found = results_and_gradients(ops.lstm, given, grads, lengths=lengths)
    for name, value in found.items():
        if name == "output":
            value, clean[name] = value[~padding], clean[name][~padding]
        torch.testing.assert_close(value, clean[name], msg=name)


@pytest.mark.parametrize("features", [40, 0])
def test_threads_and_layout_change_no_bit(isa, features):
    given = tensors(24, 5, 40, 200, features)
    grads = [torch.randn(x.shape) for x in call(ops.lstm, given)]
    given["input"] = given["input"].transpose(0, 1).contiguous().transpose(0, 1)
    wanted = None
    with only("native"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for layout in (torch.preserve_format, torch.contiguous_format):
                x = given | {"input": given["input"].clone(memory_format=layout)}
                found = results_and_gradients(ops.lstm, x, grads)
                wanted = wanted or found
                assert all(torch.equal(found[name], wanted[name]) for name in found)
