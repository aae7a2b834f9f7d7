"""What must hold between two attention calls: bitwise repetition, and results that follow a change of the inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ctxfast import ops
from tests.ops.attention_cases import (
    BACKENDS,
    DTYPES,
    ISAS,
    Case,
    build,
    machine,
    run,
    run_reference,
)
from tests.ops.implementations import only
from tests.oracle import assert_matches

REPEATS = 250

REPEATED = {
    "padded": Case(
        batch=3,
        heads=2,
        seqlen_q=33,
        seqlen_k=70,
        head_dim=17,
        bias=(0, 1, 1, 1),
        key_padding="prefix",
        dropout_p=0.1,
    ),
    "long": Case(batch=1, heads=1, seqlen_q=300, seqlen_k=320, head_dim=8, bias=(0, 0, 0, 1)),
    "packed": Case(
        lengths_q=(40, 0, 7, 21), lengths_k=(40, 0, 7, 21), tail=3, dropout_p=0.1, bias=(0, 1, 1, 1)
    ),
    "bfloat16": Case(batch=2, seqlen_q=50, seqlen_k=50, dtype=torch.bfloat16, bias=(0, 0, 1, 1)),
}


def assert_same_bits(found, expected):
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("name", REPEATED)
def test_native_repeats_every_bit(name):
    case = REPEATED[name]
    inputs = build(case)
    first = run(case, inputs, "native")
    for _ in range(REPEATS):
        assert_same_bits(run(case, inputs, "native"), first)


@pytest.mark.parametrize("name", REPEATED)
def test_the_number_of_threads_changes_no_bit(name):
    inputs = build(REPEATED[name])
    first = run(replace(REPEATED[name], threads=1), inputs, "native")
    for threads in (2, 3, 4, 7):
        assert_same_bits(run(replace(REPEATED[name], threads=threads), inputs, "native"), first)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", REPEATED)
def test_other_backends_repeat_every_bit(name, backend):
    case = replace(REPEATED[name], threads=1)
    inputs = build(case)
    first = run(case, inputs, backend)
    for _ in range(3):
        assert_same_bits(run(case, inputs, backend), first)


CASE = Case(
    batch=3,
    seqlen_q=20,
    seqlen_k=70,
    head_dim=24,
    bias=(1, 1, 1, 1),
    key_padding="prefix",
    lse_grad=False,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_the_keys_does_not_matter(backend):
    inputs = build(CASE)
    before = run(CASE, inputs, backend)
    order = torch.randperm(CASE.seqlen_k)
    inputs.key, inputs.value = inputs.key[:, :, order], inputs.value[:, :, order]
    inputs.bias = inputs.bias[..., order]
    inputs.arguments["key_padding_mask"] = inputs.arguments["key_padding_mask"][:, order]
    after = run(CASE, inputs, backend)
    for name in ("output", "lse", "dquery"):
        torch.testing.assert_close(after[name], before[name], msg=name)
    for name in ("dkey", "dvalue"):
        torch.testing.assert_close(after[name], before[name][:, :, order], msg=name)
    torch.testing.assert_close(after["dbias"], before["dbias"][..., order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_heads_and_rows_does_not_matter(backend):
    inputs = build(CASE)
    before = run(CASE, inputs, backend)
    order = torch.randperm(CASE.seqlen_q)
    inputs.query, inputs.grad_output = (
        x[:, :, order].flip(1) for x in (inputs.query, inputs.grad_output)
    )
    inputs.key, inputs.value, inputs.bias = (
        x.flip(1) for x in (inputs.key, inputs.value, inputs.bias[:, :, order])
    )
    after = run(CASE, inputs, backend)
    for name in ("output", "dquery", "dbias"):
        torch.testing.assert_close(after[name].flip(1), before[name][:, :, order], msg=name)
    for name in ("dkey", "dvalue"):
        torch.testing.assert_close(after[name].flip(1), before[name], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_gives_the_same_alone_as_in_a_batch(backend):
    inputs = build(CASE)
    together = run(CASE, inputs, backend)
    for b in range(CASE.batch):
        alone = build(CASE)
        for name in ("query", "key", "value", "bias", "grad_output"):
            setattr(alone, name, getattr(inputs, name)[b : b + 1])
        mask = inputs.arguments["key_padding_mask"][b : b + 1]
        alone.arguments = dict(inputs.arguments, key_padding_mask=mask)
        for name, x in run(CASE, alone, backend).items():
            torch.testing.assert_close(x, together[name][b : b + 1], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_padding_changes_nothing(backend):
    inputs = build(CASE)
    before = run(CASE, inputs, backend)
    extra = 61
    inputs.key, inputs.value = (
        torch.nn.functional.pad(x, (0, 0, 0, extra), value=float("nan"))
        for x in (inputs.key, inputs.value)
    )
    inputs.bias = torch.nn.functional.pad(inputs.bias, (0, extra), value=3.0)
    mask = inputs.arguments["key_padding_mask"]
    inputs.arguments["key_padding_mask"] = torch.nn.functional.pad(mask, (0, extra))
    after = run(CASE, inputs, backend)
    for name in ("output", "lse", "dquery"):
        torch.testing.assert_close(after[name], before[name], msg=name)
    for name in ("dkey", "dvalue"):
        torch.testing.assert_close(after[name][:, :, :70], before[name], msg=name)
        assert (after[name][:, :, 70:] == 0).all()
    torch.testing.assert_close(after["dbias"][..., :70], before["dbias"])
    assert (after["dbias"][..., 70:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ways_to_hide_a_key_agree(backend):
    """Padding mask, bool mask and -inf: one meaning; so for causal and window as masks."""
    inputs = build(replace(CASE, key_padding="none", bias=None))
    tensors = (inputs.query, inputs.key, inputs.value)
    mask = torch.arange(70) < torch.tensor([[70], [0], [33]])
    i, j = torch.arange(20)[:, None], torch.arange(70)
    band = (j >= i - 2) & (j <= i + 30)
    added = torch.zeros(3, 1, 1, 70).masked_fill(~mask[:, None, None], -torch.inf)
    with only(backend):
        padding = ops.attention_with_lse(*tensors, key_padding_mask=mask)
        same = [
            ops.attention_with_lse(*tensors, attn_mask=mask[:, None, None]),
            ops.attention_with_lse(*tensors, bias=added),
        ]
        window = ops.attention_with_lse(*tensors, window_size=(2, 30))
        banded = ops.attention_with_lse(*tensors, attn_mask=band)
        causal = ops.attention_with_lse(*tensors, is_causal=True)
        lower = ops.attention_with_lse(*tensors, window_size=(-1, 0))
    pairs = [(x, padding) for x in same] + [(window, banded), (causal, lower)]
    for pair in pairs:
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_linear_in_the_values_and_shifts_with_the_scores(backend):
    inputs = build(replace(CASE, key_padding="none", bias=None))
    q, k, v = inputs.query, inputs.key, inputs.value
    with only(backend):
        output, lse = ops.attention_with_lse(q, k, v)
        doubled = ops.attention(q, k, 2 * v)
        constant = ops.attention(q, k, torch.full_like(v, 0.75))
        shifted, shifted_lse = ops.attention_with_lse(q, k, v, bias=torch.full((1, 1), 5.0))
    assert torch.equal(doubled, 2 * output)  # a power of two changes no rounding
    torch.testing.assert_close(constant, torch.full_like(constant, 0.75))
    torch.testing.assert_close(shifted, output)
    torch.testing.assert_close(shifted_lse, lse + 5.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_row_sum_to_what_they_must(backend):
    """Softmax ignores a shift of its scores: the bias gradient of every row sums to the gradient of lse."""
    case = replace(CASE, lse_grad=True, key_padding="none")
    inputs = build(case)
    found, eager = (
        results["dbias"].sum(-1)
        for results in (run(case, inputs, backend), run_reference(case, inputs))
    )
    assert_matches(found, eager, inputs.grad_lse.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_the_keys_combine_through_lse(backend):
    """The identity behind ring and chunked attention, gradients of lse included."""
    inputs = build(replace(CASE, key_padding="none", bias=None))

    def halves(q, k, v):
        parts = [
            ops.attention_with_lse(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 30), slice(30, 70))
        ]
        weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0)[..., None]
        return sum(w * output for w, (output, _) in zip(weights, parts, strict=True))

    def results(function, dtype, backend):
        leaves = [
            x.to(dtype, copy=True).requires_grad_()
            for x in (inputs.query, inputs.key, inputs.value)
        ]
        with only(backend):
            output = function(*leaves)
            grad = inputs.grad_output.to(dtype)
            return output.detach(), *torch.autograd.grad(output, leaves, grad)

    found = results(halves, torch.float32, backend)
    eager = results(halves, torch.float32, "reference")
    exact = results(ops.attention, torch.float64, "reference")
    for name, *three in zip(("output", "dq", "dk", "dv"), found, eager, exact, strict=True):
        assert_matches(*three, name=name)


def test_a_row_without_a_key_among_more_keys_than_one_block():
    """The row takes its gradients from log-sum-exp, which is -inf: they are zero, and spoil nobody's."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 64, generator=generator) for n in (5, 600, 600))
    mask = torch.rand(1, 1, 5, 600, generator=generator) < 0.5
    mask[0, 0, 2] = False

    def gradients(dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]
        return torch.autograd.grad(ops.attention(*leaves, attn_mask=mask).sum(), leaves)

    with only("native"):
        found = gradients(torch.float32)
    assert torch.equal(found[0][:, :, 2], torch.zeros(1, 2, 64))
    with only("reference"):
        eager, exact = gradients(torch.float32), gradients(torch.float64)
    for name, *three in zip(("dq", "dk", "dv"), found, eager, exact, strict=True):
        assert_matches(*three, name=name)


