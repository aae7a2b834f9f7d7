// What happens to the rows of two matrices of scores in the backward pass. With S = f Q K^T in base
// 2, dP = dO V^T and the dropout mask M (kept values are multiplied by `kept`):
//
//   P  = 2^(S - lse)        weights, before dropout
//   dS = P * (kept M dP - delta + dlse),   delta = rowsum(P * kept M dP) = rowsum(dO * O)
//
// and M P and dS are what the products with dO, Q and K need, in the words that these products
// broadcast. A row whose keys are all in the block at hand takes its softmax and delta from the row
// itself, which makes dS exactly zero where a row has one key; other rows take lse and the second
// form of delta.
#pragma once

#include "cpu/attention_apart.h"
#include "cpu/attention_workspace.h"

CTXFAST_NAMESPACE_BEGIN

// Where the gradient of the bias collects, for one (sequence, head).
template <typename T>
struct BiasGradient {
  T* rows = nullptr;  // row i at rows + i * stride; stride 0: summed over the rows
  int64_t stride = 0;
  T* row_sums = nullptr;  // sum of row i added to row_sums[i]
};

template <typename Storage>
struct GradientRows {
  using T = Compute<Storage>;
  using Word = WordOf<Storage>;
  static constexpr int kPack = Arithmetic<Storage>::kPack;
  static constexpr bool kFast = sizeof(Storage) == 2;

  const ScoreTerms& terms;
  const DropoutRow& dropout;
  T factor;  // scale in base 2
  T kept;    // what dropout multiplies kept weights with
  BiasGradient<T> bias;
  const T *lse, *delta;            // by query row; lse in base 2, +inf for rows without keys
  const T* correction;             // what the rounding of lse to base 2 costs the weights
  const T* grad_lse;               // by query row, as lse
  int64_t block_begin, block_end;  // of the keys at hand
  int64_t key_length;
  int64_t row_stride;  // of the matrices, in elements of T
  T *scores,
      *grads;  // S and dP; in place M P and dS, for kPack == 2 two rows in the place of the first
  Word* grad_rows;  // kPack == 2: dS again, pairs along the keys; row stride row_stride / 2

  struct Row {
    T *scores, *grads, *bias;
    T delta, grad_lse;
    T share;  // what the stored weights are multiplied with
    int64_t i;
    uint64_t kept_bits[kLongestBlock / 64 + 1];
    Vec<T> bias_sum;
  };

