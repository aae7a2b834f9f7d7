"""Attention backward: the gradients of keys and values, and of the queries too where sequences are short.

The equations are in `attention_bwd_query`. One program owns BLOCK_N keys and walks over blocks of queries. Scores are
computed transposed, as key @ query^T, so that they are an operand of the next product as they are. Where all keys of a
sequence fit one block (ONE_BLOCK), a row of scores is complete in one program: delta is then the sum of Z * dP in
registers, grad_query needs no other kernel, and neither the output nor a second launch is read.
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
    sequence_rows,
    valid_keys,
    zero_rows,
)
from .lib import LOG2E, dot, keep_mask_transposed, round_to


@triton.jit
def _key_block(
    dk,
    dv,
    k,
    v,
    start,
    k_ptr,
    v_ptr,
    q_ptr,
    do_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    mask_ptr,
    bias_ptr,
    start_n,
    valid,
    length_q,
    length_k,
    stride_ks,
    stride_vs,
    stride_qs,
    stride_dos,
    stride_dqs,
    stride_mask_m,
    stride_mask_n,
    stride_bias_m,
    stride_bias_n,
    scale,
    keep_scale,
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
    ATTN_MASK: tl.constexpr,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what BLOCK_M queries from `start` contribute; with ONE_BLOCK stores their gradient."""
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    queries = start + m
    keys = start_n + n
    inside = queries < length_q
    if DROPOUT:  # before the products: their operands leave few registers
        keep = keep_mask_transposed(
            start, start_n, head, sequence, seed, threshold, BLOCK_M, BLOCK_N
        )
    q = load_rows(q_ptr, start, stride_qs, inside, HEAD_DIM, BLOCK_M, BLOCK_D, MASKED)
    # Tiles of a mask or a bias change their layout in shared memory; operands would wait in registers meanwhile.
    LATE: tl.constexpr = ATTN_MASK or BIAS == 1
    if not LATE:
        do = load_rows(do_ptr, start, stride_dos, inside, HEAD_DIM, BLOCK_M, BLOCK_D, MASKED)
    lse_rows = lse_ptr + queries
    lse = tl.load(lse_rows, mask=inside, other=float("inf")) if MASKED else tl.load(lse_rows)
    NATURAL: tl.constexpr = natural_unit(q.dtype, BIAS)
    if ONE_BLOCK:  # nobody has shifted lse yet
        lse = tl.where(lse == float("-inf"), float("inf"), lse if NATURAL else lse * LOG2E)
    rows_of_k = (k_ptr, keys, stride_ks, valid)
    rows_of_q = (q_ptr, queries, stride_qs, inside)
    scores = dot_rows(k, q, rows_of_k, rows_of_q, HEAD_DIM, INPUT_PRECISION)
    scores = score_tile(
        scores,
        scale,
        start,
        start_n,
        m[None, :],
        n[:, None],
        inside[None, :],
        (keys < length_k)[:, None],
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
    weights = exponential(scores, lse[None, :], scale, NATURAL)
    if WINDOW and MASKED:
        weights = tl.where(in_window(queries[None, :], keys[:, None], left, right), weights, 0.0)
    if ONE_BLOCK:  # otherwise a row of these tiles that is not valid is discarded at the end
        weights = tl.where(valid[:, None], weights, 0.0)
    kept = weights
    if DROPOUT:
        kept = tl.where(keep, weights, dropped)
    if LATE:
        do = load_rows(do_ptr, start, stride_dos, inside, HEAD_DIM, BLOCK_M, BLOCK_D, MASKED)
    dv = dot(round_to(kept, do.dtype), do, dv, INPUT_PRECISION)
    rows_of_v = (v_ptr, keys, stride_vs, valid)
    rows_of_do = (do_ptr, queries, stride_dos, inside)
    d_weights = dot_rows(v, do, rows_of_v, rows_of_do, HEAD_DIM, INPUT_PRECISION)
    if ONE_BLOCK:
        # The weights of a row sum to one but for the rounding of lse, which is common to the row and cancels here.
        total = tl.sum(weights, 0)
        delta = tl.sum(kept * d_weights, 0) / tl.where(total == 0.0, 1.0, total)
        if delta_ptr is not None:  # the gradient of lse
            grad_lse = tl.load(delta_ptr + queries, mask=inside, other=0.0)
            delta -= tl.where(lse == float("inf"), 0.0, grad_lse / keep_scale)
    elif MASKED:
        delta = tl.load(delta_ptr + queries, mask=inside, other=0.0)
    else:
        delta = tl.load(delta_ptr + queries)
    d_scores = weights * (d_weights - delta[None, :])
    if DROPOUT:
        d_scores = kept * d_weights - weights * delta[None, :]
    d_scores = round_to(d_scores, q.dtype)
    dk = dot(d_scores, q, dk, INPUT_PRECISION)
    if ONE_BLOCK:
        dq = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
        dq = tl.trans(dot(tl.trans(k), d_scores, dq, INPUT_PRECISION)) * (scale * keep_scale)
        tl.store(
            dq_ptr + start.to(tl.int64) * stride_dqs + (m * stride_dqs)[:, None] + d[None, :],
            round_to(dq, dq_ptr.dtype.element_ty),
            mask=inside[:, None] & (d < HEAD_DIM)[None, :],
        )
    return dk, dv


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
def attention_bwd_key(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
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
    stride_dkb,
    stride_dkh,
    stride_dks,
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
    ONE_BLOCK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """dk and dv share strides. lse and delta: from `attention_bwd_delta`; with ONE_BLOCK lse itself and its gradient.

    Grid: one program a tile of BLOCK_N keys, as `program_tile` numbers them. With ONE_BLOCK one program a sequence and
    head, and for packed tensors one more for every 128 rows, which clear what lies past the last offset.
    """
    if ONE_BLOCK:
        program = tl.program_id(0)
        sequence, head = program // num_heads, program % num_heads
        if VARLEN:
            extra = program - num_sequences * num_heads
            if extra >= 0:
                end_q = tl.load(cu_seqlens_q_ptr + num_sequences) + 128 * extra
                end_k = tl.load(cu_seqlens_k_ptr + num_sequences) + 128 * extra
                zero_rows(
                    dq_ptr, end_q, rows_q, num_heads, stride_dqh, stride_dqs, HEAD_DIM, BLOCK_D
                )
                zero_rows(
                    dk_ptr, end_k, rows_k, num_heads, stride_dkh, stride_dks, HEAD_DIM, BLOCK_D
                )
                zero_rows(
                    dv_ptr, end_k, rows_k, num_heads, stride_dkh, stride_dks, HEAD_DIM, BLOCK_D
                )
                return
            first_k, length_k = sequence_rows(cu_seqlens_k_ptr, sequence, num_sequences, rows_k)
        else:
            first_k, length_k = 0, rows_k
        start_n = 0
    else:
        sequence, head, first_k, length_k, start_n = program_tile(
            tile_ptr, cu_seqlens_k_ptr, num_heads, num_sequences, rows_k, GRANULE, BLOCK_N, VARLEN
        )
        if start_n >= length_k:
            return
    first_q, length_q = other_rows(cu_seqlens_q_ptr, sequence, num_sequences, rows_q, VARLEN)
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
    if ONE_BLOCK:
        dq_ptr += batch * stride_dqb + head_64 * stride_dqh + first_q * stride_dqs
    if delta_ptr is not None:
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

    keys = start_n + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    valid = valid_keys(keys, low, high, contiguous, key_mask_ptr, KEY_MASK)
    rows = keys.to(tl.int64)
    tile = valid[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(k_ptr + (rows * stride_ks)[:, None] + d[None, :], mask=tile, other=0.0)
    v = tl.load(v_ptr + (rows * stride_vs)[:, None] + d[None, :], mask=tile, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Key j is seen by the queries j - right .. j + left: the window of the forward, mirrored.
    last = tl.minimum(start_n + BLOCK_N, length_k) - 1
    begin, before, full_begin, full_end, boundary = block_ranges(
        0, length_q, True, start_n, last, window_right, window_left, BLOCK_M, WINDOW
    )
    if ONE_BLOCK:  # every query gets its gradient, be it zero
        begin = 0
        before = full_begin
        boundary = before + tl.maximum(tl.cdiv(length_q, BLOCK_M) - full_end, 0)
    else:
        nothing = (start_n >= high) | (start_n + BLOCK_N <= low)
        full_end = tl.where(nothing, full_begin, full_end)
        boundary = tl.where(nothing, 0, boundary)
    if ATTN_MASK or BIAS:  # are read without asking which keys exist, except in boundary blocks
        partial = start_n + BLOCK_N > length_k
        boundary = tl.where(partial, boundary + full_end - full_begin, boundary)
        full_begin = tl.where(partial, begin, full_begin)
        full_end = tl.where(partial, begin, full_end)
        before = tl.where(partial, 0, before)
    for masked in tl.static_range(2):
        count = boundary if masked else full_end - full_begin
        for number in tl.range(0, count, num_stages=1 if masked else None):
            block = full_begin + number
            if masked:
                block = tl.where(number < before, begin + number, full_end + number - before)
            dk, dv = _key_block(
                dk,
                dv,
                k,
                v,
                tl.cast(block * BLOCK_M, tl.int32),
                k_ptr,
                v_ptr,
                q_ptr,
                do_ptr,
                dq_ptr,
                lse_ptr,
                delta_ptr,
                mask_ptr,
                bias_ptr,
                start_n,
                valid,
                length_q,
                length_k,
                stride_ks,
                stride_vs,
                stride_qs,
                stride_dos,
                stride_dqs,
                stride_mask_m,
                stride_mask_n,
                stride_bias_m,
                stride_bias_n,
                scale,
                keep_scale,
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
                ATTN_MASK,
                BIAS,
                WINDOW,
                DROPOUT,
                ONE_BLOCK,
                INPUT_PRECISION,
                masked,
            )
    dk = tl.where(valid[:, None], dk * (scale * keep_scale), 0.0)
    dv = tl.where(valid[:, None], dv * keep_scale, 0.0)
    dk_ptr += batch * stride_dkb + head_64 * stride_dkh + first_k * stride_dks
    dv_ptr += batch * stride_dkb + head_64 * stride_dkh + first_k * stride_dks
    tile = (keys < length_k)[:, None] & (d < HEAD_DIM)[None, :]
    offsets = (rows * stride_dks)[:, None] + d[None, :]
    tl.store(dk_ptr + offsets, round_to(dk, dk_ptr.dtype.element_ty), mask=tile)
    tl.store(dv_ptr + offsets, round_to(dv, dv_ptr.dtype.element_ty), mask=tile)
