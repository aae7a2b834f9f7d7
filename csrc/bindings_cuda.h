// What the files of the module ctxfast._C_cuda share.
#pragma once

#include <pybind11/pybind11.h>

namespace ctxfast {
namespace cuda {

namespace py = pybind11;

// None, or the text of the CUDA error.
py::object to_python(int error);

void bind_lstm(py::module_& m);

}  // namespace cuda
}  // namespace ctxfast
