// Normalisation of one row (Ba, Kiros, Hinton 2016): y = (x - mean) / sqrt(variance + eps) * weight
// + bias.
//
// The row is summed up once into a working copy; mean and variance are two passes over that copy,
// which is in the first cache level, so that the variance does not cancel. Statistics are float, or
// double for double.
#pragma once

#include "cpu/parallel.h"
#include "cpu/rounded.h"
#include "status.h"

CTXFAST_NAMESPACE_BEGIN

// Calls run(Storage(), Parameter()) with the types of a dtype of the rows and one of the
// parameters.
template <typename Run>
CTXFAST_INLINE Status for_dtypes(Dtype dtype, Dtype parameter_dtype, const Run& run) {
  if (dtype == kFloat32 && parameter_dtype == kFloat32) return run(float(), float());
  if (dtype == kFloat64 && parameter_dtype == kFloat64) return run(double(), double());
  if (dtype == kBfloat16 && parameter_dtype == kBfloat16) return run(bfloat16(), bfloat16());
  if (dtype == kBfloat16 && parameter_dtype == kFloat32) return run(bfloat16(), float());
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

// Elements below which waking another thread costs more than it brings.
constexpr int64_t kElementsPerPiece = 16384;

constexpr int kUnroll = 4;  // independent partial sums, which hide the latency of the additions

template <typename T>
CTXFAST_INLINE T sum_of(const T* values, int64_t n) {
  Vec<T> partial[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes<T> <= n; i += kUnroll * kLanes<T>)
    for (int u = 0; u < kUnroll; ++u) partial[u] += load(values + i + u * kLanes<T>);
  for (; i < n; i += kLanes<T>) partial[0] += load_n(values + i, n - i);
  return reduce_add((partial[0] + partial[1]) + (partial[2] + partial[3]));
}

template <typename T>
CTXFAST_INLINE T sum_of_squared_distances(const T* values, T mean, int64_t n) {
  const Vec<T> center = splat<T>(mean);
  Vec<T> partial[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes<T> <= n; i += kUnroll * kLanes<T>)
    for (int u = 0; u < kUnroll; ++u) {
      const Vec<T> distance = load(values + i + u * kLanes<T>) - center;
      partial[u] += distance * distance;
    }
  for (; i < n; i += kLanes<T>) {
    Vec<T> distance = load_n(values + i, n - i) - center;
    distance = first_lanes<T>(n - i) ? distance : Vec<T>{};
    partial[0] += distance * distance;
  }
  return reduce_add((partial[0] + partial[1]) + (partial[2] + partial[3]));
}

template <typename T>
struct RowStatistics {
  T mean, rstd;
};

template <typename T>
CTXFAST_INLINE RowStatistics<T> row_statistics(const T* values, double eps, int64_t n) {
  const T mean = sum_of(values, n) / T(n);
  // eps joins in double: 1e-12 is far below the resolution of a float variance, but not of one that
  // is 0.
  const double variance = double(sum_of_squared_distances(values, mean, n)) / double(n);
  return {mean, T(1.0 / __builtin_sqrt(variance + eps))};
}

// values: the summed row, n elements; output: the stored row.
template <typename Storage, typename Parameter>
CTXFAST_INLINE void normalize_row(const Compute<Storage>* values, const Parameter* weight,
                                  const Parameter* bias, double eps, Storage* output, int64_t n) {
  using T = Compute<Storage>;
  const RowStatistics<T> row = row_statistics(values, eps, n);
  const Vec<T> scale = splat<T>(row.rstd), center = splat<T>(row.mean);
  const auto one = [&](int64_t i, auto full) {
    const auto part = [&](const Parameter* p) { return full ? load(p + i) : load_n(p + i, n - i); };
    Vec<T> y = (full ? load(values + i) : load_n(values + i, n - i)) - center;
    y = y * scale;
    if (weight != nullptr) y = y * part(weight);
    if (bias != nullptr) y = y + part(bias);
    store_rounded(output + i, y, full ? kLanes<T> : n - i);
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) one(i, true);
  if (i < n) one(i, false);
}

// Rows [args.rows, args.columns], each summed up by sum(row, values), normalised into args.output;
// threads over rows.
template <typename Storage, typename Parameter, typename Args, typename Sum>
Status normalize_rows(const Args& args, const Sum& sum) {
  using T = Compute<Storage>;
  const int64_t n = args.columns;
  int32_t failed = 0;
  const int64_t grain = kElementsPerPiece / (n > 0 ? n : 1);
  parallel_for(args.threads, args.rows, grain, [&](int64_t first, int64_t last) {
    T* values = static_cast<T*>(thread_scratch(sizeof(T) * n));
    if (values == nullptr) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t row = first; row < last; ++row) {
      sum(row, values);
      normalize_row<Storage, Parameter>(values, static_cast<const Parameter*>(args.weight),
                                        static_cast<const Parameter*>(args.bias), args.eps,
                                        static_cast<Storage*>(args.output) + row * n, n);
    }
  });
  Status status;
  if (failed) status.code = kOutOfMemory;
  return status;
}

CTXFAST_NAMESPACE_END
