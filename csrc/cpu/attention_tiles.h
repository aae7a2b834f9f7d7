// The products of attention on top of multiply_tile. Each struct is the body of for_each_tile:
// run<rows, columns>(row, vector) computes the tile that begins there.
#pragma once

#include "cpu/attention_pack.h"
#include "cpu/rounded.h"

CTXFAST_NAMESPACE_BEGIN

CTXFAST_INLINE constexpr int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}
CTXFAST_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CTXFAST_INLINE constexpr int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

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

  template <int kRows, int kColumns>
  CTXFAST_NOINLINE void run(int64_t row, int64_t vector) const {
    const int64_t step = Math::kPack == 1 ? part : words;
    const WordOf<Storage>* left = rows + row * row_stride;
    const WordOf<Storage>* right = keys + vector * kLanes<T> * words;
    T* result = scores + row * score_stride + vector * kLanes<T>;
    for (int64_t k = 0; k < words; k += step) {
      Vec<T> sum[kRows][kColumns];
      clear_tile<T>(sum);
      multiply_tile<Math, kRows, kColumns>(left + k, row_stride, right + k * kLanes<T>, kLanes<T>,
                                           words * kLanes<T>, smaller(step, words - k), sum);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) {
          T* to = result + r * score_stride + c * kLanes<T>;
          store(to, k == 0 ? sum[r][c] : load(to) + sum[r][c]);
        }
    }
  }

#if defined(CTXFAST_AMX)
  void run_matrix(int64_t count, int64_t vectors) const {
    const MatrixProduct product = {reinterpret_cast<const char*>(rows),
                                   row_stride * 4,
                                   reinterpret_cast<const char*>(keys),
                                   kMatrixBytes,
                                   kTileBytes,
                                   words * kMatrixBytes,
                                   words / kMatrixRows,
                                   reinterpret_cast<char*>(scores),
                                   score_stride * 4,
                                   true};
    product.run((count + kMatrixRows - 1) / kMatrixRows, vectors);
  }
#endif
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

  template <int kRows, int kColumns>
  CTXFAST_NOINLINE void run(int64_t row, int64_t vector) const {
    const int64_t column = vector * kLanes<T>;
    T* kept = state + row * width + column;
    Vec<T> sum[kRows][kColumns];
    clear_tile<T>(sum);
    if (rescale != nullptr)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c)
          sum[r][c] = load(kept + r * width + c * kLanes<T>) * rescale[row + r];
    multiply_tile<Math, kRows, kColumns>(weights + row * weight_stride, weight_stride,
                                         values + column, value_stride, kLanes<T>, depth, sum);
    Storage* to = output + row * output_stride + column;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        if (factor == nullptr) {
          store(kept + r * width + c * kLanes<T>, sum[r][c]);
        } else {
          store_columns<kColumns>(to + r * output_stride, c, sum[r][c] * factor[row + r],
                                  columns - column);
        }
      }
  }

#if defined(CTXFAST_AMX)
  void run_matrix(int64_t rows, int64_t vectors) const {
    if (rescale != nullptr)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; c += kLanes<T>)
          store(state + r * width + c, load(state + r * width + c) * rescale[r]);
    const MatrixProduct product = {reinterpret_cast<const char*>(weights),
                                   weight_stride * 4,
                                   reinterpret_cast<const char*>(values),
                                   value_stride * 4,
                                   value_stride * 4 * kMatrixRows,
                                   kMatrixBytes,
                                   depth / kMatrixRows,
                                   reinterpret_cast<char*>(state),
                                   width * 4,
                                   rescale == nullptr};
    product.run((rows + kMatrixRows - 1) / kMatrixRows, vectors);
    if (factor == nullptr) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kLanes<T>)
        store_rounded(output + r * output_stride + c, load(state + r * width + c) * factor[r],
                      columns - c);
  }
#endif
};

// total[r, c] += left[r] . right[:, c]; kTransposed: left is stored [depth, rows]. The product is
// summed by itself first: a long sum made of short ones keeps its rounding errors low. With an
// output, the total times `scale` goes there instead.
template <typename Storage, bool kTransposed>
struct AccumulateTile {
  using Math = Arithmetic<Storage>;
  using T = Compute<Storage>;
  using Word = WordOf<Storage>;
  const Word* left;
  int64_t left_stride;
  const Word* right;
  int64_t depth, width;  // of right and total
  T* total;
  bool starts;  // the total is zero, whatever lies there
  T scale;
  Storage* output;  // or nullptr
  int64_t output_stride, columns;

  // What is there so far of `rows` rows is to be added to.
  void start(int64_t rows) {
    if (starts) __builtin_memset(total, 0, rows * width * sizeof(T));
    starts = false;
  }

