// The bfloat16 linear layer of linear.cpp on matrix tiles (Intel AMX). A panel of the packed weight
// is 32 columns in pairs along the depth: 16 pairs of a panel are two tiles as they lie in memory,
// of 16 columns each. The rows of the input are packed: tiles then lie in a row, rows that are
// missing are 0, and no two lines meet in one set of the cache.
//
// Many rows are multiplied as amx_panel.h says. Few rows, one tile, meet each panel once: the time
// is that of reading the weight, and the loop asks for it far ahead.
#pragma once

#include "cpu/amx_panel.h"
#include "cpu/linear_finish.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

template <Activation kActivation>
class MatrixLinear {
 public:
  explicit MatrixLinear(const LinearArgs& args)
      : args_(args),
        steps_((args.depth + kMatrixDepth - 1) / kMatrixDepth),
        panels_((args.columns + kPanelColumns - 1) / kPanelColumns) {}

  bool run() const { return args_.rows <= kMatrixRows ? run_few() : run_many(); }

 private:
  static constexpr int64_t kRowBytes = 3 << 19;  // of packed rows: most of the second level
  static constexpr int64_t kMostRows = 384;      // that a task packs
  static constexpr int64_t kItemPanels = 8;      // of a task, at least, that packs its rows
  static_assert(kPanelColumns == kBlockColumns, "a panel is as wide as a block");

  static CTXFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static CTXFAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
  static CTXFAST_INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // Rows [first, first + count) as [blocks of `tiles` tiles][steps][tiles][16 rows][32].
  void pack_rows(int64_t first, int64_t count, int64_t tiles, char* out) const {
    const int64_t blocks = ceiling(count, tiles * kMatrixRows);
    for (int64_t row = 0; row < blocks * tiles * kMatrixRows; ++row) {
      const int64_t block = row / (tiles * kMatrixRows), tile = row / kMatrixRows % tiles;
      char* to =
          out + (block * steps_ * tiles + tile) * kTileBytes + row % kMatrixRows * kMatrixBytes;
      const bfloat16* from =
          static_cast<const bfloat16*>(args_.input) + (first + row) * args_.input_stride;
      for (int64_t k = 0; k < args_.depth; k += kMatrixDepth, to += tiles * kTileBytes) {
        const int64_t left = row < count ? smaller(args_.depth - k, kMatrixDepth) : 0;
        const __mmask32 lanes = left == 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1u;
        _mm512_store_si512(to, _mm512_maskz_loadu_epi16(lanes, from + k));
      }
    }
  }

  int64_t panel_space() const {
    return args_.panels == nullptr ? steps_ * kBlockStepBytes : kBlockStepBytes;
  }

  // What a plain weight is arranged into, or an incomplete step, is in `space`.
  MatrixPanel read_panel(int64_t index, char* space) const {
    const int64_t words = args_.depth / 2, bytes = words * kPanelRowBytes;
    if (args_.panels != nullptr)
      return matrix_panel(static_cast<const char*>(args_.panels) + index * bytes, words, space);
    const float* weight = static_cast<const float*>(args_.weight) + index * kPanelColumns * words;
    pack_vectors<2>(weight, 1, words, words, args_.columns - index * kPanelColumns,
                    reinterpret_cast<float*>(space));
    __builtin_memset(space + bytes, 0, size_t(steps_ * kBlockStepBytes - bytes));
    return {space, nullptr, steps_};
  }

  // Rows from `first` on by panels, for PanelProduct.
  struct ManyRows : BfloatTiles {
    const MatrixLinear& linear;
    int64_t first;
    char* space;
    // Of the block whose sums are complete.
    const float* sums = nullptr;
    Vec<float> bias[2] = {};
    bfloat16* results = nullptr;
    const int64_t width = linear.args_.columns;

    MatrixPanel panel(int64_t index) const { return linear.read_panel(index, space); }

    int64_t output_row() const { return width * int64_t(sizeof(bfloat16)); }
    const char* output(int64_t block, int64_t index) const {
      return static_cast<const char*>(linear.args_.output) +
             (first + block * kBlockRows) * output_row() +
             index * kBlockColumns * int64_t(sizeof(bfloat16));
    }

    bool complete(const float* found, int64_t block, int64_t index) {
      const LinearArgs& args = linear.args_;
      const int64_t row = first + block * kBlockRows, column = index * kBlockColumns;
      const int64_t rows = smaller(kBlockRows, args.rows - row);
      const int64_t columns = smaller(kBlockColumns, args.columns - column);
      if (rows < kBlockRows || columns < kBlockColumns || args.residual != nullptr) {
        finish_linear<bfloat16, kActivation>(args, found, kBlockColumns, row, rows, column,
                                             columns);
        return false;
      }
      sums = found;
      if (args.bias != nullptr)
        for (int v = 0; v < 2; ++v)
          bias[v] = load(static_cast<const bfloat16*>(args.bias) + column + v * 16);
      results = static_cast<bfloat16*>(args.output) + row * args.columns + column;
      return true;
    }

