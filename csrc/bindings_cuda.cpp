// Python module ctxfast._C_cuda: the CUDA half. It links the static CUDA runtime, so it loads
// without a driver; what needs one then returns an error. Every operator returns None or the text
// of the CUDA error.
#include "bindings_cuda.h"

#include "cuda/device_info.h"

namespace ctxfast {
namespace cuda {

py::object to_python(int error) {
  if (error == 0) return py::none();
  return py::str(error_text(error));
}

namespace {

py::object count_devices() {
  int count = 0;
  const int error = device_count(&count);
  return error == 0 ? py::object(py::int_(count)) : to_python(error);
}

py::object versions() {
  int driver = 0, runtime = 0;
  const int error = driver_version(&driver, &runtime);
  return error == 0 ? py::object(py::make_tuple(driver, runtime)) : to_python(error);
}

py::object describe(int device) {
  DeviceInfo info;
  const int error = device_info(device, &info);
  if (error != 0) return to_python(error);
  py::dict facts;
  facts["name"] = info.name;
  facts["capability"] = py::make_tuple(info.major, info.minor);
  facts["multiprocessors"] = info.multiprocessors;
  return facts;
}

py::object fill_floats(uintptr_t data, float value, size_t n, uintptr_t stream) {
  py::gil_scoped_release released;
  const int error = fill(reinterpret_cast<float*>(data), value, n, reinterpret_cast<void*>(stream));
  py::gil_scoped_acquire held;
  return to_python(error);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of ctxfast; called by ctxfast.ops only.";
  m.def("device_count", &count_devices);
  m.def("versions", &versions);
  m.def("device_info", &describe);
  m.def("fill", &fill_floats);
  bind_lstm(m);
}

}  // namespace cuda
}  // namespace ctxfast
