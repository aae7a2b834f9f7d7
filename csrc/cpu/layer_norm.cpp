// Residual addition and layer normalisation in one pass over memory, threads over rows.
#include "cpu/layer_norm.h"

#include "cpu/kernel_table.h"
#include "cpu/layer_norm_row.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int64_t kElementsPerPiece =
    16384;  // below this, waking another thread costs more than it brings

template <typename Storage>
CTXFAST_INLINE void add_rows(const Storage* input, const Storage* residual, Compute<Storage>* sum,
                             int64_t n) {
  constexpr int lanes = kLanes<Compute<Storage>>;
  int64_t i = 0;
  if (residual == nullptr) {
    for (; i + lanes <= n; i += lanes) store(sum + i, load(input + i));
    if (i < n) store_n(sum + i, load_n(input + i, n - i), n - i);
  } else {
    for (; i + lanes <= n; i += lanes) store(sum + i, load(input + i) + load(residual + i));
    if (i < n) store_n(sum + i, load_n(input + i, n - i) + load_n(residual + i, n - i), n - i);
  }
}

template <typename Storage, typename Parameter>
Status run(const AddLayerNormArgs& args) {
  using T = Compute<Storage>;
  const int64_t n = args.columns;
  int32_t failed = 0;
  const int64_t grain = kElementsPerPiece / (n > 0 ? n : 1);
  parallel_for(args.threads, args.rows, grain, [&](int64_t first, int64_t last) {
    T* sum = static_cast<T*>(thread_scratch(sizeof(T) * n));
    if (sum == nullptr) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t row = first; row < last; ++row) {
      const Storage* input = static_cast<const Storage*>(args.input) + row * args.input_stride;
      const Storage* residual =
          args.residual == nullptr
              ? nullptr
              : static_cast<const Storage*>(args.residual) + row * args.residual_stride;
      add_rows(input, residual, sum, n);
      normalize_row<Storage, Parameter>(sum, static_cast<const Parameter*>(args.weight),
                                        static_cast<const Parameter*>(args.bias), args.eps,
                                        static_cast<Storage*>(args.output) + row * n, n);
    }
  });
  Status status;
  if (failed) status.code = kOutOfMemory;
  return status;
}

}  // namespace

Status add_layer_norm(const AddLayerNormArgs& args) {
  if (args.dtype == kFloat32 && args.parameter_dtype == kFloat32) return run<float, float>(args);
  if (args.dtype == kFloat64 && args.parameter_dtype == kFloat64) return run<double, double>(args);
  if (args.dtype == kBfloat16 && args.parameter_dtype == kBfloat16)
    return run<bfloat16, bfloat16>(args);
  if (args.dtype == kBfloat16 && args.parameter_dtype == kFloat32)
    return run<bfloat16, float>(args);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
