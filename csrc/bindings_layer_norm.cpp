// Layer normalisation and what it is fused with, forward and backward.
#include <algorithm>

#include "dispatch.h"
#include "tensor_view.h"

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

constexpr int32_t kCpu = 1;  // DLPack's names
constexpr uint8_t kInt = 0, kFloat = 2, kBrainFloat = 4;

// Whether a tensor lies on the CPU, contiguous and aligned.
bool plain(const TensorView& x) {
  if (x.device_type != kCpu || x.byte_offset != 0 || x.lanes != 1) return false;
  int64_t stride = 1;
  for (int k = x.dimensions - 1; k >= 0; --k) {
    if (x.shape[k] != 1 && x.strides[k] != stride) return false;
    stride *= x.shape[k];
  }
  return reinterpret_cast<uintptr_t>(x.data) % (x.bits / 8) == 0;
}

bool same_shape(const TensorView& x, const TensorView& y) {
  return x.dimensions == y.dimensions && std::equal(x.shape, x.shape + x.dimensions, y.shape);
}

bool integers(const TensorView& x) { return x.code == kInt && (x.bits == 64 || x.bits == 32); }

bool find_dtype(const TensorView& x, Dtype* dtype) {
  *dtype = x.code == kBrainFloat ? kBfloat16 : x.bits == 64 ? kFloat64 : kFloat32;
  return x.code == kFloat ? x.bits >= 32 : x.code == kBrainFloat;
}

// The arguments of the kernel from tensors (ids, tables, weight, bias, output), in the order of
// EmbedLayerNormArgs; false unless all are as the kernel reads them, the tables and what follows of
// one dtype.
bool embed_layer_norm_args(const TensorView* tensors, EmbedLayerNormArgs* args) {
  const TensorView *ids = tensors, *tables = tensors + 3, *affine = tensors + 6;
  const TensorView &weight = affine[0], &output = affine[2];
  if (!std::all_of(tensors, tensors + 9, plain) || !find_dtype(weight, &args->dtype)) return false;
  if (weight.dimensions != 1 || !same_shape(weight, affine[1])) return false;
  args->parameter_dtype = args->dtype;
  args->columns = weight.shape[0];
  args->rows = 1;
  for (int k = 0; k < ids[0].dimensions; ++k) args->rows *= ids[0].shape[k];
  for (int k = 0; k < 3; ++k) {
    const TensorView& table = tables[k];
    if (!integers(ids[k]) || !same_shape(ids[k], ids[0])) return false;
    if (table.dimensions != 2 || table.shape[1] != args->columns) return false;
    args->wide_ids[k] = ids[k].bits == 64;
    args->ids[k] = ids[k].data;
    args->tables[k] = table.data;
    args->table_rows[k] = table.shape[0];
  }
  for (const TensorView* x = tables; x <= &output; ++x)
    if (x->code != weight.code || x->bits != weight.bits) return false;
  args->weight = weight.data;
  args->bias = affine[1].data;
  args->output = output.data;
  return true;
}

// The same from the tensors themselves: (ids, tables, weight, bias, output) as nine. False, and
// nothing is done, where the kernel does not read them as they are.
py::object embed_layer_norm_of(const py::capsule& table, const py::tuple& tensors, double eps,
                               int threads) {
  constexpr size_t kTensors = 9;
  const TensorReader reader(table);
  TensorView views[kTensors];
  EmbedLayerNormArgs args = {};
  if (!reader.usable() || tensors.size() != kTensors) return py::bool_(false);
  for (size_t k = 0; k < kTensors; ++k)
    if (!reader.read(tensors[k], &views[k])) return py::bool_(false);
  if (!embed_layer_norm_args(views, &args)) return py::bool_(false);
  args.eps = eps;
  args.threads = threads;
  if (args.rows * args.columns == 0) return py::none();
  return run(kernels().embed_layer_norm, args);
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
  m.def("embed_layer_norm_of", &embed_layer_norm_of);
  m.def("embed_layer_norm_backward", &embed_layer_norm_backward);
}

}  // namespace ctxfast
