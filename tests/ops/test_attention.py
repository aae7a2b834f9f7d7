"""Padded attention, forward and every gradient: against float64 and torch's own operator."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from ctxfast import ops, reference
from tests.ops.attention_cases import (
    BACKENDS,
    DTYPES,
    ISAS,
    Case,
    build,
    check,
    lay_out,
    machine,
    run,
)
from tests.ops.implementations import only
from tests.oracle import assert_matches

DOUBLE = torch.float64

FEATURES = {
    "plain": Case(),
    "cross": Case(seqlen_q=5, seqlen_k=37),
    "prefix": Case(key_padding="prefix", seqlen_k=33),
    "left padding": Case(key_padding="left", seqlen_k=33),
    "holes": Case(key_padding="holes", seqlen_k=33),
    "empty sequence": Case(key_padding="empty", seqlen_k=33),
    "mask": Case(attn_mask=(1, 1, 1, 1)),
    "mask of rows": Case(attn_mask=(0, 0, 1, 0)),
    "mask of keys": Case(attn_mask=(1, 0, 0, 1), key_padding="holes"),
    "causal": Case(is_causal=True, seqlen_q=19, seqlen_k=23),
    "causal, more rows": Case(is_causal=True, seqlen_q=23, seqlen_k=19),
    "window": Case(window=(3, 5), seqlen_q=40, seqlen_k=40),
    "left window": Case(window=(4, -1), seqlen_q=40, seqlen_k=20),
    "right window": Case(window=(-1, 2), seqlen_q=20, seqlen_k=40),
    "diagonal": Case(window=(0, 0)),
    "causal window": Case(window=(6, 3), is_causal=True, seqlen_q=40, seqlen_k=40),
    "bias": Case(bias=(0, 1, 1, 1), key_padding="prefix"),
    "bias with -inf": Case(bias=(1, 0, 1, 1), bias_kind="infinite"),
    "bias without gradient": Case(bias=(0, 1, 1, 1), bias_grad=False),
    "dropout": Case(dropout_p=0.17, seqlen_k=130),
    "everything dropped": Case(dropout_p=1.0),
    "negative scale": Case(scale=-0.4),
    "large scores": Case(magnitude=6.0, seqlen_k=40),
    "no gradient of lse": Case(lse_grad=False),
    "everything": Case(
        key_padding="prefix",
        attn_mask=(1, 0, 1, 1),
        bias=(0, 1, 1, 1),
        is_causal=True,
        window=(9, -1),
        dropout_p=0.3,
        seqlen_q=34,
        seqlen_k=35,
        memory="fused",
        grad_memory="transposed",
    ),
}
# The interpreter is slow: half precision runs there through the head sizes and the fuzz.
PLACES = [(b, dtype) for b in BACKENDS for dtype in DTYPES[b][: 2 if b == "triton" else None]]


@pytest.mark.parametrize(("backend", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_matches_float64(name, backend, dtype):
    check(replace(FEATURES[name], dtype=dtype), backend)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES["native"], ids=str)
def test_every_instruction_set_matches_float64(isa, dtype):
    check(replace(FEATURES["everything"], isa=isa, dtype=dtype, head_dim=37), "native")


LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257)


@pytest.mark.parametrize("seqlen_k", LENGTHS)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_tile_boundaries(backend, seqlen_k):
    for seqlen_q in LENGTHS if backend == "native" else (1, 16, 65, 128):
        case = Case(
            batch=1, heads=1, head_dim=8, seqlen_q=seqlen_q, seqlen_k=seqlen_k, dropout_p=0.1
        )
        check(case, backend)
        if backend == "native":
            check(replace(case, heads=2, is_causal=True, bias=(0, 1, 1, 1)), backend)


@pytest.mark.parametrize(
    "head_dim", [1, 2, 3, 8, 17, 31, 40, 59, 64, 80, 96, 111, 127, 160, 255, 256]
)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_head_sizes(backend, head_dim):
    for dtype in DTYPES[backend][:2]:
        check(Case(head_dim=head_dim, seqlen_q=20, seqlen_k=35, dtype=dtype), backend)


def test_head_sizes_above_256_run_on_the_reference():
    q, k, v = torch.randn(3, 1, 2, 5, 300).unbind()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_matches(ops.attention(q, k, v), F.scaled_dot_product_attention(q, k, v), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_gradient_of_every_broadcast_shape(backend):
    shapes = list(product((0, 1), repeat=4))
    for bias in shapes[::3] if backend == "triton" else shapes:
        check(Case(heads=3, seqlen_q=5, seqlen_k=9, bias=bias, key_padding="prefix"), backend)


@pytest.mark.parametrize(
    "shape", [(), (1,), (9,), (5, 1), (5, 9), (3, 5, 9), (3, 1, 1), (1, 1, 1, 9)]
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bias_of_fewer_dimensions(backend, shape):
    q, k, v = (torch.randn(2, 3, n, 4, dtype=DOUBLE) for n in (5, 9, 9))
    ours, theirs = (
        x.requires_grad_() for x in torch.randn(1, *shape, dtype=DOUBLE).expand(2, *shape).clone()
    )
    with only(backend):
        result = ops.attention(q, k, v, bias=ours)
        gradient = torch.autograd.grad(result.square().sum(), ours)[0]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=theirs.expand(2, 3, 5, 9))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), theirs)[0])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 9), (1, 1, 7, 9), (2, 1, 1, 9), (3, 7, 1), (7, 9), (9,)]
)
def test_attn_mask_means_what_torch_means(shape, backend):
    q, k, v = (torch.randn(2, 3, n, 4, dtype=DOUBLE) for n in (7, 9, 9))
    # Floating masks: numbers, a row of -inf (attends nothing) and a row of the lowest number (attends all alike).
    added = torch.randn(shape, dtype=DOUBLE)
    lowest = torch.zeros(7, 9, dtype=DOUBLE)
    lowest[2], lowest[4] = -torch.inf, torch.finfo(DOUBLE).min
    for mask in (torch.rand(shape) < 0.5, added, lowest):
        expanded = mask.expand(2, 3, 7, 9)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=expanded, scale=0.7)
        with only(backend):
            torch.testing.assert_close(ops.attention(q, k, v, attn_mask=mask, scale=0.7), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_filled_with_the_lowest_number_attend_all_keys_alike(backend, dtype):
    """The masks that Hugging Face's models add: a padded row must not turn into NaN, nor into zero."""
    q, k, v = (torch.randn(1, 2, n, 8).to(dtype) for n in (5, 20, 20))
    mask = torch.zeros(1, 1, 5, 20, dtype=dtype)
    mask[..., 3, :] = mask[..., 1, 7:] = torch.finfo(dtype).min
    with only(backend):
        result = ops.attention(q, k, v, attn_mask=mask)
    eager = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask.double()
    )
    assert_matches(result, eager, exact)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("seqlen_k", [3, 7, 12])
