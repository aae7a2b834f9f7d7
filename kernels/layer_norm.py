"""Layer normalisation (Ba et al., 2016) fused with the sum that it normalises.

    x = dropout(input) + residual,  or  x = word + token type + position embedding
    output = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

One program holds one row in registers; mean and variance are taken in float32, the variance around the mean.
"""

import triton
import triton.language as tl

from .lib import keep_mask, round_to

HIDDEN_HEAD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _normalise_and_store(
    x, inside, output_ptr, weight_ptr, bias_ptr, eps, BLOCK_N: tl.constexpr, N: tl.constexpr
):
    n = tl.arange(0, BLOCK_N)
    mean = tl.sum(x, 0) / N
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / N
    weight = tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    output = centred * (1.0 / tl.sqrt(variance + eps)) * weight + bias
    tl.store(output_ptr + n, round_to(output, output_ptr.dtype.element_ty), mask=inside)


@triton.jit
def drop(
    x, row, seed_ptr, sequence_ptr, position_ptr, threshold, keep_scale, BLOCK_N: tl.constexpr
):
    """Hidden dropout of one row of features, x float32 [BLOCK_N], BLOCK_N a multiple of 64."""
    position = tl.load(position_ptr + row + tl.arange(0, 1))
    sequence = tl.load(sequence_ptr + row)
    limit = (threshold << 16).to(tl.uint32)
    start = tl.program_id(0) * 0
    keep = keep_mask(position, start, HIDDEN_HEAD, sequence, tl.load(seed_ptr), limit, 1, BLOCK_N)
    keep = tl.reshape(keep, [BLOCK_N]) & (keep_scale > 0.0)  # a scale of 0 keeps nothing
    return tl.where(keep, x * keep_scale, 0.0)


@triton.jit
def load_sum(
    input_ptr,
    residual_ptr,
    row,
    stride_input,
    stride_residual,
    seed_ptr,
    sequence_ptr,
    position_ptr,
    threshold,
    keep_scale,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """dropout(input) + residual of one row, float32 [BLOCK_N]."""
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    x = tl.load(input_ptr + row * stride_input + n, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        x = drop(x, row, seed_ptr, sequence_ptr, position_ptr, threshold, keep_scale, BLOCK_N)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual + n, mask=inside, other=0.0)
        x += residual.to(tl.float32)
    return x


@triton.jit(do_not_specialize=["threshold"])
def add_layer_norm_fwd(
    input_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    stride_input,
    stride_residual,
    seed_ptr,
    sequence_ptr,
    position_ptr,
    threshold,
    keep_scale,
    eps,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Grid: one program a row of N features; rows of input and residual lie at their strides, output is contiguous.

    seed int64 [1], sequence and position int64 [rows]; threshold: the 16-bit dropout threshold; keep_scale: reciprocal
    of the realised keep probability, 0 where nothing is kept.
    """
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK_N) < N
    x = load_sum(
        input_ptr,
        residual_ptr,
        row,
        stride_input,
        stride_residual,
        seed_ptr,
        sequence_ptr,
        position_ptr,
        threshold,
        keep_scale,
        N,
        BLOCK_N,
        RESIDUAL,
        DROPOUT,
    )
    _normalise_and_store(x, inside, output_ptr + row * N, weight_ptr, bias_ptr, eps, BLOCK_N, N)


@triton.jit
def embedding(table_ptr, id_ptr, size, n, inside, N: tl.constexpr):
    index = tl.load(id_ptr).to(tl.int64)
    exists = (index >= 0) & (index < size)
    place = (
        table_ptr + tl.where(exists, index, 0) * N + n
    )  # row 0 stands in for a row that does not exist
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return x + tl.where(exists, 0.0, float("nan"))


@triton.jit
def embed_layer_norm_fwd(
    ids_ptr,
    type_ids_ptr,
    position_ids_ptr,
    word_ptr,
    type_ptr,
    position_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    words,
    types,
    positions,
    eps,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: one program a token. ids int64 [T]; tables contiguous, [rows, N]; output [T, N].

    An id outside its table reads nothing and gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    x = embedding(word_ptr, ids_ptr + row, words, n, inside, N)
    x += embedding(type_ptr, type_ids_ptr + row, types, n, inside, N)
    x += embedding(position_ptr, position_ids_ptr + row, positions, n, inside, N)
    _normalise_and_store(x, inside, output_ptr + row * N, weight_ptr, bias_ptr, eps, BLOCK_N, N)
