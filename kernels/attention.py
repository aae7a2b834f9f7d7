"""Attention forward: FlashAttention-2 (Dao, "FlashAttention-2", 2023) with masks, bias and dropout.

    scores  = scale * query @ key^T + bias                 for the keys that a row may attend
    lse     = log sum_j exp(scores)
    output  = dropout(exp(scores - lse)) @ value

One program owns BLOCK_M queries of one head and walks over blocks of keys with a running maximum and sum; exponents are
powers of two. Blocks that lie wholly inside the sequence, the window and the valid keys take a loop without masks; the
few others take a second loop. Rows that may attend nothing give zero output and lse = -inf.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    block_ranges,
    dot_rows,
    in_window,
    key_range,
    load_rows,
    natural_unit,
    other_rows,
    program_tile,
    score_tile,
    valid_keys,
)
from .lib import LN2, LOG2E, dot, keep_mask, round_to


@triton.jit
def _attend_block(
    output,
    total,
    maximum,
    q,
    start,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    bias_ptr,
    key_mask_ptr,
    start_m,
    query_inside,
    low,
    high,
    contiguous,
    stride_qs,
    stride_ks,
    stride_vs,
    stride_mask_m,
    stride_mask_n,
    stride_bias_m,
    stride_bias_n,
    scale,
    head,
    sequence,
    seed,
    threshold,
    dropped,
    left,
    right,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ATTN_MASK: tl.constexpr,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax over BLOCK_N keys from `start`."""
    rows = tl.arange(0, BLOCK_N)
    queries = start_m + tl.arange(0, BLOCK_M)
    keys = start + rows
    valid = valid_keys(keys, low, high, contiguous, key_mask_ptr, KEY_MASK and MASKED)
    k = load_rows(k_ptr, start, stride_ks, valid, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    NATURAL: tl.constexpr = natural_unit(q.dtype, BIAS)
    rows_of_q = (q_ptr, queries, stride_qs, query_inside)
    rows_of_k = (k_ptr, keys, stride_ks, valid)
    scores = dot_rows(q, k, rows_of_q, rows_of_k, HEAD_DIM, INPUT_PRECISION)
    scores = score_tile(
        scores,
        scale,
        start_m,
        start,
        tl.arange(0, BLOCK_M)[:, None],
        rows[None, :],
        query_inside[:, None],
        (keys < high)[None, :],
        mask_ptr,
        stride_mask_m,
        stride_mask_n,
        bias_ptr,
        stride_bias_m,
        stride_bias_n,
        ATTN_MASK,
        BIAS,
        NATURAL,
        MASKED,
        start,
    )
    if MASKED:
        allowed = valid[None, :]
        if WINDOW:
            allowed = allowed & in_window(queries[:, None], keys[None, :], left, right)
        scores = tl.where(allowed, scores, float("-inf"))
    if NATURAL:
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2((scores - finite[:, None]) * LOG2E)
        rescale = tl.exp2((maximum - finite) * LOG2E)
    else:
        exponent = scale * LOG2E
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * exponent)
        finite = new_maximum
        if MASKED or ATTN_MASK:
            finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores * exponent - finite[:, None])
        rescale = tl.exp2(maximum - finite)
    total = total * rescale + tl.sum(weights, 1)
    if DROPOUT:
        keep = keep_mask(queries, start, head, sequence, seed, threshold, BLOCK_M, BLOCK_N)
        weights = tl.where(keep, weights, dropped)
    v = load_rows(v_ptr, start, stride_vs, valid, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    output = output * rescale[:, None]
    output = dot(round_to(weights, v.dtype), v, output, INPUT_PRECISION)
    return output, total, new_maximum


@triton.jit(
    do_not_specialize=[
        "threshold",
        "window_left",
        "window_right",
        "rows_q",
        "rows_k",
        "num_heads",
        "num_sequences",
    ]
)
def attention_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    output_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    tile_ptr,
    key_mask_ptr,
    key_range_ptr,
    mask_ptr,
    bias_ptr,
    seed_ptr,
    scale,
    keep_scale,
    threshold,
    window_left,
    window_right,
    rows_q,
    rows_k,
    num_heads,
    num_sequences,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    stride_lse_b,
    stride_lse_h,
    stride_key_mask_b,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GRANULE: tl.constexpr,
    VARLEN: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ATTN_MASK: tl.constexpr,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Grid: one program a tile of BLOCK_M queries, as `program_tile` numbers them.

    rows_q, rows_k: rows of every padded sequence, or of the packed tensors. seed_ptr: int64 [1]. threshold: the 16-bit
    dropout threshold; keep_scale: reciprocal of the realised keep probability.
    """
    sequence, head, first_q, length_q, start_m = program_tile(
        tile_ptr,
        cu_seqlens_q_ptr,
        num_heads,
        num_sequences,
        rows_q,
        GRANULE,
        BLOCK_M,
        VARLEN,
    )
    if start_m >= length_q:
        return
    first_k, length_k = other_rows(cu_seqlens_k_ptr, sequence, num_sequences, rows_k, VARLEN)
    low, high, contiguous = key_range(key_range_ptr, sequence, length_k, KEY_MASK)

    sequence_64 = sequence.to(tl.int64)
    head_64 = head.to(tl.int64)
    first_q = tl.cast(first_q, tl.int64)
    first_k = tl.cast(first_k, tl.int64)
    batch_64 = sequence_64 * 0 if VARLEN else sequence_64  # packed: one tensor holds all sequences
    q_ptr += batch_64 * stride_qb + head_64 * stride_qh + first_q * stride_qs
    k_ptr += batch_64 * stride_kb + head_64 * stride_kh + first_k * stride_ks
    v_ptr += batch_64 * stride_vb + head_64 * stride_vh + first_k * stride_vs
    if KEY_MASK:
        key_mask_ptr += sequence_64 * stride_key_mask_b
    if ATTN_MASK:
        mask_ptr += sequence_64 * stride_mask_b + head_64 * stride_mask_h
    if BIAS:
        bias_ptr += sequence_64 * stride_bias_b + head_64 * stride_bias_h
    seed = 0
    dropped = 0.0
    if DROPOUT:
        seed = tl.load(seed_ptr).to(tl.uint64)
        threshold = (threshold << 16).to(tl.uint32)
        # Zero, but unknown to the compiler, which would otherwise select after packing pairs of weights.
        dropped = keep_scale * 0.0

    queries = start_m + tl.arange(0, BLOCK_M)
    query_inside = queries < length_q
    d = tl.arange(0, BLOCK_D)
    q = tl.load(
        q_ptr + (queries.to(tl.int64) * stride_qs)[:, None] + d[None, :],
        mask=query_inside[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.minimum(start_m + BLOCK_M, length_q) - 1
    begin, before, full_begin, full_end, boundary = block_ranges(
        low, high, contiguous, start_m, last, window_left, window_right, BLOCK_N, WINDOW
    )
    for masked in tl.static_range(2):
        count = boundary if masked else full_end - full_begin
        for number in tl.range(0, count, num_stages=1 if masked else None):
            block = full_begin + number
            if masked:
                block = tl.where(number < before, begin + number, full_end + number - before)
            output, total, maximum = _attend_block(
                output,
                total,
                maximum,
                q,
                tl.cast(block * BLOCK_N, tl.int32),
                q_ptr,
                k_ptr,
                v_ptr,
                mask_ptr,
                bias_ptr,
                key_mask_ptr,
                start_m,
                query_inside,
                low,
                high,
                contiguous,
                stride_qs,
                stride_ks,
                stride_vs,
                stride_mask_m,
                stride_mask_n,
                stride_bias_m,
                stride_bias_n,
                scale,
                head,
                sequence,
                seed,
                threshold,
                dropped,
                window_left,
                window_right,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_M,
                BLOCK_N,
                KEY_MASK,
                ATTN_MASK,
                BIAS,
                WINDOW,
                DROPOUT,
                INPUT_PRECISION,
                masked,
            )

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output *= tl.where(empty, 0.0, keep_scale / total)[:, None]
    lse = (maximum if natural_unit(q.dtype, BIAS) else maximum * LN2) + tl.log2(total) * LN2
    output_ptr += batch_64 * stride_ob + head_64 * stride_oh + first_q * stride_os
    lse_ptr += batch_64 * stride_lse_b + head_64 * stride_lse_h + first_q
    tl.store(
        output_ptr + (queries.to(tl.int64) * stride_os)[:, None] + d[None, :],
        round_to(output, output_ptr.dtype.element_ty),
        mask=query_inside[:, None] & (d < HEAD_DIM)[None, :],
    )
    tl.store(lse_ptr + queries, tl.where(empty, float("-inf"), lse), mask=query_inside)
