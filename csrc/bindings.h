// Shared by the sources of module ctxfast._C.
#pragma once

#include <pybind11/pybind11.h>

#include "status.h"

namespace ctxfast {

namespace py = pybind11;

template <typename T = void>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

inline py::object to_python(const Status& status) {
  if (status.code == kOk) return py::none();
  return py::make_tuple(int(status.code), status.argument, status.value);
}

void bind_attention(py::module_& m);
void bind_certificate(py::module_& m);
void bind_char_cnn(py::module_& m);
void bind_encoder_layer(py::module_& m);
void bind_layer_norm(py::module_& m);
void bind_linear(py::module_& m);
void bind_lstm(py::module_& m);
void bind_mask(py::module_& m);
void bind_matrix_product(py::module_& m);

}  // namespace ctxfast
