// The bfloat16 linear layer of linear.cpp on matrix tiles (Intel AMX; blocking after Goto and van
// de Geijn 2008). A panel of the packed weight is 32 columns in pairs along the depth: 16 pairs of
// a panel are two tiles as they lie in memory, of 16 columns each. The rows of the input are
// packed: tiles then lie in a row, rows that are missing are 0, and no two lines meet in one set of
// the cache.
//
// Two tiles of rows by two of columns take one load of a tile for each product, more than the
// second cache level delivers. Many rows therefore stream past a piece of a panel that stays in the
// first level. Meanwhile the second level is asked for the next piece and for the lines that
// results go to, whose wait would otherwise occupy the buffers that the rows come through; and the
// vector units, idle while tiles multiply, make results of the sums of the block before. They do so
// in straight lines of instructions: behind a branch that was predicted wrongly nothing overlaps.
// Few rows, one tile, meet each panel once: the time is that of reading the weight, and the loop
// asks for it far ahead.
#pragma once

#include "cpu/amx.h"
#include "cpu/linear_finish.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// Tiles 0 to 3 are the sums of 2 by 2 tiles, 4 and 5 of the rows, 6 and 7 of the columns.
template <Activation kActivation>
class MatrixLinear {
 public:
  explicit MatrixLinear(const LinearArgs& args)
      : args_(args),
        steps_((args.depth + kMatrixDepth - 1) / kMatrixDepth),
        panels_((args.columns + kPanelColumns - 1) / kPanelColumns) {}

  bool run() const { return args_.rows <= kMatrixRows ? run_few() : run_many(); }

 private:
  static constexpr int64_t kTileBytes = kMatrixRows * kMatrixBytes;
  static constexpr int64_t kPanelRowBytes = kPanelColumns * 2 * int64_t(sizeof(bfloat16));
  static constexpr int64_t kPanelStepBytes = kMatrixRows * kPanelRowBytes;
  static constexpr int64_t kBlockRows = 2 * kMatrixRows;
  static constexpr int64_t kPieceSteps = 12;     // of a panel: half of the first cache level
  static constexpr int64_t kRowBytes = 3 << 19;  // of packed rows: most of the second level
  static constexpr int64_t kMostRows = 384;      // that a task packs
  static constexpr int64_t kItemPanels = 8;      // of a task, at least, that packs its rows
  static constexpr int64_t kAheadSteps = 4;      // by which few rows ask for a panel
  static constexpr int64_t kLine = 64;
  static constexpr int kTurnRows = 4;  // that become results while a step is multiplied

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

