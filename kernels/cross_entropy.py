"""Cross entropy of rows of logits, and its gradient in their place.

    loss = log(sum over j of exp(x[j])) - x[label];   dx[j] = (softmax(x)[j] - (j = label)) * scale

The maximum and the sum come from one pass over the row (online softmax: Milakov and Gimelshein, 2018); where the
gradient is wanted a second pass, which finds the row in the cache, writes it over the logits, as in Liger Kernel (Hsu
et al., 2024). Every row belongs to one program: no atomics, the same bits in every run.
"""

import triton
import triton.language as tl

from .lib import round_to


@triton.jit
def _load(logits, j, stride_logits, columns):
    x = tl.load(logits + j, mask=j < stride_logits, other=0.0).to(tl.float32)
    return tl.where(j < columns, x, float("-inf"))


@triton.jit
def cross_entropy(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    scale_ptr,
    stride_logits,
    ignore_index,
    columns,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Grid: one program a row. labels int64 [rows], losses float32 [rows], scale float32 [1].

    Every row has stride_logits elements of memory, of which the first `columns` count; the gradient of the others is 0.
    Masks end at the stride, which is a multiple of 16, so that loads and stores move 16 bytes.
    A row labelled ignore_index has the loss 0 and the gradient 0, whatever its logits. Any other label outside
    [0, columns) reads nothing and gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    exists = (label >= 0) & (label < columns)
    logits = logits_ptr + row * stride_logits
    n = tl.arange(0, BLOCK)
    # Before the row is overwritten.
    own = tl.load(logits + tl.where(exists, label, 0)).to(tl.float32)
    own = tl.where(exists, own, float("nan"))
    read = tl.where(counted, stride_logits, 0)

    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, read, BLOCK):
        x = _load(logits, start + n, stride_logits, columns)
        higher = tl.maximum(largest, tl.max(x, 0))
        reference = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(x - reference), 0)
        largest = higher
    loss = tl.log(tl.where(counted, total, 1.0)) - (own - largest)
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))

    if GRADIENT:
        dtype = logits_ptr.dtype.element_ty
        scale = tl.load(scale_ptr)
        for start in range(0, read, BLOCK):
            j = start + n
            x = _load(logits, j, stride_logits, columns)
            share = tl.exp(x - largest) / total - tl.where(j == label, 1.0, 0.0)
            share = tl.where(exists, share * scale, float("nan"))
            share = tl.where(j < columns, share, 0.0)
            tl.store(logits + j, round_to(share, dtype), mask=j < stride_logits)
        for start in range(read, stride_logits, BLOCK):
            nothing = tl.zeros([BLOCK], dtype)
            tl.store(logits + start + n, nothing, mask=start + n < stride_logits)
