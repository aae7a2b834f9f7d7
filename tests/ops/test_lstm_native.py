"""The C++ LSTM against float64: forward, every gradient, clips, lengths, instruction sets."""

from __future__ import annotations

import pytest
import torch

from ctxfast import ops, reference
from ctxfast.benchmarks import memory
from ctxfast.ops import _native, _native_lstm
from tests.ops.implementations import only
from tests.ops.lstm_cases import assert_like_float64, call, results_and_gradients, tensors
from tests.oracle import CAPS, assert_matches

pytestmark = pytest.mark.skipif(not _native.available(), reason="native module absent")

CLIPS = {"cell_clip": 0.6, "proj_clip": 0.35}
# batch, steps, inputs, hidden, features (0: no projection)
SIZES = [(1, 1, 1, 1, 1), (3, 5, 7, 19, 5), (8, 2, 4, 16, 0), (9, 7, 16, 37, 18), (2, 3, 5, 70, 66)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_float64_on_every_instruction_set(isa, sizes, dtype):
    batch, steps, _, _, features = sizes
    clips = CLIPS if features else {"cell_clip": 0.6}
    lengths = torch.randint(0, steps + 1, (batch,))
    given = tensors(*sizes, dtype=dtype)
    assert_like_float64(given)
    assert_like_float64(given, lengths=lengths, reverse=True, **clips)


@pytest.mark.parametrize("sizes", SIZES[1:4])
@pytest.mark.parametrize("reverse", [False, True])
def test_bfloat16_matches(sizes, reverse):
    given = tensors(*sizes, dtype=torch.bfloat16)
    lengths = torch.randint(0, sizes[1] + 1, (sizes[0],))
    # c is float32, but computed from rounded gates.
    assert_like_float64(given, cap=CAPS[torch.bfloat16], lengths=lengths, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 3, 7, 19, 5), (9, 2, 20, 600, 170), (3, 4, 5, 33, 0)])
def test_plain_weights_give_the_bits_of_packed_ones(isa, sizes, dtype, monkeypatch):
    monkeypatch.setattr(_native_lstm, "_PACKED_IN_CALLS", 0)
    given = tensors(*sizes, dtype=dtype)
    weights = [given.get(f"weight_{name}") for name in ("ih", "hh", "hr")]
    packed = ops.pack_lstm(*weights)
    with only("native"):
        expected = call(ops.lstm, given, packed=packed)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for found, one in zip(call(ops.lstm, given), expected, strict=True):
                assert torch.equal(found, one)
    assert_matches(
        expected[0],
        call(reference.lstm, given)[0],
        call(reference.lstm, {k: v.double() for k, v in given.items()})[0],
        cap=CAPS[dtype],
    )