def test_causal_is_aligned_top_left_as_in_torch(seqlen_k, backend):
    q, k, v = (torch.randn(2, 3, n, 4, dtype=DOUBLE) for n in (7, seqlen_k, seqlen_k))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with only(backend):
        torch.testing.assert_close(ops.attention(q, k, v, is_causal=True), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mask", "padding", "window"])
def test_rows_without_a_key_are_exactly_zero(kind, backend):
    case = Case(seqlen_q=70, seqlen_k=66, bias=(1, 1, 1, 1), dropout_p=0.2)
    if kind == "window":  # rows from 68 on see nothing
        case = replace(case, window=(2, -1))
        rows = torch.arange(70) > 67
    else:
        rows = torch.ones(70, dtype=torch.bool)
    inputs = build(case)
    if kind == "mask":
        inputs.arguments["attn_mask"] = torch.tensor([False, True])[:, None, None, None]
    if kind == "padding":
        inputs.arguments["key_padding_mask"] = torch.tensor([False, True])[:, None].expand(2, 66)
    results = run(case, inputs, backend)
    empty = slice(None) if kind == "window" else slice(0, 1)
    assert (results["output"][empty][:, :, rows] == 0).all()
    assert (results["lse"][empty][:, :, rows] == -torch.inf).all()
    assert (results["dquery"][empty][:, :, rows] == 0).all()
    assert (results["dbias"][empty][:, :, rows] == 0).all()
    if kind != "window":
        assert (results["dkey"][0] == 0).all() and (results["dvalue"][0] == 0).all()
    for name, x in results.items():
        assert name == "lse" or x.isfinite().all()
        assert (x[1, :, :60] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["prefix", "left", "holes"])
def test_what_lies_at_masked_keys_changes_no_bit(padding, backend):
    case = Case(key_padding=padding, seqlen_q=9, seqlen_k=70, bias=(0, 1, 1, 1))
    inputs = build(case)
    poisoned = run(case, inputs, backend)  # `build` put NaN there
    for filling in (0.0, float("inf"), 1e30):
        inputs.key, inputs.value = (x.nan_to_num(filling) for x in (inputs.key, inputs.value))
        for name, x in run(case, inputs, backend).items():
            assert torch.equal(x, poisoned[name]), name
        inputs = build(case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_in_valid_input_reaches_what_reads_it_and_nothing_else(name, backend):
    inputs = build(Case(seqlen_q=8, seqlen_k=6, head_dim=4))
    tensors = {n: getattr(inputs, n).clone() for n in ("query", "key", "value")}
    tensors[name][1, 0, 3, 2] = float("nan")
    with only(backend):
        result = ops.attention(*tensors.values()).isnan()
    expected = torch.zeros_like(result)
    head = expected[1, 0]  # [Sq, D]
    {"query": head[3], "key": head, "value": head[:, 2]}[name].fill_(True)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["transposed", "columns", "gaps", "fused"])
def test_strides_change_no_bit(memory, backend):
    case = Case(seqlen_q=18, seqlen_k=33, head_dim=24, dropout_p=0.1, bias=(0, 1, 1, 1))
    inputs = build(case)
    plain = run(case, inputs, backend)
    for name in ("query", "key", "value"):
        setattr(inputs, name, lay_out(getattr(inputs, name), memory))
    inputs.bias = lay_out(inputs.bias, memory)
    inputs.grad_output = lay_out(inputs.grad_output, memory)
    for name, x in run(case, inputs, backend).items():
        assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    for dtype in DTYPES[backend][:2]:
        inputs = build(Case(seqlen_q=5, seqlen_k=40, dtype=dtype, magnitude=100.0))
        tensors = (inputs.query, inputs.key, inputs.value)
        with only(backend):
            result, lse = ops.attention_with_lse(*tensors)
        exact = F.scaled_dot_product_attention(*(x.double() for x in tensors))
        assert result.isfinite().all() and lse.isfinite().all()
        assert_matches(result, reference.attention(*tensors), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["query", "key", "value", "bias"])
def test_gradient_of_a_single_input(wanted, backend):
    case = Case(bias=(0, 1, 1, 1))
    inputs = build(case)
    expected = run(case, inputs, backend)[f"d{wanted}"]
    tensors = {n: getattr(inputs, n).clone() for n in ("query", "key", "value", "bias")}
    tensors[wanted].requires_grad_()
    with machine(case), only(backend):
        outputs = ops.attention_with_lse(**tensors)
        gradient = torch.autograd.grad(
            outputs, tensors[wanted], (inputs.grad_output, inputs.grad_lse)
        )[0]
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bias_keeps_its_dtype_and_gets_its_gradient_in_it(backend):
    q, k, v = torch.randn(3, 2, 2, 6, 8).bfloat16().unbind()
    bias = torch.randn(2, 6, 6, requires_grad=True)
    with only(backend):
        result = ops.attention(q, k, v, bias=bias)
        gradient = torch.autograd.grad(result.float().square().sum(), bias)[0]
        other = ops.attention(q, k, v, attn_mask=bias)
    assert result.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    assert gradient.shape == bias.shape and torch.equal(result, other)


def test_a_floating_mask_and_a_bias_add_up():
    q, k, v = torch.randn(3, 1, 2, 6, 8, dtype=DOUBLE).unbind()
    mask, bias = torch.randn(6, 6, dtype=DOUBLE), torch.randn(2, 1, 6, dtype=DOUBLE)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask + bias)
    torch.testing.assert_close(ops.attention(q, k, v, attn_mask=mask, bias=bias), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True, "window_size": (2, -1)},
        {"dropout_p": 0.4, "seed": torch.tensor([9])},
        {"key_padding_mask": torch.tensor([[True, False, True, True], [True, True, False, False]])},
    ],
    ids=["plain", "causal window", "dropout", "padding"],
)
@pytest.mark.parametrize("bias_shape", [(1, 2, 3, 4), (2, 1, 1, 4), (1, 2, 3, 1)])
def test_gradcheck_of_the_native_kernels(arguments, bias_shape):
    leaves = [torch.randn(2, 2, n, 3, dtype=DOUBLE, requires_grad=True) for n in (3, 4, 4)]
    leaves.append(torch.randn(bias_shape, dtype=DOUBLE, requires_grad=True))
    with only("native"):
        assert torch.autograd.gradcheck(
            lambda q, k, v, bias: ops.attention_with_lse(q, k, v, bias=bias, **arguments), leaves
        )


def test_weights_times_values_is_the_output():
    inputs = build(Case(key_padding="holes", dropout_p=0.3, dtype=DOUBLE, bias=(0, 1, 1, 1)))
    value = inputs.value.nan_to_num(0.0)
    arguments = dict(inputs.arguments, bias=inputs.bias)
    weights = ops.attention_weights(inputs.query, inputs.key, **arguments)
    with only("native"):
        result = ops.attention(inputs.query, inputs.key, inputs.value, **arguments)
    torch.testing.assert_close(weights @ value, result)
