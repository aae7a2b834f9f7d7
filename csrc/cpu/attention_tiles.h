// The products of attention on top of multiply_tile. Each struct is the body of for_each_tile:
// at(row, vector) moves it to a tile, run<rows, columns>() computes the tile.
#pragma once

#include "cpu/attention_pack.h"

CTXFAST_NAMESPACE_BEGIN

CTXFAST_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
CTXFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CTXFAST_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Scores are summed in parts of this many words, which keeps their rounding errors, and with them
// the relative errors of the weights, low. In small matrices, where the eager path splits its sums
// finely too, the extra additions cost little.
CTXFAST_INLINE int64_t summed_words(int64_t keys) { return keys <= 64 ? 16 : 32; }

// scores[r, c] = rows[r] . keys[c], the keys packed by pack_transposed.
template <typename Storage>
struct ScoreTile {
  using Math = Arithmetic<Storage>;
  using T = Compute<Storage>;
  const WordOf<Storage>*rows, *keys;
  int64_t row_stride, words, part;  // part: summed_words
  T* scores;
  int64_t score_stride;

  ScoreTile at(int64_t r, int64_t c) const {
    ScoreTile tile = *this;
    tile.rows += r * row_stride;
    tile.keys += c * kLanes<T> * words;
    tile.scores += r * score_stride + c * kLanes<T>;
    return tile;
  }

  template <int kRows, int kColumns>
  CTXFAST_NOINLINE void run() const {
    const int64_t step = Math::kPack == 1 ? part : words;
    for (int64_t k = 0; k < words; k += step) {
      Vec<T> sum[kRows][kColumns];
      clear_tile<T>(sum);
      multiply_tile<Math, kRows, kColumns>(rows + k, row_stride, keys + k * kLanes<T>, kLanes<T>,
                                           words * kLanes<T>, smaller(step, words - k), sum);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) {
          T* to = scores + r * score_stride + c * kLanes<T>;
          store(to, k == 0 ? sum[r][c] : load(to) + sum[r][c]);
        }
    }
  }
};

// Vector c of the kColumns of a row that has `left` elements; only the last may be short.
template <int kColumns, typename Storage, typename T = Compute<Storage>>
CTXFAST_INLINE void store_columns(Storage* row, int c, Vec<T> v, int64_t left) {
  if (c + 1 < kColumns || left >= kColumns * kLanes<T>)
    store(row + c * kLanes<T>, v);
  else
    store_n(row + c * kLanes<T>, v, left - c * kLanes<T>);
}

// output[r, c] = (state[r, c] * rescale[r] + weights[r] . values[:, c]) * factor[r], each part
// where it is wanted.
template <typename Storage>
struct ValueTile {
  using Math = Arithmetic<Storage>;
  using T = Compute<Storage>;
  const WordOf<Storage>*weights, *values;
  int64_t weight_stride, depth, value_stride, width;
  T* state;          // [rows, width]
  const T* rescale;  // nullptr: the state starts here
  const T* factor;   // nullptr: the state stays, there is more to come
  Storage* output;
  int64_t output_stride, columns;  // of the output that are left

  ValueTile at(int64_t r, int64_t c) const {
    ValueTile tile = *this;
    tile.weights += r * weight_stride;
    tile.values += c * kLanes<T>;
    tile.state += r * width + c * kLanes<T>;
    if (rescale != nullptr) tile.rescale += r;
    if (factor != nullptr) tile.factor += r;
    tile.output += r * output_stride + c * kLanes<T>;
    tile.columns -= c * kLanes<T>;
    return tile;
  }

  template <int kRows, int kColumns>
  CTXFAST_NOINLINE void run() const {
    Vec<T> sum[kRows][kColumns];
    clear_tile<T>(sum);
    if (rescale != nullptr)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c)
          sum[r][c] = load(state + r * width + c * kLanes<T>) * rescale[r];
    multiply_tile<Math, kRows, kColumns>(weights, weight_stride, values, value_stride, kLanes<T>,
                                         depth, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        if (factor == nullptr) {
          store(state + r * width + c * kLanes<T>, sum[r][c]);
        } else {
          store_columns<kColumns>(output + r * output_stride, c, sum[r][c] * factor[r], columns);
        }
      }
  }
};

// total[r, c] += left[r] . right[:, c]; kTransposed: left is stored [depth, rows]. The product is
// summed by itself first: a long sum made of short ones keeps its rounding errors low. With an
// output, the total times `scale` goes there instead.
template <typename Storage, bool kTransposed>
struct AccumulateTile {
  using Math = Arithmetic<Storage>;
  using T = Compute<Storage>;
  const WordOf<Storage>* left;
  int64_t left_stride;
  const WordOf<Storage>* right;
  int64_t depth, width;  // of right and total
  T* total;
  bool starts;  // the total is zero, whatever lies there
  T scale;
  Storage* output;  // or nullptr
  int64_t output_stride, columns;

  AccumulateTile at(int64_t r, int64_t c) const {
    AccumulateTile tile = *this;
    tile.left += kTransposed ? r : r * left_stride;
    tile.right += c * kLanes<T>;
    tile.total += r * width + c * kLanes<T>;
    if (output != nullptr) tile.output += r * output_stride + c * kLanes<T>;
    tile.columns -= c * kLanes<T>;
    return tile;
  }

  template <int kRows, int kColumns>
  CTXFAST_NOINLINE void run() const {
    Vec<T> sum[kRows][kColumns];
    clear_tile<T>(sum);
    multiply_tile<Math, kRows, kColumns, kTransposed>(left, left_stride, right, width, kLanes<T>,
                                                      depth, sum);
    if (!starts)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c)
          sum[r][c] = load(total + r * width + c * kLanes<T>) + sum[r][c];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        if (output == nullptr)
          store(total + r * width + c * kLanes<T>, sum[r][c]);
        else
          store_columns<kColumns>(output + r * output_stride, c, sum[r][c] * scale, columns);
      }
  }
};

CTXFAST_NAMESPACE_END
