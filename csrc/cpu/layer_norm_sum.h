// The row that add_layer_norm normalises: dropout(input) + residual, and the dropout of its
// gradient.
#pragma once

#include "cpu/layer_norm.h"
#include "cpu/philox.h"

CTXFAST_NAMESPACE_BEGIN

constexpr int64_t kHiddenHead = 0xffffffff;

// Calls body(i, bits) for every vector of lanes of a row: the lowest bits say which lanes are kept.
template <typename T, typename Body>
CTXFAST_INLINE void for_kept_lanes(const RowDropout& dropout, int64_t row, int64_t n,
                                   const Body& body) {
  for (int64_t block = 0; block * 64 < n; ++block) {
    const uint64_t kept =
        kept_columns(uint64_t(dropout.seed), dropout.threshold, block, dropout.positions[row],
                     kHiddenHead, dropout.sequence_ids[row]);
    const int64_t end = block * 64 + 64 < n ? block * 64 + 64 : n;
    for (int64_t i = block * 64; i < end; i += kLanes<T>) body(i, kept >> (i - block * 64));
  }
}

template <typename Storage, typename T = Compute<Storage>>
CTXFAST_INLINE void sum_row(const AddLayerNormArgs& args, int64_t row, T* sum) {
  const int64_t n = args.columns;
  const Storage* input = static_cast<const Storage*>(args.input) + row * args.input_stride;
  const Storage* residual = args.residual == nullptr ? nullptr
                                                     : static_cast<const Storage*>(args.residual) +
                                                           row * args.residual_stride;
  const auto finish = [&](int64_t i, Vec<T> x) {
    if (residual != nullptr) x += load_n(residual + i, n - i);
    store_n(sum + i, x, n - i);
  };
  if (args.dropout.sequence_ids == nullptr) {
    for (int64_t i = 0; i < n; i += kLanes<T>) finish(i, load_n(input + i, n - i));
    return;
  }
  const Vec<T> scale = splat<T>(T(args.dropout.scale));
  for_kept_lanes<T>(args.dropout, row, n, [&](int64_t i, uint64_t bits) {
    finish(i, keep_lanes(load_n(input + i, n - i) * scale, bits));
  });
}

// dinput = dropout(gradient of the sum)
template <typename Storage, typename T = Compute<Storage>>
CTXFAST_INLINE void drop_row(const AddLayerNormArgs& args, int64_t row, const T* gradient,
                             Storage* dinput) {
  const int64_t n = args.columns;
  if (args.dropout.sequence_ids == nullptr) {
    for (int64_t i = 0; i < n; i += kLanes<T>)
      store_n(dinput + i, load_n(gradient + i, n - i), n - i);
    return;
  }
  const Vec<T> scale = splat<T>(T(args.dropout.scale));
  for_kept_lanes<T>(args.dropout, row, n, [&](int64_t i, uint64_t bits) {
    store_n(dinput + i, keep_lanes(load_n(gradient + i, n - i) * scale, bits), n - i);
  });
}

CTXFAST_NAMESPACE_END
