"""Small kernels that plan attention on the device, so that no length ever travels to the host.

key_ranges   per padded sequence: first valid key, one past the last, and whether all keys between are valid
tile_map     packed batches: (sequence, block of rows) of every tile, longest sequences first, so that the programs
             that take longest start first (Graham, "Bounds on multiprocessing timing anomalies", 1969)
"""

import triton
import triton.language as tl

from .attention_tiles import sequence_rows


@triton.jit(do_not_specialize=["rows"])
def key_ranges(mask_ptr, valid_ptr, ranges_ptr, stride_b, stride_s, rows, BLOCK: tl.constexpr):
    """Grid: one program a sequence. mask: uint8 [B, rows]; ranges: int32 [B, 3], all zero where no key is valid.

    valid: int32 [B, rows], the mask again: a load whose predicate came from bytes would give the tensor cores operands
    laid out for bytes.
    """
    sequence = tl.program_id(0)
    mask_ptr += sequence.to(tl.int64) * stride_b
    valid_ptr += sequence.to(tl.int64) * rows
    low = tl.full([BLOCK], 1 << 30, tl.int32)
    high = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        inside = keys < rows
        valid = tl.load(mask_ptr + keys.to(tl.int64) * stride_s, mask=inside, other=0) != 0
        tl.store(valid_ptr + keys, valid.to(tl.int32), mask=inside)
        low = tl.minimum(low, tl.where(valid, keys, 1 << 30))
        high = tl.maximum(high, tl.where(valid, keys + 1, 0))
        count += valid.to(tl.int32)
    high_end = tl.max(high, 0)
    low_end = tl.minimum(tl.min(low, 0), high_end)
    contiguous = (tl.sum(count, 0) == high_end - low_end).to(tl.int32)
    tl.store(ranges_ptr + 3 * sequence, low_end)
    tl.store(ranges_ptr + 3 * sequence + 1, high_end)
    tl.store(ranges_ptr + 3 * sequence + 2, contiguous)


@triton.jit(do_not_specialize=["num_sequences", "total", "num_tiles"])
def tile_map(
    cu_seqlens_ptr,
    map_ptr,
    num_sequences,
    total,
    num_tiles,
    GRANULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: num_sequences + 2 programs. map: int32 [num_tiles, 2] of (sequence, block of GRANULE rows), (-1, 0) unused.

    Sequence number num_sequences stands for the rows past the last offset, and the last program fills what is unused.
    """
    sequence = tl.program_id(0)
    is_filler = sequence > num_sequences
    _, own_length = sequence_rows(
        cu_seqlens_ptr, tl.minimum(sequence, num_sequences), num_sequences, total
    )
    begin = 0  # tiles of all sequences that come before this one
    for start in range(0, num_sequences + 1, BLOCK):
        other = start + tl.arange(0, BLOCK)
        inside = other <= num_sequences
        first = tl.load(cu_seqlens_ptr + other, mask=inside, other=0)
        last = tl.load(cu_seqlens_ptr + other + 1, mask=other < num_sequences, other=total)
        length = tl.where(inside, last - first, 0)
        longer = (length > own_length) | ((length == own_length) & (other < sequence))
        begin += tl.sum(tl.where(longer | is_filler, tl.cdiv(length, GRANULE), 0), 0)
    count = tl.where(is_filler, num_tiles - begin, tl.cdiv(own_length, GRANULE))
    sequence = tl.where(is_filler, -1, sequence)
    for start in range(0, count, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = block < count
        place = map_ptr + 2 * (begin + block)
        tl.store(place, tl.zeros([BLOCK], tl.int32) + sequence, mask=inside)
        tl.store(place + 1, tl.where(is_filler, 0, block), mask=inside)
