"""Attention backward: the gradient of the queries, and what both halves of the backward read.

With weights P = exp(scores - lse), kept weights Z = dropout(P) and dP = grad_output @ value^T (Dao, "FlashAttention-2",
2023):

    delta = rowsum(grad_output * output) - grad_lse         (the gradient of lse enters here)
    dS    = Z * dP - P * delta
    grad_query = scale * dS @ key,   grad_key = scale * dS^T @ query,   grad_value = Z^T @ grad_output

Every program owns its rows, so there are no atomics and the result is the same from run to run. Kept weights stay
unscaled inside the kernels: delta is divided by the dropout scale beforehand, results are multiplied by it afterwards.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    block_ranges,
    dot_rows,
    exponential,
    in_window,
    key_range,
    load_rows,
    natural_unit,
    other_rows,
    program_tile,
    score_tile,
    valid_keys,
)
from .lib import LOG2E, dot, keep_mask, round_to


@triton.jit(do_not_specialize=["rows_q", "num_heads", "num_sequences"])
def attention_bwd_delta(
    do_ptr,
    output_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    shifted_lse_ptr,
    cu_seqlens_q_ptr,
    tile_ptr,
    keep_scale,
    rows_q,
    num_heads,
    num_sequences,
    stride_dob,
    stride_doh,
    stride_dos,
    stride_ob,
    stride_oh,
    stride_os,
    stride_lse_b,
    stride_lse_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GRANULE: tl.constexpr,
    VARLEN: tl.constexpr,
    BIAS: tl.constexpr,
):
    """delta over the dropout scale, and lse in the unit of the exponent, +inf on empty rows: their weights are 0.

    Grid as the forward. All float32 with the strides of lse.
    """
    sequence, head, first, length, start = program_tile(
        tile_ptr,
        cu_seqlens_q_ptr,
        num_heads,
        num_sequences,
        rows_q,
        GRANULE,
        BLOCK_M,
        VARLEN,
    )
    if start >= length:
        return
    batch = tl.cast(0 if VARLEN else sequence, tl.int64)
    head = head.to(tl.int64)
    first = tl.cast(first, tl.int64)
    m = start + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = m < length
    tile = inside[:, None] & (d < HEAD_DIM)[None, :]
    rows = m.to(tl.int64) + first
    do_ptr += batch * stride_dob + head * stride_doh
    output_ptr += batch * stride_ob + head * stride_oh
    base = batch * stride_lse_b + head * stride_lse_h + rows
    lse = tl.load(lse_ptr + base, mask=inside, other=0.0)
    do = tl.load(do_ptr + (rows * stride_dos)[:, None] + d[None, :], mask=tile, other=0.0)
    output = tl.load(output_ptr + (rows * stride_os)[:, None] + d[None, :], mask=tile, other=0.0)
    delta = tl.sum(do.to(tl.float32) * output.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + base, mask=inside, other=0.0)
    empty = lse == float("-inf")
    if not natural_unit(do.dtype, BIAS):
        lse *= LOG2E
    tl.store(delta_ptr + base, tl.where(empty, 0.0, delta / keep_scale), mask=inside)
    tl.store(shifted_lse_ptr + base, tl.where(empty, float("inf"), lse), mask=inside)


@triton.jit
def _query_block(
    dq,
    q,
    do,
    lse,
    delta,
    start,
    q_ptr,
    do_ptr,
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
    stride_dos,
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
    """Adds what BLOCK_N keys from `start` contribute."""
    n = tl.arange(0, BLOCK_N)
    queries = start_m + tl.arange(0, BLOCK_M)
    keys = start + n
    valid = valid_keys(keys, low, high, contiguous, key_mask_ptr, KEY_MASK and MASKED)
    k = load_rows(k_ptr, start, stride_ks, valid, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    # Tiles of a mask or a bias change their layout in shared memory; operands would wait in registers meanwhile.
    LATE: tl.constexpr = ATTN_MASK or BIAS == 1
    if not LATE:
        v = load_rows(v_ptr, start, stride_vs, valid, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
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
        n[None, :],
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
    weights = exponential(scores, lse[:, None], scale, NATURAL)
    if LATE:
        v = load_rows(v_ptr, start, stride_vs, valid, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    rows_of_do = (do_ptr, queries, stride_dos, query_inside)
    rows_of_v = (v_ptr, keys, stride_vs, valid)
    d_weights = dot_rows(do, v, rows_of_do, rows_of_v, HEAD_DIM, INPUT_PRECISION)
    d_scores = weights * (d_weights - delta[:, None])
    if DROPOUT:
        keep = keep_mask(queries, start, head, sequence, seed, threshold, BLOCK_M, BLOCK_N)
        kept = tl.where(keep, weights, dropped)
        d_scores = kept * d_weights - weights * delta[:, None]
    return dot(round_to(d_scores, k.dtype), k, dq, INPUT_PRECISION)


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
def attention_bwd_query(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
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
    stride_dob,
    stride_doh,
    stride_dos,
    stride_dqb,
    stride_dqh,
    stride_dqs,
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
    """Grid and arguments as `attention_fwd`; lse and delta are what `attention_bwd_delta` wrote."""
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

    batch = tl.cast(0 if VARLEN else sequence, tl.int64)
    sequence_64 = sequence.to(tl.int64)
    head_64 = head.to(tl.int64)
    first_q = tl.cast(first_q, tl.int64)
    first_k = tl.cast(first_k, tl.int64)
    q_ptr += batch * stride_qb + head_64 * stride_qh + first_q * stride_qs
    do_ptr += batch * stride_dob + head_64 * stride_doh + first_q * stride_dos
    k_ptr += batch * stride_kb + head_64 * stride_kh + first_k * stride_ks
    v_ptr += batch * stride_vb + head_64 * stride_vh + first_k * stride_vs
    lse_ptr += batch * stride_lse_b + head_64 * stride_lse_h + first_q
    delta_ptr += batch * stride_lse_b + head_64 * stride_lse_h + first_q
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
        dropped = keep_scale * 0.0  # as in `attention_fwd`

    queries = start_m + tl.arange(0, BLOCK_M)
    query_inside = queries < length_q
    d = tl.arange(0, BLOCK_D)
    tile = query_inside[:, None] & (d < HEAD_DIM)[None, :]
    rows = queries.to(tl.int64)
    q = tl.load(q_ptr + (rows * stride_qs)[:, None] + d[None, :], mask=tile, other=0.0)
    do = tl.load(do_ptr + (rows * stride_dos)[:, None] + d[None, :], mask=tile, other=0.0)
    lse = tl.load(lse_ptr + queries, mask=query_inside, other=float("inf"))
    delta = tl.load(delta_ptr + queries, mask=query_inside, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
            dq = _query_block(
                dq,
                q,
                do,
                lse,
                delta,
                tl.cast(block * BLOCK_N, tl.int32),
                q_ptr,
                do_ptr,
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
                stride_dos,
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
    dq_ptr += batch * stride_dqb + head_64 * stride_dqh + first_q * stride_dqs
    tl.store(
        dq_ptr + (rows * stride_dqs)[:, None] + d[None, :],
        round_to(dq * (scale * keep_scale), dq_ptr.dtype.element_ty),
        mask=tile,
    )
