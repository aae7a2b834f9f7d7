// Layers of a transformer encoder at inference, several as one call: with few rows a layer takes
// less time than the calls of its parts from Python.
#pragma once

#include <cstdint>

#include "cpu/linear.h"
#include "status.h"

namespace ctxfast {

struct EncoderLinear {
  const void* panels;   // as in LinearArgs, in the inner dtype; with scales as in LinearInt8Args
  const void* bias;     // or nullptr; in the inner dtype, float beside scales
  const float* scales;  // as in LinearInt8Args, of 8-bit weights, or nullptr
  const float* sums;    // beside scales
};

struct EncoderNorm {
  const void* weight;
  const void* bias;
  double eps;
};

// attended = norms[0](linears[1](attention(linears[0](input))) + input)
// output   = norms[1](linears[3](activation(linears[2](attended))) + attended)
struct EncoderLayer {
  Dtype dtype;            // float or bfloat16: of what is added up and normalised
  Dtype inner_dtype;      // of what is only multiplied again: dtype, or bfloat16 with 8-bit weights
  Dtype parameter_dtype;  // of the norms: dtype, or float beside bfloat16
  EncoderLinear linears[4];  // query, key and value stacked; attention output; the two of the
                             // feed-forward block
  EncoderNorm norms[2];      // after the attention and after the feed-forward block
  Activation activation;     // between the linears of the feed-forward block
  int64_t hidden, intermediate, heads;
  double scale;  // of the scores
};

struct EncoderLayersArgs {
  const EncoderLayer* const* layers;  // one or more, alike in dtypes and sizes
  int64_t count;
  const void* input;          // [rows, hidden], contiguous
  const int32_t* cu_seqlens;  // [batch + 1]
  void* workspace;            // encoder_workspace(*layers[0], rows) bytes
  void* output;               // [rows, hidden], contiguous
  int64_t rows, batch, max_seqlen;
  int float_parts;  // as in LinearArgs
  int threads;
};

// Bytes of working space that layers like this one take.
int64_t encoder_workspace(const EncoderLayer& layer, int64_t rows) noexcept;

Status encoder_layers(const EncoderLayersArgs& args) noexcept;

}  // namespace ctxfast
