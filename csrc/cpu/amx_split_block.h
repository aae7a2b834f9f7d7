// The product of two blocks of float that amx_pack.h has split into bfloat16 parts, on matrix
// tiles: six of the nine products of parts (Henry, Tang and Heinecke 2019), each tile loaded again
// as soon as it has been multiplied.
#pragma once

#include "cpu/amx_pack.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// Tiles 0 to 3 hold sums, 4 and 5 rows of A, 6 and 7 columns of B.
template <int kPart, int kHalf>
CTXFAST_INLINE void load_rows(const char* rows) {
  load_matrix<4 + kHalf>(rows + kPart * kSplitPartBytes + kHalf * kSplitTileBytes, 64);
}
template <int kPart, int kHalf>
CTXFAST_INLINE void load_columns(const char* columns) {
  load_matrix<6 + kHalf>(columns + kPart * kSplitPartBytes + kHalf * 64, 128);
}
template <int kRow, int kColumn>
CTXFAST_INLINE void multiply_halves() {
  multiply_matrix<2 * kRow + kColumn, 4 + kRow, 6 + kColumn>();
}

// The products of what the tiles hold; each is loaded again as soon as it has been multiplied.
template <int kPart>
CTXFAST_INLINE void multiply_then_load_rows(const char* rows) {
  multiply_halves<0, 0>();
  multiply_halves<0, 1>();
  load_rows<kPart, 0>(rows);
  multiply_halves<1, 0>();
  multiply_halves<1, 1>();
  load_rows<kPart, 1>(rows);
}
template <int kPart>
CTXFAST_INLINE void multiply_then_load_columns(const char* columns) {
  multiply_halves<0, 0>();
  multiply_halves<1, 0>();
  load_columns<kPart, 0>(columns);
  multiply_halves<0, 1>();
  multiply_halves<1, 1>();
  load_columns<kPart, 1>(columns);
}
CTXFAST_INLINE void multiply_then_load_first(const char* rows, const char* columns) {
  multiply_halves<0, 0>();
  multiply_halves<0, 1>();
  load_rows<2, 0>(rows);
  multiply_halves<1, 0>();
  load_columns<0, 0>(columns);
  multiply_halves<1, 1>();
  load_columns<0, 1>(columns);
  load_rows<2, 1>(rows);
}

// Asks the first cache level for the sixth part of the next step of two blocks.
CTXFAST_INLINE void prefetch_sixth(const char* rows, const char* columns, int sixth) {
  constexpr int64_t kBytes = kSplitStepBytes / 6;
  const int64_t first = kSplitStepBytes + sixth * kBytes;
#pragma GCC unroll 16
  for (int64_t byte = 0; byte < kBytes; byte += 64) {
    __builtin_prefetch(rows + first + byte);
    __builtin_prefetch(columns + first + byte);
  }
}

// sums [32, 32] = a block of rows times a block of columns. The step behind the last one is loaded
// too, in vain. Each step asks the second cache level for `lines` lines of `ahead`.
CTXFAST_INLINE void multiply_blocks(const char* rows, const char* columns, int64_t steps,
                                    const char* ahead, int64_t lines, const float* c,
                                    int64_t c_stride, int64_t c_rows, float* sums) {
  clear_matrix<0>();
  clear_matrix<1>();
  clear_matrix<2>();
  clear_matrix<3>();
  load_rows<2, 0>(rows);
  load_columns<0, 0>(columns);
  load_columns<0, 1>(columns);
  load_rows<2, 1>(rows);
  const float* c_end = c + c_rows * c_stride;
  for (int64_t step = 0; step < steps; ++step) {
    for (int i = 0; i < 4 && c < c_end; ++i, c += c_stride) {
      __builtin_prefetch(c, 1);
      __builtin_prefetch(c + 16, 1);
    }
    for (int64_t line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    prefetch_sixth(rows, columns, 0);
    multiply_then_load_rows<1>(rows);
    prefetch_sixth(rows, columns, 1);
    multiply_then_load_columns<1>(columns);
    prefetch_sixth(rows, columns, 2);
    multiply_then_load_rows<0>(rows);
    prefetch_sixth(rows, columns, 3);
    multiply_then_load_columns<2>(columns);
    prefetch_sixth(rows, columns, 4);
    multiply_then_load_columns<0>(columns);
    prefetch_sixth(rows, columns, 5);
    rows += kSplitStepBytes;
    columns += kSplitStepBytes;
    multiply_then_load_first(rows, columns);
  }
  store_matrix<0>(sums, 128);
  store_matrix<1>(sums + 16, 128);
  store_matrix<2>(sums + 16 * kSplitBlock, 128);
  store_matrix<3>(sums + 16 * kSplitBlock + 16, 128);
}

CTXFAST_NAMESPACE_END

#endif
