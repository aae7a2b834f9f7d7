"""ELMo's character convolutions (Peters et al., 2018; Kim et al., 2016), highway gate and scalar mix.

    convolution: out[t, f] = activation(max over p of sum over w of embedding[ids[t, p + w]] . weight[f, w] + bias[f])
    gate:        out = g * x + (1 - g) * relu(t), g = sigmoid(c)   (Srivastava et al., 2015)
    mix:         out = sum over layers l of coefficients[l] * layers[l]

The scores of a token stay in registers: one small product a character of the window, then the maximum.
"""

import triton
import triton.language as tl

from .lib import dot, round_to, tanh


@triton.jit
def char_cnn_fwd(
    ids_ptr,
    embedding_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    stride_output,
    vocabulary,
    filters,
    blocks,
    CHARACTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Grid: tokens * blocks, blocks of the filters of one width. weight [filters, WIDTH, CHANNELS].

    An id outside the table reads nothing and gives NaN.
    """
    token = (tl.program_id(0) // blocks).to(tl.int64)
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    POSITIONS: tl.constexpr = CHARACTERS - WIDTH + 1
    inside = p < POSITIONS
    scores = tl.zeros([BLOCK_P, BLOCK_F], tl.float32)
    for w in range(WIDTH):
        index = tl.load(ids_ptr + token * CHARACTERS + p + w, mask=inside, other=0).to(tl.int64)
        exists = (index >= 0) & (index < vocabulary)
        row = tl.where(exists, index, 0)
        x = tl.load(
            embedding_ptr + row[:, None] * CHANNELS + c[None, :],
            mask=inside[:, None] & (c < CHANNELS)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + (f[None, :] * WIDTH + w) * CHANNELS + c[:, None],
            mask=(f < filters)[None, :] & (c < CHANNELS)[:, None],
            other=0.0,
        )
        scores = dot(x, weight, scores, INPUT_PRECISION)
        scores += tl.where(exists, 0.0, float("nan"))[:, None]
    bias = tl.load(bias_ptr + f, mask=f < filters, other=0.0).to(tl.float32)
    bad = tl.max(((scores != scores) & inside[:, None]).to(tl.int32), 0) != 0
    best = tl.max(tl.where(inside[:, None] & (scores == scores), scores, float("-inf")), 0) + bias
    best = tl.maximum(best, 0.0) if RELU else tanh(best)
    best = tl.where(bad, float("nan"), best)
    out = round_to(best, output_ptr.dtype.element_ty)
    tl.store(output_ptr + token * stride_output + f, out, mask=f < filters)


@triton.jit
def highway_gate_fwd(projected_ptr, input_ptr, output_ptr, columns, blocks, BLOCK_N: tl.constexpr):
    """Grid: rows * blocks, blocks of the columns. projected [rows, 2 * columns], input and output [rows, columns]."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < columns
    start = projected_ptr + 2 * row * columns + n
    transform = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    carry = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(input_ptr + row * columns + n, mask=inside, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-carry))
    other = tl.where(transform > 0, transform, transform * 0.0)  # keeps a NaN
    out = gate * x + (1.0 - gate) * other
    tl.store(output_ptr + row * columns + n, round_to(out, output_ptr.dtype.element_ty), inside)


@triton.jit
def weighted_sum_fwd(
    layers_ptr, coefficients_ptr, output_ptr, size, LAYERS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: blocks of one layer. layers [LAYERS, size], coefficients float32 [LAYERS], output [size]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros([BLOCK], tl.float32)
    for layer in range(LAYERS):
        x = tl.load(layers_ptr + tl.cast(layer, tl.int64) * size + i, mask=inside, other=0.0)
        total += tl.load(coefficients_ptr + layer) * x.to(tl.float32)
    tl.store(output_ptr + i, round_to(total, output_ptr.dtype.element_ty), mask=inside)
