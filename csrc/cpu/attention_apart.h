// Rows of an operand that hold an infinity or a NaN. In a product over rows they would reach every
// sum, since a weight of 0 does not hide them: they are zero in the operand, and each is added by
// itself to the sums of those that attend it.
#pragma once

#include "cpu/attention_scores.h"

CTXFAST_NAMESPACE_BEGIN

// Whether masks and bias let row i attend key j.
template <typename T>
CTXFAST_INLINE bool shows(const ScoreTerms& terms, int64_t i, int64_t j) {
  if (terms.attn_mask != nullptr &&
      terms.attn_mask[i * terms.attn_mask_row + j * terms.attn_mask_key] == 0)
    return false;
  if (terms.key_mask != nullptr && terms.key_mask[j * terms.key_mask_key] == 0) return false;
  return terms.bias == nullptr || load_bias<T>(terms, i, j, 1)[0] != -T(__builtin_huge_val());
}

template <typename Storage>
CTXFAST_INLINE bool finite_row(const Storage* row, int64_t depth) {
  using T = Compute<Storage>;
  Vec<T> sum = {};
  for (int64_t d = 0; d < depth; d += kLanes<T>) sum += load_n(row + d, depth - d) * T(0);
  return reduce_add(sum) == T(0);
}

template <typename Storage>
CTXFAST_INLINE void add_row(const Storage* row, int64_t depth, Compute<Storage> weight,
                            Compute<Storage>* total) {
  using T = Compute<Storage>;
  for (int64_t d = 0; d < depth; d += kLanes<T>)
    store(total + d, load(total + d) + load_n(row + d, depth - d) * weight);
}

template <typename Storage, int64_t kMost>
struct RowsApart {
  using Word = WordOf<Storage>;
  static constexpr int kPack = Arithmetic<Storage>::kPack;
  int64_t count = 0;
  int16_t rows[kMost];

  CTXFAST_NOINLINE void find(const Storage* from, int64_t stride, int64_t candidates, int64_t depth,
                             RowFilter filter) {
    count = 0;
    for (int64_t row = 0; row < candidates; ++row)
      if (filter(row) && !finite_row(from + row * stride, depth)) rows[count++] = int16_t(row);
  }

  // In what pack_columns has made of all rows.
  void clear(Word* columns, int64_t width) const {
    for (int64_t n = 0; n < count; ++n) {
      Word* row = columns + rows[n] / kPack * width;
      if constexpr (kPack == 1) {
        __builtin_memset(row, 0, width * sizeof(Word));
      } else {
        uint16_t* half = reinterpret_cast<uint16_t*>(row) + rows[n] % kPack;
        for (int64_t c = 0; c < width; ++c) half[c * kPack] = 0;
      }
    }
  }
};

CTXFAST_NAMESPACE_END
