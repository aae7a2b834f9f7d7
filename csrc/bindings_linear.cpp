// What surrounds the matrix products of the GEMM library: losses.
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

}  // namespace

void bind_linear(py::module_& m) { m.def("cross_entropy", &cross_entropy); }

}  // namespace ctxfast
