// The encoder layer of module ctxfast._C. Tuples hold addresses and sizes in the order of
// EncoderLayerArgs; what stays the same from call to call is one of them.
#include "bindings.h"
#include "encoder_layer.h"

namespace ctxfast {
namespace {

// weights: (panels, bias) of the four linears, (weight, bias) of the two norms;
// shape: (dtype, hidden, intermediate, heads, activation, eps of the first norm, eps of the second,
// scale)
EncoderLayerArgs read(const py::tuple& weights, const py::tuple& shape) {
  EncoderLayerArgs args = {};
  size_t k = 0;
  const auto next = [&] { return address(weights[k++].cast<uintptr_t>()); };
  for (EncoderLinear& linear : args.linears) {
    linear.panels = next();
    linear.bias = next();
  }
  for (EncoderNorm& norm : args.norms) {
    norm.weight = next();
    norm.bias = next();
  }
  args.dtype = Dtype(shape[0].cast<int>());
  args.hidden = shape[1].cast<int64_t>();
  args.intermediate = shape[2].cast<int64_t>();
  args.heads = shape[3].cast<int64_t>();
  args.activation = Activation(shape[4].cast<int>());
  args.norms[0].eps = shape[5].cast<double>();
  args.norms[1].eps = shape[6].cast<double>();
  args.scale = shape[7].cast<double>();
  return args;
}

py::object run(const py::tuple& weights, const py::tuple& shape, uintptr_t input,
               uintptr_t cu_seqlens, uintptr_t workspace, uintptr_t output, int64_t rows,
               int64_t batch, int64_t max_seqlen, int threads) {
  EncoderLayerArgs args = read(weights, shape);
  args.input = address(input);
  args.cu_seqlens = address<const int32_t>(cu_seqlens);
  args.workspace = address(workspace);
  args.output = address(output);
  args.rows = rows;
  args.batch = batch;
  args.max_seqlen = max_seqlen;
  args.threads = threads;
  Status status;
  {
    py::gil_scoped_release released;
    status = encoder_layer(args);
  }
  return to_python(status);
}

int64_t workspace(int64_t rows, int dtype, int64_t hidden, int64_t intermediate, int64_t heads) {
  EncoderLayerArgs args = {};
  args.dtype = Dtype(dtype);
  args.rows = rows;
  args.hidden = hidden;
  args.intermediate = intermediate;
  args.heads = heads;
  return encoder_layer_workspace(args);
}

}  // namespace

void bind_encoder_layer(py::module_& m) {
  m.def("encoder_layer", &run);
  m.def("encoder_layer_workspace", &workspace);
}

}  // namespace ctxfast
