// Python module ctxfast._C: the CPU half. Addresses come as integers from ctxfast/ops/_native.py,
// which has checked them. Every operator returns None, or (code, argument, value) of status.h.
#include "bindings.h"

#include "dispatch.h"
#include "scratch.h"

namespace ctxfast {
namespace {

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
  m.def("release_scratch", &release_scratch);
  m.def("advise_large_pages",
        [](uintptr_t memory, size_t bytes) { advise_large_pages(address(memory), bytes); });
  bind_layer_norm(m);
  bind_attention(m);
  bind_certificate(m);
  bind_char_cnn(m);
  bind_encoder_layer(m);
  bind_linear(m);
  bind_lstm(m);
  bind_mask(m);
  bind_matrix_product(m);
}

}  // namespace ctxfast
