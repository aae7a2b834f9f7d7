"""Packed attention: against float64 and against the padded operator; empty sequences, tails and offsets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ctxfast
from ctxfast import ops
from tests.ops.attention_cases import (
    BACKENDS,
    DTYPES,
    ISAS,
    Case,
    build,
    check,
    lay_out,
    offsets,
    run,
)
from tests.ops.implementations import only

LENGTHS = (5, 0, 17, 1, 33)
OTHER = (7, 4, 0, 1, 40)

FEATURES = {
    "self": Case(lengths_q=LENGTHS, lengths_k=LENGTHS),
    "cross": Case(lengths_q=LENGTHS, lengths_k=OTHER),
    "one sequence": Case(lengths_q=(20,), lengths_k=(9,)),
    "one token each": Case(lengths_q=(1,) * 7, lengths_k=(1,) * 7),
    "all empty": Case(lengths_q=(0, 0), lengths_k=(0, 0), tail=3),
    "no keys": Case(lengths_q=(3, 2), lengths_k=(0, 0)),
    "tail": Case(lengths_q=LENGTHS, lengths_k=OTHER, tail=11),
    "terminal offsets": Case(lengths_q=(9, 3, 0, 0, 0), lengths_k=(9, 3, 0, 0, 0), tail=4),
    "slack": Case(lengths_q=LENGTHS, lengths_k=OTHER, slack=100, bias=(0, 1, 1, 1)),
    "causal": Case(lengths_q=LENGTHS, lengths_k=OTHER, is_causal=True),
    "window": Case(lengths_q=LENGTHS, lengths_k=LENGTHS, window=(3, 4)),
    "own bias": Case(lengths_q=LENGTHS, lengths_k=OTHER, bias=(1, 1, 1, 1)),
    "bias of keys": Case(lengths_q=LENGTHS, lengths_k=OTHER, bias=(1, 0, 0, 1)),
    "bias of rows": Case(lengths_q=LENGTHS, lengths_k=OTHER, bias=(0, 0, 1, 0)),
    "one number": Case(lengths_q=LENGTHS, lengths_k=OTHER, bias=(0, 0, 0, 0)),
    "dropout": Case(lengths_q=(70, 5, 130), lengths_k=(70, 5, 130), dropout_p=0.17),
    "everything": Case(
        lengths_q=(12, 0, 66, 3),
        lengths_k=(70, 5, 0, 33),
        tail=5,
        slack=9,
        bias=(0, 1, 1, 1),
        bias_kind="infinite",
        is_causal=True,
        window=(40, -1),
        dropout_p=0.25,
        memory="fused",
        grad_memory="transposed",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FEATURES)
def test_matches_float64(name, backend):
    for dtype in DTYPES[backend] if backend != "triton" else DTYPES[backend][:1]:
        check(replace(FEATURES[name], dtype=dtype), backend)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_matches_float64(isa):
    for dtype in DTYPES["native"]:
        check(replace(FEATURES["everything"], isa=isa, dtype=dtype, head_dim=37), "native")


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_tile_boundaries(backend):
    lengths = (15, 16, 17, 63, 64, 65, 127, 128, 129, 1, 0, 2)
    case = Case(
        heads=1, head_dim=8, lengths_q=lengths, lengths_k=lengths[::-1], tail=1, dropout_p=0.1
    )
    check(case, backend)
    check(replace(case, lengths_k=lengths, is_causal=True, bias=(0, 0, 1, 1)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "arguments", [{}, {"is_causal": True}, {"window": (9, 2)}, {"bias": (0, 1, 1, 1)}]
)
def test_packed_equals_padded(backend, arguments):
    """The same sequences with right padding: outputs, lse and gradients at valid tokens, dropout included."""
    lengths = (40, 0, 7, 66)
    packed = ctxfast.PackedBatch.from_lengths(lengths, seq_len=66)
    case = Case(batch=4, seqlen_q=66, seqlen_k=66, dropout_p=0.2, lse_grad=False, **arguments)
    inputs = build(case)
    inputs.arguments["key_padding_mask"] = torch.arange(66) < torch.tensor(lengths)[:, None]
    keep = inputs.arguments["key_padding_mask"][:, None, :, None]
    inputs.grad_output = inputs.grad_output.where(keep, 0.0)
    padded = run(case, inputs, backend)

    def pack(x):  # [B, H, S, D] -> [T, H, D]
        return packed.pack(x.transpose(1, 2))

    inputs.query, inputs.key, inputs.value = map(pack, (inputs.query, inputs.key, inputs.value))
    inputs.grad_output = pack(inputs.grad_output)
    for name in ("key_padding_mask", "attn_mask"):
        inputs.arguments.pop(name, None)
    cu, longest = packed.cu_seqlens, packed.max_seqlen
    if inputs.bias is not None:
        inputs.bias = torch.nn.functional.pad(inputs.bias, (0, longest - 66, 0, longest - 66))
    inputs.arguments |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    inputs.arguments |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    found = run(replace(case, lengths_q=lengths, lengths_k=lengths), inputs, backend)
    for name in ("output", "dquery", "dkey", "dvalue"):
        torch.testing.assert_close(found[name], pack(padded[name]), msg=name)
    lse = torch.cat([padded["lse"][b, :, :n] for b, n in enumerate(lengths)], 1)
    torch.testing.assert_close(found["lse"], lse)
    if "bias" in arguments:
        torch.testing.assert_close(found["dbias"][..., :66, :66], padded["dbias"])
        assert (found["dbias"][..., 66:, :] == 0).all() and (found["dbias"][..., 66:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tail_rows_are_zero_whatever_they_hold(backend):
    case = Case(lengths_q=(20, 3), lengths_k=(9, 30), tail=50, bias=(1, 1, 1, 1))
    inputs = build(case)  # the tails hold NaN
    results = run(case, inputs, backend)
    starts = {"output": 23, "dquery": 23, "dkey": 39, "dvalue": 39}
    for name, start in starts.items():
        assert (results[name][start:] == 0).all() and results[name].isfinite().all(), name
    assert (results["lse"][:, 23:] == -torch.inf).all()
    assert results["dbias"].isfinite().all()
    for name in ("query", "key", "value", "grad_output"):
        setattr(inputs, name, getattr(inputs, name).nan_to_num(1e30))
    for name, x in run(case, inputs, backend).items():
        assert torch.equal(x, results[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_see_its_neighbours(backend):
    case = Case(lengths_q=(10, 20, 5), lengths_k=(10, 20, 5), dropout_p=0.1, lse_grad=False)
    inputs = build(case)
    before = run(case, inputs, backend)
    for x in (inputs.query, inputs.key, inputs.value, inputs.grad_output):
        x[:10], x[30:] = float("nan"), 1e30
    after = run(case, inputs, backend)
    for name in ("output", "dquery", "dkey", "dvalue"):
        assert torch.equal(before[name][10:30], after[name][10:30]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["transposed", "columns", "gaps", "fused"])
def test_strides_change_no_bit(memory, backend):
    case = Case(lengths_q=(18, 33), lengths_k=(18, 33), head_dim=24, dropout_p=0.1)
    inputs = build(case)
    plain = run(case, inputs, backend)
    for name in ("query", "key", "value", "grad_output"):
        setattr(inputs, name, lay_out(getattr(inputs, name), memory))
    for name, x in run(case, inputs, backend).items():
        assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_bias_gradient_of_every_broadcast_shape(backend):
    for bits in range(0, 16, 5 if backend == "triton" else 1):
        bias = tuple(bits >> k & 1 for k in range(4))
        check(Case(heads=3, lengths_q=(5, 0, 9), lengths_k=(2, 6, 11), bias=bias, tail=2), backend)


def test_gradcheck_of_the_native_kernels():
    cu_q, cu_k = offsets((2, 0, 3)), offsets((3, 1, 2))
    leaves = [torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (6, 7, 7)]
    leaves.append(torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True))

    def function(q, k, v, bias):
        output, lse = ops.attention_varlen_with_lse(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=3,
            max_seqlen_k=3,
            bias=bias,
            dropout_p=0.3,
            seed=torch.tensor([4]),
        )
        return output, lse[
            :, :5
        ]  # past the last offset lse is -inf, which has no finite difference

    with only("native"):
        assert torch.autograd.gradcheck(function, leaves)


BAD_OFFSETS = {
    "falling": (0, 5, 3, 9),
    "not from zero": (1, 3, 5, 9),
    "negative": (0, -1, 5, 9),
    "beyond the rows": (0, 3, 5, 11),
    "longer than stated": (0, 1, 8, 9),
}


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("kind", BAD_OFFSETS)
def test_bad_offsets_are_refused(kind, side):
    x = torch.randn(10, 2, 4)
    good, bad = offsets((3, 3, 3)), torch.tensor(BAD_OFFSETS[kind], dtype=torch.int32)
    arguments = {"cu_seqlens_q": good, "cu_seqlens_k": good, f"cu_seqlens_{side}": bad}
    with pytest.raises(ValueError, match=f"attention_varlen: cu_seqlens_{side} must rise from 0"):
        ops.attention_varlen(x, x, x, **arguments, max_seqlen_q=6, max_seqlen_k=6)


def test_offsets_may_be_slices_of_a_larger_tensor():
    """Strided, unaligned and shared offsets."""
    x = torch.randn(9, 2, 4)
    cu = offsets((4, 2, 3))
    expected = ops.attention_varlen(
        x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=4, max_seqlen_k=4
    )
    strided = torch.stack([cu, cu + 99], 1)[:, 0]
    with only("native"):
        result = ops.attention_varlen(
            x, x, x, cu_seqlens_q=strided, cu_seqlens_k=cu, max_seqlen_q=4, max_seqlen_k=4
        )
    assert torch.equal(result, expected)