# The rows of these are many enough for every kernel of the native operator.
LONG = Case(batch=1, heads=2, seqlen_q=330, seqlen_k=600, head_dim=64)


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"window": (90, 37)}], ids=str)
def test_the_number_of_threads_changes_no_bit_of_long_sequences(arguments):
    case = replace(LONG, **arguments)
    inputs = build(case)
    inputs.key[0, 0, 500, 3] = float("inf")
    first = run(replace(case, threads=1), inputs, "native")
    for threads in (2, 3, 7):
        found = run(replace(case, threads=threads), inputs, "native")
        for name in ("output", "lse"):
            assert torch.equal(found[name].nan_to_num(), first[name].nan_to_num()), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES["native"], ids=str)
@pytest.mark.parametrize(
    ("window", "key", "rows"), [((-1, 5), 150, slice(128)), ((5, -1), 85, slice(96, None))]
)
def test_nan_in_a_key_beyond_the_window_stays_there(window, key, rows, dtype, isa):
    """Rows that no kernel takes together with a row that attends the key."""
    heads = 8  # enough that a task has all rows of one
    query, keys, value = torch.randn(3, 1, heads, 200, 64).to(dtype).unbind()
    value[0, :, key] = float("nan")
    with machine(Case(isa=isa, threads=1)), only("native"):
        result = ops.attention(query, keys, value, window_size=window)
    assert result[0, :, rows].isfinite().all()
    assert result[0, :, key].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scales", [(2.0**-100, 2.0**100, 1.0), (1.0, 1.0, 2.0**-120)], ids=str)
