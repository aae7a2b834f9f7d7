"""Bad arguments of the attention operators: one sentence that names the argument, what is expected and what came."""

from __future__ import annotations

import re

import pytest
import torch

from ctxfast import ops
from tests.ops.attention_cases import offsets

Q, K = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 6, 4)
P = torch.zeros(9, 2, 4)
CU = offsets((4, 5))
PACKED = {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 5, "max_seqlen_k": 5}
META = torch.device("meta")


def ones(*shape, dtype=torch.bool, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


# Keyword arguments that both layouts share, with the error.
SHARED = [
    ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    ({"bias": ones(1)}, TypeError, "bias must be floating point, got torch.bool"),
    (
        {"bias": ones(1, dtype=torch.float32, device=META)},
        ValueError,
        "bias must be on cpu, got meta",
    ),
    ({"is_causal": "yes"}, TypeError, "is_causal must be True or False, got 'yes'"),
    ({"is_causal": None}, TypeError, "is_causal must be True or False, got None"),
    *(
        (
            {"window_size": window},
            ValueError,
            f"window_size must be two integers (left, right) of at least -1, got {window}",
        )
        for window in (3, (1,), (1, -2), (1.0, 2), (1, 2, 3), "ab")
    ),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1], got -0.1"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be in [0, 1], got 1.5"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in [0, 1], got nan"),
    ({"dropout_p": "x"}, TypeError, "dropout_p must be a number, got str"),
    ({"scale": "x"}, TypeError, "scale must be a number, got str"),
    ({"dropout_p": 0.1, "seed": 3}, TypeError, "seed must be a tensor, got int"),
    (
        {"dropout_p": 0.1, "seed": torch.tensor([3.0])},
        ValueError,
        "seed must be an int64 tensor [1] on cpu, got torch.float32 of shape (1,) on cpu",
    ),
    (
        {"dropout_p": 0.1, "seed": torch.tensor(3)},
        ValueError,
        "seed must be an int64 tensor [1] on cpu, got torch.int64 of shape () on cpu",
    ),
    (
        {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int64, device=META)},
        ValueError,
        "seed must be an int64 tensor [1] on cpu, got torch.int64 of shape (1,) on meta",
    ),
]
MASKS = [
    ({"attn_mask": [True]}, TypeError, "attn_mask must be a tensor, got list"),
    (
        {"attn_mask": ones(5, 6, dtype=torch.int32)},
        TypeError,
        "attn_mask must be floating point, got torch.int32",
    ),
    (
        {"attn_mask": ones(5, 5)},
        ValueError,
        "attn_mask must broadcast to (2, 3, 5, 6), got shape (5, 5)",
    ),
    (
        {"attn_mask": ones(5, 5, dtype=torch.float32)},
        ValueError,
        "attn_mask must broadcast to (2, 3, 5, 6), got shape (5, 5)",
    ),
    (
        {"attn_mask": ones(1, 1, 1, 5, 6)},
        ValueError,
        "attn_mask must broadcast to (2, 3, 5, 6), got shape (1, 1, 1, 5, 6)",
    ),
    ({"attn_mask": ones(5, 6, device=META)}, ValueError, "attn_mask must be on cpu, got meta"),
    (
        {"bias": ones(4, 6, dtype=torch.float32)},
        ValueError,
        "bias must broadcast to (2, 3, 5, 6), got shape (4, 6)",
    ),
    ({"key_padding_mask": [[True]]}, TypeError, "key_padding_mask must be a tensor, got list"),
    (
        {"key_padding_mask": ones(2, 6, dtype=torch.float32)},
        ValueError,
        "key_padding_mask must be bool (2, 6), got torch.float32 of shape (2, 6)",
    ),
    (
        {"key_padding_mask": ones(2, 5)},
        ValueError,
        "key_padding_mask must be bool (2, 6), got torch.bool of shape (2, 5)",
    ),
    (
        {"key_padding_mask": ones(2, 6, device=META)},
        ValueError,
        "key_padding_mask must be on cpu, got meta",
    ),
]
OFFSETS = [
    ({"cu_seqlens_q": [0, 4, 9]}, TypeError, "cu_seqlens_q must be a tensor, got list"),
    (
        {"cu_seqlens_k": CU.long()},
        ValueError,
        "cu_seqlens_k must be int32 [batch + 1], got torch.int64 of shape (3,)",
    ),
    (
        {"cu_seqlens_k": CU[None]},
        ValueError,
        "cu_seqlens_k must be int32 [batch + 1], got torch.int32 of shape (1, 3)",
    ),
    ({"cu_seqlens_q": CU.to(META)}, ValueError, "cu_seqlens_q must be on cpu, got meta"),
    (
        {"cu_seqlens_k": CU[:2]},
        ValueError,
        "cu_seqlens_q and cu_seqlens_k must both be [batch + 1], got shape (3,) and shape (2,)",
    ),
    (
        {"cu_seqlens_q": CU[:0], "cu_seqlens_k": CU[:0]},
        ValueError,
        "cu_seqlens_q and cu_seqlens_k must both be [batch + 1], got shape (0,) and shape (0,)",
    ),
    ({"max_seqlen_q": 5.0}, TypeError, "max_seqlen_q must be an integer, got float"),
    ({"max_seqlen_k": torch.tensor(5)}, TypeError, "max_seqlen_k must be an integer, got Tensor"),
    (
        {"bias": ones(4, 6, dtype=torch.float32)},
        ValueError,
        "bias must broadcast to (2, 2, 5, 5), got shape (4, 6)",
    ),
]


