// The bfloat16 linear layer of linear.cpp on matrix tiles (Intel AMX; blocking after Goto and van
// de Geijn 2008). A panel of the packed weight is 32 columns in pairs along the depth: 16 pairs of
// a panel are two tiles as they lie in memory, of 16 columns each. The rows of the input are
// packed: tiles then lie in a row, rows that are missing are 0, and no two lines meet in one set of
// the cache.
//
// Two tiles of rows by two of columns take one load of a tile for each product, which the second
// cache level can just deliver. Many rows therefore meet a piece of a panel while it is in the
// first level, and ask for the next piece on the way. Few rows, one tile, meet each panel once: the
// time is that of reading the weight, and the loop asks for it far ahead.
#pragma once

#include "cpu/amx.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

using LinearFinish = void (*)(const LinearArgs&, const float*, int64_t, int64_t, int64_t, int64_t,
                              int64_t);

// Tiles 0 to 3 are the sums of 2 by 2 tiles, 4 and 5 of the rows, 6 and 7 of the columns.
class MatrixLinear {
 public:
  MatrixLinear(const LinearArgs& args, LinearFinish finish)
      : args_(args),
        finish_(finish),
        steps_((args.depth + kMatrixDepth - 1) / kMatrixDepth),
        panels_((args.columns + kPanelColumns - 1) / kPanelColumns) {}

  // False where memory for the packed rows is not to be had.
  bool run() const { return args_.rows <= kMatrixRows ? run_few() : run_many(); }

 private:
  static constexpr int64_t kTileBytes = kMatrixRows * kMatrixBytes;
  static constexpr int64_t kPanelRowBytes = kPanelColumns * 2 * int64_t(sizeof(bfloat16));
  static constexpr int64_t kPanelStepBytes = kMatrixRows * kPanelRowBytes;
  static constexpr int64_t kBlockRows = 2 * kMatrixRows;
  static constexpr int64_t kPieceSteps = 16;     // of a panel: 32 KiB of the first cache level
  static constexpr int64_t kRowBytes = 1 << 20;  // of packed rows: half of the second level
  static constexpr int64_t kMostRows = 384;      // that a task packs
  static constexpr int64_t kItemPanels = 8;      // of a task, at least, that packs its rows
  static constexpr int64_t kAheadSteps = 4;      // by which few rows ask for a panel
  static constexpr int64_t kLine = 64;

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

  // A panel: `whole` steps that lie in memory as they are read, and perhaps a last one, elsewhere.
  struct Panel {
    const char *steps, *last;
    int64_t whole;
  };
  int64_t panel_space() const {
    return args_.panels == nullptr ? steps_ * kPanelStepBytes : kPanelStepBytes;
  }

  // What a plain weight is arranged into, and the step within which the depth ends, filled up with
  // 0, are in `space`.
  Panel read_panel(int64_t index, char* space) const {
    const int64_t words = args_.depth / 2, bytes = words * kPanelRowBytes;
    if (args_.panels == nullptr) {
      const float* weight = static_cast<const float*>(args_.weight) + index * kPanelColumns * words;
      pack_vectors<2>(weight, 1, words, words, args_.columns - index * kPanelColumns,
                      reinterpret_cast<float*>(space));
      __builtin_memset(space + bytes, 0, size_t(steps_ * kPanelStepBytes - bytes));
      return {space, nullptr, steps_};
    }
    const char* steps = static_cast<const char*>(args_.panels) + index * bytes;
    const int64_t whole = args_.depth / kMatrixDepth, rest = bytes - whole * kPanelStepBytes;
    if (rest == 0) return {steps, nullptr, whole};
    __builtin_memcpy(space, steps + whole * kPanelStepBytes, size_t(rest));
    __builtin_memset(space + rest, 0, size_t(kPanelStepBytes - rest));
    return {steps, space, whole};
  }

