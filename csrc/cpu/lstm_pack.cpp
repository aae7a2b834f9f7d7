// Arranges the weights of an LSTM into the panels of lstm_weights.h.
#include "cpu/kernel_table.h"
#include "cpu/lstm_split.h"
#include "cpu/lstm_weights.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int64_t kPiece =
    16;  // words along the depth that are written at a time: a line of source

constexpr int64_t kScanned = 1 << 14;  // weights that a thread looks at, at least

template <typename T>
CTXFAST_INLINE T magnitude(T x) {
  return x < T(0) ? -x : x;
}

template <typename S, typename W>
struct Packer {
  using T = typename W::Compute;
  using Word = typename W::Word;
  static constexpr int64_t kWidth = kLanes<T>;

  static T scale_of(const S* column, int64_t depth) {
    T largest = 0;
    for (int64_t k = 0; k < depth; ++k) {
      const T size = magnitude(to_compute(column[k]));
      largest = size > largest || size != size ? size : largest;
    }
    return largest / T(127);
  }

  static CTXFAST_INLINE Word word(const S* column, int64_t k, int64_t depth, T scale) {
    if constexpr (W::kScaled) {
      const T quotient = scale > T(0) ? to_compute(column[k]) / scale : T(0);
      const T whole = __builtin_nearbyint(quotient);
      return Word(whole < T(-127) ? T(-127) : whole > T(127) ? T(127) : whole);
    } else if constexpr (W::kPack == 2) {
      bfloat16 first, second = {0};
      store_one(&first, to_compute(column[2 * k]));
      if (2 * k + 1 < depth) store_one(&second, to_compute(column[2 * k + 1]));
      return uint32_t(first.bits) | uint32_t(second.bits) << 16;
    } else {
      return to_compute(column[k]);
    }
  }

  // A block of `groups` vectors of columns whose elements are contiguous in the source: column
  // `place` of vector g is row g * group_rows + first + place of source [*, depth].
  static void pack_rows(const S* source, int64_t depth, int64_t first, int64_t count, int groups,
                        int64_t group_rows, int64_t words, Word* out, T* scales) {
    const int64_t width = groups * kWidth;
    if constexpr (W::kPlain) {
      for (int g = 0; g < groups; ++g)
        pack_vectors<1>(source + (g * group_rows + first) * depth, 1, depth, depth, count - first,
                        out + g * kWidth, width);
      return;
    }
    T scale[kGates * kWidth] = {};
    for (int64_t place = 0; place < width; ++place) {
      const int64_t index = first + place % kWidth;
      if (!W::kScaled) continue;
      if (index < count)
        scale[place] = scale_of(source + (place / kWidth * group_rows + index) * depth, depth);
      scales[place] = scale[place];
    }
    for (int64_t k = 0; k < words; k += kPiece) {
      const int64_t end = words - k < kPiece ? words : k + kPiece;
      for (int64_t place = 0; place < width; ++place) {
        const int64_t index = first + place % kWidth;
        const S* column = source + (place / kWidth * group_rows + index) * depth;
        for (int64_t i = k; i < end; ++i)
          out[i * width + place] = index < count ? word(column, i, depth, scale[place]) : Word(0);
      }
    }
  }

  // The same, a vector of words at a time. `side`: columns of all groups are neighbours.
  static void pack_split_rows(const S* source, int64_t depth, int64_t first, int64_t count,
                              int groups, int64_t group_rows, bool side, int64_t words, Word* out) {
    const int64_t width = groups * kWidth;
    for (int g = 0; g < groups; ++g) {
      const S* rows = source + (g * group_rows + first) * depth;
      const int64_t left = count - first - (side ? g * group_rows : 0);
      for (int64_t k = 0; k < words * W::kPack; k += kWidth) {
        Vec<T> square[kWidth] = {};
        if (k < depth && left > 0) load_transposed(rows + k, depth, depth - k, left, square);
        for (int64_t i = 0; i < kWidth; i += W::kPack)
          store_words(square[i], square[i + 1], out + (k + i) / W::kPack * width + g * kWidth);
      }
    }
  }

  // Words [begin, end) of all vectors of a panel whose columns are those of source [*, count].
  // Depth k is row row_of(k), or 0 where that is negative.
  template <typename Rows>
  static void pack_columns(const S* source, int64_t count, const VectorsPanel<W>& panel,
                           int64_t begin, int64_t end, const Rows& row_of) {
    for (int64_t vector = 0; vector * kWidth < round_up(count, W::kVectors * kWidth); ++vector) {
      const int64_t n = count - vector * kWidth;
      for (int64_t k = begin; k < end; ++k) {
        Vec<T> of[2] = {};
        for (int i = 0; i < W::kPack; ++i) {
          const int64_t row = row_of(k * W::kPack + i);
          if (row >= 0 && n > 0) of[i] = load_n(source + row * count + vector * kWidth, n);
        }
        store_words(of[0], of[1], const_cast<Word*>(panel.at(vector, k)));
      }
    }
  }

