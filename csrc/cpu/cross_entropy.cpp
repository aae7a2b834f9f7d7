// Softmax cross entropy of rows of logits and its gradient in place (the softmax minus the one-hot
// label), threads over rows.
#include "cpu/cross_entropy.h"

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "cpu/simd_math.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int64_t kElementsPerPiece = 16384;
constexpr int kSums = 4;  // independent partial sums, which hide the latency of the additions

// Lanes past the end hold the lowest value, which neither a maximum nor a sum of exponentials sees.
template <typename Storage, typename T = Compute<Storage>>
CTXFAST_INLINE Vec<T> load_or_lowest(const Storage* p, int64_t n) {
  const T lowest = -__builtin_huge_val();
  return first_lanes<T>(n) ? load_n(p, n) : splat<T>(lowest);
}

template <typename Storage, typename T = Compute<Storage>>
CTXFAST_INLINE T largest_of(const Storage* row, int64_t n) {
  constexpr int lanes = kLanes<T>;
  Vec<T> best[kSums];
  for (int u = 0; u < kSums; ++u) best[u] = splat<T>(T(-__builtin_huge_val()));
  int64_t i = 0;
  for (; i + kSums * lanes <= n; i += kSums * lanes)
    for (int u = 0; u < kSums; ++u) best[u] = vmax(load(row + i + u * lanes), best[u]);
  for (; i < n; i += lanes) best[0] = vmax(load_or_lowest(row + i, n - i), best[0]);
  return reduce_max(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
}

template <typename Storage, typename T = Compute<Storage>>
CTXFAST_INLINE T sum_of_exponentials(const Storage* row, T largest, int64_t n) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * lanes <= n; i += kSums * lanes)
    for (int u = 0; u < kSums; ++u) sum[u] += exp<T>(load(row + i + u * lanes) - largest);
  for (; i < n; i += lanes) sum[0] += exp<T>(load_or_lowest(row + i, n - i) - largest);
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <typename Storage>
Status run(const CrossEntropyArgs& args) {
  using T = Compute<Storage>;
  constexpr int lanes = kLanes<T>;
  const int64_t n = args.columns;
  parallel_for(args.threads, args.rows, kElementsPerPiece / n, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      Storage* row = static_cast<Storage*>(args.logits) + r * n;
      const int64_t label = args.labels[r];
      const T chosen = to_compute(row[label]);
      const T largest = largest_of(row, n);  // the maximum may miss a NaN, the sum does not
      const T sum = sum_of_exponentials(row, largest, n);
      static_cast<T*>(args.losses)[r] = log<T>(splat<T>(sum))[0] + (largest - chosen);
      if (!args.gradient) continue;
      const T scale = T(args.scale), factor = scale / sum;
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) store(row + i, exp<T>(load(row + i) - largest) * factor);
      if (i < n) store_n(row + i, exp<T>(load_n(row + i, n - i) - largest) * factor, n - i);
      store_one(row + label, (exp<T>(splat<T>(chosen - largest))[0] / sum - T(1)) * scale);
    }
  });
  return Status();
}

}  // namespace

Status cross_entropy(const CrossEntropyArgs& args) {
  if (args.dtype == kFloat32) return run<float>(args);
  if (args.dtype == kFloat64) return run<double>(args);
  if (args.dtype == kBfloat16) return run<bfloat16>(args);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
