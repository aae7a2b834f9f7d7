// The encoder layers of module ctxfast._C. Tuples hold addresses and sizes in the order of
// EncoderLayer.
#include <vector>

#include "bindings.h"
#include "encoder_layer.h"

namespace ctxfast {
namespace {

// weights: (panels, bias, scales, sums) of the four linears, (weight, bias) of the two norms;
// dtypes: (of states, of the inside, of the norms' parameters);
// shape: (hidden, intermediate, heads, activation, eps of the first norm, eps of the second, scale)
EncoderLayer read(const py::tuple& weights, const py::tuple& dtypes, const py::tuple& shape) {
  EncoderLayer layer = {};
  size_t k = 0;
  const auto next = [&] { return weights[k++].cast<uintptr_t>(); };
  for (EncoderLinear& linear : layer.linears) {
    linear.panels = address(next());
    linear.bias = address(next());
    linear.scales = address<const float>(next());
    linear.sums = address<const float>(next());
  }
  for (EncoderNorm& norm : layer.norms) {
    norm.weight = address(next());
    norm.bias = address(next());
  }
  layer.dtype = Dtype(dtypes[0].cast<int>());
  layer.inner_dtype = Dtype(dtypes[1].cast<int>());
  layer.parameter_dtype = Dtype(dtypes[2].cast<int>());
  layer.hidden = shape[0].cast<int64_t>();
  layer.intermediate = shape[1].cast<int64_t>();
  layer.heads = shape[2].cast<int64_t>();
  layer.activation = Activation(shape[3].cast<int>());
  layer.norms[0].eps = shape[4].cast<double>();
  layer.norms[1].eps = shape[5].cast<double>();
  layer.scale = shape[6].cast<double>();
  return layer;
}

py::object run(const py::sequence& layers, uintptr_t input, uintptr_t cu_seqlens,
               uintptr_t workspace, uintptr_t output, int64_t rows, int64_t batch,
               int64_t max_seqlen, int float_parts, int threads) {
  std::vector<const EncoderLayer*> stack;
  stack.reserve(layers.size());
  for (const py::handle& layer : layers) stack.push_back(layer.cast<const EncoderLayer*>());
  EncoderLayersArgs args = {};
  args.layers = stack.data();
  args.count = int64_t(stack.size());
  args.input = address(input);
  args.cu_seqlens = address<const int32_t>(cu_seqlens);
  args.workspace = address(workspace);
  args.output = address(output);
  args.rows = rows;
  args.batch = batch;
  args.max_seqlen = max_seqlen;
  args.float_parts = float_parts;
  args.threads = threads;
  Status status;
  {
    py::gil_scoped_release released;
    status = encoder_layers(args);
  }
  return to_python(status);
}

}  // namespace

void bind_encoder_layer(py::module_& m) {
  py::class_<EncoderLayer>(m, "EncoderLayer").def(py::init(&read));
  m.def("encoder_layers", &run);
  m.def("encoder_workspace", &encoder_workspace);
}

}  // namespace ctxfast
