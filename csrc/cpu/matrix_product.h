// Arguments of a plain matrix product; strides in elements.
#pragma once

#include <cstdint>

#include "status.h"

namespace ctxfast {

// C [rows, columns] = A [rows, depth] B [depth, columns], C without gaps.
struct MatrixProductArgs {
  Dtype dtype;  // float or double
  int64_t rows, depth, columns;
  const void* a;
  int64_t a_stride[2];  // from row to row, along the depth; one of them is 1
  const void* b;
  int64_t b_stride;  // along the depth; columns are neighbours
  void* c;
  int threads;
};

}  // namespace ctxfast
