// Copies of queries, keys and values in the layouts that multiply_tile reads. Rows that must not be
// seen, and tails, are zero: whatever lies there, NaN included, has no influence.
#pragma once

#include "cpu/amx_block.h"
#include "cpu/matrix_tile.h"
#include "cpu/transpose.h"

CTXFAST_NAMESPACE_BEGIN

template <typename Storage>
using WordOf = typename Arithmetic<Storage>::Word;

// Whether a row of elements is an operand as it lies in memory.
template <typename Storage>
constexpr bool kWordIsElement =
    Arithmetic<Storage>::kPack == 1 && sizeof(WordOf<Storage>) == sizeof(Storage);

// Whether products run on matrix tiles, whose operands have a whole number of steps along the
// depth.
#if defined(CTXFAST_AMX)
template <typename Storage>
constexpr bool kMatrix = sizeof(Storage) == 2;
#else
template <typename Storage>
constexpr bool kMatrix = false;
#endif

// Whether they may run there on the bfloat16 parts of float operands.
template <typename Storage>
constexpr bool kSplits = false;
#if defined(CTXFAST_AMX)
template <>
inline constexpr bool kSplits<float> = true;
#endif

CTXFAST_INLINE void prefetch_bytes(const void* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(from) + b);
}

// Which rows of a block are visible: those from `first` on, and, unless it is nullptr, where `keep`
// is not 0.
struct RowFilter {
  int64_t first;
  const uint8_t* keep;
  int64_t step;
  CTXFAST_INLINE bool operator()(int64_t row) const {
    return row >= first && (keep == nullptr || keep[row * step] != 0);
  }
  CTXFAST_INLINE bool shows_all() const { return first <= 0 && keep == nullptr; }
};

// What the elements of a depth are counted in, and the words that hold n of them.
template <typename Storage>
constexpr int64_t kDepthStep = kMatrix<Storage> ? 32 : Arithmetic<Storage>::kPack;
template <typename Storage>
CTXFAST_INLINE int64_t words_of(int64_t n) {
  constexpr int64_t kStep = kDepthStep<Storage>;
  return (n + kStep - 1) / kStep * (kStep / Arithmetic<Storage>::kPack);
}

// kLanes words of a row from word `first` on; elements from n on are 0.
template <typename Storage>
CTXFAST_INLINE Vec<Compute<Storage>> load_row(const Storage* row, int64_t first, int64_t n) {
  if constexpr (Arithmetic<Storage>::kPack == 1) {
    return load_n(row + first, n - first);
  } else {
#if defined(CTXFAST_AVX512)
    const int64_t left = n - 2 * first;
    const __mmask32 bits = left >= 32  ? ~__mmask32(0)
                           : left <= 0 ? __mmask32(0)
                                       : __mmask32((1u << left) - 1u);
    return (Vec<float>)_mm512_maskz_loadu_epi16(bits, row + 2 * first);
#endif
  }
}

// The lanes 0 a0, 1 b0, 2 a1, 3 b1 ... of the lower (kHigh: upper) halves of a and b.
template <bool kHigh, typename T>
CTXFAST_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  constexpr int kCount = kLanes<T>;
#if defined(__clang__)
  Vec<T> mixed;
  for (int i = 0; i < kCount; ++i) mixed[i] = (i % 2 ? b : a)[i / 2 + (kHigh ? kCount / 2 : 0)];
  return mixed;
#else
  Mask<T> order;
  for (int i = 0; i < kCount; ++i) order[i] = i / 2 + (kHigh ? kCount / 2 : 0) + (i % 2) * kCount;
  return __builtin_shuffle(a, b, order);
#endif
}

// Transposes kLanes vectors: interleaving row i with row i + kLanes / 2, log2(kLanes) times.
template <typename T>
CTXFAST_INLINE void transpose_rows(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int round = kLanes<T>; round > 1; round /= 2) {
    Vec<T> mixed[kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      mixed[2 * i] = interleave<false, T>(rows[i], rows[i + kHalf]);
      mixed[2 * i + 1] = interleave<true, T>(rows[i], rows[i + kHalf]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kHalf; ++i) rows[i] = mixed[i];
  }
}

