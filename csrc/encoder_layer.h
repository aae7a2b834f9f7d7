// One layer of a transformer encoder at inference, as one call: with few rows a layer takes less
// time than the calls of its parts from Python.
#pragma once

#include <cstdint>

#include "cpu/linear.h"
#include "status.h"

namespace ctxfast {

struct EncoderLinear {
  const void* panels;  // as in LinearArgs
  const void* bias;    // or nullptr
};

struct EncoderNorm {
  const void* weight;
  const void* bias;
  double eps;
};

// attended = norms[0](linears[1](attention(linears[0](input))) + input)
// output   = norms[1](linears[3](activation(linears[2](attended))) + attended)
struct EncoderLayerArgs {
  Dtype dtype;                // float or bfloat16, of everything
  const void* input;          // [rows, hidden], contiguous
  EncoderLinear linears[4];   // query, key and value stacked; attention output; the two of the
                              // feed-forward block
  EncoderNorm norms[2];       // after the attention and after the feed-forward block
  Activation activation;      // between the linears of the feed-forward block
  const int32_t* cu_seqlens;  // [batch + 1]
  void* workspace;            // encoder_layer_workspace(args) bytes
  void* output;               // [rows, hidden], contiguous
  int64_t rows, hidden, intermediate, heads, batch, max_seqlen;
  double scale;  // of the scores
  int threads;
};

// Bytes of working space that a layer of these sizes takes.
int64_t encoder_layer_workspace(const EncoderLayerArgs& args) noexcept;

Status encoder_layer(const EncoderLayerArgs& args) noexcept;

}  // namespace ctxfast
