"""Attention dropout: the mask that each kernel draws, recovered from its results, is the one of the specification."""

from __future__ import annotations

import math

import pytest
import torch

import ctxfast
from ctxfast import ops
from ctxfast.reference.dropout import dropout_mask, dropout_scale, dropout_threshold
from tests.ops.attention_cases import BACKENDS, Case, build, machine, offsets
from tests.ops.implementations import only

SEEDS = (0, 1, 2**31, 2**32 + 5, 2**63 - 1, -1, -(2**63))
P = 0.3


def specified(seed, p, batch, heads, seqlen_q, seqlen_k):
    """The kept weights, bool [B, H, Sq, Sk]."""
    b, h, i, j = (torch.arange(n) for n in (batch, heads, seqlen_q, seqlen_k))
    return dropout_mask(
        torch.tensor([seed]),
        p,
        i=i[:, None],
        j=j,
        head=h[:, None, None],
        sequence=b[:, None, None, None],
    )


def probe(seqlen_k, first, width):
    """Values [S, width] of which row first + d is 1 in column d: the output holds those weights themselves."""
    return torch.eye(max(seqlen_k, first + width))[:seqlen_k, first : first + width]


def forward_mask(seed, p, batch, heads, seqlen_q, seqlen_k, width=64, **arguments):
    """Kept weights, read off the outputs for one-hot values. Scores are 0, so that all weights are alike."""
    q, k = torch.zeros(batch, heads, seqlen_q, width), torch.zeros(batch, heads, seqlen_k, width)
    found = []
    for first in range(0, seqlen_k, width):
        value = probe(seqlen_k, first, width).expand(batch, heads, -1, -1)
        found.append(
            ops.attention(q, k, value, dropout_p=p, seed=torch.tensor([seed]), **arguments)
        )
    weights = torch.cat(found, -1)[..., :seqlen_k]
    if not arguments:
        kept = weights[weights != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, dropout_scale(p) / seqlen_k))
    return weights != 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_forward_mask(backend, seed):
    sizes = (2, 3, 5, 130)
    with only(backend):
        assert torch.equal(forward_mask(seed, P, *sizes), specified(seed, P, *sizes))


