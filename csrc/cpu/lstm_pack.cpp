// Arranges the recurrent weights of an LSTM into the panels of lstm_weights.h.
#include "cpu/kernel_table.h"
#include "cpu/lstm_weights.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

// One column of a product: element k of the depth is source[k * stride]; nullptr: a column of
// padding.
template <typename S>
struct Column {
  const S* source;
  int64_t stride;
};

template <typename T>
CTXFAST_INLINE T magnitude(T x) {
  return x < T(0) ? -x : x;
}

template <typename S, typename W>
struct Packer {
  using T = typename W::Compute;
  using Word = typename W::Word;

  static CTXFAST_INLINE T element(const Column<S>& column, int64_t k, int64_t depth) {
    return column.source == nullptr || k >= depth ? T(0)
                                                  : to_compute(column.source[k * column.stride]);
  }

  // Writes a column whose words lie `step` apart.
  static void write(const Column<S>& column, int64_t depth, Word* out, int64_t step, T* scale) {
    if constexpr (W::kScaled) {
      T largest = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const T size = magnitude(element(column, k, depth));
        largest = size > largest || size != size ? size : largest;
      }
      *scale = largest / T(127);
      for (int64_t k = 0; k < depth; ++k) {
        const T quotient = *scale > T(0) ? element(column, k, depth) / *scale : T(0);
        const T whole = __builtin_nearbyint(quotient);
        out[k * step] = Word(whole < T(-127) ? T(-127) : whole > T(127) ? T(127) : whole);
      }
    } else if constexpr (W::kPack == 2) {
      for (int64_t k = 0; k < depth; k += 2) {
        bfloat16 first, second;
        store_one(&first, element(column, k, depth));
        store_one(&second, element(column, k + 1, depth));
        out[k / 2 * step] = uint32_t(first.bits) | uint32_t(second.bits) << 16;
      }
    } else {
      for (int64_t k = 0; k < depth; ++k) out[k * step] = element(column, k, depth);
    }
  }

  static void run(const LstmPackArgs& args) {
    const PackedLayout<W> layout(args.hidden, args.features, args.projected, args.backward);
    *args.header = {layout.bytes,         args.hidden,   args.features,
                    CTXFAST_VECTOR_BYTES, args.dtype,    args.weight,
                    args.projected,       args.backward, 0};
    if (args.packed == nullptr) return;
    char* base = static_cast<char*>(args.packed);
    __builtin_memcpy(base, args.header, sizeof *args.header);
    const int64_t lanes = kLanes<T>, hidden = args.hidden, features = args.features;
    const S* hh = static_cast<const S*>(args.weight_hh);
    const S* hr = static_cast<const S*>(args.weight_hr);
    const int group[2] = {args.backward ? 1 : kGates, 1};
    for (int k = 0; k < 2; ++k) {
      const int64_t depth = k == 0 ? (args.backward ? kGates * hidden : features)
                                   : (args.backward ? features : hidden);
      const int64_t words = layout.words[k], width = group[k] * lanes;
      Word* panel = const_cast<Word*>(layout.words_of(base, k));
      T* scales = const_cast<T*>(layout.scales_of(base, k));
      parallel_for(args.threads, layout.columns[k] / width, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block)
          for (int64_t place = 0; place < width; ++place) {
            const int64_t index = block * lanes + place % lanes;  // unit, or column
            Column<S> column = {nullptr, 1};
            if (k == 0 && !args.backward && index < hidden) {
              column.source = hh + (place / lanes * hidden + index) * features;
            } else if (k == 0 && args.backward && index < features) {
              column = {hh + index, features};
            } else if (k == 1 && !args.backward && index < features) {
              column.source = hr + index * hidden;
            } else if (k == 1 && args.backward && index < hidden) {
              column = {hr + index, hidden};
            }
            write(column, depth, panel + block * words * width + place, width,
                  scales + block * width + place);
          }
      });
    }
  }
};

}  // namespace

Status lstm_pack(const LstmPackArgs& args) {
  Status status;
  if (args.dtype == kFloat64 && args.weight == kPlainWeight) {
    Packer<double, PlainWeight<double> >::run(args);
  } else if (args.dtype == kFloat32 && args.weight == kPlainWeight) {
    Packer<float, PlainWeight<float> >::run(args);
  } else if (args.dtype == kFloat32 && args.weight == kBfloat16Weight) {
    Packer<float, HalfWeight>::run(args);
  } else if (args.dtype == kFloat32 && args.weight == kInt8Weight) {
    Packer<float, ByteWeight>::run(args);
  } else if (args.dtype == kBfloat16 && args.weight == kBfloat16Weight) {
    Packer<bfloat16, HalfWeight>::run(args);
  } else if (args.dtype == kBfloat16 && args.weight == kInt8Weight) {
    Packer<bfloat16, ByteWeight>::run(args);
  } else {
    status.code = kUnsupportedDtype;
  }
  return status;
}

CTXFAST_NAMESPACE_END
