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

// A Word is what one step along the depth takes of a row or of a column: a float, or two bfloat16
// that are neighbours along the depth.
template <typename T>
struct Operand;

template <>
struct Operand<float> {
  using Word = float;
  static constexpr int kPack = 1;
  static CTXFAST_INLINE Vec<float> multiply_add(const float* a, Vec<float> b, Vec<float> c) {
    return *a * b + c;
  }
};

template <>
struct Operand<bfloat16> {
  using Word = uint32_t;
  static constexpr int kPack = 2;
  static CTXFAST_INLINE Vec<float> multiply_add(const bfloat16* a, Vec<float> b, Vec<float> c) {
#if defined(CTXFAST_ISA_AVX512_BF16)
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
#else
    const VecOf<float>::bits pairs = (VecOf<float>::bits)b;
    c = to_compute(a[0]) * (Vec<float>)(pairs << 16) + c;
    return to_compute(a[1]) * (Vec<float>)(pairs & 0xffff0000u) + c;
#endif
  }
};

constexpr int64_t kTallRows = 32;          // from more rows on, wide tiles are faster
constexpr int64_t kRowBlock = 48;          // whose sums stay in the first cache level
constexpr int64_t kDepthPiece = 256;       // rounding errors of a sum do not grow beyond it
constexpr int64_t kPrefetchDistance = 16;  // in words of the depth: 2 KiB of a panel

// sums[r][c] = or += A [kRows, words of the depth] B, B the vectors from b on: kPanelVectors in one
// panel, the next ones next_panel words further.
template <typename T, int kRows, int kColumns, bool kPrefetch>
CTXFAST_NOINLINE void multiply(const T* a, int64_t lda, const typename Operand<T>::Word* b,
                               int64_t next_panel, int64_t words, float* sums, int64_t ldc,
                               bool first) {
  Vec<float> sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sum[r][c] = Vec<float>{};
  for (int64_t k = 0; k < words; ++k) {
    Vec<float> right[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c)
      right[c] = load(reinterpret_cast<const float*>(b) + c % kPanelVectors * kWidth +
                      c / kPanelVectors * next_panel);
    if constexpr (kPrefetch) {
      __builtin_prefetch(b + kPrefetchDistance * kPanelColumns);
      __builtin_prefetch(b + kPrefetchDistance * kPanelColumns + kPanelColumns / 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c)
        sum[r][c] = Operand<T>::multiply_add(a + r * lda, right[c], sum[r][c]);
    }
    a += Operand<T>::kPack;
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

template <typename T, typename Tile, bool kPrefetch, int kRows = Tile::kRows>
CTXFAST_INLINE void multiply_rows(int rows, const T* a, int64_t lda,
                                  const typename Operand<T>::Word* b, int64_t next_panel,
                                  int64_t words, float* sums, int64_t ldc, bool first) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return multiply_rows<T, Tile, kPrefetch, kRows - 1>(rows, a, lda, b, next_panel, words, sums,
                                                          ldc, first);
  }
  multiply<T, kRows, Tile::kColumns, kPrefetch>(a, lda, b, next_panel, words, sums, ldc, first);
}

// output[rows, columns from `column` on] = activation(sums + bias) + residual
template <typename T, Activation kActivation>
void finish(const LinearArgs& args, const float* sums, int64_t ldc, int64_t row, int64_t rows,
            int64_t column, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    T* output = static_cast<T*>(args.output) + (row + r) * args.columns + column;
    const int64_t residual = (row + r) * args.residual_stride + column;
    for (int64_t i = 0; i < columns; i += kWidth) {
      Vec<float> y = load(sums + r * ldc + i);
      if (args.bias != nullptr)
        y += load_n(static_cast<const T*>(args.bias) + column + i, columns - i);
      y = activate<T, kActivation>(y);
      if (args.residual != nullptr)
        y += load_n(static_cast<const T*>(args.residual) + residual + i, columns - i);
      store_n(output + i, y, columns - i);
    }
  }
}

using Finish = void (*)(const LinearArgs&, const float*, int64_t, int64_t, int64_t, int64_t,
                        int64_t);

template <typename T>
Finish finish_for(Activation activation) {
  if (activation == kGelu) return finish<T, kGelu>;
  if (activation == kGeluTanh) return finish<T, kGeluTanh>;
  if (activation == kTanh) return finish<T, kTanh>;
  return finish<T, kNone>;
}

template <typename T, typename Tile>
struct Product {
  using Word = typename Operand<T>::Word;

  const LinearArgs& args;
  Finish finish;
  int64_t panels = (args.columns + kPanelColumns - 1) / kPanelColumns;
  int64_t groups = (panels + Tile::kPanels - 1) / Tile::kPanels;
  int64_t row_blocks = (args.rows + kRowBlock - 1) / kRowBlock;
  int64_t words = args.depth / Operand<T>::kPack;
  int64_t panel_size = words * kPanelColumns;
  // Pieces as equal as possible: how a sum is rounded depends on the depth alone.
  int64_t pieces = (args.depth + kDepthPiece - 1) / kDepthPiece;
  int64_t piece = (words + pieces - 1) / pieces;

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
    for (int64_t k = 0; k < words; k += piece) {
      const int64_t depth = smaller(piece, words - k);
      const Word* b =
          static_cast<const Word*>(args.panels) + panel * panel_size + k * kPanelColumns;
      for (int v = 0; v < Shape::kPanels * kPanelVectors; v += Shape::kColumns) {
        for (int64_t r = 0; r < rows;) {
          const int step = int(smaller(rows - r, Shape::kRows));
          const T* a = static_cast<const T*>(args.input) + (row + r) * args.input_stride +
                       k * Operand<T>::kPack;
          float* out = sums + r * ldc + v * kWidth;
          const Word* columns = b + v * kWidth;
          // Whoever comes first brings a panel from memory.
          if (Shape::kPrefetch && r == 0 && v == 0) {
            multiply_rows<T, Shape, true>(step, a, args.input_stride, columns, panel_size, depth,
                                          out, ldc, k == 0);
          } else {
            multiply_rows<T, Shape, false>(step, a, args.input_stride, columns, panel_size, depth,
                                           out, ldc, k == 0);
          }
          r += step;
        }
      }
    }
  }

  static CTXFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
};

template <typename T, typename Tile>
void run(const LinearArgs& args) {
  const Product<T, Tile> product = {args, finish_for<T>(args.activation)};
  parallel_ranges(args.threads, product.groups * product.row_blocks,
                  [&](int64_t item) { product.run(item); });
}

template <typename T>
void run(const LinearArgs& args) {
  if (args.rows > kTallRows) {
    run<T, Wide>(args);
  } else {
    run<T, Tall>(args);
  }
}

}  // namespace

Status linear(const LinearArgs& args) {
  Status status;
  if (args.dtype == kFloat32) {
    run<float>(args);
  } else if (args.dtype == kBfloat16 && args.depth % 2 == 0) {
    run<bfloat16>(args);
  } else {
    status.code = kUnsupportedDtype;
  }
  return status;
}

CTXFAST_NAMESPACE_END
