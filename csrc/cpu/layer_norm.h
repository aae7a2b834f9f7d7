// Arguments of the layer normalisation operators; sizes in elements, strides in elements.
#pragma once

#include <cstdint>

#include "status.h"

namespace ctxfast {

// output = LayerNorm(input + residual) * weight + bias over the last of [rows, columns].
struct AddLayerNormArgs {
  Dtype dtype;            // of input, residual and output
  Dtype parameter_dtype;  // of weight and bias: dtype, or float32 beside bfloat16
  const void* input;
  const void* residual;  // or nullptr
  const void* weight;    // or nullptr: ones
  const void* bias;      // or nullptr: zeros
  void* output;          // contiguous
  int64_t rows, columns;
  int64_t input_stride, residual_stride;  // from row to row
  double eps;
  int threads;
};

// output = LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]) *
// weight + bias.
struct EmbedLayerNormArgs {
  Dtype dtype;            // of the tables and the output
  Dtype parameter_dtype;  // of weight and bias
  bool wide_ids[3];       // int64 instead of int32
  const void* ids[3];  // [rows] each, contiguous; nullptr: all 0, or for positions the row number
  const void* tables[3];  // [table_rows[k], columns], contiguous; nullptr: not added
  int64_t table_rows[3];
  const void* weight;  // or nullptr: ones
  const void* bias;    // or nullptr: zeros
  void* output;        // contiguous
  int64_t rows, columns;
  double eps;
  int threads;
};

}  // namespace ctxfast
