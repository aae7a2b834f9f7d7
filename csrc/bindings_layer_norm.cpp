// Layer normalisation and what it is fused with, forward and backward.
#include "bindings.h"
#include "dispatch.h"

namespace ctxfast {
namespace {

template <typename Args>
py::object run(Status (*kernel)(const Args&), const Args& args) {
  Status status;
  {
    py::gil_scoped_release released;
    status = kernel(args);
  }
  return to_python(status);
}

// forward: (dtype, parameter dtype, input, residual, weight, bias, output, rows, columns,
// input stride, residual stride, eps, threads); dropout: (sequence_ids, positions, seed,
// threshold, scale) or an empty tuple.
AddLayerNormArgs add_layer_norm_args(const py::tuple& forward, const py::tuple& dropout) {
  AddLayerNormArgs args = {};
  int k = 0;
  const auto next = [&] { return forward[k++].cast<int64_t>(); };
  args.dtype = Dtype(next());
  args.parameter_dtype = Dtype(next());
  args.input = address(next());
  args.residual = address(next());
  args.weight = address(next());
  args.bias = address(next());
  args.output = address(next());
  args.rows = next();
  args.columns = next();
  args.input_stride = next();
  args.residual_stride = next();
  args.eps = forward[k++].cast<double>();
  args.threads = int(next());
  if (dropout.size() == 0) return args;
  args.dropout.sequence_ids = address<const int64_t>(dropout[0].cast<uintptr_t>());
  args.dropout.positions = address<const int64_t>(dropout[1].cast<uintptr_t>());
  args.dropout.seed = dropout[2].cast<int64_t>();
  args.dropout.threshold = dropout[3].cast<uint32_t>();
  args.dropout.scale = dropout[4].cast<double>();
  return args;
}

py::object add_layer_norm(py::tuple forward, py::tuple dropout) {
  return run(kernels().add_layer_norm, add_layer_norm_args(forward, dropout));
}

py::object add_layer_norm_backward(py::tuple forward, py::tuple dropout, uintptr_t grad_output,
                                   int64_t grad_stride, uintptr_t dinput, uintptr_t dresidual,
                                   uintptr_t partials, uintptr_t dweight, uintptr_t dbias) {
  AddLayerNormBackwardArgs args = {};
  args.forward = add_layer_norm_args(forward, dropout);
  args.grad_output = address(grad_output);
  args.grad_stride = grad_stride;
  args.dinput = address(dinput);
  args.dresidual = address(dresidual);
  args.partials = address(partials);
  args.dweight = address(dweight);
  args.dbias = address(dbias);
  return run(kernels().add_layer_norm_backward, args);
}

// forward: (dtype, parameter dtype, ids, wide ids, tables, table rows, weight, bias, output, rows,
// columns, eps, threads), the four in the middle tuples of three.
EmbedLayerNormArgs embed_layer_norm_args(const py::tuple& forward) {
  EmbedLayerNormArgs args = {};
  args.dtype = Dtype(forward[0].cast<int>());
  args.parameter_dtype = Dtype(forward[1].cast<int>());
  const py::tuple ids = forward[2], wide_ids = forward[3], tables = forward[4], rows = forward[5];
  for (int k = 0; k < 3; ++k) {
    args.ids[k] = address(ids[k].cast<uintptr_t>());
    args.wide_ids[k] = wide_ids[k].cast<bool>();
    args.tables[k] = address(tables[k].cast<uintptr_t>());
    args.table_rows[k] = rows[k].cast<int64_t>();
  }
  args.weight = address(forward[6].cast<uintptr_t>());
  args.bias = address(forward[7].cast<uintptr_t>());
  args.output = address(forward[8].cast<uintptr_t>());
  args.rows = forward[9].cast<int64_t>();
  args.columns = forward[10].cast<int64_t>();
  args.eps = forward[11].cast<double>();
  args.threads = forward[12].cast<int>();
  return args;
}

py::object embed_layer_norm(py::tuple forward) {
  return run(kernels().embed_layer_norm, embed_layer_norm_args(forward));
}

py::object embed_layer_norm_backward(py::tuple forward, uintptr_t grad_output, int64_t grad_stride,
                                     int64_t padding_idx, uintptr_t rows, py::tuple dtables,
                                     uintptr_t partials, uintptr_t dweight, uintptr_t dbias) {
  EmbedLayerNormBackwardArgs args = {};
  args.forward = embed_layer_norm_args(forward);
  args.grad_output = address(grad_output);
  args.grad_stride = grad_stride;
  args.padding_idx = padding_idx;
  args.rows = address(rows);
  for (int k = 0; k < 3; ++k) args.dtables[k] = address(dtables[k].cast<uintptr_t>());
  args.partials = address(partials);
  args.dweight = address(dweight);
  args.dbias = address(dbias);
  return run(kernels().embed_layer_norm_backward, args);
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  m.attr("row_blocks") = kRowBlocks;
  m.def("add_layer_norm", &add_layer_norm);
  m.def("add_layer_norm_backward", &add_layer_norm_backward);
  m.def("embed_layer_norm", &embed_layer_norm);
  m.def("embed_layer_norm_backward", &embed_layer_norm_backward);
}

}  // namespace ctxfast