    CTXFAST_INLINE void finish() {
      const float* from = sums;
      bfloat16* to = results;
      const int64_t row = width;
#pragma GCC unroll 4
      for (int r = 0; r < kTurnRows; ++r, from += kBlockColumns, to += row) {
        const Vec<float> low = load(from) + bias[0], high = load(from + 16) + bias[1];
        store_pair(to, activate<bfloat16, kActivation>(low), activate<bfloat16, kActivation>(high));
      }
      sums = from;
      results = to;
    }
  };

  // Tasks are blocks of rows by runs of panels; each packs its rows for its own cache.
  bool run_many() const {
    const int64_t limit = kRowBytes / (steps_ * kMatrixBytes) / kBlockRows * kBlockRows;
    const int64_t most = larger(smaller(limit, kMostRows), kBlockRows);
    int64_t tasks = ceiling(args_.rows, most);
    if (args_.rows >= args_.threads * 2 * kBlockRows)
      tasks = ceiling(tasks, args_.threads) * args_.threads;
    const int64_t rows = ceiling(ceiling(args_.rows, tasks), kBlockRows) * kBlockRows;
    tasks = ceiling(args_.rows, rows);
    const int64_t wanted = ceiling(2 * args_.threads, tasks);
    const int64_t runs = args_.threads == 1 ? 1 : larger(smaller(wanted, panels_ / kItemPanels), 1);
    int32_t failed = 0;
    parallel_for(args_.threads, tasks * runs, 1, [&](int64_t item, int64_t) {
      const int64_t task = item / runs, run = item % runs;
      const int64_t first = task * rows, count = smaller(rows, args_.rows - first);
      const int64_t blocks = ceiling(count, kBlockRows);
      const int64_t row_bytes = blocks * steps_ * 2 * kTileBytes;
      const int64_t sum_bytes = (blocks + 2) * kBlockSize * int64_t(sizeof(float));
      char* memory =
          static_cast<char*>(thread_scratch(size_t(row_bytes + sum_bytes + panel_space())));
      if (memory == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      pack_rows(first, count, 2, memory);
      ManyRows part = {{}, *this, first, memory + row_bytes + sum_bytes};
      PanelProduct<ManyRows> product(part, memory, steps_, blocks,
                                     reinterpret_cast<float*>(memory + row_bytes));
      const MatrixTiles tiles;
      for (int64_t index = panels_ * run / runs; index < panels_ * (run + 1) / runs; ++index)
        product.multiply(index);
      product.finish();
    });
    return failed == 0;
  }

  bool run_few() const {
    char* rows = static_cast<char*>(thread_scratch(size_t(steps_ * kTileBytes), kPlanScratch));
    if (rows == nullptr) return false;
    pack_rows(0, args_.rows, 1, rows);
    const int64_t run = larger(panels_ / (4 * args_.threads), 1);
    int32_t failed = 0;
    parallel_ranges(args_.threads, ceiling(panels_, run), [&](int64_t item) {
      char* space = static_cast<char*>(thread_scratch(size_t(panel_space())));
      if (space == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      const MatrixTiles tiles;
      multiply_few_rows<BfloatTiles>(
          rows, kTileBytes, args_.rows, item * run, smaller((item + 1) * run, panels_),
          [&](int64_t index) { return read_panel(index, space); },
          [&](const float* sums, int64_t row, int64_t count, int64_t index) {
            const int64_t column = index * kPanelColumns;
            finish_linear<bfloat16, kActivation>(args_, sums, kPanelColumns, row, count, column,
                                                 smaller(kPanelColumns, args_.columns - column));
          });
    });
    return failed == 0;
  }

  const LinearArgs& args_;
  const int64_t steps_, panels_;  // steps along the depth, panels of columns
};

// False where memory for the packed rows is not to be had.
inline bool matrix_linear(const LinearArgs& args) {
  if (args.activation == kGelu) return MatrixLinear<kGelu>(args).run();
  if (args.activation == kGeluTanh) return MatrixLinear<kGeluTanh>(args).run();
  if (args.activation == kTanh) return MatrixLinear<kTanh>(args).run();
  return MatrixLinear<kNone>(args).run();
}

CTXFAST_NAMESPACE_END

#endif
