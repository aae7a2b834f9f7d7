"""Pieces that every kernel shares: dots, roundings and the dropout generator.

Dropout is Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One call
serves eight columns of a 64-wide block: column j is field (j mod 64) div 8 of the call with counter
((j div 64) * 8 + j mod 8, i, head, sequence), so the eight scores that one call decides lie eight columns apart, in one
thread of a matrix-multiply accumulator.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b in float32; INPUT_PRECISION is "ieee" or "tf32" and concerns float32 operands only."""
    if a.dtype == tl.float32 and INPUT_PRECISION == "ieee":
        return _dot_of_float32(a, b, acc)
    if INTERPRET:  # numpy has no bfloat16: the interpreter would multiply raw bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def _dot_of_float32(a, b, acc):
    """Sixteen columns of a at a time: outside the tensor cores a thread holds its rows of a and b whole."""
    M: tl.constexpr = a.shape[0]
    K: tl.constexpr = a.shape[1]
    N: tl.constexpr = b.shape[1]
    if K <= 16:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        a0, a1 = tl.split(tl.reshape(a, [M, K // 2, 2]))
        b0, b1 = tl.split(tl.permute(tl.reshape(b, [K // 2, 2, N]), [0, 2, 1]))
        acc = _dot_of_float32(a0, b0, acc)
        return _dot_of_float32(a1, b1, acc)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to dtype, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """To float32 accuracy, relative: near 0, where 1 - exp(-2 |x|) cancels, by its series."""
    size = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - size) / (1.0 + size)
    y = x * x
    series = -0.3333333333 + y * (0.1333333333 + y * (-0.0539682540 + y * 0.0218694885))
    return tl.where(y < 0.0625, x + x * y * series, far)


@triton.jit
def _multiply(word, MULTIPLIER: tl.constexpr):
    product = word.to(tl.uint64) * MULTIPLIER
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    # Counters keep their own broadcast shapes: the first two rounds cost almost nothing per element.
    for _ in tl.static_range(7):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _words(column, row, head, sequence, seed, step):
    """Four words per (column group, row). step: a number that changes in the caller's loop, never negative."""
    # Zero, but the compiler does not know: the 14 round keys are made where they are used, not held in 14 registers.
    nothing = tl.minimum(step, 0).to(tl.uint32)
    k0 = seed.to(tl.uint32) + nothing
    k1 = (seed >> 32).to(tl.uint32) + nothing
    head = tl.cast(head, tl.uint32)
    sequence = tl.cast(sequence, tl.uint32)
    return _philox(column.to(tl.uint32), row.to(tl.uint32), head, sequence, k0, k1)


@triton.jit
def _bit(word, threshold, POSITION: tl.constexpr):
    """Bits POSITION and POSITION + 1: whether the low and the high half of word reach the threshold."""
    low = tl.where((word << 16) >= threshold, 1 << POSITION, 0)
    return low | tl.where(word >= threshold, 2 << POSITION, 0)


@triton.jit
def keep_mask(
    rows, start, head, sequence, seed, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which weights dropout keeps, [BLOCK_M, BLOCK_N]: queries `rows`, keys from `start`, a multiple of BLOCK_N.

    threshold: uint32, the 16-bit threshold in the high half. BLOCK_N: 32 (half the fields of every call), 64 or 128.
    """
    BLOCKS: tl.constexpr = BLOCK_N // 64 if BLOCK_N > 64 else 1
    FIELDS: tl.constexpr = 4 if BLOCK_N == 32 else 8
    column = start // 64 * 8 + tl.arange(0, 8 * BLOCKS)
    w0, w1, w2, w3 = _words(column[None, :], rows[:, None], head, sequence, seed, start)
    bits = _bit(w0, threshold, 0) | _bit(w1, threshold, 2)
    bits |= _bit(w2, threshold, 4) | _bit(w3, threshold, 6)
    field = tl.arange(0, FIELDS)[None, None, :, None]
    if BLOCK_N == 32:
        field += start % 64 // 8
    bits = tl.reshape(bits, [BLOCK_M, BLOCKS, 1, 8]) >> field
    return tl.reshape(bits & 1, [BLOCK_M, BLOCK_N]) != 0


@triton.jit
def keep_mask_transposed(
    start_m, start, head, sequence, seed, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The same mask as [BLOCK_N, BLOCK_M], for queries from start_m.

    The eight columns of one call lie in different warps here, so whole words travel through shared memory.
    """
    BLOCKS: tl.constexpr = BLOCK_N // 64 if BLOCK_N > 64 else 1
    WORDS: tl.constexpr = 2 if BLOCK_N == 32 else 4
    column = start // 64 * 8 + tl.arange(0, 8 * BLOCKS)
    rows = start_m + tl.arange(0, BLOCK_M)
    w0, w1, w2, w3 = _words(column[:, None], rows[None, :], head, sequence, seed, start_m)
    if BLOCK_N == 32:
        is_second = start % 64 != 0
        words = tl.join(tl.where(is_second, w2, w0), tl.where(is_second, w3, w1))
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_N / 8, BLOCK_M, 2, 2]
    words = tl.permute(tl.reshape(words, [BLOCKS, 8, BLOCK_M, WORDS]), [0, 3, 1, 2])
    words = tl.reshape(words, [BLOCKS, WORDS, 1, 8, BLOCK_M])
    half = tl.arange(0, 2)[None, None, :, None, None]
    words = words << (16 - 16 * half).to(tl.uint32)
    return tl.reshape(words, [BLOCK_N, BLOCK_M]) >= threshold
