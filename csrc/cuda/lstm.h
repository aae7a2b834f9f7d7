// The CUDA LSTM: arguments and launches. Addresses are device memory; `T` below is the type of
// input and weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ctxfast {
namespace cuda {

enum LstmDtype : int { kLstmFloat32 = 0, kLstmBfloat16 = 2, kLstmFloat16 = 3 };

// One direction. B rows of T steps, H hidden units, P features of the state.
struct LstmDirection {
  const void* gates;      // T [B, T, 4H]: what input and bias contribute
  const void* weight_hh;  // T [4H, P]; backward: its transpose [P, 4H]
  const void* weight_hr;  // T [P, H]; backward: its transpose [H, P]; null without a projection
  const void* h0;         // T [B, P]
  const float* c0;        // [B, H]
  const float* mask;      // [B, P] or null
  void* output;           // T, row (b, t) at (b * T + t) * output_stride
  void* h;                // T [B, P]
  float* c;               // [B, H]
  void* saved_gates;      // T [B, T, 4H], activated; null: not kept
  float* cells;           // [B, T, H] before the clip; null: not kept
  float* projected;       // [B, T, P] before the clip; null: not kept
  // backward only
  const void* grad_output;  // T, rows as output
  const void* grad_h;       // T [B, P]
  const float* grad_c;      // [B, H]
  void* grad_gates;         // T [B, T, 4H]
  void* grad_projected;     // T [B, T, P]
  float* grad_h0;           // [B, P]
  float* grad_c0;           // [B, H]
  int reverse;
};

struct Lstm {
  LstmDirection directions[2];
  const int64_t* lengths;  // [B], or null: every row has `steps`
  const int64_t* order;    // [B]: rows in the order in which they are taken together, or null
  int64_t output_stride;
  int count, batch, steps, hidden, features;
  float cell_clip, proj_clip;  // infinity: no clip
};

// What blocks that work on the same rows use to exchange sums.
struct Exchange {
  float* sums;          // [slots, depth, C, G, rows, P / C]
  uint32_t* counters;   // one for each slot and rank, kCounterStride words apart; zero at the start
  uint32_t* abandoned;  // one word, zero at the start: set where a wait has lasted too long
  uint32_t* error;      // one word that the host reads
  uint64_t timeout;     // nanoseconds
};
constexpr int kCounterStride = 32;  // 128 bytes: no two counters in one cache line

}  // namespace cuda
}  // namespace ctxfast
