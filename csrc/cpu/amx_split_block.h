// The product of two blocks of float that amx_pack.h has split into bfloat16 parts, on matrix
// tiles: of three parts six of the nine products, of two parts three of the four (Henry, Tang and
// Heinecke 2019), each tile loaded again as soon as it has been multiplied.
#pragma once

#include "cpu/amx_pack.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// Tiles 0 to 3 hold sums, 4 and 5 rows of A, 6 and 7 columns of B.
template <int kPart, int kHalf>
CTXFAST_INLINE void load_rows(const char* rows) {
  load_matrix<4 + kHalf>(rows + kPart * kSplitPartBytes + kHalf * kTileBytes, 64);
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
// The first product of a step is that of the last part of the rows with the first of the columns.
template <int kParts = 3>
CTXFAST_INLINE void load_first(const char* rows, const char* columns) {
  load_rows<kParts - 1, 0>(rows);
  load_columns<0, 0>(columns);
  load_columns<0, 1>(columns);
  load_rows<kParts - 1, 1>(rows);
}
template <int kParts = 3>
CTXFAST_INLINE void multiply_then_load_first(const char* rows, const char* columns) {
  multiply_halves<0, 0>();
  multiply_halves<0, 1>();
  load_rows<kParts - 1, 0>(rows);
  multiply_halves<1, 0>();
  load_columns<0, 0>(columns);
  multiply_halves<1, 1>();
  load_columns<0, 1>(columns);
  load_rows<kParts - 1, 1>(rows);
}

// Products of parts in a step, and pauses.
template <int kParts>
constexpr int64_t kSplitProducts = kParts * (kParts + 1) / 2;

// sums [32, 32] = a block of rows times a block of columns. The step behind the last one is loaded
// too, in vain. `beside` is called in each pause: the vector units are idle while tiles multiply.
// They take a little work at a time almost for nothing; more than a hundred instructions at once,
// or a chain of them that takes longer than a pause, keep the tiles waiting.
template <int kParts, typename Beside>
CTXFAST_INLINE void multiply_blocks(const char* rows, const char* columns, int64_t steps,
                                    float* sums, const Beside& beside) {
  clear_sums();
  load_first<kParts>(rows, columns);
  for (int64_t step = 0; step < steps; ++step) {
    if constexpr (kParts == 3) {
      multiply_then_load_rows<1>(rows);
      beside();
      multiply_then_load_columns<1>(columns);
      beside();
      multiply_then_load_rows<0>(rows);
      beside();
      multiply_then_load_columns<2>(columns);
      beside();
      multiply_then_load_columns<0>(columns);
      beside();
    } else if constexpr (kParts == 2) {
      multiply_then_load_rows<0>(rows);
      beside();
      multiply_then_load_columns<1>(columns);
      beside();
    }
    rows += kSplitStepBytes<kParts>;
    columns += kSplitStepBytes<kParts>;
    multiply_then_load_first<kParts>(rows, columns);
    beside();
  }
  store_sums(sums, kSplitBlock * int64_t(sizeof(float)));
}

CTXFAST_NAMESPACE_END

#endif
