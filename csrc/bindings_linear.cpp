// What surrounds the matrix products of the GEMM library: losses, quantisation.
#include "bindings.h"
#include "dispatch.h"

namespace ctxfast {
namespace {

py::object cross_entropy(int dtype, uintptr_t logits, uintptr_t labels, uintptr_t losses,
                         int64_t rows, int64_t columns, double scale, bool gradient, int threads) {
  const CrossEntropyArgs args = {Dtype(dtype),
                                 address(logits),
                                 address<const int64_t>(labels),
                                 address(losses),
                                 rows,
                                 columns,
                                 scale,
                                 gradient,
                                 threads};
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().cross_entropy(args);
  }
  return to_python(status);
}

py::object quantize_rows(int dtype, uintptr_t input, int64_t input_stride, uintptr_t output,
                         uintptr_t scales, int64_t rows, int64_t columns, int threads) {
  const QuantizeRowsArgs args = {
      Dtype(dtype),           address(input), input_stride, address<int8_t>(output),
      address<float>(scales), rows,           columns,      threads};
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().quantize_rows(args);
  }
  return to_python(status);
}

py::object dequantize_rows(int dtype, uintptr_t sums, uintptr_t row_scales, uintptr_t column_scales,
                           uintptr_t bias, uintptr_t output, int64_t rows, int64_t columns,
                           int activation, int threads) {
  const DequantizeArgs args = {Dtype(dtype),
                               address<const int32_t>(sums),
                               address<const float>(row_scales),
                               address<const float>(column_scales),
                               address<const float>(bias),
                               address(output),
                               rows,
                               columns,
                               Activation(activation),
                               threads};
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().dequantize_rows(args);
  }
  return to_python(status);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("cross_entropy", &cross_entropy);
  m.def("quantize_rows", &quantize_rows);
  m.def("dequantize_rows", &dequantize_rows);
}

}  // namespace ctxfast
