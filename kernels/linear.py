"""What follows the product of a linear layer: activation (GELU: Hendrycks and Gimpel, 2016; tanh) and residual.

    output = activation(z) + residual,  z = x W^T + bias;      dz = activation'(z) * grad,  dbias = sum over rows of dz

The product, bias included, is cuBLAS's, whose own GELU is only the tanh form. This is one pass over what it wrote: in
place where no gradient is needed; else z is kept, and the backward computes the activation's slope from it.

Why not a product of our own with the epilogue inside? An element of z in bfloat16 costs 2 K flops and the pass 4 bytes
of traffic. At an H100's 650 Tflop/s and 3.35 TB/s that is 2.4 ps and 1.2 ps for K = 768, and less while z is in the L2
cache (50 MB; 4,096 rows of 3,072 are 25 MB). A product of our own saves the pass and loses more than that where it is a
third slower than cuBLAS, or a fifth on a cached z; simple ones are 10 to 30 % slower, and several times in float32,
which must not use TF32. Only measured tables for every shape and architecture could settle the difference. In training
z has to be written anyway and half the advantage is gone.

The bias gradient is summed while dz passes by, which saves reading dz again: 6 bytes an element instead of 8. Two
stages in a fixed order, as in `layer_norm_bwd`: every program sums its range of rows, `column_sum` adds the ranges.
"""

import triton
import triton.language as tl

from .lib import round_to, tanh

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * z * (1.0 + tanh((z + z * z * z * CUBIC) * SQRT_2_OVER_PI))
    elif ACTIVATION == "tanh":
        return tanh(z)
    else:
        return z


@triton.jit
def _sech2(x):
    """tanh'(x), without the cancellation of 1 - tanh(x)^2."""
    size = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * size / ((1.0 + size) * (1.0 + size))


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    """activation'(z); ACTIVATION is not "none"."""
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * INV_SQRT_2PI
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * density
    elif ACTIVATION == "gelu_tanh":
        x = (z + z * z * z * CUBIC) * SQRT_2_OVER_PI
        t = tanh(x)
        inner = (1.0 + z * z * (3.0 * CUBIC)) * SQRT_2_OVER_PI
        return 0.5 * (1.0 + t) + 0.5 * z * _sech2(x) * inner
    else:
        return _sech2(z)


@triton.jit
def linear_epilogue_fwd(
    z_ptr,
    residual_ptr,
    output_ptr,
    size,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of all elements. z, residual and output [size]; output may be z."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    result = _activate(tl.load(z_ptr + i, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if RESIDUAL:
        result += tl.load(residual_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + i, round_to(result, output_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def linear_epilogue_bwd(
    grad_ptr,
    z_ptr,
    dz_ptr,
    partial_ptr,
    stride_grad,
    rows,
    rows_per_part,
    columns,
    blocks,
    ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: parts * blocks, parts of rows_per_part rows, blocks of the columns.

    z and dz [rows, columns]; partial float32 [parts, columns], the sums of dz over each part, where SUMS.
    """
    part = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    first = part * rows_per_part
    end = tl.minimum(first + rows_per_part, rows)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_M):
        row = (start + m)[:, None].to(tl.int64)
        inside = (row < end) & (n < columns)[None, :]
        place = row * columns + n[None, :]
        z = tl.load(z_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * stride_grad + n[None, :], mask=inside, other=0.0)
        dz = grad.to(tl.float32) * _slope(z, ACTIVATION)
        if SUMS:
            total += dz
        tl.store(dz_ptr + place, round_to(dz, dz_ptr.dtype.element_ty), mask=inside)
    if SUMS:
        start = partial_ptr + part.to(tl.int64) * columns
        tl.store(start + n, tl.sum(total, 0), mask=n < columns)
