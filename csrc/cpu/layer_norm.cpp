// Dropout, residual addition and layer normalisation (Ba, Kiros, Hinton 2016) in one pass over
// memory, threads over rows.
#include "cpu/layer_norm.h"

#include "cpu/kernel_table.h"
#include "cpu/layer_norm_row.h"
#include "cpu/layer_norm_sum.h"

CTXFAST_NAMESPACE_BEGIN

Status add_layer_norm(const AddLayerNormArgs& args) {
  return for_dtypes(args.dtype, args.parameter_dtype, [&](auto storage, auto parameter) {
    using Storage = decltype(storage);
    return normalize_rows<Storage, decltype(parameter)>(
        args, [&](int64_t row, Compute<Storage>* values) { sum_row<Storage>(args, row, values); });
  });
}

CTXFAST_NAMESPACE_END
