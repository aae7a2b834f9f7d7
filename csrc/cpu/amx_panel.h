// The product of many rows with panels of 32 columns on matrix tiles (blocking after Goto and van
// de Geijn 2008), for the linear layers in bfloat16 and in 8 bits.
//
// Two tiles of rows by two of columns, a block, take one load of a tile for each product, more than
// the second cache level delivers. Rows therefore stream past a piece of a panel that stays in the
// first level. Meanwhile the second level is asked for what is multiplied next and for the lines
// that results go to, whose wait would otherwise occupy the buffers that the rows come through; and
// the vector units, idle while tiles multiply, make results of the sums of the block before. They
// do so in a straight line of instructions: behind a branch that was predicted wrongly nothing
// overlaps.
#pragma once

#include "cpu/amx.h"
#include "cpu/simd.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

constexpr int64_t kBlockRows = 2 * kMatrixRows, kBlockColumns = 32;
constexpr int64_t kBlockSize = kBlockRows * kBlockColumns;
constexpr int64_t kPanelRowBytes = 2 * kMatrixBytes;  // of two tiles side by side
constexpr int64_t kBlockStepBytes = kMatrixRows * kPanelRowBytes;
constexpr int64_t kMostPieceSteps = 12;  // half of the first cache level
constexpr int kTurnRows = 4;             // of results, made in one go
constexpr int kTurns = int(kBlockRows) / kTurnRows;

// A panel is [words of the depth][32 columns][4 bytes]; 16 words are a step. `whole` steps lie in
// memory as they are read, and perhaps a last one, elsewhere, filled up with 0.
struct MatrixPanel {
  const char *steps, *last;
  int64_t whole;
};

// space: kBlockStepBytes
CTXFAST_INLINE MatrixPanel matrix_panel(const char* panel, int64_t words, char* space) {
  const int64_t whole = words / kMatrixRows, bytes = words % kMatrixRows * kPanelRowBytes;
  if (bytes == 0) return {panel, nullptr, whole};
  __builtin_memcpy(space, panel + whole * kBlockStepBytes, size_t(bytes));
  __builtin_memset(space + bytes, 0, size_t(kBlockStepBytes - bytes));
  return {panel, space, whole};
}

CTXFAST_INLINE void ask_second_level(const char* from, int64_t lines) {
  for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(from + line * 64, 0, 2);
}

// What tiles hold.
struct BfloatTiles {
  using Sum = float;
  template <int kC, int kA, int kB>
  static CTXFAST_INLINE void multiply() {
    multiply_matrix<kC, kA, kB>();
  }
};
struct ByteTiles {
  using Sum = int32_t;
  template <int kC, int kA, int kB>
  static CTXFAST_INLINE void multiply() {
    multiply_matrix8<kC, kA, kB>();
  }
};

// Rows lie as tiles load them, [block][step][2 tiles][16][64 bytes], padded to whole blocks. A Task
// is one of the kinds of tiles and has
//   panel(index)                 a MatrixPanel
//   output(block, index)         where results go, output_row() bytes from row to row
//   complete(sums, block, index) whether results are made later; false: it has made them
//   finish()                     makes the next kTurnRows rows of them
template <typename Task>
class PanelProduct {
 public:
  using Sum = typename Task::Sum;

  // sums: memory for `blocks` + 2 blocks
  PanelProduct(Task& task, const void* rows, int64_t steps, int64_t blocks, Sum* sums)
      : task_(task),
        rows_(static_cast<const char*>(rows)),
        steps_(steps),
        blocks_(blocks),
        lines_((kBlockStepBytes / 64 + blocks - 1) / blocks),
        sums_(sums) {}

  // Results are complete after `finish`.
  void multiply(int64_t index) {
    const int64_t pieces = (steps_ + kMostPieceSteps - 1) / kMostPieceSteps;
    const int64_t size = (steps_ + pieces - 1) / pieces;
    const MatrixPanel panel = task_.panel(index);
    for (int64_t first = 0; first < steps_; first += size) {
      const int64_t last = first + size < steps_ ? first + size : steps_;
      const char* columns = piece(panel, first, last);
      const char* ahead = panel.steps + last * kBlockStepBytes;
      for (int64_t block = 0; block < blocks_; ++block)
        ahead = multiply_block(index, columns, block, first, last, ahead);
    }
  }

  void finish() {
    for (; turn_ < kTurns; ++turn_) task_.finish();
  }

 private:
  // Steps [first, last) of a panel, the last one brought to the others.
  const char* piece(const MatrixPanel& panel, int64_t first, int64_t last) {
    const char* steps = panel.steps + first * kBlockStepBytes;
    if (last <= panel.whole) return steps;
    const int64_t bytes = (panel.whole - first) * kBlockStepBytes;
    __builtin_memcpy(together_, steps, size_t(bytes));
    __builtin_memcpy(together_ + bytes, panel.last, size_t(kBlockStepBytes));
    return together_;
  }

