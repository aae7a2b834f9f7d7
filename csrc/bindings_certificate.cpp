// What Python objects hold and how tensors lie, for checks at every call of a model: a pass over
// thousands of attributes costs microseconds here, and in Python as much as a small layer.
#include <cstddef>
#include <cstring>
#include <string>
#include <string_view>

#include "tensor_view.h"

namespace ctxfast {
namespace {

// Bytes that are written one behind the other into room made beforehand.
class Writer {
 public:
  explicit Writer(size_t most) : bytes_(most, '\0'), end_(bytes_.data()) {}
  void add(const void* data, size_t size) {
    std::memcpy(end_, data, size);
    end_ += size;
  }
  template <typename T>
  void add(const T& value) {
    add(&value, sizeof value);
  }
  py::bytes bytes() const { return py::bytes(bytes_.data(), size_t(end_ - bytes_.data())); }

 private:
  std::string bytes_;
  char* end_;
};

// Objects that a model has used lie scattered, and its weights have driven them out of the caches.
void prefetch(const py::tuple& objects) {
  for (const py::handle& object : objects) __builtin_prefetch(object.ptr());
}

// The class of every object and the version of every dictionary (PEP 509), which no two states of
// dictionaries share. None where this Python keeps no versions: from 3.12 on they are deprecated.
py::object states(const py::tuple& objects, const py::tuple& dictionaries) {
#if PY_VERSION_HEX < 0x030C0000
  prefetch(objects);
  prefetch(dictionaries);
  Writer writer((objects.size() + dictionaries.size()) * sizeof(uint64_t));
  for (const py::handle& object : objects) writer.add(Py_TYPE(object.ptr()));
  for (const py::handle& dictionary : dictionaries) {
    writer.add(reinterpret_cast<const PyDictObject*>(dictionary.ptr())->ma_version_tag);
  }
  return writer.bytes();
#else
  return py::none();
#endif
}

// Index in `items` behind what the dictionary holds, if that is what stands there from `next` on;
// or -1.
Py_ssize_t behind(PyObject* dictionary, PyObject* items, Py_ssize_t next) {
  const Py_ssize_t count = PyTuple_GET_SIZE(items);
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(dictionary, &position, &key, &value)) {
    if (next + 2 > count || PyTuple_GET_ITEM(items, next) != key ||
        PyTuple_GET_ITEM(items, next + 1) != value) {
      return -1;
    }
    next += 2;
  }
  return next;
}

// Whether dictionaries hold these very objects: keys and values in turn, dictionary after
// dictionary.
bool same_items(const py::tuple& dictionaries, const py::tuple& items) {
  Py_ssize_t next = 0;
  for (const py::handle& dictionary : dictionaries) {
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(dictionary.ptr());
    next = behind(dictionary.ptr(), items.ptr(), next);
    Py_END_CRITICAL_SECTION();
#else
    next = behind(dictionary.ptr(), items.ptr(), next);
#endif
    if (next < 0) return false;
  }
  return next == PyTuple_GET_SIZE(items.ptr());
}

constexpr int32_t kMostDimensions = 4;

// Address, device, dtype, shape and strides of torch tensors, and the versions of some.
// table: the capsule of torch.Tensor. None where it, or a tensor, cannot be read in this way.
py::object tensor_states(const py::tuple& tensors, const py::tuple& versioned,
                         const py::capsule& table) {
  const TensorReader reader(table);
  if (!reader.usable()) return py::none();
  prefetch(tensors);
  const size_t most = sizeof(TensorView) + 2 * kMostDimensions * sizeof(int64_t);
  Writer writer(tensors.size() * most + versioned.size() * sizeof(int64_t));
  for (const py::handle& tensor : tensors) {
    TensorView view;
    if (!reader.read(tensor, &view) || view.dimensions > kMostDimensions) return py::none();
    writer.add(&view, offsetof(TensorView, shape));
    writer.add(view.byte_offset);
    for (int32_t k = 0; k < view.dimensions; ++k) {
      writer.add(view.shape[k]);
      writer.add(view.strides[k]);
    }
  }
  const py::str name("_version");
  for (const py::handle& tensor : versioned) {
    const auto found =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name.ptr()));
    if (!found) throw py::error_already_set();
    writer.add(PyLong_AsLongLong(found.ptr()));
  }
  return writer.bytes();
}

// The `size` bytes at each of these addresses, which lie one behind the other.
py::bytes values_at(const std::string_view addresses, size_t size) {
  const size_t count = addresses.size() / sizeof(uintptr_t);
  Writer writer(count * size);
  for (size_t k = 0; k < count; ++k) {
    uintptr_t place;
    std::memcpy(&place, addresses.data() + k * sizeof place, sizeof place);
    writer.add(address<const void>(place), size);
  }
  return writer.bytes();
}

}  // namespace

void bind_certificate(py::module_& m) {
  m.def("states", &states);
  m.def("same_items", &same_items);
  m.def("tensor_states", &tensor_states);
  m.def("values_at", &values_at);
}

}  // namespace ctxfast
