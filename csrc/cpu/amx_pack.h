// Operands of matrix tiles in float: each is split into three bfloat16 parts of 8 bits of the
// mantissa, exact together, while it is packed, whichever way it lies in memory.
//
// A block is 32 rows of the left operand or 32 columns of the right one; a step is 32 along the
// depth. Neighbours in a row of a tile are made of elements that lie 16 apart along the depth:
// packing needs no permutation then, and a sum does not mind.
#pragma once

#include "cpu/amx.h"
#include "cpu/transpose.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

constexpr int64_t kSplitBlock = 32, kSplitStep = 32;
constexpr int64_t kSplitTileBytes = 1024;
constexpr int64_t kSplitPartBytes = 2 * kSplitTileBytes;  // of a block's step
constexpr int64_t kSplitStepBytes = 3 * kSplitPartBytes;

// Element (i, k): row or column i, depth k. One of the strides is 1. Blocks need not be neighbours.
struct SplitSource {
  const float* data;
  int64_t stride, depth_stride, block_stride;

  SplitSource(const void* from, int64_t stride, int64_t depth_stride)
      : SplitSource(from, stride, depth_stride, kSplitBlock * stride) {}
  SplitSource(const void* from, int64_t stride, int64_t depth_stride, int64_t block_stride)
      : data(static_cast<const float*>(from)),
        stride(stride),
        depth_stride(depth_stride),
        block_stride(block_stride) {}

  // Depth k of the first row or column of a block.
  const float* block(int64_t index, int64_t k) const {
    return data + index * block_stride + k * depth_stride;
  }
  // Whether a block lies together, rather than a step of all blocks.
  bool by_blocks() const { return depth_stride < block_stride; }
};

// Which elements of a step are there; the rest is packed as 0.
struct SplitExtent {
  int64_t count, depth;
};

// In each lane the larger magnitude, and a number rather than a NaN.
CTXFAST_INLINE Vec<float> larger_magnitude(Vec<float> a, Vec<float> b) {
  return _mm512_range_ps(a, b, 0b1011);
}

// Writes the parts of first[i] and second[i] side by side into row i of a tile.
template <int kCount>
CTXFAST_INLINE Vec<float> split(const Vec<float>* first, const Vec<float>* second, char* out,
                                int64_t row_bytes, Vec<float> largest) {
  using Bits = VecOf<float>::bits;
  const Bits upper = Bits{} + 0xffff0000u;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    Vec<float> x = first[i], y = second[i];
    largest = larger_magnitude(largest, larger_magnitude(x, y));
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      const Bits low = (Bits)x & upper, high = (Bits)y & upper;
      *reinterpret_cast<Bits*>(out + part * kSplitPartBytes + i * row_bytes) = low >> 16 | high;
      x -= (Vec<float>)low;
      y -= (Vec<float>)high;
    }
  }
  return largest;
}

// A tile of each part. Row i is made of the 16 elements at x + i * stride, of which `lanes` are
// there, and of those at y + i * stride; `rows` rows are there.
struct SplitLines {
  const float *x, *y;
  int64_t stride, x_rows, y_rows, x_lanes, y_lanes;
};

CTXFAST_INLINE Vec<float> pack_lines(const SplitLines& from, char* out, int64_t row_bytes,
                                     Vec<float> largest) {
  constexpr int kAtOnce = 8;
  const bool whole =
      from.x_rows >= 16 && from.y_rows >= 16 && from.x_lanes >= 16 && from.y_lanes >= 16;
  for (int64_t i = 0; i < 16; i += kAtOnce) {
    Vec<float> first[kAtOnce], second[kAtOnce];
    if (whole) {
#pragma GCC unroll 8
      for (int64_t r = 0; r < kAtOnce; ++r) {
        first[r] = load(from.x + (i + r) * from.stride);
        second[r] = load(from.y + (i + r) * from.stride);
      }
    } else {
#pragma GCC unroll 8
      for (int64_t r = 0; r < kAtOnce; ++r) {
        first[r] = load_n(from.x + (i + r) * from.stride, i + r < from.x_rows ? from.x_lanes : 0);
        second[r] = load_n(from.y + (i + r) * from.stride, i + r < from.y_rows ? from.y_lanes : 0);
      }
    }
    largest = split<kAtOnce>(first, second, out + i * row_bytes, row_bytes, largest);
  }
  return largest;
}

// The same with row i made of the elements at x + i and y + i, `stride` apart.
CTXFAST_INLINE Vec<float> pack_transposed_lines(const SplitLines& from, char* out,
                                                int64_t row_bytes, Vec<float> largest) {
  Vec<float> first[16], second[16];
  load_transposed(from.x, from.stride, from.x_rows, from.x_lanes, first);
  load_transposed(from.y, from.stride, from.y_rows, from.y_lanes, second);
  return split<16>(first, second, out, row_bytes, largest);
}

// A step of a block of rows: [part][2 tiles][16 rows][16 pairs]. All of these return the larger of
// `largest` and the magnitudes that they meet.
CTXFAST_NOINLINE inline Vec<float> pack_row_step(const SplitSource& a, const float* from,
                                                 SplitExtent there, char* out, Vec<float> largest) {
  for (int64_t i = 0; i < kSplitBlock; i += 16, out += kSplitTileBytes) {
    const float *x = from + i * a.stride, *y = x + 16 * a.depth_stride;
    const int64_t rows = there.count - i, depth = there.depth;
    if (a.depth_stride == 1) {
      largest = pack_lines({x, y, a.stride, rows, rows, depth, depth - 16}, out, 64, largest);
    } else {
      largest = pack_transposed_lines({x, y, a.depth_stride, rows, rows, depth, depth - 16}, out,
                                      64, largest);
    }
  }
  return largest;
}

// A step of a block of columns: [part][16 pairs][32 columns]
CTXFAST_NOINLINE inline Vec<float> pack_column_step(const SplitSource& b, const float* from,
                                                    SplitExtent there, char* out,
                                                    Vec<float> largest) {
  for (int64_t i = 0; i < kSplitBlock; i += 16, out += 64) {
    const float *x = from + i * b.stride, *y = x + 16 * b.depth_stride;
    const int64_t columns = there.count - i, depth = there.depth;
    if (b.stride == 1) {
      largest = pack_lines({x, y, b.depth_stride, depth, depth - 16, columns, columns}, out, 128,
                           largest);
    } else {
      largest = pack_transposed_lines({x, y, b.stride, depth, depth - 16, columns, columns}, out,
                                      128, largest);
    }
  }
  return largest;
}

CTXFAST_NAMESPACE_END

#endif
