// Products of the loop with plain weights, which are put into panels a piece at a time: nothing is
// held twice, for what that costs in every step. The sums are those of packed weights, bit for bit.
#pragma once

#include "cpu/lstm_weights.h"
#include "cpu/transpose.h"

CTXFAST_NAMESPACE_BEGIN

// a [depth] times the first `count` of a vector of rows of weights [*, depth]: for one row of A
// nothing needs to be stored. Asks for the rows that follow: each is too short a stream.
template <typename T>
CTXFAST_INLINE Vec<T> multiply_plain_row(const T* a, const T* weights, int64_t depth,
                                         int64_t count) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> sum = {};
  for (int64_t k = 0; k < depth; k += kSumPiece) {
    const int64_t end = depth - k < kSumPiece ? depth : k + kSumPiece;
    Vec<T> part = {};
    for (int64_t i = k; i < end; i += kWidth) {
      Vec<T> square[kWidth];
      load_transposed(weights + i, depth, end - i, count, square);
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) __builtin_prefetch(weights + i + (kWidth + j) * depth, 0, 2);
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j)
        if (j < end - i) part = a[i + j] * square[j] + part;
    }
    sum += part;
  }
  return sum;
}

// C [rows, vectors first .. last) = A [rows, depth] weights^T, weights [columns, depth]; `space`
// takes four vectors of kDepthPiece.
template <typename W, typename T = typename W::Compute>
CTXFAST_INLINE void multiply_plain(const T* a, int64_t lda, const T* weights, int64_t depth,
                                   int64_t columns, T* space, T* c, int64_t ldc, int64_t rows,
                                   int64_t first, int64_t last) {
  constexpr int64_t kWidth = kLanes<T>;
  const auto rows_of = [&](int64_t vector) { return weights + vector * kWidth * depth; };
  if (rows == 1) {
    for (int64_t vector = first; vector < last; ++vector)
      store(c + vector * kWidth,
            multiply_plain_row(a, rows_of(vector), depth, columns - vector * kWidth));
    return;
  }
  for (int64_t vector = first; vector < last;) {
    const int width = last - vector >= 4 ? 4 : 1;
    for (int64_t k = 0; k < depth; k += kDepthPiece) {
      const int64_t part = depth - k < kDepthPiece ? depth - k : kDepthPiece;
      for (int64_t v = 0; v < width; ++v)
        pack_vectors<1>(rows_of(vector + v) + k, 1, depth, part, columns - (vector + v) * kWidth,
                        space + v * part * kWidth);
      multiply_depth<W>(a + k, lda, space, kWidth, part * kWidth, part, space, 0,
                        c + vector * kWidth, ldc, rows, width, k == 0);
    }
    vector += width;
  }
}

CTXFAST_NAMESPACE_END
