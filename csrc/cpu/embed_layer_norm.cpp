// BERT's embedding layer in one pass: three table rows are added and normalised, threads over
// tokens.
#include "cpu/embed_layer_norm_sum.h"
#include "cpu/kernel_table.h"
#include "cpu/layer_norm_row.h"

CTXFAST_NAMESPACE_BEGIN

Status embed_layer_norm(const EmbedLayerNormArgs& args) {
  const Status status = check_ids(args);
  if (status.code != kOk) return status;
  return for_dtypes(args.dtype, args.parameter_dtype, [&](auto storage, auto parameter) {
    using Storage = decltype(storage);
    return normalize_rows<Storage, decltype(parameter)>(
        args,
        [&](int64_t row, Compute<Storage>* values) { sum_embeddings<Storage>(args, row, values); });
  });
}

CTXFAST_NAMESPACE_END
