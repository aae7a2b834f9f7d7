// From the sums of a linear layer to its results.
#pragma once

#include "cpu/gelu.h"
#include "cpu/linear.h"
#include "cpu/rounded.h"

CTXFAST_NAMESPACE_BEGIN

// output[rows, columns from `column` on] = activation(sums + bias) + residual
template <typename T, Activation kActivation>
void finish_linear(const LinearArgs& args, const float* sums, int64_t ldc, int64_t row,
                   int64_t rows, int64_t column, int64_t columns) {
  const auto finish = [&](int64_t r, int64_t i, int64_t left) {
    Vec<float> y = load(sums + r * ldc + i);
    if (args.bias != nullptr) y += load_n(static_cast<const T*>(args.bias) + column + i, left);
    y = activate<T, kActivation>(y);
    if (args.residual != nullptr)
      y += load_n(
          static_cast<const T*>(args.residual) + (row + r) * args.residual_stride + column + i,
          left);
    store_rounded(static_cast<T*>(args.output) + (row + r) * args.columns + column + i, y, left);
  };
  for (int64_t r = 0; r < rows; ++r) {
    int64_t i = 0;
    for (; i + kLanes<float> <= columns; i += kLanes<float>) finish(r, i, kLanes<float>);
    if (i < columns) finish(r, i, columns - i);
  }
}

using LinearFinish = void (*)(const LinearArgs&, const float*, int64_t, int64_t, int64_t, int64_t,
                              int64_t);

template <typename T>
LinearFinish finish_for(Activation activation) {
  if (activation == kGelu) return finish_linear<T, kGelu>;
  if (activation == kGeluTanh) return finish_linear<T, kGeluTanh>;
  if (activation == kTanh) return finish_linear<T, kTanh>;
  return finish_linear<T, kNone>;
}

CTXFAST_NAMESPACE_END
