// The attention operators of module ctxfast._C. Their many arguments come in three tuples, in the
// order of the structs.
#include "bindings.h"
#include "dispatch.h"

namespace ctxfast {
namespace {

// Takes the items of a tuple one after the other.
class Reader {
 public:
  explicit Reader(const py::tuple& items) : items_(items) {}
  template <typename T = int64_t>
  T next() {
    return items_[position_++].template cast<T>();
  }
  template <typename T = void>
  T* pointer() {
    return address<T>(next<uintptr_t>());
  }
  template <size_t kCount>
  void strides(int64_t (&out)[kCount]) {
    const py::tuple values = items_[position_++];
    for (size_t k = 0; k < kCount; ++k) out[k] = values[k].template cast<int64_t>();
  }

 private:
  const py::tuple& items_;
  size_t position_ = 0;
};

void read_common(Reader& pointers, Reader& strides, Reader& numbers, AttentionArgs& args) {
  args.query = pointers.pointer();
  args.key = pointers.pointer();
  args.value = pointers.pointer();
  args.attn_mask = pointers.pointer<uint8_t>();
  args.key_padding_mask = pointers.pointer<uint8_t>();
  args.bias = pointers.pointer();
  args.cu_seqlens_q = pointers.pointer<int32_t>();
  args.cu_seqlens_k = pointers.pointer<int32_t>();
  strides.strides(args.query_stride);
  strides.strides(args.key_stride);
  strides.strides(args.value_stride);
  strides.strides(args.attn_mask_stride);
  strides.strides(args.key_padding_mask_stride);
  strides.strides(args.bias_stride);
  args.dtype = Dtype(numbers.next<int>());
  args.bias_dtype = Dtype(numbers.next<int>());
  args.batch = numbers.next();
  args.heads = numbers.next();
  args.head_dim = numbers.next();
  args.seqlen_q = numbers.next();
  args.seqlen_k = numbers.next();
  args.max_seqlen_q = numbers.next();
  args.max_seqlen_k = numbers.next();
  args.window_left = numbers.next();
  args.window_right = numbers.next();
  args.dropout_threshold = numbers.next<uint32_t>();
  args.seed = uint64_t(numbers.next());
  args.threads = numbers.next<int>();
  args.scale = numbers.next<double>();
}

py::object attention_forward(const py::tuple& pointers, const py::tuple& strides,
                             const py::tuple& numbers) {
  Reader p(pointers), s(strides), n(numbers);
  AttentionForwardArgs args = {};
  read_common(p, s, n, args.common);
  args.output = p.pointer();
  args.lse = p.pointer();
  s.strides(args.output_stride);
  s.strides(args.lse_stride);
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().attention_forward(args);
  }
  return to_python(status);
}

py::object attention_backward(const py::tuple& pointers, const py::tuple& strides,
                              const py::tuple& numbers) {
  Reader p(pointers), s(strides), n(numbers);
  AttentionBackwardArgs args = {};
  read_common(p, s, n, args.common);
  args.grad_output = p.pointer();
  args.grad_lse = p.pointer();
  args.output = p.pointer();
  args.lse = p.pointer();
  args.grad_query = p.pointer();
  args.grad_key = p.pointer();
  args.grad_value = p.pointer();
  args.grad_bias = p.pointer();
  args.partial_bias = p.pointer();
  s.strides(args.grad_output_stride);
  s.strides(args.grad_lse_stride);
  s.strides(args.output_stride);
  s.strides(args.lse_stride);
  s.strides(args.grad_query_stride);
  s.strides(args.grad_key_stride);
  s.strides(args.grad_value_stride);
  s.strides(args.grad_bias_stride);
  args.partial_bias_length = n.next();
  Status status;
  {
    py::gil_scoped_release released;
    status = kernels().attention_backward(args);
  }
  return to_python(status);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
}

}  // namespace ctxfast
