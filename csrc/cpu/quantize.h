// Arguments of the two passes around an int8 matrix product; sizes in elements.
#pragma once

#include <cstdint>

#include "status.h"

namespace ctxfast {

// Each row by its own scale: scales[r] = max|input[r]| / 127, output = round(input / scale).
struct QuantizeRowsArgs {
  Dtype dtype;  // of input: float32 or bfloat16
  const void* input;
  int64_t input_stride;  // from row to row
  int8_t* output;        // [rows, columns], contiguous
  float* scales;         // [rows]
  int64_t rows, columns;
  int threads;
};

enum Activation : int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2, kTanh = 3 };

// output = activation(sums * row_scales[r] * column_scales[c] + bias[c])
struct DequantizeArgs {
  Dtype dtype;          // of output: float32 or bfloat16
  const int32_t* sums;  // [rows, columns], contiguous
  const float* row_scales;
  const float* column_scales;
  const float* bias;  // or nullptr
  void* output;       // [rows, columns], contiguous
  int64_t rows, columns;
  Activation activation;
  int threads;
};

}  // namespace ctxfast