  template <int kRows, int kColumns>
  CTXFAST_NOINLINE void run(int64_t row, int64_t vector) const {
    const int64_t column = vector * kLanes<T>;
    T* collected = total + row * width + column;
    Vec<T> sum[kRows][kColumns];
    clear_tile<T>(sum);
    multiply_tile<Math, kRows, kColumns, kTransposed>(
        left + (kTransposed ? row : row * left_stride), left_stride, right + column, width,
        kLanes<T>, depth, sum);
    if (!starts)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c)
          sum[r][c] = load(collected + r * width + c * kLanes<T>) + sum[r][c];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        if (output == nullptr)
          store(collected + r * width + c * kLanes<T>, sum[r][c]);
        else
          store_columns<kColumns>(output + (row + r) * output_stride + column, c, sum[r][c] * scale,
                                  columns - column);
      }
  }

#if defined(CTXFAST_AMX)
  // Two tiles of rows at a time. A transposed left operand is turned on the way, the rows behind
  // before those at hand are multiplied, and their results are written after the next ones: what
  // has just been stored is not there yet to be loaded.
  void run_matrix(int64_t rows, int64_t vectors) const {
    alignas(64) float turned[2][kBlockRows * kMostSteps * kMatrixRows];
    if constexpr (kTransposed) turn_block(0, rows, turned[0]);
    for (int64_t row = 0, n = 0; row < rows; row += kBlockRows, ++n) {
      const Word* a = left + row * left_stride;
      int64_t a_row = left_stride;
      if constexpr (kTransposed) {
        a = reinterpret_cast<const Word*>(turned[n % 2]);
        a_row = steps() * kMatrixRows;
        turn_block(row + kBlockRows, rows, turned[(n + 1) % 2]);
      }
      T* to = total + row * width;
      const MatrixProduct product = {reinterpret_cast<const char*>(a),
                                     a_row * 4,
                                     reinterpret_cast<const char*>(right),
                                     width * 4,
                                     width * 4 * kMatrixRows,
                                     kMatrixBytes,
                                     steps(),
                                     reinterpret_cast<char*>(to),
                                     width * 4,
                                     starts};
      product.run(rows - row > kMatrixRows ? 2 : 1, vectors);
      if (row > 0) write_block(row - kBlockRows, rows);
    }
    if (rows > 0) write_block((rows - 1) / kBlockRows * kBlockRows, rows);
  }

 private:
  static constexpr int64_t kBlockRows = 2 * kMatrixRows, kMostSteps = 2;

  int64_t steps() const { return (depth + kMatrixRows - 1) / kMatrixRows; }

  CTXFAST_INLINE void write_block(int64_t row, int64_t rows) const {
    if (output == nullptr) return;
    for (int64_t r = row; r < smaller(row + kBlockRows, rows); ++r)
      for (int64_t c = 0; c < columns; c += kLanes<T>)
        store_rounded(output + r * output_stride + c, load(total + r * width + c) * scale,
                      columns - c);
  }

  CTXFAST_INLINE void turn_block(int64_t row, int64_t rows, float* to) const {
    const int64_t a_row = steps() * kMatrixRows;
    for (int64_t last = smaller(row + kBlockRows, rows); row < last;
         row += kMatrixRows, to += kMatrixRows * a_row)
      turn(row, a_row, to);
  }

  // A tile of rows from `row` on as [16, a_row]; words beyond the depth are 0.
  CTXFAST_INLINE void turn(int64_t row, int64_t a_row, float* to) const {
    for (int64_t first = 0; first < a_row; first += kMatrixRows) {
      Vec<float> tile[kMatrixRows];
      load_transposed(reinterpret_cast<const float*>(left) + first * left_stride + row, left_stride,
                      kMatrixRows, depth - first, tile);
#pragma GCC unroll 16
      for (int r = 0; r < kMatrixRows; ++r) store(to + r * a_row + first, tile[r]);
    }
  }
#endif
};

// What a thread needs to have while it runs products of a storage type.
template <typename Storage>
struct ProductScope {};
#if defined(CTXFAST_AMX)
template <>
struct ProductScope<bfloat16> : MatrixTiles {};
template <>
struct ProductScope<float> : MatrixTiles {};
#endif

// The product of `rows` rows and `vectors` vectors whose tiles `tile` computes.
template <typename Storage, typename Tile>
CTXFAST_INLINE void for_each_product(int64_t rows, int64_t vectors, const Tile& tile) {
  if constexpr (kMatrix<Storage>)
    tile.run_matrix(rows, vectors);
  else
    for_each_tile(rows, vectors, tile);
}

CTXFAST_NAMESPACE_END
