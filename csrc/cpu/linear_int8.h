// Arguments of the int8 linear layer; sizes in elements.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "status.h"

namespace ctxfast {

// output = activation(input @ weight^T + bias), with input and weight rounded to 8 bits:
//   weight[n, k] = scales[n] * q[n, k]           q signed
//   input[m, k] = low[m] + step[m] * u[m, k]     u unsigned, low and step from the row's range
struct LinearInt8Args {
  Dtype input_dtype, output_dtype;  // float32 or bfloat16
  const void* input;
  int64_t input_stride;  // from row to row
  const int8_t* panels;  // q: [columns / 32, depth / 4, 32, 4], both rounded up, padded with 0
  const float* scales;   // [columns]
  const float* sums;     // [columns]: of weight[n, :]
  const float* bias;     // [columns] or nullptr
  void* output;          // [rows, columns], contiguous
  int64_t rows, depth, columns;
  Activation activation;
  int threads;
};

}  // namespace ctxfast
