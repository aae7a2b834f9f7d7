// Products of bfloat16 matrices in float, two by two matrix tiles at a time: four sums, and each
// tile of an operand serves two of them.
#pragma once

#include "cpu/amx.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// C [rows, columns] = A B, or added to what lies there, all distances in bytes. Tiles are whole:
// memory reaches to the end of the last one. Step k of the depth, 32 elements, reads
//   A: 16 rows a_row apart, at a + 64 k
//   B: 16 rows b_row apart, at b + k b_step, each next 16 columns b_column further
struct MatrixProduct {
  const char* a;
  int64_t a_row;
  const char* b;
  int64_t b_row, b_step, b_column;
  int64_t steps;
  char* c;
  int64_t c_row;
  bool starts;  // nothing is added to

  CTXFAST_INLINE void run(int64_t row_tiles, int64_t column_tiles) const {
    for (int64_t column = 0; column < column_tiles; column += 2)
      for (int64_t row = 0; row < row_tiles; row += 2) {
        if (row_tiles - row > 1)
          column_tiles - column > 1 ? block<true, true>(row, column)
                                    : block<true, false>(row, column);
        else
          column_tiles - column > 1 ? block<false, true>(row, column)
                                    : block<false, false>(row, column);
      }
  }

 private:
  template <bool kLower, bool kRight>
  CTXFAST_INLINE void block(int64_t row, int64_t column) const {
    const char* left = a + row * kMatrixRows * a_row;
    const char* right = b + column * b_column;
    char* upper = c + row * kMatrixRows * c_row + column * kMatrixBytes;
    char* lower = upper + kMatrixRows * c_row;
    if (starts) {
      clear_matrix<0>();
      if constexpr (kRight) clear_matrix<1>();
      if constexpr (kLower) clear_matrix<2>();
      if constexpr (kLower && kRight) clear_matrix<3>();
    } else {
      load_matrix<0>(upper, c_row);
      if constexpr (kRight) load_matrix<1>(upper + kMatrixBytes, c_row);
      if constexpr (kLower) load_matrix<2>(lower, c_row);
      if constexpr (kLower && kRight) load_matrix<3>(lower + kMatrixBytes, c_row);
    }
    for (int64_t k = 0; k < steps; ++k) {
      load_matrix<4>(left, a_row);
      load_matrix<6>(right, b_row);
      multiply_matrix<0, 4, 6>();
      if constexpr (kRight) load_matrix<7>(right + b_column, b_row);
      if constexpr (kRight) multiply_matrix<1, 4, 7>();
      if constexpr (kLower) load_matrix<5>(left + kMatrixRows * a_row, a_row);
      if constexpr (kLower) multiply_matrix<2, 5, 6>();
      if constexpr (kLower && kRight) multiply_matrix<3, 5, 7>();
      left += kMatrixBytes;
      right += b_step;
    }
    store_matrix<0>(upper, c_row);
    if constexpr (kRight) store_matrix<1>(upper + kMatrixBytes, c_row);
    if constexpr (kLower) store_matrix<2>(lower, c_row);
    if constexpr (kLower && kRight) store_matrix<3>(lower + kMatrixBytes, c_row);
  }
};

CTXFAST_NAMESPACE_END

#endif
