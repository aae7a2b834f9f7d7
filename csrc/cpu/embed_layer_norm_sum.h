// The row that embed_layer_norm normalises: one row of each of up to three tables, added.
#pragma once

#include "cpu/layer_norm.h"
#include "cpu/simd.h"

CTXFAST_NAMESPACE_BEGIN

CTXFAST_INLINE int64_t id_at(const EmbedLayerNormArgs& args, int table, int64_t row) {
  if (args.ids[table] == nullptr) return table == 2 ? row : 0;
  return args.wide_ids[table] ? static_cast<const int64_t*>(args.ids[table])[row]
                              : static_cast<const int32_t*>(args.ids[table])[row];
}

// All ids are checked before anything is read or written.
CTXFAST_INLINE Status check_ids(const EmbedLayerNormArgs& args) {
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

template <typename Storage, typename T = Compute<Storage>>
CTXFAST_INLINE void sum_embeddings(const EmbedLayerNormArgs& args, int64_t row, T* sum) {
  const int64_t n = args.columns;
  bool started = false;
  for (int table = 0; table < 3; ++table) {
    if (args.tables[table] == nullptr) continue;
    const Storage* values =
        static_cast<const Storage*>(args.tables[table]) + id_at(args, table, row) * n;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> x = load_n(values + i, n - i);
      store_n(sum + i, started ? load_n(sum + i, n - i) + x : x, n - i);
    }
    started = true;
  }
}

CTXFAST_NAMESPACE_END
