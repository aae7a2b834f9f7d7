// A linear layer with its epilogue on a weight packed into panels of 32 columns: register-blocked
// products (Goto and van de Geijn 2008) without packing the input.
//
// With few rows the time is that of reading the weight from memory. Each thread streams through a
// contiguous run of panels, a tile holds as many rows as the registers do, and its loop prefetches
// what it reads next, so that memory stays busy while it multiplies. With more rows the same panels
// are read two at a time, by tiles that need fewer loads.
//
// A weight that is not packed is put into panels on the way, a piece of the depth at a time: its
// rows come from memory while the piece before is multiplied.
#include "cpu/linear.h"

#include "cpu/amx_digit_linear.h"
#include "cpu/amx_linear.h"
#include "cpu/amx_matrix_product.h"
#include "cpu/kernel_table.h"
#include "cpu/linear_finish.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

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

// A Word is what one step along the depth takes of a column: a float, or two bfloat16 that are
// neighbours along the depth. Of a row it takes as many Factors: floats, where the processor does
// not multiply bfloat16.
template <typename T>
struct Operand;

template <>
struct Operand<float> {
  using Word = float;
  using Factor = float;
  static constexpr int kPack = 1;
  static CTXFAST_INLINE Vec<float> multiply_add(const float* a, Vec<float> b, Vec<float> c) {
    return *a * b + c;
  }
};

template <>
struct Operand<bfloat16> {
  using Word = uint32_t;
  static constexpr int kPack = 2;
#if defined(CTXFAST_AVX512_BF16)
  using Factor = bfloat16;
  static CTXFAST_INLINE Vec<float> multiply_add(const bfloat16* a, Vec<float> b, Vec<float> c) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
#else
  using Factor = float;
  static CTXFAST_INLINE Vec<float> multiply_add(const float* a, Vec<float> b, Vec<float> c) {
    c = a[0] * first_of_pairs(b) + c;
    return a[1] * second_of_pairs(b) + c;
  }
#endif
};

constexpr int64_t kTallRows = 32;        // from more rows on, wide tiles are faster
constexpr int64_t kRowBlock = 48;        // whose sums stay in the first cache level
constexpr int64_t kLargeRowBlock = 192;  // for which a piece of a weight is put into other panels
constexpr int64_t kDepthPiece = 256;     // rounding errors of a sum do not grow beyond it

// Words of the depth by which the loop is ahead of itself in the first cache level, and in the
// second, which has more requests to memory under way: 2 and 8 KiB of a panel.
constexpr int64_t kNear = 16, kFar = 64;

// What the loop asks memory for: the lines of step k are those at k / kAheadSteps rows and
// k % kAheadSteps pairs of lines of `ahead`.
constexpr int64_t kAheadSteps = 8, kLineBytes = 64;

// sums[r][c] = or += A [kRows, words of the depth] B, B the vectors from b on: kPanelVectors in one
// panel, the next ones next_panel words further.
template <typename T, int kRows, int kColumns, bool kPrefetch>
CTXFAST_NOINLINE void multiply(const typename Operand<T>::Factor* a, int64_t lda,
                               const typename Operand<T>::Word* b, int64_t next_panel,
                               int64_t words, float* sums, int64_t ldc, bool first,
                               const char* ahead, int64_t ahead_row) {
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
      const char* near = reinterpret_cast<const char*>(b + kNear * kPanelColumns);
      const char* far = ahead + k / kAheadSteps * ahead_row + k % kAheadSteps * 2 * kLineBytes;
      __builtin_prefetch(near);
      __builtin_prefetch(near + kLineBytes);
      __builtin_prefetch(far, 0, 2);
      __builtin_prefetch(far + kLineBytes, 0, 2);
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
CTXFAST_INLINE void multiply_rows(int rows, const typename Operand<T>::Factor* a, int64_t lda,
                                  const typename Operand<T>::Word* b, int64_t next_panel,
                                  int64_t words, float* sums, int64_t ldc, bool first,
                                  const char* ahead, int64_t ahead_row) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return multiply_rows<T, Tile, kPrefetch, kRows - 1>(rows, a, lda, b, next_panel, words, sums,
                                                          ldc, first, ahead, ahead_row);
  }
  multiply<T, kRows, Tile::kColumns, kPrefetch>(a, lda, b, next_panel, words, sums, ldc, first,
                                                ahead, ahead_row);
}

// Panels from some word on, and what the loop over them asks memory for.
template <typename T>
struct Piece {
  const typename Operand<T>::Word* columns;
  int64_t next_panel, words;
  const char* ahead;
  int64_t ahead_row;
};

