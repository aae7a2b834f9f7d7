// Arguments of the layer normalisation operators; sizes in elements, strides in elements.
#pragma once

#include <cstdint>

#include "status.h"

namespace ctxfast {

// Hidden dropout as in ctxfast/reference/dropout.py; off where sequence_ids is nullptr.
struct RowDropout {
  const int64_t* sequence_ids;  // [rows]
  const int64_t* positions;     // [rows]
  int64_t seed;
  uint32_t threshold;  // fields below it are dropped
  double scale;        // factor of what is kept
};

// output = LayerNorm(dropout(input) + residual) * weight + bias over the last of [rows, columns].
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
  RowDropout dropout;
  int threads;
};

// Gradients of the same: of input and residual [rows, columns], weight and bias [columns].
struct AddLayerNormBackwardArgs {
  AddLayerNormArgs forward;  // without output
  const void* grad_output;   // in dtype
  int64_t grad_stride;       // from row to row
  void* dinput;              // contiguous, in dtype
  void* dresidual;           // contiguous, in dtype, or nullptr: not wanted
  void* partials;            // [kRowBlocks][2][columns] for sums, in the compute type
  void* dweight;             // [columns], in the compute type: float, double for double
  void* dbias;               // [columns], in the compute type
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

// Gradients of the same, all in the compute type: tables [table_rows[k], columns], weight and bias.
struct EmbedLayerNormBackwardArgs {
  EmbedLayerNormArgs forward;  // without output
  const void* grad_output;     // in dtype, rows at grad_stride
  int64_t grad_stride;
  int64_t padding_idx;  // row of the word table that receives nothing, or -1
  void* rows;           // [rows, columns]: working space
  void* dtables[3];     // zero when given
  void* partials;       // as above
  void* dweight;
  void* dbias;
};

// Blocks of rows whose parameter gradients are summed up on their own, then in the order of blocks:
// the result does not depend on the number of threads.
constexpr int64_t kRowBlocks = 32;

}  // namespace ctxfast
