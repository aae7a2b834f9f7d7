// Dynamic quantisation of activations, one scale a row, and the way back with bias and activation
// in the same pass.
#include "cpu/quantize.h"

#include "cpu/gelu.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int64_t kElementsPerPiece = 16384;

typedef int8_t Bytes __attribute__((vector_size(kLanes<float>), aligned(1)));
typedef int32_t Whole __attribute__((vector_size(CTXFAST_VECTOR_BYTES), aligned(4)));

CTXFAST_INLINE void store_bytes(int8_t* p, Vec<float> v, int64_t n) {
  const Bytes bytes = __builtin_convertvector(
      __builtin_convertvector(round_to_integer(v), VecOf<float>::mask), Bytes);
  if (n >= kLanes<float>) {
    *(Bytes*)p = bytes;
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = bytes[i];
  }
}

template <typename Storage>
CTXFAST_INLINE void quantize_row(const Storage* input, int8_t* output, float* scale, int64_t n) {
  constexpr int lanes = kLanes<float>;
  Vec<float> largest = {}, poison = {};
  for (int64_t i = 0; i < n; i += lanes) {
    const Vec<float> x = load_n(input + i, n - i);
    largest = vmax(x < 0.0f ? -x : x, largest);
    poison += x - x;  // the maximum misses a NaN, this sum does not
  }
  const float most = reduce_max(largest);
  *scale = most / 127.0f + reduce_add(poison);
  const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
  for (int64_t i = 0; i < n; i += lanes)
    store_bytes(output + i, load_n(input + i, n - i) * inverse, n - i);
}

template <typename Storage>
Status quantize(const QuantizeRowsArgs& args) {
  const int64_t n = args.columns;
  parallel_for(args.threads, args.rows, kElementsPerPiece / n, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      quantize_row(static_cast<const Storage*>(args.input) + row * args.input_stride,
                   args.output + row * n, args.scales + row, n);
  });
  return Status();
}

CTXFAST_INLINE Vec<float> load_sums(const int32_t* p, int64_t n) {
  if (n >= kLanes<float>) return __builtin_convertvector(*(const Whole*)p, Vec<float>);
  Vec<float> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = float(p[i]);
  return v;
}

template <typename Storage, Activation kActivation>
CTXFAST_INLINE void dequantize_row(const DequantizeArgs& args, int64_t row) {
  const int64_t n = args.columns;
  const int32_t* sums = args.sums + row * n;
  Storage* output = static_cast<Storage*>(args.output) + row * n;
  const Vec<float> scale = splat<float>(args.row_scales[row]);
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    Vec<float> y = load_sums(sums + i, n - i) * (scale * load_n(args.column_scales + i, n - i));
    if (args.bias != nullptr) y += load_n(args.bias + i, n - i);
    if constexpr (kActivation == kGelu) y = gelu(y);
    if constexpr (kActivation == kGeluTanh) y = gelu_tanh(y);
    if constexpr (kActivation == kTanh) y = tanh(y);
    store_n(output + i, y, n - i);
  }
}

template <typename Storage, Activation kActivation>
Status dequantize_as(const DequantizeArgs& args) {
  parallel_for(args.threads, args.rows, kElementsPerPiece / args.columns,
               [&](int64_t first, int64_t last) {
                 for (int64_t row = first; row < last; ++row)
                   dequantize_row<Storage, kActivation>(args, row);
               });
  return Status();
}

template <typename Storage>
Status dequantize(const DequantizeArgs& args) {
  if (args.activation == kGelu) return dequantize_as<Storage, kGelu>(args);
  if (args.activation == kGeluTanh) return dequantize_as<Storage, kGeluTanh>(args);
  if (args.activation == kTanh) return dequantize_as<Storage, kTanh>(args);
  return dequantize_as<Storage, kNone>(args);
}

Status unsupported() {
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

}  // namespace

Status quantize_rows(const QuantizeRowsArgs& args) {
  if (args.dtype == kFloat32) return quantize<float>(args);
  if (args.dtype == kBfloat16) return quantize<bfloat16>(args);
  return unsupported();
}

Status dequantize_rows(const DequantizeArgs& args) {
  if (args.dtype == kFloat32) return dequantize<float>(args);
  if (args.dtype == kBfloat16) return dequantize<bfloat16>(args);
  return unsupported();
}

CTXFAST_NAMESPACE_END
