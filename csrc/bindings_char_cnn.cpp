// The operators around ELMo's characters and layers, of module ctxfast._C.
#include "bindings.h"
#include "dispatch.h"

namespace ctxfast {
namespace {

template <typename Args>
py::object call(Status (*kernel)(const Args&), const Args& args) {
  Status status;
  {
    py::gil_scoped_release released;
    status = kernel(args);
  }
  return to_python(status);
}

CharCnnArgs char_cnn_args(int dtype, bool wide_ids, uintptr_t ids, uintptr_t embedding,
                          uintptr_t weight, uintptr_t bias, const py::tuple& sizes,
                          const py::tuple& widths, const py::tuple& counts, bool relu,
                          int threads) {
  CharCnnArgs args = {};
  args.dtype = Dtype(dtype);
  args.wide_ids = wide_ids;
  args.ids = address(ids);
  args.embedding = address(embedding);
  args.weight = address(weight);
  args.bias = address(bias);
  args.tokens = sizes[0].cast<int64_t>();
  args.characters = sizes[1].cast<int64_t>();
  args.vocabulary = sizes[2].cast<int64_t>();
  args.channels = sizes[3].cast<int64_t>();
  args.groups = int32_t(widths.size());
  for (int32_t g = 0; g < args.groups && g < kMaxFilters; ++g) {
    args.widths[g] = widths[g].cast<int64_t>();
    args.counts[g] = counts[g].cast<int64_t>();
  }
  args.relu = relu;
  args.threads = threads;
  return args;
}

py::object char_cnn(int dtype, bool wide_ids, uintptr_t ids, uintptr_t embedding, uintptr_t weight,
                    uintptr_t bias, py::tuple sizes, py::tuple widths, py::tuple counts, bool relu,
                    int threads, uintptr_t output) {
  CharCnnArgs args = char_cnn_args(dtype, wide_ids, ids, embedding, weight, bias, sizes, widths,
                                   counts, relu, threads);
  args.output = address(output);
  return call(kernels().char_cnn, args);
}

py::object char_cnn_backward(int dtype, bool wide_ids, uintptr_t ids, uintptr_t embedding,
                             uintptr_t weight, uintptr_t bias, py::tuple sizes, py::tuple widths,
                             py::tuple counts, bool relu, int threads, uintptr_t grad_output,
                             uintptr_t grad_embedding, uintptr_t grad_weight, uintptr_t grad_bias) {
  const CharCnnBackwardArgs args = {char_cnn_args(dtype, wide_ids, ids, embedding, weight, bias,
                                                  sizes, widths, counts, relu, threads),
                                    address(grad_output), address(grad_embedding),
                                    address(grad_weight), address(grad_bias)};
  return call(kernels().char_cnn_backward, args);
}

py::object highway_gate(int dtype, uintptr_t projected, uintptr_t input, uintptr_t output,
                        int64_t rows, int64_t columns, int threads) {
  const HighwayGateArgs args = {
      Dtype(dtype), address(projected), address(input), address(output), rows, columns, threads};
  return call(kernels().highway_gate, args);
}

py::object highway_gate_backward(int dtype, uintptr_t projected, uintptr_t input,
                                 uintptr_t grad_output, uintptr_t grad_projected,
                                 uintptr_t grad_input, int64_t rows, int64_t columns, int threads) {
  const HighwayGateBackwardArgs args = {
      {Dtype(dtype), address(projected), address(input), nullptr, rows, columns, threads},
      address(grad_output),
      address(grad_projected),
      address(grad_input)};
  return call(kernels().highway_gate_backward, args);
}

py::object weighted_sum(int dtype, uintptr_t layers, uintptr_t coefficients, uintptr_t output,
                        int64_t count, int64_t size, int threads) {
  const WeightedSumArgs args = {
      Dtype(dtype), address(layers), address(coefficients), address(output), count, size, threads};
  return call(kernels().weighted_sum, args);
}

}  // namespace

void bind_char_cnn(py::module_& m) {
  m.attr("max_filters") = kMaxFilters;
  m.def("char_cnn", &char_cnn);
  m.def("char_cnn_backward", &char_cnn_backward);
  m.def("highway_gate", &highway_gate);
  m.def("highway_gate_backward", &highway_gate_backward);
  m.def("weighted_sum", &weighted_sum);
}

}  // namespace ctxfast
