// Arguments of the character convolutions and of the layers around them; sizes in elements.
#pragma once

#include <cstdint>

#include "status.h"

namespace ctxfast {

constexpr int kMaxFilters = 32;

// output[t, f] = activation(max over p of x[t, p : p + width_f] . weight_f + bias_f), where x[t, m]
// = embedding[ids[t, m]].
struct CharCnnArgs {
  Dtype dtype;  // of embedding, weight, bias and output
  bool wide_ids;
  const void* ids;        // [tokens, characters], int64 or int32
  const void* embedding;  // [vocabulary, channels]
  const void* weight;     // one filter after another, each [width, channels]
  const void* bias;       // [filters]
  void* output;           // [tokens, filters]
  int64_t tokens, characters, vocabulary, channels;
  int32_t groups;               // filters of one width each
  int64_t widths[kMaxFilters];  // at most `characters`
  int64_t counts[kMaxFilters];
  bool relu;  // otherwise tanh
  int threads;
};

// Gradients of embedding, weight and bias, float or double; args.output is not used.
struct CharCnnBackwardArgs {
  CharCnnArgs forward;
  const void* grad_output;  // [tokens, filters]
  void* grad_embedding;
  void* grad_weight;
  void* grad_bias;
};

// output = g * input + (1 - g) * relu(projected[:, :columns]), g = sigmoid(projected[:, columns:]).
struct HighwayGateArgs {
  Dtype dtype;
  const void* projected;  // [rows, 2 * columns]
  const void* input;      // [rows, columns]
  void* output;           // [rows, columns]
  int64_t rows, columns;
  int threads;
};

struct HighwayGateBackwardArgs {
  HighwayGateArgs forward;
  const void* grad_output;
  void* grad_projected;
  void* grad_input;
};

// output = sum over layers of coefficients[l] * layers[l].
struct WeightedSumArgs {
  Dtype dtype;               // of layers and output
  const void* layers;        // [count, size]
  const void* coefficients;  // [count], float or double as the arithmetic of dtype
  void* output;              // [size]
  int64_t count, size;
  int threads;
};

}  // namespace ctxfast