  // meanwhile() follows every step.
  template <typename Meanwhile>
  static CTXFAST_INLINE void multiply_block(const char* rows, const char* columns, int64_t steps,
                                            const Meanwhile& meanwhile) {
    for (int64_t step = 0; step < steps; ++step) {
      stream_matrix<4>(rows, kMatrixBytes);
      load_matrix<6>(columns, kPanelRowBytes);
      multiply_matrix<0, 4, 6>();
      load_matrix<7>(columns + kMatrixBytes, kPanelRowBytes);
      multiply_matrix<1, 4, 7>();
      stream_matrix<5>(rows + kTileBytes, kMatrixBytes);
      multiply_matrix<2, 5, 6>();
      multiply_matrix<3, 5, 7>();
      rows += 2 * kTileBytes;
      columns += kPanelStepBytes;
      meanwhile();
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

  // What remains to be done for a block whose sums are complete: `rows` rows, a multiple of
  // kTurnRows.
  struct Pending {
    const float* sums;
    bfloat16* output;
    Vec<float> bias[2];
    int rows;
  };

  CTXFAST_INLINE void finish_turn(Pending& block) const {
    if (block.rows == 0) return;
#pragma GCC unroll 4
    for (int r = 0; r < kTurnRows; ++r) {
      const float* sums = block.sums + r * kPanelColumns;
      const Vec<float> low = activate<bfloat16, kActivation>(load(sums) + block.bias[0]);
      const Vec<float> high = activate<bfloat16, kActivation>(load(sums + 16) + block.bias[1]);
      _mm512_storeu_si512(block.output + r * args_.columns,
                          (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    block.sums += kTurnRows * kPanelColumns;
    block.output += kTurnRows * args_.columns;
    block.rows -= kTurnRows;
  }
  CTXFAST_INLINE void finish_all(Pending& block) const {
    while (block.rows > 0) finish_turn(block);
  }

  // Complete sums from `row` and `column` on: to be finished later if they are a whole block,
  // otherwise at once.
  CTXFAST_INLINE void complete(const float* sums, int64_t row, int64_t column,
                               Pending& pending) const {
    const int64_t rows = smaller(kBlockRows, args_.rows - row);
    const int64_t columns = smaller(kPanelColumns, args_.columns - column);
    if (rows < kBlockRows || columns < kPanelColumns || args_.residual != nullptr)
      return finish<bfloat16, kActivation>(args_, sums, kPanelColumns, row, rows, column, columns);
    const bfloat16* bias = static_cast<const bfloat16*>(args_.bias) + column;
    pending.sums = sums;
    pending.output = static_cast<bfloat16*>(args_.output) + row * args_.columns + column;
    pending.bias[0] = args_.bias == nullptr ? Vec<float>{} : load(bias);
    pending.bias[1] = args_.bias == nullptr ? Vec<float>{} : load(bias + 16);
    pending.rows = kBlockRows;
  }

  // A task's packed rows, and memory for the sums of each of its blocks, for two blocks that are
  // complete, and for `read_panel`.
  struct Task {
    char* rows;
    float *sums, *complete;
    char* space;
    int64_t first, blocks;
  };

  void multiply_panel(const Task& task, int64_t index, Pending& pending) const {
    const Panel panel = read_panel(index, task.space);
    const int64_t pieces = ceiling(steps_, kPieceSteps), piece = ceiling(steps_, pieces);
    for (int64_t first = 0; first < steps_; first += piece) {
      const int64_t last = smaller(first + piece, steps_);
      const char* columns = panel.steps + first * kPanelStepBytes;
      const char* ahead = panel.steps + last * kPanelStepBytes;
      const int64_t lines = ceiling(kPanelStepBytes / kLine, task.blocks);
      for (int64_t block = 0; block < task.blocks; ++block) {
        const int64_t row = task.first + block * kBlockRows, column = index * kPanelColumns;
        float* sums = task.sums + block * kBlockRows * kPanelColumns;
        if (first == 0) {
          clear_sums();
        } else {
          load_sums(sums);
        }
        const bfloat16* next = static_cast<const bfloat16*>(args_.output) + row * args_.columns +
                               column + kPanelColumns;
        const auto meanwhile = [&] {
          prefetch_lines(ahead, lines);
          ahead += lines * kLine;
          if (last == steps_) {
#pragma GCC unroll 4
            for (int r = 0; r < kTurnRows; ++r, next += args_.columns)
              __builtin_prefetch(next, 0, 2);
          }
          finish_turn(pending);
        };
        const char* rows = task.rows + (block * steps_ + first) * 2 * kTileBytes;
        const int64_t whole = smaller(last, panel.whole) - first;
        multiply_block(rows, columns, whole, meanwhile);
        if (last < steps_) {
          store_sums(sums);
          continue;
        }
        if (panel.last != nullptr)
          multiply_block(rows + whole * 2 * kTileBytes, panel.last, 1, meanwhile);
        finish_all(pending);
        sums = task.complete + block % 2 * kBlockRows * kPanelColumns;
        store_sums(sums);
        complete(sums, row, column, pending);
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
      const int64_t sum_bytes = (blocks + 2) * kBlockRows * kPanelColumns * int64_t(sizeof(float));
      char* memory =
          static_cast<char*>(thread_scratch(size_t(row_bytes + sum_bytes + panel_space())));
      if (memory == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      pack_rows(first, count, 2, memory);
      float* sums = reinterpret_cast<float*>(memory + row_bytes);
      const Task part = {
          memory, sums,  sums + blocks * kBlockRows * kPanelColumns, memory + row_bytes + sum_bytes,
          first,  blocks};
      const MatrixTiles tiles;
      Pending pending = {};
      for (int64_t index = panels_ * run / runs; index < panels_ * (run + 1) / runs; ++index)
        multiply_panel(part, index, pending);
      finish_all(pending);
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
        finish<bfloat16, kActivation>(args_, sums, kPanelColumns, 0, args_.rows, column,
                                      smaller(kPanelColumns, args_.columns - column));
      }
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
