// A linear layer with its epilogue on a weight packed into panels of 32 columns: register-blocked
// products (Goto and van de Geijn 2008) without packing the input.
//
// With few rows the time is that of reading the weight from memory. Each thread streams through a
// contiguous run of panels, a tile holds as many rows as the registers do, and its loop prefetches
// what it reads next, so that memory stays busy while it multiplies. With more rows the same panels
// are read two at a time, by tiles that need fewer loads.
#include "cpu/linear.h"

#include "cpu/gelu.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int kWidth = kLanes<float>;
constexpr int kPanelVectors = int(kPanelColumns) / kWidth;

// Rows and vectors of a tile, as many as fit the registers beside their operands.
struct Tall {
#if defined(CTXFAST_AVX512)
  static constexpr int kRows = 14, kColumns = 2;
#else
  static constexpr int kRows = 6, kColumns = 2;
#endif
  static constexpr int kPanels = 1;
  static constexpr bool kPrefetch = true;
};
struct Wide {
#if defined(CTXFAST_AVX512)
  static constexpr int kRows = 6, kColumns = 4, kPanels = 2;
#else
  static constexpr int kRows = 6, kColumns = 2, kPanels = 1;
#endif
  static constexpr bool kPrefetch = false;
};

constexpr int64_t kTallRows = 32;          // from more rows on, wide tiles are faster
constexpr int64_t kRowBlock = 48;          // whose sums stay in the first cache level
constexpr int64_t kDepthPiece = 256;       // rounding errors of a sum do not grow beyond it
constexpr int64_t kPrefetchDistance = 16;  // in steps of the depth: 2 KiB of a panel

// sums[r][c] = or += A [kRows, depth] B, B the vectors from b on: kPanelVectors in one panel, the
// next ones next_panel floats further.
template <int kRows, int kColumns, bool kPrefetch>
CTXFAST_NOINLINE void multiply(const float* a, int64_t lda, const float* b, int64_t next_panel,
                               int64_t depth, float* sums, int64_t ldc, bool first) {
  Vec<float> sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sum[r][c] = Vec<float>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<float> right[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c)
      right[c] = load(b + c % kPanelVectors * kWidth + c / kPanelVectors * next_panel);
    if constexpr (kPrefetch) {
      __builtin_prefetch(b + kPrefetchDistance * kPanelColumns);
      __builtin_prefetch(b + kPrefetchDistance * kPanelColumns + kPanelColumns / 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const float left = a[r * lda];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sum[r][c] = left * right[c] + sum[r][c];
    }
    a += 1;
    b += kPanelColumns;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      float* out = sums + r * ldc + c * kWidth;
      store(out, first ? sum[r][c] : load(out) + sum[r][c]);
    }
}

template <typename Tile, bool kPrefetch, int kRows = Tile::kRows>
CTXFAST_INLINE void multiply_rows(int rows, const float* a, int64_t lda, const float* b,
                                  int64_t next_panel, int64_t depth, float* sums, int64_t ldc,
                                  bool first) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return multiply_rows<Tile, kPrefetch, kRows - 1>(rows, a, lda, b, next_panel, depth, sums,
                                                       ldc, first);
  }
  multiply<kRows, Tile::kColumns, kPrefetch>(a, lda, b, next_panel, depth, sums, ldc, first);
}

template <Activation kActivation>
CTXFAST_INLINE Vec<float> activate(Vec<float> x) {
  if constexpr (kActivation == kGelu) return gelu(x);
  if constexpr (kActivation == kGeluTanh) return gelu_tanh(x);
  if constexpr (kActivation == kTanh) return tanh(x);
  return x;
}