@pytest.mark.parametrize("p", [1e-6, 2**-16, 0.1, 0.5, 0.999, 1 - 2**-16, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds(backend, p):
    sizes = (1, 2, 40, 130)
    with only(backend):
        assert torch.equal(forward_mask(7, p, *sizes), specified(7, p, *sizes))


@pytest.mark.parametrize("seqlen_k", [1, 7, 8, 9, 63, 64, 65, 127, 129, 200, 513])
def test_native_mask_at_every_block_boundary(seqlen_k):
    sizes = (1, 1, 27, seqlen_k)
    for isa in ("baseline", "avx2", "avx512", "avx512_bf16", "amx"):
        with machine(Case(isa=isa)), only("native"):
            assert torch.equal(forward_mask(3, P, *sizes), specified(3, P, *sizes)), isa


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_blocks_do_not_shift_the_mask(backend):
    sizes = (1, 2, 140, 140)
    i, j = torch.arange(140)[:, None], torch.arange(140)
    with only(backend):
        causal = forward_mask(5, P, *sizes, is_causal=True)
        window = forward_mask(5, P, *sizes, window_size=(3, 20))
        padded = forward_mask(5, P, *sizes, key_padding_mask=(j >= 70)[None])
    kept = specified(5, P, *sizes)
    assert torch.equal(causal, kept & (j <= i))
    assert torch.equal(window, kept & (j >= i - 3) & (j <= i + 20))
    assert torch.equal(padded, kept & (j >= 70))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_draws_the_mask_of_the_forward(backend):
    """dV for one-hot output gradients is the dropped weights; the sign of the bias gradient tells kept from dropped."""
    batch, heads, rows, columns, width = 2, 2, 64, 130, 64
    q, k = torch.zeros(batch, heads, rows, width), torch.zeros(batch, heads, columns, width)
    value = torch.ones(batch, heads, columns, width, requires_grad=True)
    bias = torch.zeros(batch, heads, rows, columns, requires_grad=True)
    with only(backend):
        output = ops.attention(q, k, value, bias=bias, dropout_p=P, seed=torch.tensor([11]))
        one_hot = torch.eye(rows, width).expand(batch, heads, -1, -1)
        dvalue, dbias = torch.autograd.grad(output, (value, bias), one_hot)
    kept = specified(11, P, batch, heads, rows, columns)
    assert torch.equal(dvalue.mT != 0, kept)
    # dbias = W * (factor - sum of the factors over the row): positive exactly at kept weights.
    assert torch.equal(dbias > 0, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_draws_the_mask_of_padded(backend):
    lengths, heads, width = (70, 0, 5, 130), 2, 64
    sizes = (len(lengths), heads, max(lengths), max(lengths))
    packed = ctxfast.PackedBatch.from_lengths(lengths)
    weights = []
    with only(backend):
        for first in range(0, max(lengths), width):
            value = packed.pack(probe(max(lengths), first, width).expand(len(lengths), -1, -1))
            value = value[:, None].expand(-1, heads, -1)
            zeros = torch.zeros_like(value)
            found = ops.attention_varlen(
                zeros,
                zeros,
                value,
                cu_seqlens_q=packed.cu_seqlens,
                cu_seqlens_k=packed.cu_seqlens,
                max_seqlen_q=packed.max_seqlen,
                max_seqlen_k=packed.max_seqlen,
                dropout_p=P,
                seed=torch.tensor([21]),
            )
            weights.append(found)
    kept = specified(21, P, *sizes)
    found = torch.cat(weights, -1)[..., : max(lengths)] != 0  # [T, H, Sk]
    for b, n in enumerate(lengths):
        rows = found[packed.cu_seqlens[b] : packed.cu_seqlens[b + 1]].transpose(0, 1)
        assert torch.equal(rows[..., :n], kept[b, :, :n, :n])


def test_every_dtype_draws_the_same_mask():
    inputs = build(Case(batch=1, seqlen_q=20, seqlen_k=64, head_dim=64))
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        value = torch.eye(64, dtype=dtype).expand(1, 2, -1, -1)
        tensors = (inputs.query.to(dtype), inputs.key.to(dtype), value)
        with only("native"):
            results.append(ops.attention(*tensors, dropout_p=P, seed=torch.tensor([2])) != 0)
    for mask in results:
        assert torch.equal(mask, specified(2, P, 1, 2, 20, 64))


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5, 0.9])
def test_keep_rate_is_binomial_in_every_head_and_row(p):
    sizes = (2, 4, 128, 512)
    with only("native"):
        mask = forward_mask(42, p, *sizes, width=256).double()
    keep = 1 - dropout_threshold(p) / 65536
    for dims, parts in (((0, 1, 2, 3), 1), ((0, 2, 3), 4), ((3,), 1024)):
        count = mask.numel() / parts
        z = (mask.mean(dims) - keep) / math.sqrt(keep * (1 - keep) / count)
        # Largest of `parts` normal deviates, and their chi-squared statistic, each at about one in 10^6.
        assert z.abs().max() < 5.0 + 0.4 * math.log10(parts), dims
        assert abs(z.square().sum() - parts) < 5 * math.sqrt(2 * parts) + 20, dims


@pytest.mark.parametrize("shift", [1, 2, 7, 8, 9, 56, 63, 64, 65])
def test_columns_at_a_distance_are_independent(shift):
    with only("native"):
        mask = forward_mask(42, 0.5, 2, 4, 128, 512, width=256).double() * 2 - 1
    correlation = (mask[..., shift:] * mask[..., :-shift]).mean().item()
    assert abs(correlation) < 5 / math.sqrt(mask[..., shift:].numel())


def test_rows_heads_sequences_and_seeds_are_independent():
    with only("native"):
        mask = forward_mask(42, 0.5, 3, 4, 128, 256, width=256).double() * 2 - 1
        other = forward_mask(43, 0.5, 3, 4, 128, 256, width=256).double() * 2 - 1
    pairs = {
        "rows": (mask[:, :, 1:], mask[:, :, :-1]),
        "heads": (mask[:, 1:], mask[:, :-1]),
        "sequences": (mask[1:], mask[:-1]),
        "seeds": (mask, other),
        "transposed": (mask[..., :128].mT, mask[..., :128]),
    }
    for name, (a, b) in pairs.items():
        diagonal = 128 if name == "transposed" else 0  # entries that are compared with themselves
        correlation = ((a * b).sum().item() - 12 * diagonal) / a.numel()
        assert abs(correlation) < 5 / math.sqrt(a.numel() / (2 if diagonal else 1)), name


def test_the_mean_over_seeds_is_the_output_without_dropout():
    inputs = build(Case(batch=1, heads=1, seqlen_q=8, seqlen_k=20, head_dim=4))
    tensors = (inputs.query, inputs.key, inputs.value)
    draws = 2000
    with only("native"):
        plain = ops.attention(*tensors)
        dropped = torch.stack(
            [ops.attention(*tensors, dropout_p=P, seed=torch.tensor([n])) for n in range(draws)]
        )
    deviation = dropped.std(0) / math.sqrt(draws)
    assert ((dropped.mean(0) - plain).abs() < 5 * deviation).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_dropped_is_zero(backend):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 5, 8).unbind())
    with only(backend):
        output = ops.attention(q, k, v, dropout_p=1.0)
        gradients = torch.autograd.grad(output.sum(), (q, k, v))
    for x in (output, *gradients):
        assert (x == 0).all()


def test_default_seed_follows_torchs_generator():
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append([ops.attention(q, k, v, dropout_p=0.5) for _ in range(2)])
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_no_dropout_draws_nothing_from_the_generator():
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    before = torch.get_rng_state()
    ops.attention(q, k, v)
    cu = offsets((5,))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    ops.attention_varlen(*packed, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_operator_draws_the_same_mask():
    sizes = (2, 3, 5, 70)
    zeros_q, zeros_k = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 70, 4)
    weights = ops.attention_weights(zeros_q, zeros_k, dropout_p=P, seed=torch.tensor([9]))
    assert torch.equal(weights != 0, specified(9, P, *sizes))
