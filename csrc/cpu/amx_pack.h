// Operands of matrix tiles in float: each is split into three bfloat16 parts of 8 bits of the
// mantissa, exact together, while it is packed, whichever way it lies in memory. Where less
// precision is asked for, one or two parts are the nearest to it.
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
constexpr int64_t kSplitPartBytes = 2 * kTileBytes;  // of a block's step
template <int kParts = 3>
constexpr int64_t kSplitStepBytes = kParts * kSplitPartBytes;

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
template <int kParts, int kCount>
CTXFAST_INLINE Vec<float> split(const Vec<float>* first, const Vec<float>* second, char* out,
                                int64_t row_bytes, Vec<float> largest) {
  using Bits = VecOf<float>::bits;
  const Bits upper = Bits{} + 0xffff0000u;
  const Bits half = Bits{} + (kParts < 3 ? 0x8000u : 0);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    Vec<float> x = first[i], y = second[i];
    largest = larger_magnitude(largest, larger_magnitude(x, y));
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      const Bits low = ((Bits)x + half) & upper, high = ((Bits)y + half) & upper;
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

template <int kParts>
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
    largest = split<kParts, kAtOnce>(first, second, out + i * row_bytes, row_bytes, largest);
  }
  return largest;
}

// The same with row i made of the elements at x + i and y + i, `stride` apart.
template <int kParts>
CTXFAST_INLINE Vec<float> pack_transposed_lines(const SplitLines& from, char* out,
                                                int64_t row_bytes, Vec<float> largest) {
  Vec<float> first[16], second[16];
  load_transposed(from.x, from.stride, from.x_rows, from.x_lanes, first);
  load_transposed(from.y, from.stride, from.y_rows, from.y_lanes, second);
  return split<kParts, 16>(first, second, out, row_bytes, largest);
}

constexpr int64_t kRowsAhead = 2 * kSplitStep;  // by which the packing of rows asks for them

// A step of a block of rows: [part][2 tiles][16 rows][16 pairs]. All of these return the larger of
// `largest` and the magnitudes that they meet.
template <int kParts = 3>
CTXFAST_NOINLINE inline Vec<float> pack_row_step(const SplitSource& a, const float* from,
                                                 SplitExtent there, char* out, Vec<float> largest) {
  for (int64_t i = 0; i < kSplitBlock; i += 16, out += kTileBytes) {
    const float *x = from + i * a.stride, *y = x + 16 * a.depth_stride;
    const int64_t rows = there.count - i, depth = there.depth;
    if (a.depth_stride == 1) {
      for (int64_t r = 0; r < 16; ++r) {
        __builtin_prefetch(x + r * a.stride + kRowsAhead);
        __builtin_prefetch(x + r * a.stride + kRowsAhead + 16);
      }
      largest =
          pack_lines<kParts>({x, y, a.stride, rows, rows, depth, depth - 16}, out, 64, largest);
    } else {
      largest = pack_transposed_lines<kParts>({x, y, a.depth_stride, rows, rows, depth, depth - 16},
                                              out, 64, largest);
    }
  }
  return largest;
}

// sums[r] += the first `depth` elements of row r of a step of a block, 8 at a time in float.
CTXFAST_INLINE void add_rows(const SplitSource& a, const float* from, SplitExtent there,
                             double* sums) {
  const auto add = [&](Vec<float>(&x)[8], double* to) {
#pragma GCC unroll 3
    for (int half = 4; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int i = 0; i < half; ++i) x[i] += x[i + half];
    store(to, load(to) + (Vec<double>)_mm512_cvtps_pd(_mm512_castps512_ps256(x[0])));
    store(to + 8, load(to + 8) + (Vec<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps(x[0], 1)));
  };
  for (int64_t i = 0; i < kSplitBlock; i += 16)
    for (int64_t k = 0; k < kSplitStep && k < there.depth; k += 8) {
      Vec<float> x[16] = {};
      const float* first = from + i * a.stride + k * a.depth_stride;
      if (a.depth_stride == 1) {
        load_transposed(first, a.stride, there.depth - k < 8 ? there.depth - k : 8, there.count - i,
                        x);
      } else {
#pragma GCC unroll 8
        for (int d = 0; d < 8; ++d)
          x[d] = load_n(first + d * a.depth_stride, k + d < there.depth ? there.count - i : 0);
      }
      add(reinterpret_cast<Vec<float>(&)[8]>(x), sums + i);
    }
}

