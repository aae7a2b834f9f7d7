"""Attention backward: the gradient of the bias, of any broadcast shape, without a workspace of all scores.

    grad_bias = sum of dS over the dimensions along which the bias is broadcast,   dS as in `attention_bwd_query`

One program owns one tile of the bias, [BLOCK_M, BLOCK_N] of one bias batch and head, and walks over all that is
summed into it: sequences, heads, query blocks (a bias without queries) and key blocks (a bias without keys). A long
walk is cut into chunks that write partial sums, and `attention_bwd_bias_sum` adds these. The order is always the same.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    dot_rows,
    exponential,
    in_window,
    key_range,
    load_rows,
    natural_unit,
    other_rows,
    score_tile,
    valid_keys,
)
from .lib import keep_mask, round_to


@triton.jit(do_not_specialize=["count", "chunks"])
def attention_bwd_bias_sum(partial_ptr, dbias_ptr, count, chunks, BLOCK: tl.constexpr):
    """dbias[i] = sum of partial[c, i] over c in order. partial: float32 [chunks, count]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(0, chunks):
        total += tl.load(
            partial_ptr + tl.cast(chunk, tl.int64) * count + index, mask=inside, other=0.0
        )
    tl.store(dbias_ptr + index, round_to(total, dbias_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "threshold",
        "window_left",
        "window_right",
        "rows_q",
        "rows_k",
        "num_heads",
        "num_sequences",
        "seqlen_q",
        "seqlen_k",
        "summed",
        "chunk_size",
    ]
)
def attention_bwd_bias(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dbias_ptr,
    lse_ptr,
    delta_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
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
    seqlen_q,
    seqlen_k,
    summed,
    chunk_size,
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
    VARLEN: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ATTN_MASK: tl.constexpr,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    SUM_B: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_M: tl.constexpr,
    SUM_N: tl.constexpr,
):
    """Grid: chunks x bias batches x bias heads x query tiles x key tiles, a summed dimension counting once.

    dbias: contiguous [chunks, Bb, Hb, Mb, Nb]. seqlen_q, seqlen_k: sizes of the scores, [B, H, seqlen_q, seqlen_k].
    summed: how many tiles of scores go into one tile of the bias; each chunk takes chunk_size of them.
    """
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    program = tl.program_id(0)
    own_n = 0 if SUM_N else program % tiles_n
    program = program if SUM_N else program // tiles_n
    own_m = 0 if SUM_M else program % tiles_m
    program = program if SUM_M else program // tiles_m
    own_head = 0 if SUM_H else program % num_heads
    program = program if SUM_H else program // num_heads
    own_sequence = 0 if SUM_B else program % num_sequences
    chunk = program if SUM_B else program // num_sequences

    seed = 0
    dropped = 0.0
    if DROPOUT:
        seed = tl.load(seed_ptr).to(tl.uint64)
        threshold = (threshold << 16).to(tl.uint32)
        dropped = keep_scale * 0.0  # as in `attention_fwd`
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(chunk * chunk_size, tl.minimum((chunk + 1) * chunk_size, summed)):
        rest = tl.cast(number, tl.int32)
        tile_n = rest % tiles_n if SUM_N else own_n
        rest = rest // tiles_n if SUM_N else rest
        tile_m = rest % tiles_m if SUM_M else own_m
        rest = rest // tiles_m if SUM_M else rest
        head = rest % num_heads if SUM_H else own_head
        sequence = rest // num_heads if SUM_H else rest
        sequence = sequence if SUM_B else own_sequence
        start_m = tl.cast(tile_m, tl.int32) * BLOCK_M
        start_n = tl.cast(tile_n, tl.int32) * BLOCK_N
        first_q, length_q = other_rows(cu_seqlens_q_ptr, sequence, num_sequences, rows_q, VARLEN)
        first_k, length_k = other_rows(cu_seqlens_k_ptr, sequence, num_sequences, rows_k, VARLEN)
        low, high, contiguous = key_range(key_range_ptr, sequence, length_k, KEY_MASK)
        touched = (start_m < length_q) & (start_n < high) & (start_n + BLOCK_N > low)
        if WINDOW:
            touched = touched & (start_n <= start_m + BLOCK_M - 1 + window_right)
            touched = touched & (start_n + BLOCK_N - 1 >= start_m - window_left)
        if touched:
            sequence_64 = tl.cast(sequence, tl.int64)
            head_64 = tl.cast(head, tl.int64)
            batch = sequence_64 * 0 if VARLEN else sequence_64
            queries = start_m + m
            keys = start_n + n
            query_inside = queries < length_q
            valid = valid_keys(
                keys,
                low,
                high,
                contiguous,
                key_mask_ptr + sequence_64 * stride_key_mask_b if KEY_MASK else key_mask_ptr,
                KEY_MASK,
            )
            row_q = tl.cast(first_q, tl.int64) + start_m
            row_k = tl.cast(first_k, tl.int64) + start_n
            q_rows = q_ptr + batch * stride_qb + head_64 * stride_qh
            k_rows = k_ptr + batch * stride_kb + head_64 * stride_kh
            v_rows = v_ptr + batch * stride_vb + head_64 * stride_vh
            do_rows = do_ptr + batch * stride_dob + head_64 * stride_doh
            lse_rows = batch * stride_lse_b + head_64 * stride_lse_h + row_q + m
            q = load_rows(q_rows, row_q, stride_qs, query_inside, HEAD_DIM, BLOCK_M, BLOCK_D, True)
            k = load_rows(k_rows, row_k, stride_ks, valid, HEAD_DIM, BLOCK_N, BLOCK_D, True)
            lse = tl.load(lse_ptr + lse_rows, mask=query_inside, other=float("inf"))
            delta = tl.load(delta_ptr + lse_rows, mask=query_inside, other=0.0)
            NATURAL: tl.constexpr = natural_unit(q.dtype, BIAS)
            rows_of_q = (q_rows, row_q + m, stride_qs, query_inside)
            rows_of_k = (k_rows, row_k + n, stride_ks, valid)
            scores = dot_rows(q, k, rows_of_q, rows_of_k, HEAD_DIM, INPUT_PRECISION)
            scores = score_tile(
                scores,
                scale,
                start_m,
                start_n,
                m[:, None],
                n[None, :],
                query_inside[:, None],
                (keys < high)[None, :],
                mask_ptr + sequence_64 * stride_mask_b + head_64 * stride_mask_h
                if ATTN_MASK
                else mask_ptr,
                stride_mask_m,
                stride_mask_n,
                bias_ptr + sequence_64 * stride_bias_b + head_64 * stride_bias_h,
                stride_bias_m,
                stride_bias_n,
                ATTN_MASK,
                BIAS,
                NATURAL,
                True,
                number,
            )
            allowed = valid[None, :]
            if WINDOW:
                allowed = allowed & in_window(
                    queries[:, None], keys[None, :], window_left, window_right
                )
            scores = tl.where(allowed, scores, float("-inf"))
            weights = exponential(scores, lse[:, None], scale, NATURAL)
            v = load_rows(v_rows, row_k, stride_vs, valid, HEAD_DIM, BLOCK_N, BLOCK_D, True)
            do = load_rows(
                do_rows, row_q, stride_dos, query_inside, HEAD_DIM, BLOCK_M, BLOCK_D, True
            )
            rows_of_do = (do_rows, row_q + m, stride_dos, query_inside)
            rows_of_v = (v_rows, row_k + n, stride_vs, valid)
            d_weights = dot_rows(do, v, rows_of_do, rows_of_v, HEAD_DIM, INPUT_PRECISION)
            kept = weights
            if DROPOUT:
                keep = keep_mask(
                    queries, start_n, head, sequence, seed, threshold, BLOCK_M, BLOCK_N
                )
                kept = tl.where(keep, weights, dropped)
            total += kept * d_weights - weights * delta[:, None]

    total *= keep_scale
    size_m = 1 if SUM_M else seqlen_q
    size_n = 1 if SUM_N else seqlen_k
    heads = 1 if SUM_H else num_heads
    sequences = 1 if SUM_B else num_sequences
    plane = (tl.cast(chunk, tl.int64) * sequences + own_sequence) * heads + own_head
    dbias_ptr += plane * size_m * size_n
    place_m = own_m * BLOCK_M + m
    place_n = own_n * BLOCK_N + n
    if SUM_M and SUM_N:
        tl.store(dbias_ptr, round_to(tl.sum(tl.sum(total, 1), 0), dbias_ptr.dtype.element_ty))
    elif SUM_M:
        value = round_to(tl.sum(total, 0), dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + place_n, value, mask=place_n < seqlen_k)
    elif SUM_N:
        value = round_to(tl.sum(total, 1), dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + place_m, value, mask=place_m < seqlen_q)
    else:
        offsets = (place_m.to(tl.int64) * seqlen_k)[:, None] + place_n[None, :]
        inside = (place_m < seqlen_q)[:, None] & (place_n < seqlen_k)[None, :]
        tl.store(dbias_ptr + offsets, round_to(total, dbias_ptr.dtype.element_ty), mask=inside)
