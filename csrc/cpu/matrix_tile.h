// The register-blocked product that attention is made of: C[r, c] += sum_k A[r, k] B[k, c] on a
// tile of kRows rows by kColumns vectors. Each step broadcasts one element of A per row and loads
// kColumns vectors of B.
//
// Arithmetic<Storage> says how a storage type is multiplied. Its Word is what one broadcast or one
// vector lane holds: a float, a double, or, where the CPU multiplies bfloat16 itself, a pair of
// bfloat16 that are neighbours along k.
#pragma once

#include "cpu/simd.h"

CTXFAST_NAMESPACE_BEGIN

template <typename T>
struct ScalarArithmetic {
  using Accumulator = T;
  using Word = T;
  static constexpr int kPack = 1;  // elements along k in a Word
  static CTXFAST_INLINE Vec<T> multiply_add(Word a, Vec<T> b, Vec<T> c) { return a * b + c; }
  static CTXFAST_INLINE Vec<T> load_words(const Word* p) { return load(p); }
};

template <typename Storage>
struct Arithmetic : ScalarArithmetic<Compute<Storage>> {};

#if defined(CTXFAST_AVX512_BF16)
template <>
struct Arithmetic<bfloat16> {
  using Accumulator = float;
  using Word = uint32_t;
  static constexpr int kPack = 2;
  static CTXFAST_INLINE Vec<float> multiply_add(Word a, Vec<float> b, Vec<float> c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
  static CTXFAST_INLINE Vec<float> load_words(const Word* p) {
    return load(reinterpret_cast<const float*>(p));
  }
};
#endif

// Largest tile that fits the vector registers beside its operands.
#if defined(CTXFAST_AVX512)
constexpr int kTileRows = 6, kTileColumns = 4;
#else
constexpr int kTileRows = 6, kTileColumns = 2;
#endif

// A sum over a long depth is made of sums over pieces of this many elements, whose rounding errors
// do not grow with the depth.
constexpr int64_t kSumPiece = 128;

// Element by element: an initialiser list would clear the tile in memory and load it from there.
template <typename T, int kRows, int kColumns>
CTXFAST_INLINE void clear_tile(Vec<T> (&sum)[kRows][kColumns]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sum[r][c] = Vec<T>{};
}

constexpr int64_t kLineBytes = 64;

// A is [rows, depth] with row stride lda (kTransposed: [depth, rows] with row stride lda). Step k
// reads vector c of B at b + k * ldb + c * next_column. All in words. kAhead: step k also asks for
// the line k of `ahead`, what will be read next, for the second cache level.
template <typename Math, int kRows, int kColumns, bool kTransposed = false, bool kAhead = false>
CTXFAST_INLINE void multiply_tile(const typename Math::Word* a, int64_t lda,
                                  const typename Math::Word* b, int64_t ldb, int64_t next_column,
                                  int64_t depth,
                                  Vec<typename Math::Accumulator> (&sum)[kRows][kColumns],
                                  const char* ahead = nullptr) {
  using T = typename Math::Accumulator;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) right[c] = Math::load_words(b + c * next_column);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename Math::Word left = kTransposed ? a[r] : a[r * lda];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[r][c] = Math::multiply_add(left, right[c], sum[r][c]);
    }
    if constexpr (kAhead) __builtin_prefetch(ahead + k * kLineBytes, 0, 2);
    a += kTransposed ? lda : 1;
    b += ldb;
  }
}

// Calls body.template run<rows, columns>(place...) with the two counts as constants, 1 .. kTileRows
// and 1 .. kTileColumns.
template <int kColumns, typename Body, typename... Place>
CTXFAST_INLINE void with_rows(int rows, Body& body, Place... place) {
  switch (rows) {
    case 1:
      return body.template run<1, kColumns>(place...);
    case 2:
      return body.template run<2, kColumns>(place...);
    case 3:
      return body.template run<3, kColumns>(place...);
    case 4:
      return body.template run<4, kColumns>(place...);
    case 5:
      return body.template run<5, kColumns>(place...);
    default:
      return body.template run<6, kColumns>(place...);
  }
}

template <typename Body, typename... Place>
CTXFAST_INLINE void with_tile(int rows, int columns, Body& body, Place... place) {
#if defined(CTXFAST_AVX512)
  if (columns == 4) return with_rows<4>(rows, body, place...);
  if (columns == 3) return with_rows<3>(rows, body, place...);
#endif
  if (columns == 2) return with_rows<2>(rows, body, place...);
  return with_rows<1>(rows, body, place...);
}

// How many rows the next tile takes so that the tiles of `left` rows are as equal as possible.
CTXFAST_INLINE int next_rows(int64_t left) {
  const int64_t tiles = (left + kTileRows - 1) / kTileRows;
  return int((left + tiles - 1) / tiles);
}

// Calls body.template run<rows, columns>(row, vector) for tiles that cover `rows` rows and
// `vectors` vectors, the rows of a few columns first.
template <typename Body>
CTXFAST_INLINE void for_each_tile(int64_t rows, int64_t vectors, const Body& body) {
  for (int64_t c = 0; c < vectors; c += kTileColumns) {
    const int columns = vectors - c < kTileColumns ? int(vectors - c) : kTileColumns;
    for (int64_t r = 0; r < rows;) {
      const int step = next_rows(rows - r);
      with_tile(step, columns, body, r, c);
      r += step;
    }
  }
}

CTXFAST_NAMESPACE_END