// output[rows, columns from `column` on] = activation(sums + bias) + residual
template <Activation kActivation>
void finish(const LinearArgs& args, const float* sums, int64_t ldc, int64_t row, int64_t rows,
            int64_t column, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    float* output = args.output + (row + r) * args.columns + column;
    const float* residual = args.residual + (row + r) * args.residual_stride + column;
    for (int64_t i = 0; i < columns; i += kWidth) {
      Vec<float> y = load(sums + r * ldc + i);
      if (args.bias != nullptr) y += load_n(args.bias + column + i, columns - i);
      y = activate<kActivation>(y);
      if (args.residual != nullptr) y += load_n(residual + i, columns - i);
      store_n(output + i, y, columns - i);
    }
  }
}

using Finish = void (*)(const LinearArgs&, const float*, int64_t, int64_t, int64_t, int64_t,
                        int64_t);

Finish finish_for(Activation activation) {
  if (activation == kGelu) return finish<kGelu>;
  if (activation == kGeluTanh) return finish<kGeluTanh>;
  if (activation == kTanh) return finish<kTanh>;
  return finish<kNone>;
}

template <typename Tile>
struct Product {
  const LinearArgs& args;
  Finish finish;
  int64_t panels = (args.columns + kPanelColumns - 1) / kPanelColumns;
  int64_t groups = (panels + Tile::kPanels - 1) / Tile::kPanels;
  int64_t row_blocks = (args.rows + kRowBlock - 1) / kRowBlock;
  int64_t panel_size = args.depth * kPanelColumns;
  // Pieces as equal as possible: how a sum is rounded depends on the depth alone.
  int64_t pieces = (args.depth + kDepthPiece - 1) / kDepthPiece;
  int64_t piece = (args.depth + pieces - 1) / pieces;

  // One block of rows by one group of panels.
  void run(int64_t item) const {
    const int64_t group = item / row_blocks, row = item % row_blocks * kRowBlock;
    const int64_t rows = smaller(args.rows - row, kRowBlock);
    const int64_t panel = group * Tile::kPanels;
    const int64_t column = panel * kPanelColumns;
    alignas(64) float sums[kRowBlock * Tile::kPanels * kPanelColumns];
    if (panel + Tile::kPanels > panels) {  // the last of an odd number of panels
      multiply_block<Tall>(row, rows, panel, sums);
    } else {
      multiply_block<Tile>(row, rows, panel, sums);
    }
    const int64_t width = Tile::kPanels * kPanelColumns;
    finish(args, sums, width, row, rows, column, smaller(args.columns - column, width));
  }

  template <typename Shape>
  CTXFAST_INLINE void multiply_block(int64_t row, int64_t rows, int64_t panel, float* sums) const {
    constexpr int64_t ldc = Tile::kPanels * kPanelColumns;
    for (int64_t k = 0; k < args.depth; k += piece) {
      const int64_t depth = smaller(piece, args.depth - k);
      const float* b = args.panels + panel * panel_size + k * kPanelColumns;
      for (int v = 0; v < Shape::kPanels * kPanelVectors; v += Shape::kColumns) {
        for (int64_t r = 0; r < rows;) {
          const int step = int(smaller(rows - r, Shape::kRows));
          const float* a = args.input + (row + r) * args.input_stride + k;
          float* out = sums + r * ldc + v * kWidth;
          const float* columns = b + v * kWidth;
          // Whoever comes first brings a panel from memory.
          if (Shape::kPrefetch && r == 0 && v == 0) {
            multiply_rows<Shape, true>(step, a, args.input_stride, columns, panel_size, depth, out,
                                       ldc, k == 0);
          } else {
            multiply_rows<Shape, false>(step, a, args.input_stride, columns, panel_size, depth, out,
                                        ldc, k == 0);
          }
          r += step;
        }
      }
    }
  }

  static CTXFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
};

template <typename Tile>
void run(const LinearArgs& args) {
  const Product<Tile> product = {args, finish_for(args.activation)};
  parallel_ranges(args.threads, product.groups * product.row_blocks,
                  [&](int64_t item) { product.run(item); });
}

}  // namespace

Status linear(const LinearArgs& args) {
  if (args.rows > kTallRows) {
    run<Wide>(args);
  } else {
    run<Tall>(args);
  }
  return Status();
}

CTXFAST_NAMESPACE_END