// Word `first` + k of kLanes rows in square[k]. Whether the rows lie such that it can.
template <typename Storage, typename T = Compute<Storage>>
CTXFAST_INLINE bool load_words_transposed(const Storage* rows, int64_t stride, int64_t first,
                                          Vec<T> (&square)[kLanes<T>]) {
  constexpr int kPack = Arithmetic<Storage>::kPack;
  if constexpr (kPack * sizeof(Storage) == sizeof(T)) {
    if (stride % kPack != 0) return false;
    load_transposed(reinterpret_cast<const T*>(rows + kPack * first), stride / kPack, square);
    return true;
  }
  return false;
}

// rows [count, depth] -> blocks of kLanes rows, each [words_of(depth), kLanes]: B of a product with
// the rows transposed.
template <typename Storage>
CTXFAST_NOINLINE void pack_transposed(const Storage* rows, int64_t stride, int64_t count,
                                      int64_t depth, RowFilter filter, WordOf<Storage>* out) {
  using T = Compute<Storage>;
  constexpr int kCount = kLanes<T>;
  const int64_t words = words_of<Storage>(depth);
  for (int64_t block = 0; block < count; block += kCount) {
    for (int64_t first = 0; first < words; first += kCount) {
      Vec<T> tile[kCount];
      const bool whole = filter.shows_all() && count - block >= kCount &&
                         depth >= Arithmetic<Storage>::kPack * (first + kCount);
      if (!whole || !load_words_transposed(rows + block * stride, stride, first, tile)) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
          const int64_t row = block + i;
          tile[i] =
              row < count && filter(row) ? load_row(rows + row * stride, first, depth) : Vec<T>{};
        }
        transpose_rows<T>(tile);
      }
      T* to = reinterpret_cast<T*>(out) + first * kCount;
      const int64_t used = words - first < kCount ? words - first : kCount;
      if (used == kCount) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) store(to + i * kCount, tile[i]);
      } else {
        for (int i = 0; i < used; ++i) store(to + i * kCount, tile[i]);
      }
    }
    out += words * kCount;
  }
}

// rows [count, depth] -> [count, words_of(depth)]: A of a product over the depth.
template <typename Storage>
CTXFAST_NOINLINE void pack_rows(const Storage* rows, int64_t stride, int64_t count, int64_t depth,
                                WordOf<Storage>* out) {
  using T = Compute<Storage>;
  const int64_t words = words_of<Storage>(depth);
  for (int64_t row = 0; row < count; ++row) {
    T* to = reinterpret_cast<T*>(out + row * words);
    for (int64_t first = 0; first < words; first += kLanes<T>)
      store_n(to + first, load_row(rows + row * stride, first, depth), words - first);
  }
}

// rows [count, width] -> [words_of(count), padded width]: B of a product over the rows. Where a
// word is a pair, it holds the same column of two neighbouring rows. `width_lanes` is the width
// rounded up to whole vectors.
template <typename Storage>
CTXFAST_NOINLINE void pack_columns(const Storage* rows, int64_t stride, int64_t count,
                                   int64_t width, int64_t width_lanes, RowFilter filter,
                                   WordOf<Storage>* out) {
  using T = Compute<Storage>;
  const auto visible = [&](int64_t row) { return row < count && filter(row); };
  if constexpr (Arithmetic<Storage>::kPack == 1) {
    for (int64_t row = 0; row < count; ++row) {
      const Storage* from = rows + row * stride;
      WordOf<Storage>* to = out + row * width_lanes;
      const bool seen = visible(row);
      for (int64_t first = 0; first < width_lanes; first += kLanes<T>)
        store(to + first, seen ? load_n(from + first, width - first) : Vec<T>{});
    }
  } else {
    for (int64_t row = 0; row < 2 * words_of<Storage>(count); row += 2) {
      const Storage* from = rows + row * stride;
      float* to = reinterpret_cast<float*>(out + row / 2 * width_lanes);
      const bool seen0 = visible(row), seen1 = visible(row + 1);
      for (int64_t first = 0; first < width_lanes; first += kLanes<T>) {
        const int64_t left = width - first;
        // A widened bfloat16 has its bits in the upper half: the first row's move down, the
        // second's stay.
        const Vec<float> low = seen0 ? load_n(from + first, left) : Vec<float>{};
        const Vec<float> high = seen1 ? load_n(from + stride + first, left) : Vec<float>{};
        using Bits = VecOf<float>::bits;
        store(to + first, (Vec<float>)(((Bits)low >> 16) | (Bits)high));
      }
    }
  }
}

CTXFAST_NAMESPACE_END
