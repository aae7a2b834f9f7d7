// The LSTM in the module ctxfast._C_cuda.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings_cuda.h"
#include "cuda/exchange_benchmark.h"
#include "cuda/lstm_arguments.h"
#include "cuda/lstm_launch.h"

namespace ctxfast {
namespace cuda {
namespace {

using Integers = std::vector<int64_t>;

std::vector<PersistentKernel> all_kernels() {
  std::vector<PersistentKernel> kernels;
  for (auto* table : {&persistent_kernels_bfloat16, &persistent_kernels_float16}) {
    int count = 0;
    const PersistentKernel* first = table(&count);
    kernels.insert(kernels.end(), first, first + count);
  }
  return kernels;
}

// (dtype, hidden, features, cluster, clusters, rows, bytes of shared memory forward and backward)
// of each.
py::list kernels() {
  py::list list;
  for (const PersistentKernel& k : all_kernels()) {
    list.append(py::make_tuple(int(k.dtype), k.hidden, k.features, k.cluster, k.clusters, k.rows,
                               k.forward_shared, k.backward_shared));
  }
  return list;
}

// The number of groups of blocks that the current device holds, or the text of an error.
py::object groups(int index, bool backward) {
  int count = 0;
  const int error = persistent_groups(all_kernels().at(index), backward, &count);
  return error == 0 ? py::object(py::int_(count)) : to_python(error);
}

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

py::object persistent(int index, bool backward, const Integers& values, double cell_clip,
                      double proj_clip, int slots, const Integers& exchange, uintptr_t stream) {
  const PersistentKernel kernel = all_kernels().at(index);
  const Lstm lstm = lstm_arguments(values.data(), cell_clip, proj_clip);
  const Exchange words = {pointer<float>(exchange.at(0)), pointer<uint32_t>(exchange.at(1)),
                          pointer<uint32_t>(exchange.at(2)), pointer<uint32_t>(exchange.at(3)),
                          uint64_t(exchange.at(4))};
  int error;
  {
    py::gil_scoped_release released;
    error = launch_persistent(kernel, backward, lstm, words, slots, pointer<void>(stream));
  }
  return to_python(error);
}

py::object stepwise(int dtype, bool backward, const Integers& values, double cell_clip,
                    double proj_clip, uintptr_t scratch, uintptr_t stream) {
  const auto launch = dtype == kLstmFloat32    ? &launch_stepwise_float32
                      : dtype == kLstmBfloat16 ? &launch_stepwise_bfloat16
                                               : &launch_stepwise_float16;
  const Lstm lstm = lstm_arguments(values.data(), cell_clip, proj_clip);
  int error;
  {
    py::gil_scoped_release released;
    error = launch(lstm, pointer<void>(scratch), backward, pointer<void>(stream));
  }
  return to_python(error);
}

py::list exchange_loops() {
  py::list names;
  for (int i = 0; exchange_loop_name(i); ++i) names.append(exchange_loop_name(i));
  return names;
}

py::object exchange_loop(int index, const Integers& exchange, int count, uintptr_t stream) {
  const Exchange words = {pointer<float>(exchange.at(0)), pointer<uint32_t>(exchange.at(1)),
                          pointer<uint32_t>(exchange.at(2)), pointer<uint32_t>(exchange.at(3)),
                          uint64_t(exchange.at(4))};
  return to_python(launch_exchange_loop(index, words, count, pointer<void>(stream)));
}

}  // namespace

void bind_lstm(py::module_& m) {
  m.def("lstm_kernels", &kernels);
  m.def("lstm_groups", &groups);
  m.def("lstm_persistent", &persistent);
  m.def("lstm_stepwise", &stepwise);
  m.def("exchange_loops", &exchange_loops);
  m.def("exchange_loop", &exchange_loop);
}

}  // namespace cuda
}  // namespace ctxfast
