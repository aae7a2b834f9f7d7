// Arguments of the LSTM operators; sizes and strides in elements. The products that give the
// gradients of weights and input come after the backward pass: see matrix_product.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace ctxfast {

enum WeightType : int32_t {
  kPlainWeight = 0,  // the type of the arithmetic: float or double
  kBfloat16Weight = 1,
  kInt8Weight = 2,   // with a scale for each row
  kSplitWeight = 3,  // float as three bfloat16, within a call, where there are matrix tiles
};

// What every call knows. B batch, T steps, K inputs, H hidden, P features.
struct LstmSizes {
  Dtype dtype;  // of input, h and output; c and the arithmetic are float, or double for double
  int64_t batch, steps, inputs, hidden, features;
  bool projected;               // with weight_hr; else features == hidden
  double cell_clip, proj_clip;  // infinity: none
  const int64_t* lengths;       // [B] in [0, T], or nullptr: all T
  int threads;
};

// What packed weights begin with: they serve a call only where all of this is equal, but for
// `ordinary`.
struct LstmPackedHeader {
  int64_t bytes, inputs, hidden, features;
  int32_t vector_bytes, dtype, weight, projected, backward;
  int32_t ordinary;  // whether all weights are smaller than kOrdinaryBound, thus finite
};

// Weights as the kernels read them: see lstm_weights.h.
struct LstmPackArgs {
  Dtype dtype;
  WeightType weight;
  bool backward;  // the transposed products of the backward pass, without weight_ih
  int64_t inputs, hidden, features;
  const void* weight_ih;  // [4H, K], contiguous, of dtype
  const void* weight_hh;  // [4H, P], contiguous, of dtype
  const void* weight_hr;  // [P, H], or nullptr
  bool projected;
  void* packed;  // nullptr: only the header is wanted
  LstmPackedHeader* header;
  int threads;
};

struct LstmForwardDirection {
  const void* input;        // [B, T, K], unit stride along the last
  int64_t input_stride[2];  // from row to row, from step to step
  const void* bias;         // [4H], or nullptr
  const void* weight_ih;    // [4H, K], contiguous: read where the weights are plain
  const void* packed;     // of LstmPackArgs; nullptr, where they are plain: the next two are read,
                          // and packed within the call where gates are kept
  const void* weight_hh;  // [4H, P], contiguous, or nullptr
  const void* weight_hr;  // [P, H], contiguous, or nullptr
  const void* h0;         // [B, P]
  const void* c0;         // [B, H]
  const void* mask;       // [B, P] in the type of the arithmetic, or nullptr
  void* output;           // [B, T, P]
  int64_t output_stride[2];
  void* h;               // [B, P]
  void* c;               // [B, H]
  void* kept_gates;      // [B, T, 4H], or nullptr
  void* kept_cells;      // [B, T, H], or nullptr
  void* kept_projected;  // [B, T, P], or nullptr
  bool reverse;
};

struct LstmForwardArgs {
  LstmSizes sizes;
  WeightType weight;
  int count;
  LstmForwardDirection directions[2];
};

struct LstmBackwardDirection {
  const void* grad_output;  // [B, T, P], unit stride along the last
  int64_t grad_output_stride[2];
  const void* grad_h;     // [B, P]
  const void* grad_c;     // [B, H]
  const void* weight_hh;  // [4H, P], contiguous
  const void* weight_hr;  // [P, H], contiguous, or nullptr
  const void* packed;     // set within the call
  const void* c0;
  const void* mask;
  const void* kept_gates;
  const void* kept_cells;
  const void* kept_projected;  // or nullptr: the projected state was not clipped
  void* dgates;                // [B, T, 4H]
  void* dprojected;            // [B, T, P], or nullptr
  void* full;                  // what the projection read, o * tanh(c) [B, T, H], or nullptr
  void* dh0;
  void* dc0;
  bool reverse;
};

struct LstmBackwardArgs {
  LstmSizes sizes;
  int count;
  LstmBackwardDirection directions[2];
};

}  // namespace ctxfast
