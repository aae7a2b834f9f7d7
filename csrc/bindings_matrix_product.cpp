// Matrix products of training.
#include "bindings.h"
#include "dispatch.h"

namespace ctxfast {
namespace {

py::object matrix_product(int dtype, std::tuple<uintptr_t, int64_t, int64_t> a,
                          std::tuple<uintptr_t, int64_t, int64_t> b, uintptr_t bias, uintptr_t c,
                          uintptr_t row_sums, int64_t rows, int64_t columns, int64_t depth,
                          int float_parts, int threads) {
  const auto [a_address, a_row, a_depth] = a;
  const auto [b_address, b_depth, b_column] = b;
  const MatrixProductArgs args = {Dtype(dtype),
                                  address(a_address),
                                  a_row,
                                  a_depth,
                                  address(b_address),
                                  b_depth,
                                  b_column,
                                  address(bias),
                                  address(c),
                                  address(row_sums),
                                  rows,
                                  columns,
                                  depth,
                                  float_parts,
                                  threads};
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().matrix_product(args);
  }
  return to_python(status);
}

}  // namespace

void bind_matrix_product(py::module_& m) { m.def("matrix_product", &matrix_product); }

}  // namespace ctxfast
