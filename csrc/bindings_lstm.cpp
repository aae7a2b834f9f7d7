// The LSTM operators of module ctxfast._C. Arguments come in tuples, in the order of the structs.
#include <cstring>

#include "bindings.h"
#include "dispatch.h"

namespace ctxfast {
namespace {

void* pointer(const py::tuple& items, size_t k) { return address(items[k].cast<uintptr_t>()); }
int64_t number(const py::tuple& items, size_t k) { return items[k].cast<int64_t>(); }

LstmSizes read_sizes(const py::tuple& numbers, double cell_clip, double proj_clip,
                     uintptr_t lengths, int threads) {
  LstmSizes sizes;
  sizes.dtype = Dtype(number(numbers, 0));
  sizes.batch = number(numbers, 1);
  sizes.steps = number(numbers, 2);
  sizes.inputs = number(numbers, 3);
  sizes.hidden = number(numbers, 4);
  sizes.features = number(numbers, 5);
  sizes.projected = number(numbers, 6) != 0;
  sizes.cell_clip = cell_clip;
  sizes.proj_clip = proj_clip;
  sizes.lengths = address<const int64_t>(lengths);
  sizes.threads = threads;
  return sizes;
}

LstmPackedHeader expected_header(LstmPackArgs args) {
  LstmPackedHeader header = {};
  args.packed = nullptr;
  args.header = &header;
  kernels().lstm_pack(args);
  return header;
}

// Bytes of the packed weights, which are written where `packed` is not 0.
py::object lstm_pack(int dtype, int weight, int64_t inputs, int64_t hidden, int64_t features,
                     bool projected, uintptr_t weight_ih, uintptr_t weight_hh, uintptr_t weight_hr,
                     uintptr_t packed, int threads) {
  LstmPackedHeader header = {};
  const LstmPackArgs args = {Dtype(dtype),
                             WeightType(weight),
                             false,
                             inputs,
                             hidden,
                             features,
                             address(weight_ih),
                             address(weight_hh),
                             address(weight_hr),
                             projected,
                             address(packed),
                             &header,
                             threads};
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().lstm_pack(args);
  }
  if (status.code != kOk) return to_python(status);
  return py::int_(header.bytes);
}

// Whether `bytes` bytes at `packed` were made by lstm_pack for such a forward call.
bool lstm_packed_fits(uintptr_t packed, int64_t bytes, int dtype, int weight, int64_t inputs,
                      int64_t hidden, int64_t features, bool projected) {
  LstmPackArgs args = {};
  args.dtype = Dtype(dtype);
  args.weight = WeightType(weight);
  args.inputs = inputs;
  args.hidden = hidden;
  args.features = features;
  args.projected = projected;
  const LstmPackedHeader header = expected_header(args);
  if (bytes != header.bytes) return false;
  LstmPackedHeader found;
  std::memcpy(&found, address(packed), sizeof found);
  found.ordinary = header.ordinary;
  return std::memcmp(&found, &header, sizeof header) == 0;
}

py::object lstm_forward(const py::tuple& numbers, double cell_clip, double proj_clip,
                        uintptr_t lengths, int weight, const py::list& directions, int threads) {
  LstmForwardArgs args = {};
  args.sizes = read_sizes(numbers, cell_clip, proj_clip, lengths, threads);
  args.weight = WeightType(weight);
  args.count = int(directions.size());
  for (int k = 0; k < args.count; ++k) {
    const py::tuple items = directions[k];
    LstmForwardDirection& way = args.directions[k];
    way.input = pointer(items, 0);
    way.bias = pointer(items, 1);
    way.packed = pointer(items, 2);
    way.h0 = pointer(items, 3);
    way.c0 = pointer(items, 4);
    way.mask = pointer(items, 5);
    way.output = pointer(items, 6);
    way.h = pointer(items, 7);
    way.c = pointer(items, 8);
    way.kept_gates = pointer(items, 9);
    way.kept_cells = pointer(items, 10);
    way.kept_projected = pointer(items, 11);
    for (int s = 0; s < 2; ++s) {
      way.input_stride[s] = number(items, 12 + s);
      way.output_stride[s] = number(items, 14 + s);
    }
    way.reverse = number(items, 16) != 0;
    way.weight_ih = pointer(items, 17);
    way.weight_hh = pointer(items, 18);
    way.weight_hr = pointer(items, 19);
  }
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().lstm_forward(args);
  }
  return to_python(status);
}

py::object lstm_backward(const py::tuple& numbers, double cell_clip, double proj_clip,
                         uintptr_t lengths, const py::list& directions, int threads) {
  LstmBackwardArgs args = {};
  args.sizes = read_sizes(numbers, cell_clip, proj_clip, lengths, threads);
  args.count = int(directions.size());
  for (int k = 0; k < args.count; ++k) {
    const py::tuple items = directions[k];
    LstmBackwardDirection& way = args.directions[k];
    way.grad_output = pointer(items, 0);
    way.grad_h = pointer(items, 1);
    way.grad_c = pointer(items, 2);
    way.weight_hh = pointer(items, 3);
    way.weight_hr = pointer(items, 4);
    way.c0 = pointer(items, 5);
    way.mask = pointer(items, 6);
    way.kept_gates = pointer(items, 7);
    way.kept_cells = pointer(items, 8);
    way.kept_projected = pointer(items, 9);
    way.dgates = pointer(items, 10);
    way.dprojected = pointer(items, 11);
    way.full = pointer(items, 12);
    way.dh0 = pointer(items, 13);
    way.dc0 = pointer(items, 14);
    for (int s = 0; s < 2; ++s) way.grad_output_stride[s] = number(items, 15 + s);
    way.reverse = number(items, 17) != 0;
  }
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().lstm_backward(args);
  }
  return to_python(status);
}

}  // namespace

void bind_lstm(py::module_& m) {
  m.def("lstm_pack", &lstm_pack);
  m.def("lstm_packed_fits", &lstm_packed_fits);
  m.def("lstm_forward", &lstm_forward);
  m.def("lstm_backward", &lstm_backward);
}

}  // namespace ctxfast