// A block of columns, a piece of the depth of it, that is split a little at a time: a step is
// [part][16 pairs][32 columns], a unit is a row of pairs where columns are neighbours in memory,
// and half of the columns where they are not.
template <int kParts = 3>
class SplitColumns {
 public:
  explicit SplitColumns(const SplitSource& b) : b_(b), in_step_(b.stride == 1 ? 16 : 2) {}

  // From now on `steps` steps from `from` on, of which `there` is there. As it proceeds it asks the
  // second cache level for what lies at `ahead` as they do at `from`.
  void begin(const float* from, const float* ahead, SplitExtent there, int64_t steps, char* out) {
    from_ = from;
    ahead_ = ahead - from;
    there_ = there;
    out_ = out;
    unit_ = 0;
    left_ = steps * in_step_;
  }
  // Units that are left.
  int64_t left() const { return left_; }
  void finish() {
    while (left_ > 0) split_unit();
  }
  // The largest magnitude so far.
  Vec<float> largest() const { return largest_; }

  CTXFAST_INLINE void split_unit() {
    largest_ = b_.stride == 1 ? split_pairs() : split_half();
    --left_;
    if (++unit_ == in_step_) {
      unit_ = 0;
      from_ += kSplitStep * b_.depth_stride;
      out_ += kSplitStepBytes<kParts>;
      there_.depth -= kSplitStep;
    }
  }

 private:
  CTXFAST_INLINE void ask_for(const float* line) const {
    __builtin_prefetch(line + ahead_, 0, 2);
    __builtin_prefetch(line + ahead_ + 16, 0, 2);
  }
  CTXFAST_NOINLINE Vec<float> split_pairs() const {
    const float *x = from_ + unit_ * b_.depth_stride, *y = x + 16 * b_.depth_stride;
    char* out = out_ + unit_ * 128;
    ask_for(x);
    ask_for(y);
    if (there_.count >= kSplitBlock && there_.depth >= kSplitStep) {
      const Vec<float> first[] = {load(x), load(x + 16)}, second[] = {load(y), load(y + 16)};
      return split<kParts, 2>(first, second, out, 64, largest_);
    }
    const int64_t x_lanes = unit_ < there_.depth ? there_.count : 0;
    const int64_t y_lanes = unit_ + 16 < there_.depth ? there_.count : 0;
    const Vec<float> first[] = {load_n(x, x_lanes), load_n(x + 16, x_lanes - 16)};
    const Vec<float> second[] = {load_n(y, y_lanes), load_n(y + 16, y_lanes - 16)};
    return split<kParts, 2>(first, second, out, 64, largest_);
  }
  CTXFAST_NOINLINE Vec<float> split_half() const {
    const float* x = from_ + unit_ * 16 * b_.stride;
    for (int64_t i = 0; i < 16; ++i) ask_for(x + i * b_.stride);
    const int64_t columns = there_.count - unit_ * 16, depth = there_.depth;
    return pack_transposed_lines<kParts>(
        {x, x + 16, b_.stride, depth, depth - 16, columns, columns}, out_ + unit_ * 64, 128,
        largest_);
  }

  const SplitSource b_;
  const int64_t in_step_;  // units of a step
  const float* from_ = nullptr;
  int64_t ahead_ = 0;
  SplitExtent there_ = {};
  char* out_ = nullptr;
  int64_t unit_ = 0, left_ = 0;
  Vec<float> largest_ = {};
};

CTXFAST_NAMESPACE_END

#endif