@pytest.mark.skipif(not memory.available(), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("saves", [False, True])
def test_working_space_is_held_for_the_next_call_of_packed_weights_and_of_training_alone(saves):
    torch.set_num_threads(1)
    given = tensors(128, 1, 16, 4096, 16)
    space = 4 * 128 * 4 * 4096  # at least: what the input contributes to the gates
    packed = ops.pack_lstm(*(given[f"weight_{name}"] for name in ("ih", "hh", "hr")))
    with only("native"), torch.inference_mode():
        call(ops.lstm, given, packed=packed)
    held = memory.resident("VmRSS")
    with only("native"), torch.set_grad_enabled(saves):
        call(ops.lstm, given | {"bias": given["bias"].requires_grad_()})
    assert (held - memory.resident("VmRSS") > space) is not saves


@pytest.mark.parametrize("steps", [1, 2, 7, 64])
@pytest.mark.parametrize("batch", [1, 3, 8, 9])
def test_lengths_with_ties_zero_and_one(batch, steps):
    lengths = torch.tensor([0, 1, steps, steps // 2, steps // 2, steps, 1, 0, steps])[:batch]
    given = tensors(batch, steps, 3, 17, 4)
    for reverse in (False, True):
        assert_like_float64(given, lengths=lengths, reverse=reverse, **CLIPS)
        output, h, c = call(ops.lstm, given, lengths=lengths, reverse=reverse)
        padding = torch.arange(steps) >= lengths.unsqueeze(1)
        plain = output - given["residual"]
        assert torch.equal(torch.where(padding.unsqueeze(2), plain, 0), torch.zeros_like(plain))
        assert torch.equal(h[lengths == 0], given["h0"][lengths == 0])
        assert torch.equal(c[lengths == 0], given["c0"][lengths == 0])


def kept(given, **options):
    """gates, cells and projected states as the forward pass keeps them."""
    x = given
    arguments = [x["input"], None]
    for name in ("weight_ih", "weight_hh", "bias", "weight_hr"):
        arguments += [x[name], None]
    arguments += [x["h0"][None], x["c0"][None], None, None, None, None, False]
    arguments += [options["cell_clip"], options["proj_clip"], None, True]
    return torch.ops.ctxfast.lstm(*arguments)[3:]


@pytest.mark.parametrize("reverse", [False, True])
def test_active_clips(reverse):
    given = tensors(6, 9, 8, 40, 16)
    _, cells, projected = kept(given, **CLIPS)
    for values, bound in zip((cells, projected), CLIPS.values(), strict=True):
        assert 0.05 < (values.abs() > bound).float().mean() < 0.95
    assert_like_float64(given, reverse=reverse, **CLIPS)
    free, clipped = call(ops.lstm, given)[2], call(ops.lstm, given, **CLIPS)[2]
    clip = torch.tensor(CLIPS["cell_clip"])
    assert clipped.abs().max() == clip and free.abs().max() > clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_passes_at_an_exact_tie_and_not_beyond(dtype):
    """With the forget gate at 1 and the input gate at 0 the cell is c0 itself."""
    hidden = 20
    bias = torch.cat([torch.full((hidden,), v, dtype=dtype) for v in (-1e4, 1e4, 0.0, 1e4)])
    above = torch.nextafter(torch.tensor(0.5, dtype=dtype), torch.tensor(1.0, dtype=dtype))
    c0 = torch.tensor([0.5, -0.5, 0.25, above, -above], dtype=dtype).repeat(4).unsqueeze(0)
    c0.requires_grad_()
    weights = torch.zeros(4 * hidden, 1, dtype=dtype), torch.zeros(4 * hidden, hidden, dtype=dtype)
    x, h0 = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, hidden, dtype=dtype)
    with only("native"):
        c = ops.lstm(x, *weights, bias, initial_state=(h0, c0), cell_clip=0.5)[2]
        found = torch.autograd.grad(c.sum(), c0)[0]
    assert torch.equal(c, c0.clamp(-0.5, 0.5))
    assert torch.equal(found, torch.autograd.grad(c0.clamp(-0.5, 0.5).sum(), c0)[0])
    assert torch.equal(found[0, :5], torch.tensor([1.0, 1, 1, 0, 0], dtype=dtype))


def test_gradient_passes_at_a_tie_of_the_projected_state():
    given = tensors(1, 1, 3, 8, 2)
    _, _, projected = kept(given, cell_clip=None, proj_clip=1e9)
    bound = projected.abs().max().item()
    for clip in (bound, bound * (1 - 1e-6)):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        with only("native"):
            output = call(ops.lstm, leaves, proj_clip=clip)[1]
            grad = torch.autograd.grad(output.sum(), leaves["weight_hr"])[0]
        blocked = (grad == 0).all(1)
        assert blocked.tolist() == (projected.abs() > clip).view(-1).tolist()


@pytest.mark.parametrize("sizes", [(1, 2, 3, 8, 2), (3, 7, 5, 20, 6), (5, 9, 64, 48, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_in_parts_is_bit_for_bit_the_whole(sizes, dtype):
    batch, steps = sizes[:2]
    given = tensors(*sizes, dtype=dtype)
    for lengths in (None, torch.randint(0, steps + 1, (batch,))):
        with only("native"):
            whole = call(ops.lstm, given, lengths=lengths, **CLIPS)
            for cut in range(1, steps):
                state, outputs = (given["h0"], given["c0"]), []
                for part in (slice(0, cut), slice(cut, steps)):
                    own = (
                        None
                        if lengths is None
                        else (lengths - part.start).clamp(0, part.stop - part.start)
                    )
                    piece = given | {"h0": state[0], "c0": state[1]}
                    piece |= {k: given[k][:, part] for k in ("input", "residual")}
                    output, *state = call(ops.lstm, piece, lengths=own, **CLIPS)
                    outputs.append(output)
                assert torch.equal(torch.cat(outputs, 1), whole[0])
                assert torch.equal(state[0], whole[1]) and torch.equal(state[1], whole[2])


def test_rows_do_not_depend_on_their_neighbours():
    """Nor on their place: permuted rows give permuted results, and a row alone gives what it gives among others."""
    given = tensors(9, 6, 12, 40, 24)
    lengths = torch.tensor([6, 2, 0, 5, 6, 1, 3, 3, 4])
    order = torch.randperm(9)
    rows = ("input", "h0", "c0", "residual")
    with only("native"):
        whole = call(ops.lstm, given, lengths=lengths, **CLIPS)
        mixed = given | {name: given[name][order] for name in rows}
        for a, b in zip(call(ops.lstm, mixed, lengths=lengths[order], **CLIPS), whole, strict=True):
            assert torch.equal(a, b[order])
        for row in (0, 3):
            alone = given | {name: given[name][row : row + 1] for name in rows}
            result = call(ops.lstm, alone, lengths=lengths[row : row + 1], **CLIPS)
            for a, b in zip(result, whole, strict=True):
                assert torch.equal(a[0], b[row])


@pytest.mark.parametrize("batch", [1, 8])
def test_long_sums_are_as_exact_as_those_of_the_library(batch):
    """The depths of ELMo: 512 features, and a projection of 2048 cells."""
    assert_like_float64(tensors(batch, 3, 64, 2048, 512))


@pytest.mark.parametrize(("batch", "steps"), [(128, 2), (1, 100), (8, 100)])
def test_many_rows_and_many_steps(batch, steps):
    """More rows than the product with the input takes at a time, and several of its turns."""
    lengths = torch.randint(0, steps + 1, (batch,))
    for reverse in (False, True):
        given = tensors(batch, steps, 5, 17, 6)
        assert_like_float64(given, lengths=lengths, reverse=reverse, **CLIPS)


@pytest.mark.full
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("batch", [1, 3, 8, 9, 128])
def test_every_batch_with_every_number_of_steps(batch, steps):
    lengths = torch.randint(0, steps + 1, (batch,))
    assert_like_float64(tensors(batch, steps, 24, 100, 20), lengths=lengths, **CLIPS)


def test_gradients_are_as_exact_as_those_of_torch():
    """The gradient of the input sums over 4096 gates, those of the weights over 640 steps of sequences."""
    assert_like_float64(tensors(32, 20, 16, 1024, 32, scale=0.5))


def test_two_directions_at_once_are_two_calls():
    first, second = tensors(4, 5, 6, 21, 9), tensors(4, 5, 6, 21, 9)
    lengths = torch.tensor([5, 0, 3, 5])
    weights = [(first[n], second[n]) for n in ("weight_ih", "weight_hh", "bias", "weight_hr")]
    state = tuple(torch.stack((first[n], second[n])) for n in ("h0", "c0"))
    residual = torch.cat((first["residual"], second["residual"]), 2)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with only("native"):
            both = ops.bilstm(
                (first["input"], second["input"]), *weights,
                lengths=lengths, initial_state=state, residual=residual, **CLIPS,
            )  # fmt: skip
            one = call(ops.lstm, first, lengths=lengths, **CLIPS)
            two = call(ops.lstm, second, lengths=lengths, reverse=True, **CLIPS)
        assert torch.equal(both[0], torch.cat((one[0], two[0]), 2))
        for k in (1, 2):
            assert torch.equal(both[k], torch.stack((one[k], two[k])))


def test_error_grows_no_faster_than_that_of_the_eager_loop():
    given = tensors(4, 100, 16, 32, 16, scale=1.5)
    with only("native"):
        found = call(ops.lstm, given, **CLIPS)[0]
    eager = call(reference.lstm, given, **CLIPS)[0]
    exact = call(reference.lstm, {k: v.double() for k, v in given.items()}, **CLIPS)[0]
    for end in range(5, 101, 5):
        assert_matches(found[:, :end], eager[:, :end], exact[:, :end], name=f"{end} steps")


def test_nan_spreads_in_its_row_from_its_step_and_nowhere_else():
    given = tensors(4, 5, 6, 20, 8)
    lengths = torch.tensor([5, 5, 3, 5])
    clean = call(ops.lstm, given, lengths=lengths, **CLIPS)
    given["input"][1, 2, 0] = float("nan")
    given["input"][2, 3:] = float("nan")  # padding
    given["residual"][2, 3:] = 0.0
    clean[0][2, 3:] = 0.0
    with only("native"):
        output, h, c = call(ops.lstm, given, lengths=lengths, **CLIPS)
    assert output[1, 2:].isnan().all() and h[1].isnan().all() and c[1].isnan().all()
    output[1, 2:] = clean[0][1, 2:]
    assert torch.equal(output, clean[0])
    for a, b in ((h, clean[1]), (c, clean[2])):
        a[1] = b[1]
        assert torch.equal(a, b)
    given["input"][1, 2, 0] = 0.0
    grads = [torch.randn(x.shape) for x in clean]
    found = results_and_gradients(ops.lstm, given, grads, lengths=lengths, **CLIPS)
    assert all(x.isfinite().all() for x in found.values())
    for name in ("h0", "c0"):
        poisoned = given | {name: torch.full_like(given[name], float("nan"))}
        assert call(ops.lstm, poisoned)[0].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("packed", [True, False])
def test_a_weight_that_is_not_finite_shows_from_the_first_step(isa, rows, bad, packed, monkeypatch):
    """A state of zeros has no product with weight_hh, but zero times infinity is NaN."""
    monkeypatch.setattr(_native_lstm, "_PACKED_IN_CALLS", 1 << 20 if packed else 0)
    for dtype, weight_dtype in (
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
    ):
        given = tensors(rows, 2, 7, 40, 24, dtype=dtype)
        del given["residual"]
        given |= {name: torch.zeros_like(given[name]) for name in ("h0", "c0")}
        given["weight_hh"][3, 5] = bad
        expected = call(reference.lstm, given)[2].isnan()
        with only("native"):
            found = call(ops.lstm, given, weight_dtype=weight_dtype)[2].isnan()
        assert expected.any() and torch.equal(found, expected)
        first = {**given, "input": given["input"][:, :1]}
        expected = call(reference.lstm, first)[2].isnan()
        with only("native"):
            found = call(ops.lstm, first, weight_dtype=weight_dtype)[2].isnan()
        assert 0 < expected.sum() < expected.numel() and torch.equal(found, expected)


@pytest.mark.parametrize("rows", [5, 16, 17, 33, 70])
@pytest.mark.parametrize("scale", [1.0, 1e-34, 1e20])
def test_float_states_with_bfloat16_weights_are_not_rounded(isa, rows, scale):
    """Numbers far from one too, and a depth that no tile divides."""
    given = tensors(rows, 2, 37, 50, 45)
    del given["residual"], given["bias"]
    given = {k: x.bfloat16().float() if k.startswith("weight") else x for k, x in given.items()}
    given["input"] *= scale
    if scale < 1:
        given |= {name: given[name] * scale for name in ("h0", "c0")}
    with only("native"):
        found = call(ops.lstm, given, weight_dtype=torch.bfloat16)
    eager = call(reference.lstm, given)
    exact = call(reference.lstm, {name: x.double() for name, x in given.items()})
    for three in zip(found, eager, exact, strict=True):
        assert_matches(*three)


def test_gradcheck_of_the_native_kernels():
    given = tensors(3, 4, 2, 5, 3, dtype=torch.float64)
    mask_options = {"recurrent_dropout_p": 0.4, "seed": torch.tensor([3])}
    leaves = [x.requires_grad_() for x in given.values()]

    def function(*values):
        arguments = dict(zip(given, values, strict=True))
        return call(ops.lstm, arguments, lengths=[4, 0, 2], reverse=True, **CLIPS, **mask_options)

    with only("native"):
        assert torch.autograd.gradcheck(function, leaves)


def test_vector_functions_are_accurate():
    """sigmoid and tanh of every size of argument, read from the gates that the forward pass keeps, to 4 ulp.

    In float64 the truth has an error of its own, and one more is allowed.
    """
    size = torch.logspace(-30, 2.5, 4000, dtype=torch.float64)
    values = torch.cat((-size, torch.zeros(1, dtype=torch.float64), size))
    for dtype in (torch.float32, torch.float64):
        x = values.to(dtype)
        hidden = len(x)
        bias = x.repeat(4)
        zeros = [torch.zeros(s, dtype=dtype) for s in ((1, 1, 1), (4 * hidden, 1), (4 * hidden, 1))]
        state = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1, hidden, dtype=dtype)
        hr = torch.zeros(1, hidden, dtype=dtype)
        gates = torch.ops.ctxfast.lstm(
            zeros[0], None, zeros[1], None, zeros[2], None, bias, None, hr, None, *state,
            None, None, None, None, False, None, None, None, True,
        )[3].view(4, hidden)  # fmt: skip
        for found, exact in ((gates[0], torch.sigmoid), (gates[2], torch.tanh)):
            true = exact(x.double())
            normal = true.abs() > torch.finfo(dtype).tiny
            error = ((found.double() - true) / true)[normal].abs().max().item()
            ulps = error / torch.finfo(dtype).eps
            assert ulps <= (4 if dtype == torch.float32 else 5), (dtype, ulps)