def test_tiny_numbers_keep_their_precision(scales, isa):
    tensors = [x * scale for x, scale in zip(torch.randn(3, 1, 2, 300, 64), scales, strict=True)]
    with machine(Case(isa=isa)), only("native"):
        result = ops.attention(*tensors)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in tensors))
    eager = torch.nn.functional.scaled_dot_product_attention(*tensors)
    scale = scales[2]
    assert_matches(result / scale, eager / scale, exact / scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_value_stays_in_its_column(value, isa):
    query, keys, values = torch.randn(3, 1, 2, 300, 64).unbind()
    values[0, 1, 7, 5] = value
    with machine(Case(isa=isa)), only("native"):
        result = ops.attention(query, keys, values)
    expected = torch.zeros_like(result)
    expected[0, 1, :, 5] = value
    assert torch.equal(
        result.where(~result.isfinite(), 0.0).nan_to_num(2.0), expected.nan_to_num(2.0)
    )


@pytest.mark.parametrize("isa", ISAS)
def test_weights_below_the_normal_range_vanish(isa):
    """Scores that lie a hundred apart: weights from 1 down to 2^-150 and below."""
    query, key, value = torch.randn(3, 1, 2, 300, 64).unbind()
    query *= 30
    with machine(Case(isa=isa)), only("native"):
        result = ops.attention(query, key, value)
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(query.double(), key.double(), value.double())
    assert_matches(result, attend(query, key, value), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rise", [0.05, -0.05])
def test_scores_that_rise_or_fall_from_key_to_key(rise, isa):
    """A key outweighs those of the block before it by far more than a weight can hold, or the other way round."""
    query, key, value = torch.randn(3, 2, 2, 600, 64)
    key = 0.1 * key + (rise * torch.arange(600.0))[:, None]
    query, key, value = ((0.1 * query + 1).bfloat16(), key.bfloat16(), value.bfloat16())
    with machine(Case(isa=isa)), only("native"):
        result, lse = ops.attention_with_lse(query, key, value)
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(query.double(), key.double(), value.double())
    assert_matches(result, attend(query, key, value), exact)
    scores = [query.to(dtype) @ key.to(dtype).mT / 8 for dtype in (torch.float32, torch.float64)]
    eager, exact = (x.logsumexp(-1) for x in scores)
    # Exponentials that are stored in 16 bits are good to 4e-6, and so is their sum.
    assert_matches(lse, eager, exact, name="lse", rounding=torch.full_like(exact, 2e-6))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [(100, 37), (40, 90), (300, 0), (0, 200)], ids=str)
def test_windows_across_blocks_of_keys(window, isa):
    """Rows that meet one block of keys only, beside rows of the same task that meet two."""
    heads = 8  # enough that tasks have many rows
    query, key, value = torch.randn(3, 1, heads, 1100, 64).bfloat16()
    i, j = torch.arange(1100)[:, None], torch.arange(1100)
    mask = (j >= i - window[0]) & (j <= i + window[1])
    with machine(Case(isa=isa, threads=1)), only("native"):
        result = ops.attention(query, key, value, window_size=window)
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(query.double(), key.double(), value.double(), attn_mask=mask)
    assert_matches(result, attend(query, key, value, attn_mask=mask), exact)
