// The float linear layer of linear.cpp on matrix tiles, by the digits of amx_digits.h, where many
// rows meet a packed weight. Before rows become digits each of their features is multiplied, and
// the same feature of the weight divided, by a power of two that is stored behind the panels: an
// element is then rounded by what it contributes to results, not by the units it was given in.
//
// A thread packs a chunk of the rows for its second cache level, a piece of the depth at a time,
// and one half of a panel after another meets it, from the first level. Tiles leave the vector
// units idle: in the pauses they turn the next half into digits, and the sums of the block before
// into results.
//
// A result is a float sum over pieces of the depth. It depends on its row and on the weight.
#pragma once

#include "cpu/amx_digits.h"
#include "cpu/amx_division.h"
#include "cpu/linear_finish.h"
#include "cpu/parallel.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// What becomes of the sums of digits: one block is being summed while the one before becomes
// results, some rows at a time.
template <Activation kActivation>
class DigitResults {
 public:
  static constexpr int64_t kTurns = 8;
  static constexpr int64_t kTurnRows = kMatrixRows / kTurns;

  explicit DigitResults(const LinearArgs& args) : args_(args) {}

  // Where the sums of the next block go.
  int32_t* next() { return sums_[current_ ^ 1]; }
  // They are there. rows: the first of the block; columns: the piece of the panel, whose units are
  // column_units; first, last: whether results begin and end with it.
  void begin(int64_t row, int64_t column, const DigitRow* rows, const float* columns,
             Vec<float> column_units, bool first, bool last) {
    current_ ^= 1;
    turn_ = 0;
    row_ = row;
    column_ = column;
    height_ = args_.rows - row;
    width_ = args_.columns - column;
    rows_ = rows;
    columns_ = columns;
    column_units_ = column_units * 0x1p32f;
    first_ = first;
    last_ = last;
    alone_ =
        height_ >= kMatrixRows && width_ >= kMatrixRows && (!last || args_.residual == nullptr);
    bias_ = last && alone_ && args_.bias != nullptr
                ? load(static_cast<const float*>(args_.bias) + column)
                : Vec<float>{};
  }
  // Turns that are left.
  int64_t left() const { return kTurns - turn_; }
  void finish() {
    while (left() > 0) finish_rows();
  }

  CTXFAST_NOINLINE void finish_rows() {
    const int64_t first = turn_++ * kTurnRows;
    if (!alone_) return finish_some(first);
    float* output = output_at(first);
#pragma GCC unroll 2
    for (int64_t r = 0; r < kTurnRows; ++r, output += args_.columns) {
      Vec<float> y = value(first + r, bias_);
      if (!first_) y += load(output);
      store(output, last_ ? activate<float, kActivation>(y) : y);
    }
  }

 private:
  float* output_at(int64_t row) const {
    return static_cast<float*>(args_.output) + (row_ + row) * args_.columns + column_;
  }

  // What a row's sums make, and `more`.
  CTXFAST_INLINE Vec<float> value(int64_t row, Vec<float> more) const {
    constexpr int64_t kSize = kMatrixRows * kMatrixRows;
    const int32_t* sums = sums_[current_] + row * kMatrixRows;
    const auto sum = [&](int64_t weight) {
      return (Vec<float>)_mm512_cvtepi32_ps(_mm512_load_si512(sums + weight * kSize));
    };
    Vec<float> y = sum(3);
#pragma GCC unroll 3
    for (int64_t weight = 2; weight >= 0; --weight) y = y * 0x1p-8f + sum(weight);
    y = y * (rows_[row].unit * column_units_) + more;
    for (int32_t i = 0; i < rows_[row].apart; ++i)
      y += rows_[row].value[i] * load(columns_ + rows_[row].at[i] * kPanelColumns);
    return y;
  }

  // At the edge of the results, or with a residual.
  CTXFAST_NOINLINE void finish_some(int64_t first) {
    alignas(64) float sums[kMatrixRows];
    for (int64_t row = first; row < first + kTurnRows && row < height_; ++row) {
      Vec<float> y = value(row, Vec<float>{});
      if (!first_) y += load_n(output_at(row), width_);
      store(sums, y);
      if (last_) {
        const int64_t width = width_ < kMatrixRows ? width_ : kMatrixRows;
        finish_linear<float, kActivation>(args_, sums, kMatrixRows, row_ + row, 1, column_, width);
      } else {
        store_n(output_at(row), y, width_);
      }
    }
  }

