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
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) {
        const int64_t left = v * kWidth + j < count ? depth - k : 0;
        square[j] = load_n(x + (v * kWidth + j) * stride + k, left);
      }
      transpose<T>(square);
      T* out = packed + k * ld + v * kWidth;
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j)
        if (j < depth - k) store(out + j * ld, square[j]);
    }
}

CTXFAST_NAMESPACE_END