template <typename T, typename Tile>
struct Product {
  using Word = typename Operand<T>::Word;
  using Factor = typename Operand<T>::Factor;
  static constexpr int64_t kPack = Operand<T>::kPack;
  static constexpr bool kWidens = sizeof(Factor) > sizeof(T);
  static constexpr int64_t kWideRow = kDepthPiece + kWidth;  // spreads rows over a cache's sets

  const LinearArgs& args;
  LinearFinish finish;
  int64_t panels = (args.columns + kPanelColumns - 1) / kPanelColumns;
  int64_t groups = (panels + Tile::kPanels - 1) / Tile::kPanels;
  int64_t row_block = args.panels != nullptr && !kWidens ? kRowBlock : kLargeRowBlock;
  int64_t row_blocks = (args.rows + row_block - 1) / row_block;
  int64_t words = args.depth / kPack;
  int64_t panel_size = words * kPanelColumns;
  // Pieces as equal as possible: how a sum is rounded depends on the depth alone.
  int64_t pieces = (args.depth + kDepthPiece - 1) / kDepthPiece;
  int64_t piece = (words + pieces - 1) / pieces;

  // One block of rows by one group of panels.
  void run(int64_t item) const {
    const int64_t group = item / row_blocks, row = item % row_blocks * row_block;
    const int64_t rows = smaller(args.rows - row, row_block);
    const int64_t panel = group * Tile::kPanels;
    const int64_t column = panel * kPanelColumns;
    alignas(64) float sums[kLargeRowBlock * Tile::kPanels * kPanelColumns];
    if (panel + Tile::kPanels > panels) {  // the last of an odd number of panels
      multiply_block<Tall>(row, rows, panel, sums);
    } else {
      multiply_block<Tile>(row, rows, panel, sums);
    }
    const int64_t width = Tile::kPanels * kPanelColumns;
    finish(args, sums, width, row, rows, column, smaller(args.columns - column, width));
  }

  Piece<T> packed_piece(int64_t panel, int64_t k, int64_t depth) const {
    const Word* b = static_cast<const Word*>(args.panels) + panel * panel_size + k * kPanelColumns;
    return {b, panel_size, depth, reinterpret_cast<const char*>(b + kFar * kPanelColumns),
            2 * kAheadSteps * kLineBytes};
  }

  // `depth` words from k on of a plain weight's rows, put into panels in `out`. Ahead lies their
  // next piece, or the first one of the next panel.
  template <typename Shape>
  Piece<T> plain_piece(int64_t panel, int64_t k, int64_t depth, Word* out) const {
    const auto at = [&](int64_t panel, int64_t k) {
      return static_cast<const float*>(args.weight) + panel * kPanelColumns * words + k;
    };
    for (int64_t p = 0; p < Shape::kPanels; ++p)
      pack_vectors<kPanelVectors>(at(panel + p, k), 1, words, depth,
                                  args.columns - (panel + p) * kPanelColumns,
                                  reinterpret_cast<float*>(out + p * depth * kPanelColumns));
    const float* ahead = k + depth < words ? at(panel, k + depth) : at(panel + 1, 0);
    return {out, depth * kPanelColumns, depth, reinterpret_cast<const char*>(ahead),
            words * int64_t(sizeof(Word))};
  }

  // A piece as rows are multiplied by it. Pairs that many rows meet are separated once, in `wide`.
  template <typename Shape>
  static CTXFAST_INLINE auto separated(const Piece<T>& b, [[maybe_unused]] float* wide) {
    if constexpr (!kWidens || Shape::kPrefetch) {
      return b;
    } else {
      const int64_t size = b.words * kPanelColumns;
      for (int64_t p = 0; p < Shape::kPanels; ++p)
        for (int64_t i = 0; i < size; i += kWidth) {
          const Vec<float> pairs =
              load(reinterpret_cast<const float*>(b.columns + p * b.next_panel + i));
          float* to = wide + 2 * p * size + i + i / kPanelColumns * kPanelColumns;
          store(to, first_of_pairs(pairs));
          store(to + kPanelColumns, second_of_pairs(pairs));
        }
      return Piece<Factor>{wide, 2 * size, 2 * b.words, nullptr, 0};
    }
  }