  // First pass: weights (times a constant) and dropped gradients in the place of scores and
  // gradients.
  CTXFAST_INLINE Row open(int64_t r, int64_t i, int64_t key0, int64_t columns,
                          KeyRange range) const {
    Row row;
    row.scores = scores + r * row_stride;
    row.grads = grads + r * row_stride;
    row.bias = bias.rows == nullptr ? nullptr : bias.rows + i * bias.stride + key0;
    row.i = i;
    row.grad_lse = grad_lse[i];
    row.bias_sum = Vec<T>{};
    T f = factor;
    if (terms.any) {
      apply_terms<T>(terms, i, factor, key0, key0, key0 + columns, key_length, row.scores);
      f = T(1);
    }
    const T minus_infinity = -T(__builtin_huge_val());
    fill_outside<T>(row.scores, range.begin - key0, range.end - key0, columns, minus_infinity);
    if (terms.any)
      clear_hidden(row.scores, row.grads, columns);
    else
      fill_outside<T>(row.grads, range.begin - key0, range.end - key0, columns, T(0));
    if (dropout.threshold != 0)
      for (int64_t word = 0; word <= (key0 + columns - 1) / 64 - key0 / 64; ++word)
        row.kept_bits[word] = kept_columns(dropout.seed, dropout.threshold, key0 / 64 + word, i,
                                           dropout.head, dropout.sequence);
    if (range.begin >= block_begin && range.end <= block_end) {
      const T peak = row_maximum(row.scores, columns);
      const T level = peak == minus_infinity ? T(0) : peak;
      Vec<T> sum = {}, dot = {};
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        const Vec<T> weight = exp2_nonpositive<kFast>((load(row.scores + j) - level) * f);
        const Vec<T> upstream = dropped(row, key0, j, load(row.grads + j) * kept);
        sum += weight;
        dot += weight * upstream;
        store(row.scores + j, weight);
        store(row.grads + j, upstream);
      }
      const T total = reduce_add(sum);
      row.share = total == T(0) ? T(0) : T(1) / total;
      row.delta = reduce_add(dot) * row.share;
    } else {
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        store(row.scores + j, exp2_nonpositive<kFast>(load(row.scores + j) * f - lse[i]));
        store(row.grads + j, dropped(row, key0, j, load(row.grads + j) * kept));
      }
      row.share = correction[i];
      row.delta = delta[i];
    }
    // 0 times a number that is none would not be 0.
    if ((row.share + row.delta + row.grad_lse) * T(0) != T(0)) {
      settle(row, range, key0, columns);
      row.share = T(1);
      row.delta = row.grad_lse = T(0);
    }
    return row;
  }

  static CTXFAST_INLINE void clear_hidden(const T* scores, T* grads, int64_t columns) {
    const Vec<T> hidden = splat<T>(-T(__builtin_huge_val()));
    for (int64_t j = 0; j < columns; j += kLanes<T>)
      store(grads + j, load(scores + j) == hidden ? Vec<T>{} : load(grads + j));
  }

  // Makes of the first pass's results what the second one would, and zeros for the keys that the
  // row does not attend.
  CTXFAST_NOINLINE void settle(Row row, KeyRange range, int64_t key0, int64_t columns) const {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t j = key0 + c;
      const bool attends = j >= range.begin && j < range.end && shows<T>(terms, row.i, j);
      row.scores[c] = attends ? row.scores[c] * row.share : T(0);
      row.grads[c] = attends ? row.grads[c] - row.delta + row.grad_lse : T(0);
    }
  }

  CTXFAST_INLINE Vec<T> dropped(const Row& row, int64_t key0, int64_t j, Vec<T> v) const {
    if (dropout.threshold == 0) return v;
    const int64_t key = key0 + j;
    return keep_lanes(v, row.kept_bits[key / 64 - key0 / 64] >> (key % 64));
  }

  // Second pass, one vector of keys key0 + j on: gives dS and changes `weight` to M P.
  CTXFAST_INLINE Vec<T> gradient(Row& row, int64_t key0, int64_t j, Vec<T>* weight) const {
    const Vec<T> p = load(row.scores + j) * row.share;
    const Vec<T> grad = p * ((load(row.grads + j) - row.delta) + row.grad_lse);
    *weight = dropped(row, key0, j, p);
    if (row.bias != nullptr) {
      const int64_t n = key_length - key0 - j;
      store_n(row.bias + j, load_n(row.bias + j, n) + grad, n);
    }
    if (bias.row_sums != nullptr) row.bias_sum += grad;
    return grad;
  }

  CTXFAST_INLINE void close(const Row& row) const {
    if (bias.row_sums != nullptr) bias.row_sums[row.i] += reduce_add(row.bias_sum);
  }

  // Rows r and, for kPack == 2, r + 1 (if there is one) of the matrices, query rows i and i + 1.
  template <typename Ranges>
  CTXFAST_INLINE void run(int64_t r, int64_t rows, int64_t i, int64_t key0, int64_t columns,
                          const Ranges& range_of) const {
    Row first = open(r, i, key0, columns, range_of(i));
    if constexpr (kPack == 1) {
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        Vec<T> weight;
        const Vec<T> grad = gradient(first, key0, j, &weight);
        store(first.scores + j, weight);
        store(first.grads + j, grad);
      }
    } else {
      const bool two = r + 1 < rows;
      Row second = two ? open(r + 1, i + 1, key0, columns, range_of(i + 1)) : first;
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        Vec<T> weight0, weight1 = {}, grad1 = {};
        const Vec<T> grad0 = gradient(first, key0, j, &weight0);
        if (two) grad1 = gradient(second, key0, j, &weight1);
        store_pairs(first.scores + j, weight0, weight1);
        store_pairs(first.grads + j, grad0, grad1);
        store_weights<Storage>(reinterpret_cast<T*>(grad_rows + r * (row_stride / 2)), j, grad0);
        if (two)
          store_weights<Storage>(reinterpret_cast<T*>(grad_rows + (r + 1) * (row_stride / 2)), j,
                                 grad1);
      }
      end_weights<Storage>(reinterpret_cast<T*>(grad_rows + r * (row_stride / 2)), columns);
      if (two) {
        end_weights<Storage>(reinterpret_cast<T*>(grad_rows + (r + 1) * (row_stride / 2)), columns);
        close(second);
      }
    }
    close(first);
  }

  // Of M P or dS, in the place of the scores or of the gradients: row r, key `column` of those at
  // hand.
  CTXFAST_INLINE T word_element(const T* matrix, int64_t r, int64_t column) const {
    const T* words = matrix + r / kPack * kPack * row_stride;
    if constexpr (kPack == 1)
      return words[column];
    else
      return to_compute(reinterpret_cast<const Storage*>(words)[kPack * column + r % kPack]);
  }

  // Words whose lower halves are `low` and whose upper halves are `high`, rounded to bfloat16.
  static CTXFAST_INLINE void store_pairs(T* to, Vec<T> low, Vec<T> high) {
#if defined(CTXFAST_AVX512_BF16)
    const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
    store(to, (Vec<float>)_mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
#endif
  }
};

CTXFAST_NAMESPACE_END
