// Padding masks.
#include "bindings.h"

namespace ctxfast {
namespace {

template <typename T>
bool every_one_set(const T* mask, int64_t count) {
  bool all = true;
  for (int64_t k = 0; k < count; ++k) all &= mask[k] != 0;
  return all;
}

// Whether none of `count` contiguous elements of so many bytes is 0.
bool all_set(uintptr_t mask, int64_t count, int64_t bytes) {
  if (bytes == 8) return every_one_set(address<const int64_t>(mask), count);
  if (bytes == 4) return every_one_set(address<const int32_t>(mask), count);
  if (bytes == 2) return every_one_set(address<const int16_t>(mask), count);
  return every_one_set(address<const int8_t>(mask), count);
}

}  // namespace

void bind_mask(py::module_& m) { m.def("all_set", &all_set); }

}  // namespace ctxfast