  // sums of rows [r, rows), as many as Shape has, by vectors of a piece from v on.
  template <typename Shape, typename Math>
  static CTXFAST_INLINE void multiply_part(const Piece<Math>& b, int64_t r, int64_t rows, int v,
                                           const Factor* a, int64_t lda, float* sums, bool first) {
    constexpr int64_t ldc = Tile::kPanels * kPanelColumns;
    const int count = int(smaller(rows - r, Shape::kRows));
    float* out = sums + r * ldc + v * kWidth;
    // Whoever comes first brings a panel from memory.
    if (Shape::kPrefetch && r == 0 && v == 0) {
      multiply_rows<Math, Shape, true>(count, a, lda, b.columns, b.next_panel, b.words, out, ldc,
                                       first, b.ahead, b.ahead_row);
    } else {
      multiply_rows<Math, Shape, false>(count, a, lda, b.columns + v * kWidth, b.next_panel,
                                        b.words, out, ldc, first, b.ahead, b.ahead_row);
    }
  }

  template <typename Shape>
  CTXFAST_INLINE void multiply_block(int64_t row, int64_t rows, int64_t panel, float* sums) const {
    constexpr int kVectors = Shape::kPanels * kPanelVectors;
    const int64_t stride = args.input_stride;
    alignas(64) Word arranged[Shape::kPanels * kDepthPiece / kPack * kPanelColumns];
    for (int64_t k = 0; k < words; k += piece) {
      const int64_t depth = smaller(piece, words - k);
      const Piece<T> b = args.panels != nullptr ? packed_piece(panel, k, depth)
                                                : plain_piece<Shape>(panel, k, depth, arranged);
      const T* a = static_cast<const T*>(args.input) + row * stride + k * kPack;
      if constexpr (!kWidens) {
        for (int v = 0; v < kVectors; v += Shape::kColumns)
          for (int64_t r = 0; r < rows; r += Shape::kRows)
            multiply_part<Shape>(b, r, rows, v, a + r * stride, stride, sums, k == 0);
      } else {
        alignas(64) float wide[Shape::kPanels * kDepthPiece * kPanelColumns];
        alignas(64) float left[Shape::kRows * kWideRow];
        const auto right = separated<Shape>(b, wide);
        for (int64_t r = 0; r < rows; r += Shape::kRows) {
          for (int64_t i = 0; i < smaller(rows - r, Shape::kRows); ++i)
            for (int64_t d = 0; d < depth * kPack; d += kWidth)
              store(left + i * kWideRow + d, load_n(a + (r + i) * stride + d, depth * kPack - d));
          for (int v = 0; v < kVectors; v += Shape::kColumns)
            multiply_part<Shape>(right, r, rows, v, left, kWideRow, sums, k == 0);
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

constexpr int64_t kSetLines = 8;  // that a set of the first cache level holds

// A copy of a few rows whose distance would map all of them to one set of the first cache level,
// which does not hold as many lines as a tall tile has rows; nullptr where they need none.
template <typename T>
const T* spread_rows(const LinearArgs& args, int64_t* stride) {
  constexpr int64_t kSetsBytes = 4096, kLine = kLineBytes / int64_t(sizeof(T));
  if (args.rows <= kSetLines || args.input_stride * int64_t(sizeof(T)) % kSetsBytes != 0)
    return nullptr;
  *stride = (args.depth + kLine - 1) / kLine * kLine + kLine;
  T* rows = static_cast<T*>(thread_scratch(size_t(args.rows * *stride) * sizeof(T)));
  if (rows == nullptr) return nullptr;
  for (int64_t r = 0; r < args.rows; ++r)
    __builtin_memcpy(rows + r * *stride, static_cast<const T*>(args.input) + r * args.input_stride,
                     size_t(args.depth) * sizeof(T));
  return rows;
}

template <typename T>
void run(const LinearArgs& args) {
  if (args.rows > kTallRows) return run<T, Wide>(args);
  LinearArgs spread = args;
  if (const T* rows = spread_rows<T>(args, &spread.input_stride)) spread.input = rows;
  run<T, Tall>(spread);
}

}  // namespace

Status linear(const LinearArgs& args) {
  Status status;
  if (args.dtype == kFloat32) {
#if defined(CTXFAST_AMX)
    const LinearFinish finish = finish_for<float>(args.activation);
    if (digit_linear(args) || split_product(args, finish)) return status;
#endif
    run<float>(args);
  } else if (args.dtype == kBfloat16 && args.depth % 2 == 0) {
#if defined(CTXFAST_AMX)
    if (matrix_linear(args)) return status;
#endif
    run<bfloat16>(args);
  } else {
    status.code = kUnsupportedDtype;
  }
  return status;
}

CTXFAST_NAMESPACE_END