  // Returns what is to be asked for next.
  CTXFAST_INLINE const char* multiply_block(int64_t index, const char* columns, int64_t block,
                                            int64_t first, int64_t last, const char* ahead) {
    Sum* sums = sums_ + block * kBlockSize;
    if (first == 0) {
      clear_sums();
    } else {
      load_sums(sums, kPanelRowBytes);
    }
    const char* rows = rows_ + (block * steps_ + first) * 2 * kTileBytes;
    const char* output = task_.output(block, index + 1);
    for (int64_t step = first; step < last; ++step) {
      stream_matrix<4>(rows, kMatrixBytes);
      load_matrix<6>(columns, kPanelRowBytes);
      Task::template multiply<0, 4, 6>();
      load_matrix<7>(columns + kMatrixBytes, kPanelRowBytes);
      Task::template multiply<1, 4, 7>();
      stream_matrix<5>(rows + kTileBytes, kMatrixBytes);
      Task::template multiply<2, 5, 6>();
      Task::template multiply<3, 5, 7>();
      rows += 2 * kTileBytes;
      columns += kBlockStepBytes;
      ask_second_level(ahead, lines_);
      ahead += lines_ * 64;
      if (last == steps_) {
#pragma GCC unroll 4
        for (int r = 0; r < kTurnRows; ++r, output += task_.output_row())
          __builtin_prefetch(output, 0, 2);
      }
      if (turn_ < kTurns) {
        task_.finish();
        ++turn_;
      }
    }
    if (last < steps_) {
      store_sums(sums, kPanelRowBytes);
      return ahead;
    }
    finish();
    sums = sums_ + (blocks_ + block % 2) * kBlockSize;
    store_sums(sums, kPanelRowBytes);
    if (task_.complete(sums, block, index)) turn_ = 0;
    return ahead;
  }

  Task& task_;
  const char* rows_;
  const int64_t steps_, blocks_;
  const int64_t lines_;  // asked for after each step
  Sum* sums_;
  int turn_ = kTurns;  // of the block that was complete last
  alignas(64) char together_[kMostPieceSteps * kBlockStepBytes];
};

constexpr int64_t kAheadSteps = 8;  // by which one tile of rows asks for a panel

// sums [16, 32] = one tile of rows, row_step bytes from step to step, by a panel. Sums of the odd
// steps are in tiles of their own, so that no product waits for the one before; they take the next
// [16, 32]. meanwhile() follows each step.
template <typename Tiles, typename Meanwhile>
CTXFAST_INLINE void multiply_few(const char* rows, int64_t row_step, const MatrixPanel& panel,
                                 typename Tiles::Sum* sums, const Meanwhile& meanwhile) {
  clear_sums();
  const char* columns = panel.steps;
  for (int64_t step = 0; step < panel.whole; ++step) {
    ask_second_level(columns + kAheadSteps * kBlockStepBytes, kBlockStepBytes / 64);
    load_matrix<4>(rows, kMatrixBytes);
    stream_matrix<6>(columns, kPanelRowBytes);
    stream_matrix<7>(columns + kMatrixBytes, kPanelRowBytes);
    if (step % 2 == 0) {
      Tiles::template multiply<0, 4, 6>();
      Tiles::template multiply<1, 4, 7>();
    } else {
      Tiles::template multiply<2, 4, 6>();
      Tiles::template multiply<3, 4, 7>();
    }
    rows += row_step;
    columns += kBlockStepBytes;
    meanwhile();
  }
  if (panel.last != nullptr) {
    load_matrix<4>(rows, kMatrixBytes);
    load_matrix<6>(panel.last, kPanelRowBytes);
    load_matrix<7>(panel.last + kMatrixBytes, kPanelRowBytes);
    Tiles::template multiply<0, 4, 6>();
    Tiles::template multiply<1, 4, 7>();
  }
  store_sums(sums, kPanelRowBytes);
  for (int64_t i = 0; i < kBlockSize / 2; i += 16) {
    using Vector = typename VecOf<typename Tiles::Sum>::unaligned;
    *(Vector*)(sums + i) += *(const Vector*)(sums + kBlockSize / 2 + i);
  }
}

// The first `count` rows of a tile by the panels [first, last): the time is that of reading the
// weight. panel(index) is a MatrixPanel; finish(sums, row, rows, index) makes results of the sums
// of some rows, while the next panel is read.
template <typename Tiles, typename Panel, typename Finish>
CTXFAST_INLINE void multiply_few_rows(const char* rows, int64_t row_step, int64_t count,
                                      int64_t first, int64_t last, const Panel& panel,
                                      const Finish& finish) {
  alignas(64) typename Tiles::Sum sums[2][kBlockSize];
  int64_t row = count;  // from which on the panel before is not finished
  for (int64_t index = first; index < last; ++index) {
    const MatrixPanel columns = panel(index);
    const int64_t share = (count + columns.whole) / (columns.whole + 1);
    const auto finish_share = [&](int64_t most) {
      const int64_t here = count - row < most ? count - row : most;
      if (here > 0) finish(sums[(index - 1) & 1] + row * kBlockColumns, row, here, index - 1);
      row += here;
    };
    multiply_few<Tiles>(rows, row_step, columns, sums[index & 1], [&] { finish_share(share); });
    finish_share(count);
    row = 0;
  }
  if (last > first) finish(sums[(last - 1) & 1], 0, count, last - 1);
}

CTXFAST_NAMESPACE_END

#endif
