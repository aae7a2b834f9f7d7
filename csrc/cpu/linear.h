// Arguments of a float32 linear layer on a packed weight; sizes and strides in elements.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "status.h"

namespace ctxfast {

// Columns of a panel of the packed weight.
constexpr int64_t kPanelColumns = 32;

// output = activation(input @ weight^T + bias) + residual
struct LinearArgs {
  const float* input;  // [rows, depth]
  int64_t input_stride;
  const float* panels;    // weight as [ceil(columns / 32)][depth][32], padded with 0
  const float* bias;      // [columns] or nullptr
  const float* residual;  // [rows, columns] or nullptr
  int64_t residual_stride;
  float* output;  // [rows, columns], contiguous
  int64_t rows, depth, columns;
  Activation activation;
  int threads;
};

}  // namespace ctxfast
