// Matrix products and what surrounds those of the GEMM library: losses.
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

py::object matrix_product(int dtype, int64_t rows, int64_t depth, int64_t columns, uintptr_t a,
                          int64_t a_row, int64_t a_depth, uintptr_t b, int64_t b_depth, uintptr_t c,
                          int threads) {
  const MatrixProductArgs args = {Dtype(dtype),     rows,       depth,   columns,    address(a),
                                  {a_row, a_depth}, address(b), b_depth, address(c), threads};
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().matrix_product(args);
  }
  return to_python(status);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("cross_entropy", &cross_entropy);
  m.def("matrix_product", &matrix_product);
}

}  // namespace ctxfast
