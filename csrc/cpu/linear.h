// Arguments of a linear layer on a packed weight; sizes and strides in elements.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "status.h"

namespace ctxfast {

// Columns of a panel of the packed weight.
constexpr int64_t kPanelColumns = 32;

// output = activation(input @ weight^T + bias) + residual
struct LinearArgs {
  Dtype dtype;        // float or bfloat16, of everything; depth is even in bfloat16
  const void* input;  // [rows, depth]
  int64_t input_stride;
  // weight as [ceil(columns / 32)][depth][32], padded with 0, and behind it, for amx_digits.h,
  // [depth] powers of two that features are multiplied by, the first one NaN where the weight has
  // no digits, and [ceil(columns / 32)][32] units of columns. In bfloat16
  // [ceil(columns / 32)][depth / 2][32][2]. Or nullptr.
  const void* panels;
  const void* weight;    // [columns, depth], contiguous: read where there are no panels
  const void* bias;      // [columns] or nullptr
  const void* residual;  // [rows, columns] or nullptr
  int64_t residual_stride;
  void* output;  // [rows, columns], contiguous
  int64_t rows, depth, columns;
  Activation activation;
  // Of 8 bits of the mantissa: how much of a float products on matrix tiles read. 2 (an error below
  // 2^-16 of each product) and 1 (2^-8) are for those who ask for less; anything else is all of it.
  int float_parts;
  int threads;
};

}  // namespace ctxfast
