// Arguments of a matrix product; sizes and strides in elements.
#pragma once

#include <cstdint>

#include "status.h"

namespace ctxfast {

// c[i][j] = sum_k a[i][k] b[k][j] + bias[j]
// One of the two strides of a, and one of those of b, is 1.
struct MatrixProductArgs {
  Dtype dtype;    // float or double, of everything
  const void* a;  // element (i, k) at a[i * a_row + k * a_depth]
  int64_t a_row, a_depth;
  const void* b;  // element (k, j) at b[k * b_depth + j * b_column]
  int64_t b_depth, b_column;
  const void* bias;  // [columns], or null
  void* c;           // [rows, columns], contiguous
  void* row_sums;    // [rows]: sum_k a[i][k], or null
  int64_t rows, columns, depth;
  int float_parts;  // as in LinearArgs
  int threads;
};

}  // namespace ctxfast