  const LinearArgs& args_;
  alignas(64) int32_t sums_[2][kDigitSums * kMatrixRows * kMatrixRows];
  int64_t current_ = 0, turn_ = kTurns;
  int64_t row_ = 0, column_ = 0, height_ = 0, width_ = 0;  // of the block; how many are there
  const DigitRow* rows_ = nullptr;
  const float* columns_ = nullptr;
  Vec<float> column_units_ = {}, bias_ = {};
  bool first_ = false, last_ = false;
  bool alone_ = false;  // whether sums, bias and activation are all there is to a whole block
};

template <Activation kActivation>
class DigitLinear {
 public:
  explicit DigitLinear(const LinearArgs& args)
      : args_(args),
        row_blocks_(ceiling(args.rows, kMatrixRows)),
        halves_(ceiling(args.columns, kMatrixRows)),
        steps_(ceiling(args.depth, kDigitStep)),
        pieces_(ceiling(steps_, kPieceSteps)),
        piece_steps_(ceiling(steps_, pieces_)),
        panels_(static_cast<const float*>(args.panels)),
        features_(panels_ + ceiling(args.columns, kPanelColumns) * kPanelColumns * args.depth),
        column_units_(features_ + args.depth) {}

  // False where memory is not to be had, or where rows or columns do not fit digits.
  bool run() {
    if (features_[0] != features_[0]) return false;
    const int64_t padded = steps_ * kDigitStep;
    scaled_ = static_cast<float*>(thread_scratch(size_t(2 * padded) * sizeof(float), kPlanScratch));
    if (scaled_ == nullptr) return false;
    inverse_ = scaled_ + padded;
    for (int64_t k = 0; k < padded; k += kLanes<float>) {
      const Vec<float> size = load_n(features_ + k, args_.depth - k);
      store(scaled_ + k, size);
      store(inverse_ + k, 1.0f / size);
    }
    const int64_t fewest = ceiling(row_blocks_, kRowBytes / block_bytes());
    const Division by = divide(row_blocks_, halves_, fewest, args_.threads, kCosts);
    for (piece_ = 0; piece_ < pieces_ && !failed_; ++piece_)
      parallel_for(args_.threads, by.chunks * by.groups, 1, [&](int64_t item, int64_t) {
        const int64_t chunk = item / by.groups, group = item % by.groups;
        multiply(row_blocks_ * chunk / by.chunks, row_blocks_ * (chunk + 1) / by.chunks,
                 halves_ * group / by.groups, halves_ * (group + 1) / by.groups);
      });
    return !failed_;
  }

 private:
  // At most: digits of half a panel then fill the first level, and those of a chunk the second.
  static constexpr int64_t kPieceSteps = kMostDepth / kDigitStep;
  static constexpr int64_t kRowBytes = 5 << 18;
  static constexpr StepCosts kCosts = {4, 11, 4};

  static CTXFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static CTXFAST_INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

  int64_t block_bytes() const { return piece_steps_ * kDigitStepBytes; }

  // A piece of the depth of row blocks [first, last) by that of halves [from, to) of panels.
  struct Chunk {
    const DigitLinear& linear;
    const int64_t first, last, from, to;
    char* const rows;       // [blocks][steps] and behind them two blocks of columns
    DigitRow* const found;  // of each row
    const int64_t begin = linear.piece_ * linear.piece_steps_;
    const int64_t steps = smaller(linear.piece_steps_, linear.steps_ - begin);
    const int64_t depth = smaller(steps * kDigitStep, linear.args_.depth - begin * kDigitStep);
    const int64_t bytes = steps * kDigitStepBytes;
    DigitColumns columns;
    DigitResults<kActivation> results{linear.args_};