  static CTXFAST_INLINE void store_words(Vec<T> first, Vec<T> second, Word* to) {
    if constexpr (sizeof(Word) == sizeof(uint32_t) && W::kPack == 2) {
      bfloat16 pair[2][kWidth];
      store(pair[0], first);
      store(pair[1], second);
      for (int64_t i = 0; i < kWidth; ++i)
        to[i] = uint32_t(pair[0][i].bits) | uint32_t(pair[1][i].bits) << 16;
    } else if constexpr (W::kPack == 2) {
      W::store_words(first, second, to);
    } else {
      store(to, first);
    }
  }

  static bool ordinary(const S* weights, int64_t count, int threads) {
    bool all = true;
    parallel_for(threads, count, kScanned, [&](int64_t begin, int64_t end) {
      if (!all_ordinary(weights + begin, end - begin))
        __atomic_store_n(&all, false, __ATOMIC_RELAXED);
    });
    return all;
  }

  static void run(const LstmPackArgs& args) {
    const int64_t inputs = args.backward ? 0 : args.inputs;
    const int64_t hidden = args.hidden, features = args.features;
    const PackedLayout<W> layout(inputs, hidden, features, args.projected, args.backward);
    *args.header = {layout.bytes, inputs,      hidden,         features,      CTXFAST_VECTOR_BYTES,
                    args.dtype,   args.weight, args.projected, args.backward, true};
    if (args.packed == nullptr) return;
    char* base = static_cast<char*>(args.packed);
    const void* const sources[kPanels] = {args.weight_hh, args.weight_hr, args.weight_ih};
    const int64_t sizes[kPanels] = {kGates * hidden * features, features * hidden,
                                    kGates * hidden * inputs};
    for (int k = 0; k < kPanels; ++k) {
      if (layout.columns[k] == 0) continue;
      const S* source = static_cast<const S*>(sources[k]);
      if (!ordinary(source, sizes[k], args.threads)) args.header->ordinary = false;
      Word* panel = const_cast<Word*>(layout.words_of(base, k));
      T* scales = const_cast<T*>(layout.scales_of(base, k));
      const int64_t words = layout.words[k];
      if constexpr (!W::kScaled) {
        if (args.backward) {
          const bool state = k == kStatePanel;
          const UnitChunks chunks = layout.chunks;
          const auto row_of = [=](int64_t d) -> int64_t {
            if (!state) return d < features ? d : -1;
            const int64_t place = d % chunks.depth();
            const int64_t unit = d / chunks.depth() * chunks.size + place % chunks.size;
            return unit < hidden ? place / chunks.size * hidden + unit : -1;
          };
          parallel_for(args.threads, words, 4 * kPiece, [&](int64_t begin, int64_t end) {
            pack_columns(source, state ? features : hidden, layout.vectors_of(base, k), begin, end,
                         row_of);
          });
          continue;
        }
      }
      const bool projection = k == kProjectionPanel;
      const int64_t depth = projection ? hidden : k == kStatePanel ? features : inputs;
      const int64_t count = projection ? features : hidden;
      const int groups = projection ? W::kVectors : kGates;
      const int64_t width = groups * kWidth, step = projection ? width : kWidth;
      parallel_for(args.threads, layout.columns[k] / width, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          Word* out = panel + block * words * width;
          if constexpr (W::kVectors > 1) {
            pack_split_rows(source, depth, block * step, count, groups,
                            projection ? kWidth : hidden, projection, words, out);
          } else {
            pack_rows(source, depth, block * step, count, groups, hidden, words, out,
                      scales + block * width);
          }
        }
      });
    }
    __builtin_memcpy(base, args.header, sizeof *args.header);
  }
};

}  // namespace

Status lstm_pack(const LstmPackArgs& args) {
  Status status;
  if (args.backward && args.weight == kInt8Weight) {
    status.code = kUnsupportedDtype;
  } else if (args.dtype == kFloat64 && args.weight == kPlainWeight) {
    Packer<double, PlainWeight<double> >::run(args);
  } else if (args.dtype == kFloat32 && args.weight == kPlainWeight) {
    Packer<float, PlainWeight<float> >::run(args);
#if defined(CTXFAST_AMX)
  } else if (args.dtype == kFloat32 && args.weight == kSplitWeight) {
    Packer<float, SplitWeight>::run(args);
#endif
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