def raises(error, op, message):
    return pytest.raises(error, match=f"^{re.escape(f'{op}: {message}')}$")


@pytest.mark.parametrize(("arguments", "error", "message"), SHARED + MASKS, ids=str)
def test_arguments_of_padded_attention(arguments, error, message):
    for operator in (ops.attention, ops.attention_with_lse):
        with raises(error, "attention", message):
            operator(Q, K, K, **arguments)
    with raises(error, "attention_weights", message):
        ops.attention_weights(Q, K, **arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), SHARED + OFFSETS, ids=str)
def test_arguments_of_packed_attention(arguments, error, message):
    for operator in (ops.attention_varlen, ops.attention_varlen_with_lse):
        with raises(error, "attention_varlen", message):
            operator(P, P, P, **PACKED | arguments)


TENSORS = [
    (0, Q.numpy(), TypeError, "query must be a tensor, got ndarray"),
    (1, None, TypeError, "key must be a tensor, got NoneType"),
    (2, [1.0], TypeError, "value must be a tensor, got list"),
    (0, Q.long(), TypeError, "query must be floating point, got torch.int64"),
    (0, Q.to(torch.complex64), TypeError, "query must be floating point, got torch.complex64"),
    (
        1,
        K.double(),
        TypeError,
        "key must have the dtype of query, torch.float32, got torch.float64",
    ),
    (
        2,
        K.half(),
        TypeError,
        "value must have the dtype of query, torch.float32, got torch.float16",
    ),
    (1, K.to(META), ValueError, "key must be on the device of query, cpu, got meta"),
    (0, Q[0], ValueError, "query must be [batch, heads, sequence, head size], got shape (3, 5, 4)"),
    (1, K[0], ValueError, "key must be [batch, heads, sequence, head size], got shape (3, 6, 4)"),
    (
        2,
        K[:, :, :5],
        ValueError,
        "value must have the shape of key (2, 3, 6, 4), got shape (2, 3, 5, 4)",
    ),
    (
        0,
        Q[..., :0],
        ValueError,
        "query must have a head size of at least 1, got shape (2, 3, 5, 0)",
    ),
    (
        0,
        Q[:1],
        ValueError,
        "key must match query (1, 3, 5, 4) in batch, heads and head size, got shape (2, 3, 6, 4)",
    ),
    (
        0,
        Q[..., :3],
        ValueError,
        "key must match query (2, 3, 5, 3) in batch, heads and head size, got shape (2, 3, 6, 4)",
    ),
]


@pytest.mark.parametrize(
    ("place", "tensor", "error", "message"), TENSORS, ids=lambda x: str(x)[:60]
)
def test_tensors_of_padded_attention(place, tensor, error, message):
    tensors = [Q, K, K]
    tensors[place] = tensor
    with raises(error, "attention", message):
        ops.attention(*tensors)
    if place < 2:
        with raises(error, "attention_weights", message):
            ops.attention_weights(*tensors[:2])


def test_tensors_of_packed_attention():
    with raises(
        ValueError,
        "attention_varlen",
        "query must be [tokens, heads, head size], got shape (2, 3, 5, 4)",
    ):
        ops.attention_varlen(Q, P, P, **PACKED)
    message = "key must match query (9, 2, 4) in heads and head size, got shape (9, 1, 4)"
    with raises(ValueError, "attention_varlen", message):
        ops.attention_varlen(P, P[:, :1], P[:, :1], **PACKED)
    message = "cu_seqlens_k must rise from 0 to at most 8 by at most max_seqlen 5, got 4 and 9 for sequence 1"
    for backend in ("native", "reference"):
        with ops.use_backend(backend), raises(ValueError, "attention_varlen", message):
            ops.attention_varlen(P, P[:8], P[:8], **PACKED)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        ops.attention(Q, K, K, mask=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'key_padding_mask'"):
        ops.attention_varlen(P, P, P, **PACKED, key_padding_mask=None)


@pytest.mark.parametrize("backend", ["native", "reference", "triton"])
def test_empty_tensors_are_no_error(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    with ops.use_backend(backend):
        assert ops.attention(Q[:0], K[:0], K[:0]).shape == (0, 3, 5, 4)
        assert ops.attention(Q[:, :0], K[:, :0], K[:, :0]).shape == (2, 0, 5, 4)
        assert ops.attention(Q[:, :, :0], K, K).shape == (2, 3, 0, 4)
        output, lse = ops.attention_with_lse(Q, K[:, :, :0], K[:, :, :0])
        assert (output == 0).all() and (lse == -torch.inf).all()
        none = offsets(())
        arguments = PACKED | {"cu_seqlens_q": none, "cu_seqlens_k": none}
        assert (ops.attention_varlen(P + 1, P, P, **arguments) == 0).all()