    bool pack_rows() const {
      const LinearArgs& args = linear.args_;
      for (int64_t row = 0; row < (last - first) * kMatrixRows; ++row) {
        const int64_t source = first * kMatrixRows + row;
        char* out = rows + row / kMatrixRows * bytes + row % kMatrixRows * kMatrixBytes;
        const float* from =
            static_cast<const float*>(args.input) + source * args.input_stride + begin * kDigitStep;
        if (!pack_digit_row(from, linear.scaled_ + begin * kDigitStep,
                            source < args.rows ? depth : 0, steps, out, found + row))
          return false;
      }
      return true;
    }

    char* digits_of(int64_t half) const { return rows + (last - first + half % 2) * bytes; }

    // The piece of half a panel.
    const float* columns_of(int64_t half) const {
      return linear.panels_ + half / 2 * kPanelColumns * linear.args_.depth +
             half % 2 * kMatrixRows + begin * kDigitStep * kPanelColumns;
    }

    void begin_columns(int64_t half) {
      const Vec<float> units = load(linear.column_units_ + half * kMatrixRows);
      columns.begin(columns_of(half), columns_of(half + 1 < to ? half + 1 : half),
                    linear.inverse_ + begin * kDigitStep, units > 0 ? 1.0f / units : Vec<float>{},
                    depth, steps, digits_of(half));
    }

    void run() {
      begin_columns(from);
      const MatrixTiles tiles;
      for (int64_t half = from; half < to; ++half) {
        columns.finish();
        if (half + 1 < to) begin_columns(half + 1);
        multiply(half);
      }
      results.finish();
    }

    // All rows by half a panel.
    CTXFAST_NOINLINE void multiply(int64_t half) {
      const int64_t count = last - first, pauses = steps * kDigitPauses;
      const int64_t all_pauses = count * pauses, column_work = columns.left();
      const bool starts = linear.piece_ == 0, ends = linear.piece_ + 1 == linear.pieces_;
      const Vec<float> column_units = load(linear.column_units_ + half * kMatrixRows);
      int64_t columns_due = 0;
      for (int64_t block = 0; block < count; ++block) {
        const int64_t turns = results.left();
        int64_t results_due = 0;
        const auto beside = [&] {
          for (results_due += turns; results_due >= pauses; results_due -= pauses)
            results.finish_rows();
          for (columns_due += column_work; columns_due >= all_pauses; columns_due -= all_pauses)
            columns.pack_row();
        };
        multiply_digits(rows + block * bytes, digits_of(half), steps, results.next(), beside);
        results.finish();
        results.begin((first + block) * kMatrixRows, half * kMatrixRows,
                      found + block * kMatrixRows, columns_of(half), column_units, starts, ends);
      }
    }
  };

  CTXFAST_NOINLINE void multiply(int64_t first, int64_t last, int64_t from, int64_t to) {
    const int64_t bytes = (last - first + 2) * block_bytes();
    char* memory = static_cast<char*>(
        thread_scratch(size_t(bytes + (last - first) * kMatrixRows * int64_t(sizeof(DigitRow)))));
    if (memory == nullptr) return __atomic_store_n(&failed_, 1, __ATOMIC_RELAXED);
    Chunk chunk = {
        *this, first, last, from, to, memory, reinterpret_cast<DigitRow*>(memory + bytes)};
    if (!chunk.pack_rows()) return __atomic_store_n(&failed_, 1, __ATOMIC_RELAXED);
    chunk.run();
  }

  const LinearArgs args_;
  const int64_t row_blocks_, halves_, steps_;
  const int64_t pieces_, piece_steps_;  // of the depth, as equal as possible
  const float *panels_, *features_, *column_units_;
  float *scaled_ = nullptr, *inverse_ = nullptr;  // features_ and what they are divided by, padded
  int64_t piece_ = 0;
  int32_t failed_ = 0;
};

// False where the layer remains to be done otherwise.
inline bool digit_linear(const LinearArgs& args) {
  constexpr int64_t kFewestRows = 49;  // for which columns are worth packing
  if (args.panels == nullptr || args.float_parts < 3 || args.rows < kFewestRows) return false;
  if (args.activation == kGelu) return DigitLinear<kGelu>(args).run();
  if (args.activation == kGeluTanh) return DigitLinear<kGeluTanh>(args).run();
  if (args.activation == kTanh) return DigitLinear<kTanh>(args).run();
  return DigitLinear<kNone>(args).run();
}

CTXFAST_NAMESPACE_END

#endif
