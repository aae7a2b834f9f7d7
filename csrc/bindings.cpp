// Python module ctxfast._C: the CPU half. Addresses come as integers from ctxfast/ops/_native.py,
// which has checked them. Every operator returns None, or (code, argument, value) of status.h.
#include "bindings.h"

#include "dispatch.h"
#include "scratch.h"

namespace ctxfast {
namespace {

py::object add_layer_norm(int dtype, int parameter_dtype, uintptr_t input, uintptr_t residual,
                          uintptr_t weight, uintptr_t bias, uintptr_t output, int64_t rows,
                          int64_t columns, int64_t input_stride, int64_t residual_stride,
                          double eps, int threads) {
  const AddLayerNormArgs args = {
      Dtype(dtype),    Dtype(parameter_dtype), address(input),  address(residual),
      address(weight), address(bias),          address(output), rows,
      columns,         input_stride,           residual_stride, eps,
      threads};
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().add_layer_norm(args);
  }
  return to_python(status);
}

py::object embed_layer_norm(int dtype, int parameter_dtype, py::tuple ids, py::tuple wide_ids,
                            py::tuple tables, py::tuple table_rows, uintptr_t weight,
                            uintptr_t bias, uintptr_t output, int64_t rows, int64_t columns,
                            double eps, int threads) {
  EmbedLayerNormArgs args = {};
  args.dtype = Dtype(dtype);
  args.parameter_dtype = Dtype(parameter_dtype);
  for (int k = 0; k < 3; ++k) {
    args.ids[k] = address(ids[k].cast<uintptr_t>());
    args.wide_ids[k] = wide_ids[k].cast<bool>();
    args.tables[k] = address(tables[k].cast<uintptr_t>());
    args.table_rows[k] = table_rows[k].cast<int64_t>();
  }
  args.weight = address(weight);
  args.bias = address(bias);
  args.output = address(output);
  args.rows = rows;
  args.columns = columns;
  args.eps = eps;
  args.threads = threads;
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().embed_layer_norm(args);
  }
  return to_python(status);
}

py::list instruction_sets() {
  int count = 0;
  const InstructionSet* sets = available_instruction_sets(&count);
  py::list names;
  for (int i = 0; i < count; ++i) names.append(sets[i].name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of ctxfast; called by ctxfast.ops only.";
  m.def("isa", [] { return instruction_set().name; });
  m.def("available_isas", &instruction_sets);
  m.def("set_isa", [](const std::string& name) { return set_instruction_set(name.c_str()); });
  m.def("poison_scratch", &set_poison_scratch);
  m.def("add_layer_norm", &add_layer_norm);
  m.def("embed_layer_norm", &embed_layer_norm);
  bind_attention(m);
  bind_lstm(m);
}

}  // namespace ctxfast
