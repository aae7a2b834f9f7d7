"""Where attention tiles lie: rows of a sequence, blocks that need masks, and the additive and boolean masks of a tile.

The attention kernels are written once for padded [B, H, S, D] and packed [T, H, D] tensors: a program finds the first
row and the number of rows of its sequence, and from there on everything is relative to the sequence.
"""

import triton
import triton.language as tl

from .lib import LOG2E, dot


@triton.jit
def sequence_rows(cu_seqlens_ptr, sequence, num_sequences, total):
    """First row and number of rows of a packed sequence; number num_sequences is what lies past the last offset."""
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < num_sequences, other=total)
    return start, end - start


@triton.jit
def program_tile(
    tile_ptr,
    cu_seqlens_ptr,
    num_heads,
    num_sequences,
    rows,
    GRANULE: tl.constexpr,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Sequence, head, first row of the sequence, its number of rows, and the first row of the tile inside it.

    rows: rows of every padded sequence, or of the packed tensor. Packed: tile_ptr int32 [tiles, 2] holds (sequence,
    block of GRANULE rows), sequence -1 where there is none, all heads of one tile side by side. Padded: all tiles of
    one head side by side, last rows first, because under a causal mask they take longest.
    """
    program = tl.program_id(0)
    if VARLEN:
        SPLIT: tl.constexpr = GRANULE // BLOCK
        head = program % num_heads
        tile = program // num_heads
        sequence = tl.load(tile_ptr + 2 * (tile // SPLIT))
        block = tl.load(tile_ptr + 2 * (tile // SPLIT) + 1) * SPLIT + tile % SPLIT
        first, length = sequence_rows(cu_seqlens_ptr, tl.maximum(sequence, 0), num_sequences, rows)
        length = tl.where(sequence < 0, 0, length)
    else:
        blocks = tl.cdiv(rows, BLOCK)
        block = blocks - 1 - program % blocks
        head = (program // blocks) % num_heads
        sequence = program // blocks // num_heads
        first = 0
        length = rows
    return sequence, head, first, length, block * BLOCK


@triton.jit
def other_rows(cu_seqlens_ptr, sequence, num_sequences, rows, VARLEN: tl.constexpr):
    """First row and number of rows of the same sequence on the other side; none past the last packed offset."""
    if VARLEN:
        first, length = sequence_rows(cu_seqlens_ptr, sequence, num_sequences, rows)
        length = tl.where(sequence < num_sequences, length, 0)
    else:
        first = 0
        length = rows
    return first, length


@triton.jit
def key_range(ranges_ptr, sequence, length, KEY_MASK: tl.constexpr):
    """Valid keys lie in [low, high); `contiguous`: all of these are valid."""
    if KEY_MASK:
        low = tl.load(ranges_ptr + 3 * sequence)
        high = tl.load(ranges_ptr + 3 * sequence + 1)
        contiguous = tl.load(ranges_ptr + 3 * sequence + 2) != 0
    else:
        # Zero, but the compiler does not know: what follows from it would be held in registers through the loops.
        low = tl.minimum(length, 0)
        high = length
        contiguous = True
    return low, high, contiguous


@triton.jit
def block_ranges(
    low, high, contiguous, first, last, left, right, BLOCK: tl.constexpr, WINDOW: tl.constexpr
):
    """Which blocks to visit for the rows first .. last when row i sees [i - left, i + right] within [low, high).

    Blocks full_begin .. full_end - 1 need no mask. Of the others, `before` lie from block `begin` on and the rest
    from full_end on, `boundary` in all.
    """
    full_low = low
    full_high = high
    if WINDOW:
        full_low = tl.maximum(low, last - left)
        full_high = tl.minimum(high, first + right + 1)
        low = tl.maximum(low, first - left)
        high = tl.minimum(high, last + right + 1)
    begin = low // BLOCK
    end = tl.cdiv(tl.maximum(high, 0), BLOCK)
    full_begin = tl.cdiv(full_low, BLOCK)
    full_end = tl.maximum(full_high, 0) // BLOCK
    none = (full_end <= full_begin) | (not contiguous)
    full_begin = tl.where(none, begin, full_begin)
    full_end = tl.where(none, begin, full_end)
    before = full_begin - begin
    boundary = before + tl.maximum(end - full_end, 0)
    return begin, before, full_begin, full_end, boundary


@triton.jit
def valid_keys(keys, low, high, contiguous, mask_ptr, KEY_MASK: tl.constexpr):
    """Which keys any query may attend; the mask is read only where the valid keys have holes."""
    valid = (keys >= low) & (keys < high)
    if KEY_MASK:
        valid = valid & (tl.load(mask_ptr + keys, mask=valid & (not contiguous), other=1) != 0)
    return valid


@triton.jit
def in_window(queries, keys, left, right):
    """queries and keys broadcast against each other, in either orientation."""
    offset = keys - queries
    return (offset <= right) & (offset >= -left)


@triton.constexpr_function
def natural_unit(dtype, BIAS):
    """Whether exponents are taken of natural scores, exp2((score - shift) * log2(e)): one instruction more.

    A bias near the smallest float32 would overflow in base 2, and float32 results would feel lse rounded in base 2.
    """
    return BIAS != 0 or dtype == tl.float32


@triton.jit
def exponential(scores, shift, scale, NATURAL: tl.constexpr):
    """exp(score - shift), the shift in the unit that `natural_unit` tells."""
    if NATURAL:
        return tl.exp2((scores - shift) * LOG2E)
    return tl.exp2(scores * (scale * LOG2E) - shift)


@triton.jit
def score_tile(
    scores,
    scale,
    start_m,
    start_n,
    m,
    n,
    query_inside,
    key_inside,
    mask_ptr,
    stride_mask_m,
    stride_mask_n,
    bias_ptr,
    stride_bias_m,
    stride_bias_n,
    ATTN_MASK: tl.constexpr,
    BIAS: tl.constexpr,
    NATURAL: tl.constexpr,
    MASKED: tl.constexpr,
    step=0,
):
    """Adds the bias to a tile of scores and applies the boolean mask.

    m, n: indices inside the tile that broadcast against each other, in either orientation, and so do query_inside
    and key_inside (used in boundary blocks), which tell the rows that exist. NATURAL scores are scaled here; the
    others keep the unit of query @ key^T, and the scale is folded into the exponent. BIAS: 0 none, 1 any, 2 the same
    for every query (then only its keys are read).
    """
    if NATURAL:
        scores *= scale
    # Zero, but the compiler does not know: offsets of every score would otherwise be held through the loop.
    m += tl.minimum(step, 0)
    start_m = tl.cast(start_m, tl.int64)
    start_n = tl.cast(start_n, tl.int64)
    if BIAS == 1:
        tile = bias_ptr + start_m * stride_bias_m + start_n * stride_bias_n
        inside = query_inside & key_inside if MASKED else query_inside
        bias = tl.load(tile + m * stride_bias_m + n * stride_bias_n, mask=inside, other=0.0)
        scores += bias.to(tl.float32)
    if BIAS == 2:
        tile = bias_ptr + start_n * stride_bias_n
        if MASKED:
            bias = tl.load(tile + n * stride_bias_n, mask=key_inside, other=0.0)
        else:
            bias = tl.load(tile + n * stride_bias_n)
        scores += bias.to(tl.float32)
    if ATTN_MASK:
        tile = mask_ptr + start_m * stride_mask_m + start_n * stride_mask_n
        inside = query_inside & key_inside if MASKED else query_inside
        allowed = tl.load(tile + m * stride_mask_m + n * stride_mask_n, mask=inside, other=0)
        scores = tl.where(allowed != 0, scores, float("-inf"))
    return scores


@triton.jit
def load_rows(
    x_ptr,
    start,
    stride,
    inside,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows start .. start + BLOCK - 1 of [rows, D]: those `inside` if MASKED, otherwise all."""
    d = tl.arange(0, BLOCK_D)
    tile = (
        x_ptr + start.to(tl.int64) * stride + (tl.arange(0, BLOCK) * stride)[:, None] + d[None, :]
    )
    if MASKED:
        return tl.load(tile, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        return tl.load(tile, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def dot_rows(a, b, rows_of_a, rows_of_b, HEAD_DIM: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """a @ b^T in float32. rows_of_a, rows_of_b: where a and b were loaded from, (pointer, rows, stride, which exist).

    Outside the tensor cores a thread would hold its rows of a and b whole, more than its registers: there they are
    loaded again, sixteen columns at a time.
    """
    acc = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    if a.dtype == tl.float32 and INPUT_PRECISION == "ieee":
        a_ptr, a_rows, stride_a, inside_a = rows_of_a
        b_ptr, b_rows, stride_b, inside_b = rows_of_b
        a_ptr += (a_rows.to(tl.int64) * stride_a)[:, None]
        b_ptr += (b_rows.to(tl.int64) * stride_b)[None, :]
        for first in range(0, a.shape[1], 16):
            d = first + tl.arange(0, 16)
            inside = d < HEAD_DIM
            part_of_a = tl.load(
                a_ptr + d[None, :], mask=inside_a[:, None] & inside[None, :], other=0.0
            )
            part_of_b = tl.load(
                b_ptr + d[:, None], mask=inside[:, None] & inside_b[None, :], other=0.0
            )
            acc = dot(part_of_a, part_of_b, acc, INPUT_PRECISION)
    else:
        acc = dot(a, tl.trans(b), acc, INPUT_PRECISION)
    return acc


@triton.jit
def zero_rows(
    x_ptr, first, rows, num_heads, stride_h, stride_s, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Zeros in rows first .. first + 127 of [rows, H, D]."""
    row = first.to(tl.int64) + tl.arange(0, 128)
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < HEAD_DIM)[None, :]
    zeros = tl.zeros([128, BLOCK_D], x_ptr.dtype.element_ty)
    for head in range(0, tl.where(first < rows, num_heads, 0)):
        tile = x_ptr + tl.cast(head, tl.int64) * stride_h
        tl.store(tile + (row * stride_s)[:, None] + d[None, :], zeros, mask=inside)
