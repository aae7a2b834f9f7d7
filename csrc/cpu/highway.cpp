// The gate of a highway layer (Srivastava et al., 2015) after its matrix product, forward and
// backward, and the weighted sum of layers (scalar mix, Peters et al., 2018): one pass over memory.
#include "cpu/char_cnn.h"
#include "cpu/kernel_table.h"
#include "cpu/lstm_cell.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int64_t kElementsPerPiece = 8192;

template <typename Storage>
Status run_gate(const HighwayGateArgs& args) {
  using T = Compute<Storage>;
  const int64_t n = args.columns;
  parallel_for(args.threads, args.rows, kElementsPerPiece / n, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const Storage* transform = static_cast<const Storage*>(args.projected) + 2 * row * n;
      const Storage* input = static_cast<const Storage*>(args.input) + row * n;
      Storage* output = static_cast<Storage*>(args.output) + row * n;
      for (int64_t i = 0; i < n; i += kLanes<T>) {
        const int64_t left = n - i;
        const Vec<T> gate = sigmoid<T>(load_n(transform + n + i, left));
        const Vec<T> other = vmax(Vec<T>{}, load_n(transform + i, left));
        store_n(output + i, gate * load_n(input + i, left) + (T(1) - gate) * other, left);
      }
    }
  });
  return Status();
}

template <typename T>
Status run_gate_backward(const HighwayGateBackwardArgs& all) {
  const HighwayGateArgs& args = all.forward;
  const int64_t n = args.columns;
  parallel_for(args.threads, args.rows, kElementsPerPiece / n, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* transform = static_cast<const T*>(args.projected) + 2 * row * n;
      const T* input = static_cast<const T*>(args.input) + row * n;
      const T* grad = static_cast<const T*>(all.grad_output) + row * n;
      T* dtransform = static_cast<T*>(all.grad_projected) + 2 * row * n;
      T* dinput = static_cast<T*>(all.grad_input) + row * n;
      for (int64_t i = 0; i < n; i += kLanes<T>) {
        const int64_t left = n - i;
        const Vec<T> gate = sigmoid<T>(load_n(transform + n + i, left));
        const Vec<T> z = load_n(transform + i, left), g = load_n(grad + i, left);
        const Vec<T> shut = T(1) - gate;
        const Vec<T> other = vmax(Vec<T>{}, z);
        store_n(dtransform + i, z > T(0) ? g * shut : Vec<T>{}, left);
        store_n(dtransform + n + i, g * (load_n(input + i, left) - other) * gate * shut, left);
        store_n(dinput + i, g * gate, left);
      }
    }
  });
  return Status();
}

template <typename Storage>
Status run_sum(const WeightedSumArgs& args) {
  using T = Compute<Storage>;
  const Storage* layers = static_cast<const Storage*>(args.layers);
  const T* scales = static_cast<const T*>(args.coefficients);
  Storage* output = static_cast<Storage*>(args.output);
  parallel_for(args.threads, args.size, kElementsPerPiece, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += kLanes<T>) {
      Vec<T> sum = {};
      for (int64_t l = 0; l < args.count; ++l)
        sum = scales[l] * load_n(layers + l * args.size + i, last - i) + sum;
      store_n(output + i, sum, last - i);
    }
  });
  return Status();
}

Status unsupported() {
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

}  // namespace

Status highway_gate(const HighwayGateArgs& args) {
  if (args.dtype == kFloat32) return run_gate<float>(args);
  if (args.dtype == kFloat64) return run_gate<double>(args);
  if (args.dtype == kBfloat16) return run_gate<bfloat16>(args);
  return unsupported();
}

Status highway_gate_backward(const HighwayGateBackwardArgs& args) {
  if (args.forward.dtype == kFloat32) return run_gate_backward<float>(args);
  if (args.forward.dtype == kFloat64) return run_gate_backward<double>(args);
  return unsupported();
}

Status weighted_sum(const WeightedSumArgs& args) {
  if (args.dtype == kFloat32) return run_sum<float>(args);
  if (args.dtype == kFloat64) return run_sum<double>(args);
  if (args.dtype == kBfloat16) return run_sum<bfloat16>(args);
  return unsupported();
}

CTXFAST_NAMESPACE_END
