// Pointwise arithmetic of the LSTM.
#pragma once

#include "cuda/device.cuh"

namespace ctxfast {
namespace cuda {

// NaN stays NaN.
CTXFAST_DEVICE float clamp(float x, float bound) {
  return x < -bound ? -bound : x > bound ? bound : x;
}

// The gradient of clamp passes at the bounds themselves, and not where x is NaN; without a clip it
// always passes.
CTXFAST_DEVICE float inside(float gradient, float x, float bound) {
  constexpr float kLargest = 3.402823466e38f;
  return (x >= -bound && x <= bound) || bound > kLargest ? gradient : 0.0f;
}

// Fast: an absolute error near 1e-7, far below a unit of the 16-bit types. Otherwise as exact as
// the library's.
template <bool Fast>
CTXFAST_DEVICE float sigmoid(float x) {
  if constexpr (Fast) return fast_reciprocal(1.0f + fast_exp2(-1.44269504f * x));
  return 1.0f / (1.0f + exponential(-x));
}

template <bool Fast>
CTXFAST_DEVICE float tangent(float x) {
  if constexpr (Fast) return 1.0f - 2.0f * fast_reciprocal(1.0f + fast_exp2(2.88539008f * x));
  return hyperbolic_tangent(x);
}

template <class T>
CTXFAST_DEVICE uint32_t pack(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

}  // namespace cuda
}  // namespace ctxfast
