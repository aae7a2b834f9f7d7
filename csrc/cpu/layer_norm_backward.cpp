// Gradients of dropout + residual + layer normalisation in one pass over memory; the row that was
// normalised is formed again from input, residual and the dropout coordinates.
#include "cpu/kernel_table.h"
#include "cpu/layer_norm_gradient.h"
#include "cpu/layer_norm_sum.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

template <typename Storage, typename Parameter>
Status run(const AddLayerNormBackwardArgs& args) {
  using T = Compute<Storage>;
  const AddLayerNormArgs& forward = args.forward;
  const int64_t n = forward.columns;
  int32_t failed = 0;
  rows_with_parameter_sums<T>(
      forward.threads, forward.rows, n, args.partials, args.dweight, args.dbias,
      [&](int64_t row, T* dweight, T* dbias) {
        T* values = static_cast<T*>(thread_scratch(sizeof(T) * n));
        if (values == nullptr) {
          __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
          return;
        }
        sum_row<Storage>(forward, row, values);
        row_gradient<Storage, Parameter>(
            values, static_cast<const Storage*>(args.grad_output) + row * args.grad_stride,
            static_cast<const Parameter*>(forward.weight), forward.eps, dweight, dbias, n);
        drop_row<Storage>(forward, row, values, static_cast<Storage*>(args.dinput) + row * n);
        if (args.dresidual == nullptr) return;
        Storage* dresidual = static_cast<Storage*>(args.dresidual) + row * n;
        for (int64_t i = 0; i < n; i += kLanes<T>)
          store_n(dresidual + i, load_n(values + i, n - i), n - i);
      });
  Status status;
  if (failed) status.code = kOutOfMemory;
  return status;
}

}  // namespace

Status add_layer_norm_backward(const AddLayerNormBackwardArgs& args) {
  return for_dtypes(args.forward.dtype, args.forward.parameter_dtype,
                    [&](auto storage, auto parameter) {
                      return run<decltype(storage), decltype(parameter)>(args);
                    });
}

CTXFAST_NAMESPACE_END
