// Gradients of BERT's embedding layer: of each row first, then into the tables. A thread owns some
// columns of all tables and adds the rows in order, so neither atomics nor sorting are needed and
// the result does not depend on the number of threads.
#include "cpu/embed_layer_norm_sum.h"
#include "cpu/kernel_table.h"
#include "cpu/layer_norm_gradient.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int64_t kOwnedBytes = 256;  // whole cache lines, so that threads do not share any

template <typename T>
CTXFAST_INLINE void add_to_tables(const EmbedLayerNormBackwardArgs& args, int64_t first,
                                  int64_t columns) {
  const EmbedLayerNormArgs& forward = args.forward;
  const int64_t n = forward.columns;
  for (int64_t row = 0; row < forward.rows; ++row) {
    const T* gradient = static_cast<const T*>(args.rows) + row * n + first;
    for (int table = 0; table < 3; ++table) {
      if (args.dtables[table] == nullptr) continue;
      const int64_t id = id_at(forward, table, row);
      if (table == 0 && id == args.padding_idx) continue;
      T* total = static_cast<T*>(args.dtables[table]) + id * n + first;
      for (int64_t i = 0; i < columns; i += kLanes<T>)
        store_n(total + i, load_n(total + i, columns - i) + load_n(gradient + i, columns - i),
                columns - i);
    }
  }
}

template <typename Storage, typename Parameter>
Status run(const EmbedLayerNormBackwardArgs& args) {
  using T = Compute<Storage>;
  const EmbedLayerNormArgs& forward = args.forward;
  const int64_t n = forward.columns;
  rows_with_parameter_sums<T>(
      forward.threads, forward.rows, n, args.partials, args.dweight, args.dbias,
      [&](int64_t row, T* dweight, T* dbias) {
        T* values = static_cast<T*>(args.rows) + row * n;
        sum_embeddings<Storage>(forward, row, values);
        row_gradient<Storage, Parameter>(
            values, static_cast<const Storage*>(args.grad_output) + row * args.grad_stride,
            static_cast<const Parameter*>(forward.weight), forward.eps, dweight, dbias, n);
      });
  const int threads = forward.rows * n < 2 * kElementsPerPiece ? 1 : forward.threads;
  parallel_for(threads, n, kOwnedBytes / sizeof(T),
               [&](int64_t first, int64_t last) { add_to_tables<T>(args, first, last - first); });
  return Status();
}

}  // namespace

Status embed_layer_norm_backward(const EmbedLayerNormBackwardArgs& args) {
  const Status status = check_ids(args.forward);
  if (status.code != kOk) return status;
  return for_dtypes(args.forward.dtype, args.forward.parameter_dtype,
                    [&](auto storage, auto parameter) {
                      return run<decltype(storage), decltype(parameter)>(args);
                    });
}

CTXFAST_NAMESPACE_END
