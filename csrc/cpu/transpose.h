// Matrices as rows of vectors, whichever way they lie in memory.
#pragma once

#include "cpu/simd.h"

CTXFAST_NAMESPACE_BEGIN

// The transpose of a square of lanes: blocks beside the diagonal change places, halves first.
template <typename T, int kStep = kLanes<T> / 2>
CTXFAST_INLINE void transpose(Vec<T> (&x)[kLanes<T>]) {
  constexpr int kWidth = kLanes<T>;
  Mask<T> lower, upper;
  for (int j = 0; j < kWidth; ++j) {
    lower[j] = j & kStep ? kWidth + j - kStep : j;
    upper[j] = j & kStep ? kWidth + j : j + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kStep) continue;
    const Vec<T> first = x[i], second = x[i + kStep];
    x[i] = __builtin_shuffle(first, second, lower);
    x[i + kStep] = __builtin_shuffle(first, second, upper);
  }
  if constexpr (kStep > 1) transpose<T, kStep / 2>(x);
}

// square[k][j] = x[j * stride + k]
template <typename T>
CTXFAST_INLINE void load_transposed(const T* x, int64_t stride, Vec<T> (&square)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<T>; ++j) square[j] = load(x + j * stride);
  transpose<T>(square);
}

#if defined(CTXFAST_AVX512)
// The same with a quarter fewer exchanges: halves of rows meet while they are loaded.
CTXFAST_INLINE void load_transposed(const float* x, int64_t stride, Vec<float> (&square)[16]) {
  const auto halves = [&](int row, int column) {
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(x + row * stride + column));
    return _mm512_insertf32x8(low, _mm256_loadu_ps(x + (row + 4) * stride + column), 1);
  };
#pragma GCC unroll 2
  for (int column = 0; column < 16; column += 8) {
    __m512 rows[2][4];  // of four columns: lane l of vector i is row 4 l + i
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 upper = halves(i, column), lower = halves(i + 8, column);
      rows[0][i] = _mm512_shuffle_f32x4(upper, lower, _MM_SHUFFLE(2, 0, 2, 0));
      rows[1][i] = _mm512_shuffle_f32x4(upper, lower, _MM_SHUFFLE(3, 1, 3, 1));
    }
#pragma GCC unroll 2
    for (int quarter = 0; quarter < 2; ++quarter) {
      const __m512(&r)[4] = rows[quarter];
      const __m512d low[2] = {_mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])),
                              _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]))};
      const __m512d high[2] = {_mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1])),
                               _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]))};
      Vec<float>* to = square + column + 4 * quarter;
      to[0] = (Vec<float>)_mm512_unpacklo_pd(low[0], low[1]);
      to[1] = (Vec<float>)_mm512_unpackhi_pd(low[0], low[1]);
      to[2] = (Vec<float>)_mm512_unpacklo_pd(high[0], high[1]);
      to[3] = (Vec<float>)_mm512_unpackhi_pd(high[0], high[1]);
    }
  }
}
#endif

// The same of `depth` columns and `count` rows; the rest is 0.
template <typename T>
CTXFAST_INLINE void load_transposed(const T* x, int64_t stride, int64_t depth, int64_t count,
                                    Vec<T> (&square)[kLanes<T>]) {
  if (depth >= kLanes<T> && count >= kLanes<T>) return load_transposed(x, stride, square);
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<T>; ++j) square[j] = load_n(x + j * stride, j < count ? depth : 0);
  transpose<T>(square);
}

// packed[k * ld + j] = x[k * depth_stride + j * stride] for k < depth and j < count; 0 from there
// to the end of the kPacked vectors of a row. One of the two strides is 1.
template <int kPacked, typename T>
CTXFAST_INLINE void pack_vectors(const T* x, int64_t depth_stride, int64_t stride, int64_t depth,
                                 int64_t count, T* packed, int64_t ld = kPacked * kLanes<T>) {
  constexpr int kWidth = kLanes<T>;
  if (stride == 1) {
    for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < kPacked; ++v)
        store(packed + k * ld + v * kWidth,
              load_n(x + k * depth_stride + v * kWidth, count - v * kWidth));
    return;
  }
  for (int v = 0; v < kPacked; ++v)
    for (int64_t k = 0; k < depth; k += kWidth) {
      Vec<T> square[kWidth];
      load_transposed(x + v * kWidth * stride + k, stride, depth - k, count - v * kWidth, square);
      T* out = packed + k * ld + v * kWidth;
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j)
        if (j < depth - k) store(out + j * ld, square[j]);
    }
}

CTXFAST_NAMESPACE_END
