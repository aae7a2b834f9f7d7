// Linear layers and their losses.
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

py::object linear(int dtype, uintptr_t input, int64_t input_stride, uintptr_t panels,
                  uintptr_t weight, uintptr_t bias, uintptr_t residual, int64_t residual_stride,
                  uintptr_t output, int64_t rows, int64_t depth, int64_t columns, int activation,
                  int float_parts, int threads) {
  const LinearArgs args = {
      Dtype(dtype),  address(input),    input_stride,           address(panels), address(weight),
      address(bias), address(residual), residual_stride,        address(output), rows,
      depth,         columns,           Activation(activation), float_parts,     threads};
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().linear(args);
  }
  return to_python(status);
}

py::object linear_int8(int input_dtype, int output_dtype, uintptr_t input, int64_t input_stride,
                       uintptr_t panels, uintptr_t scales, uintptr_t sums, uintptr_t bias,
                       uintptr_t output, int64_t rows, int64_t depth, int64_t columns,
                       int activation, int threads) {
  const LinearInt8Args args = {Dtype(input_dtype),
                               Dtype(output_dtype),
                               address(input),
                               input_stride,
                               address<const int8_t>(panels),
                               address<const float>(scales),
                               address<const float>(sums),
                               address<const float>(bias),
                               address(output),
                               rows,
                               depth,
                               columns,
                               Activation(activation),
                               threads};
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().linear_int8(args);
  }
  return to_python(status);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("cross_entropy", &cross_entropy);
  m.def("linear", &linear);
  m.def("linear_int8", &linear_int8);
}

}  // namespace ctxfast
