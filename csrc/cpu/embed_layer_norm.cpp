// BERT's embedding layer in one pass: three table rows are added and normalised, threads over
// tokens.
#include "cpu/embed_layer_norm_sum.h"
#include "cpu/kernel_table.h"
#include "cpu/layer_norm_row.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

template <typename Storage, typename Parameter>
Status run(const EmbedLayerNormArgs& args) {
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
      sum_embeddings<Storage>(args, row, sum);
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

Status embed_layer_norm(const EmbedLayerNormArgs& args) {
  const Status status = check_ids(args);
  if (status.code != kOk) return status;
  return for_dtypes(args.dtype, args.parameter_dtype, [&](auto storage, auto parameter) {
    return run<decltype(storage), decltype(parameter)>(args);
  });
}

CTXFAST_NAMESPACE_END
