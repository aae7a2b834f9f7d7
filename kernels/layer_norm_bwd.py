"""Gradients of layer normalisation (Ba et al., 2016) and of the sum that it normalises.

    g = weight * grad,  n = (x - mean) / sqrt(var + eps):   dx = (g - mean(g) - n * mean(g * n)) / sqrt(var + eps)

The row is read and normalised again, so the forward keeps no statistics. Sums over rows have two stages in a fixed
order: every program adds a fixed range of rows in registers, `column_sum` adds the ranges. No atomics: the same bits
in every run. Tables add the rows of each id in the order of the tokens, which a stable sort has brought together.
"""

import triton
import triton.language as tl

from .layer_norm import drop, embedding, load_sum
from .lib import round_to


@triton.jit
def _row_gradients(x, grad, weight, inside, eps, N: tl.constexpr):
    """dx and the row's part of dweight, float32 [BLOCK_N]."""
    mean = tl.sum(x, 0) / N
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / N + eps)
    normalised = centred * rstd
    g = grad * weight
    projection = tl.sum(g * normalised, 0) / N
    return (g - tl.sum(g, 0) / N - normalised * projection) * rstd, grad * normalised


@triton.jit(do_not_specialize=["threshold", "rows", "rows_per_part", "parts"])
def add_layer_norm_bwd(
    grad_ptr,
    input_ptr,
    residual_ptr,
    weight_ptr,
    dinput_ptr,
    dresidual_ptr,
    partial_ptr,
    stride_grad,
    stride_input,
    stride_residual,
    seed_ptr,
    sequence_ptr,
    position_ptr,
    threshold,
    keep_scale,
    eps,
    rows,
    rows_per_part,
    parts,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Grid: parts, each of rows_per_part rows. partial float32 [2, parts, N]: dweight, dbias. dresidual or None."""
    part = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    weight = tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    first = part * rows_per_part
    for index in range(first, tl.minimum(first + rows_per_part, rows)):
        row = tl.cast(index, tl.int64)
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
        grad = tl.load(grad_ptr + row * stride_grad + n, mask=inside, other=0.0).to(tl.float32)
        dx, own = _row_gradients(x, grad, weight, inside, eps, N)
        dweight += own
        dbias += grad
        if DROPOUT:
            if RESIDUAL:
                dresidual = round_to(dx, dresidual_ptr.dtype.element_ty)
                tl.store(dresidual_ptr + row * N + n, dresidual, mask=inside)
            dx = drop(dx, row, seed_ptr, sequence_ptr, position_ptr, threshold, keep_scale, BLOCK_N)
        tl.store(dinput_ptr + row * N + n, round_to(dx, dinput_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + part * N + n, dweight, mask=inside)
    tl.store(partial_ptr + (parts + part) * N + n, dbias, mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_part", "parts"])
def embed_layer_norm_bwd(
    grad_ptr,
    ids_ptr,
    type_ids_ptr,
    position_ids_ptr,
    word_ptr,
    type_ptr,
    position_ptr,
    weight_ptr,
    dsum_ptr,
    partial_ptr,
    stride_grad,
    words,
    types,
    positions,
    eps,
    rows,
    rows_per_part,
    parts,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid and partial as `add_layer_norm_bwd`; dsum [rows, N] is the gradient of the sum of the three embeddings."""
    part = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    weight = tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    first = part * rows_per_part
    for index in range(first, tl.minimum(first + rows_per_part, rows)):
        row = tl.cast(index, tl.int64)
        x = embedding(word_ptr, ids_ptr + row, words, n, inside, N)
        x += embedding(type_ptr, type_ids_ptr + row, types, n, inside, N)
        x += embedding(position_ptr, position_ids_ptr + row, positions, n, inside, N)
        grad = tl.load(grad_ptr + row * stride_grad + n, mask=inside, other=0.0).to(tl.float32)
        dx, own = _row_gradients(x, grad, weight, inside, eps, N)
        dweight += own
        dbias += grad
        tl.store(dsum_ptr + row * N + n, dx, mask=inside)
    tl.store(partial_ptr + part * N + n, dweight, mask=inside)
    tl.store(partial_ptr + (parts + part) * N + n, dbias, mask=inside)


@triton.jit(do_not_specialize=["parts"])
def column_sum(
    partial_ptr, output_ptr, parts, columns, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Grid: blocks of the columns. partial float32 [parts, columns] -> output [columns], parts in order."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < columns)[None, :]
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = (start + p)[:, None].to(tl.int64)
        total += tl.load(
            partial_ptr + part * columns + n[None, :], mask=inside & (part < parts), other=0.0
        )
    result = round_to(tl.sum(total, 0), output_ptr.dtype.element_ty)
    tl.store(output_ptr + n, result, mask=n < columns)


@triton.jit
def segment_sum(
    rows_ptr,
    order_ptr,
    offsets_ptr,
    output_ptr,
    table_rows,
    skipped,
    parts,
    blocks,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """output[part, r] = sum of rows[order[t]] over the part's share of t in [offsets[r], offsets[r + 1]).

    Grid: parts * table_rows * blocks. rows float32 [tokens, N]; the table row `skipped` receives 0.
    """
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.program_id(0) // blocks
    part, row = target // table_rows, target % table_rows
    first, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    end = tl.where(row == skipped, first, end)
    share = (end - first + parts - 1) // parts
    first = tl.minimum(first + part * share, end)
    end = tl.minimum(first + share, end)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_T):
        token = tl.load(order_ptr + start + t, mask=start + t < end, other=0).to(tl.int64)
        here = (start + t < end)[:, None] & (n < N)[None, :]
        total += tl.load(rows_ptr + token[:, None] * N + n[None, :], mask=here, other=0.0)
    result = round_to(tl.sum(total, 0), output_ptr.dtype.element_ty)
    tl.store(output_ptr + tl.cast(target, tl.int64) * N + n, result, mask=n < N)