  static CTXFAST_INLINE void multiply_block(const char* rows, const char* columns, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
      load_matrix<4>(rows, kMatrixBytes);
      load_matrix<6>(columns, kPanelRowBytes);
      multiply_matrix<0, 4, 6>();
      load_matrix<7>(columns + kMatrixBytes, kPanelRowBytes);
      multiply_matrix<1, 4, 7>();
      load_matrix<5>(rows + kTileBytes, kMatrixBytes);
      multiply_matrix<2, 5, 6>();
      multiply_matrix<3, 5, 7>();
      rows += 2 * kTileBytes;
      columns += kPanelStepBytes;
    }
  }

  static CTXFAST_INLINE void load_sums(const float* sums) {
    constexpr int64_t kRowBytes = kPanelColumns * int64_t(sizeof(float));
    load_matrix<0>(sums, kRowBytes);
    load_matrix<1>(sums + 16, kRowBytes);
    load_matrix<2>(sums + kMatrixRows * kPanelColumns, kRowBytes);
    load_matrix<3>(sums + kMatrixRows * kPanelColumns + 16, kRowBytes);
  }
  static CTXFAST_INLINE void store_sums(float* sums) {
    constexpr int64_t kRowBytes = kPanelColumns * int64_t(sizeof(float));
    store_matrix<0>(sums, kRowBytes);
    store_matrix<1>(sums + 16, kRowBytes);
    store_matrix<2>(sums + kMatrixRows * kPanelColumns, kRowBytes);
    store_matrix<3>(sums + kMatrixRows * kPanelColumns + 16, kRowBytes);
  }
  static CTXFAST_INLINE void clear_sums() {
    clear_matrix<0>();
    clear_matrix<1>();
    clear_matrix<2>();
    clear_matrix<3>();
  }

  static CTXFAST_INLINE void prefetch_lines(const char* from, int64_t lines) {
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(from + line * kLine, 0, 2);
  }

  // Packed rows, `blocks` blocks of them, by one panel. The first of them is row `row`.
  void multiply_panel(const char* rows, float* sums, char* space, int64_t row, int64_t blocks,
                      int64_t index) const {
    const Panel panel = read_panel(index, space);
    const int64_t pieces = ceiling(steps_, kPieceSteps), piece = ceiling(steps_, pieces);
    const int64_t column = index * kPanelColumns;
    for (int64_t first = 0; first < steps_; first += piece) {
      const int64_t last = smaller(first + piece, steps_);
      const char* columns = panel.steps + first * kPanelStepBytes;
      const char* ahead = columns + (last - first) * kPanelStepBytes;
      const int64_t lines = ceiling((last - first) * kPanelStepBytes / kLine, blocks);
      for (int64_t block = 0; block < blocks; ++block) {
        float* out = sums + block * kBlockRows * kPanelColumns;
        const char* from = rows + (block * steps_ + first) * 2 * kTileBytes;
        prefetch_lines(ahead + block * lines * kLine, lines);
        if (first == 0) {
          clear_sums();
        } else {
          load_sums(out);
        }
        const int64_t whole = smaller(last, panel.whole) - first;
        multiply_block(from, columns, whole);
        if (last == steps_ && panel.last != nullptr)
          multiply_block(from + whole * 2 * kTileBytes, panel.last, 1);
        store_sums(out);
        if (last == steps_) {
          const int64_t at = row + block * kBlockRows;
          finish_(args_, out, kPanelColumns, at, smaller(kBlockRows, args_.rows - at), column,
                  smaller(kPanelColumns, args_.columns - column));
        }
      }
    }
  }

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
      const int64_t sum_bytes = blocks * kBlockRows * kPanelColumns * int64_t(sizeof(float));
      char* memory =
          static_cast<char*>(thread_scratch(size_t(row_bytes + sum_bytes + panel_space())));
      if (memory == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      pack_rows(first, count, 2, memory);
      const MatrixTiles tiles;
      for (int64_t index = panels_ * run / runs; index < panels_ * (run + 1) / runs; ++index)
        multiply_panel(memory, reinterpret_cast<float*>(memory + row_bytes),
                       memory + row_bytes + sum_bytes, first, blocks, index);
    });
    return failed == 0;
  }

  // One tile of rows by a panel: sums in tiles 0 and 1, two more in 2 and 3 for the odd steps, so
  // that a product does not wait for the one before.
  static CTXFAST_INLINE void multiply_few(const char* rows, const Panel& panel, float* sums) {
    clear_sums();
    const char* columns = panel.steps;
    for (int64_t step = 0; step < panel.whole; ++step) {
      const char* ahead = columns + kAheadSteps * kPanelStepBytes;
      prefetch_lines(ahead, kPanelStepBytes / kLine);
      load_matrix<4>(rows, kMatrixBytes);
      load_matrix<6>(columns, kPanelRowBytes);
      load_matrix<7>(columns + kMatrixBytes, kPanelRowBytes);
      if (step % 2 == 0) {
        multiply_matrix<0, 4, 6>();
        multiply_matrix<1, 4, 7>();
      } else {
        multiply_matrix<2, 4, 6>();
        multiply_matrix<3, 4, 7>();
      }
      rows += kTileBytes;
      columns += kPanelStepBytes;
    }
    if (panel.last != nullptr) {
      load_matrix<4>(rows, kMatrixBytes);
      load_matrix<6>(panel.last, kPanelRowBytes);
      load_matrix<7>(panel.last + kMatrixBytes, kPanelRowBytes);
      multiply_matrix<0, 4, 6>();
      multiply_matrix<1, 4, 7>();
    }
    store_sums(sums);
    for (int64_t i = 0; i < kMatrixRows * kPanelColumns; i += 16)
      store(sums + i, load(sums + i) + load(sums + kMatrixRows * kPanelColumns + i));
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
      alignas(64) float sums[kBlockRows * kPanelColumns];
      const MatrixTiles tiles;
      for (int64_t index = item * run; index < smaller((item + 1) * run, panels_); ++index) {
        const int64_t column = index * kPanelColumns;
        multiply_few(rows, read_panel(index, space), sums);
        finish_(args_, sums, kPanelColumns, 0, args_.rows, column,
                smaller(kPanelColumns, args_.columns - column));
      }
    });
    return failed == 0;
  }

  const LinearArgs& args_;
  const LinearFinish finish_;
  const int64_t steps_, panels_;  // steps along the depth, panels of columns
};

CTXFAST_NAMESPACE_END

#endif
