// BERT's embedding layer in one pass: three table rows are added and normalised, threads over
// tokens.
#include "cpu/kernel_table.h"
#include "cpu/layer_norm.h"
#include "cpu/layer_norm_row.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int64_t kElementsPerPiece = 16384;

CTXFAST_INLINE int64_t id_at(const EmbedLayerNormArgs& args, int table, int64_t row) {
  if (args.ids[table] == nullptr) return table == 2 ? row : 0;
  return args.wide_ids[table] ? static_cast<const int64_t*>(args.ids[table])[row]
                              : static_cast<const int32_t*>(args.ids[table])[row];
}

// All ids are checked before anything is read or written.
Status check_ids(const EmbedLayerNormArgs& args) {
  Status status;
  for (int table = 0; table < 3; ++table) {
    if (args.tables[table] == nullptr) continue;
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t id = id_at(args, table, row);
      if (id < 0 || id >= args.table_rows[table]) {
        status.code = kIndexOutOfRange;
        status.argument = table;
        status.value = id;
        return status;
      }
    }
  }
  return status;
}

template <typename Storage, typename Parameter>
Status run(const EmbedLayerNormArgs& args) {
  using T = Compute<Storage>;
  constexpr int lanes = kLanes<T>;
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
      bool started = false;
      for (int table = 0; table < 3; ++table) {
        if (args.tables[table] == nullptr) continue;
        const Storage* values =
            static_cast<const Storage*>(args.tables[table]) + id_at(args, table, row) * n;
        int64_t i = 0;
        if (!started) {
          for (; i + lanes <= n; i += lanes) store(sum + i, load(values + i));
          if (i < n) store_n(sum + i, load_n(values + i, n - i), n - i);
        } else {
          for (; i + lanes <= n; i += lanes) store(sum + i, load(sum + i) + load(values + i));
          if (i < n) store_n(sum + i, load_n(sum + i, n - i) + load_n(values + i, n - i), n - i);
        }
        started = true;
      }
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
  if (args.dtype == kFloat32 && args.parameter_dtype == kFloat32) return run<float, float>(args);
  if (args.dtype == kFloat64 && args.parameter_dtype == kFloat64) return run<double, double>(args);
  if (args.dtype == kBfloat16 && args.parameter_dtype == kBfloat16)
    return run<bfloat16, bfloat16>(args);
  if (args.dtype == kBfloat16 && args.parameter_dtype == kFloat32)
    return run<bfloat16, float>(args);
  Status unsupported;
  unsupported.code = kUnsupportedDtype;
  return unsupported;
}

CTXFAST_NAMESPACE_END
