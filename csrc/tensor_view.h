// Tensors of torch, read without Python's attributes: the table of functions that DLPack 1.3 has a
// framework publish (https://dmlc.github.io/dlpack), cut down to what describes a tensor that stays
// the caller's.
#pragma once

#include <cstdint>

#include "bindings.h"

namespace ctxfast {

struct TensorView {
  void* data;
  int32_t device_type, device;
  int32_t dimensions;
  uint8_t code, bits;  // of the dtype
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

class TensorReader {
 public:
  // table: the capsule of torch.Tensor
  explicit TensorReader(const py::capsule& table) : table_(table.get_pointer<Table>()) {}

  // Whether this version of the table is known.
  bool usable() const { return table_->major == 1 && table_->view != nullptr; }

  // What a tensor is like for as long as it stays so; false where it cannot be read in this way.
  bool read(const py::handle& tensor, TensorView* view) const {
    const bool found = table_->view(tensor.ptr(), view) == 0;
    if (!found) PyErr_Clear();
    return found;
  }

 private:
  struct Table {
    uint32_t major, minor;
    void* older;
    void *allocate, *give, *take;
    int (*view)(void* tensor, TensorView* result);
  };
  const Table* table_;
};

}  // namespace ctxfast
