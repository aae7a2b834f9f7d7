// Matrix products of training: both operands are packed into panels as a register tile reads them
// (Goto and van de Geijn 2008), whichever way they lie in memory, so that the transposed operands
// of a linear layer's gradients need no copy of their own.
//
// A is packed once for all threads, which also sums its rows: the gradient of the bias. Each thread
// packs the panels of B that it takes. An element is a sum of sums over pieces of the depth, whose
// rounding errors do not grow with the depth as those of one running sum do: gradients of an LSTM
// have depths of thousands. The order depends on the depth alone.
#include "cpu/matrix_product.h"

#include "cpu/kernel_table.h"
#include "cpu/matrix_tile.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

// Sums that fill the vector registers beside their operands.
#if defined(CTXFAST_AVX512)
constexpr int kMostRows = 8, kVectors = 3;
#else
constexpr int kMostRows = 4, kVectors = 3;
#endif
constexpr int64_t kDepth = 256;  // of a panel of B, which stays in the second cache level
constexpr int64_t kPackedBytes = 32 << 20;  // of A at a time
constexpr int64_t kBlocksPerPiece = 4;      // that a thread packs at a time
constexpr int kPiecesPerThread = 8;

CTXFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CTXFAST_INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The transpose of a square of lanes: blocks beside the diagonal change places, halves first.
template <typename T, int kStep = kLanes<T> / 2>
CTXFAST_INLINE void transpose(Vec<T> (&x)[kLanes<T>]) {
  constexpr int kWidth = kLanes<T>;
  Mask<T> lower, upper;
  for (int j = 0; j < kWidth; ++j) {
    lower[j] = j & kStep ? kWidth + j - kStep : j;
    upper[j] = j & kStep ? kWidth + j : j + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kStep) continue;
    const Vec<T> first = x[i], second = x[i + kStep];
    x[i] = __builtin_shuffle(first, second, lower);
    x[i + kStep] = __builtin_shuffle(first, second, upper);
  }
  if constexpr (kStep > 1) transpose<T, kStep / 2>(x);
}

// packed[k][j] = x[k * depth_stride + j * stride] for k < depth and j < count; 0 from there to the
// end of the kPacked vectors of a row.
template <int kPacked, typename T>
CTXFAST_INLINE void pack(const T* x, int64_t depth_stride, int64_t stride, int64_t depth,
                         int64_t count, T* packed) {
  constexpr int kWidth = kLanes<T>;
  constexpr int64_t ld = kPacked * kWidth;
  if (stride == 1) {
    for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < kPacked; ++v)
        store(packed + k * ld + v * kWidth,
              load_n(x + k * depth_stride + v * kWidth, count - v * kWidth));
    return;
  }
  for (int v = 0; v < kPacked; ++v)
    for (int64_t k = 0; k < depth; k += kWidth) {
      Vec<T> square[kWidth];
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) {
        const int64_t left = v * kWidth + j < count ? depth - k : 0;
        square[j] = load_n(x + (v * kWidth + j) * stride + k, left);
      }
      transpose<T>(square);
      T* out = packed + k * ld + v * kWidth;
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j)
        if (j < depth - k) store(out + j * ld, square[j]);
    }
}

template <typename T>
struct Product {
  static constexpr int kWidth = kLanes<T>;
  static constexpr int kColumns = kVectors * kWidth;
  static constexpr int kRows = kMostRows < kWidth ? kMostRows : kWidth;

  const MatrixProductArgs& args;
  int64_t first_row, rows;  // of this round
  T* packed;                // A: [pieces][blocks of kWidth rows][depth of the piece][kWidth]
  int64_t blocks = ceiling(rows, kWidth);
  // Pieces as equal as possible: how a sum is rounded depends on the depth alone.
  int64_t pieces = ceiling(args.depth, kDepth);
  int64_t piece = ceiling(args.depth, pieces);

  int64_t depth_of(int64_t k) const { return smaller(piece, args.depth - k); }
  T* block_at(int64_t block, int64_t k) const {
    return packed + (k * blocks + block * depth_of(k)) * kWidth;
  }

  void pack_rows(int64_t block) const {
    const int64_t row = first_row + block * kWidth;
    const int64_t count = smaller(kWidth, args.rows - row);
    const T* a = static_cast<const T*>(args.a) + row * args.a_row;
    double sums[kWidth] = {};
    for (int64_t k = 0; k < args.depth; k += piece) {
      T* out = block_at(block, k);
      pack<1>(a + k * args.a_depth, args.a_depth, args.a_row, depth_of(k), count, out);
      if (args.row_sums == nullptr) continue;
      for (int64_t d = 0; d < depth_of(k); ++d)
        for (int r = 0; r < kWidth; ++r) sums[r] += double(out[d * kWidth + r]);
    }
    if (args.row_sums == nullptr) return;
    for (int64_t r = 0; r < count; ++r) static_cast<T*>(args.row_sums)[row + r] = T(sums[r]);
  }

  // The columns of one panel in the rows of blocks [first, last).
  CTXFAST_NOINLINE void multiply_panel(int64_t panel, int64_t first, int64_t last) const {
    alignas(64) T b[kDepth * kColumns];
    const T* source = static_cast<const T*>(args.b) + panel * kColumns * args.b_column;
    const int64_t column = panel * kColumns;
    const int64_t columns = smaller(kColumns, args.columns - column);
    for (int64_t k = 0; k < args.depth; k += piece) {
      const int64_t depth = depth_of(k);
      pack<kVectors>(source + k * args.b_depth, args.b_depth, args.b_column, depth, columns, b);
      for (int64_t block = first; block < last; ++block)
        for (int r = 0; r < kWidth; r += kRows) {
          const int64_t row = first_row + block * kWidth + r;
          if (row < args.rows)
            multiply(block_at(block, k) + r, b, depth, row, column, columns, k == 0);
        }
    }
  }

  CTXFAST_INLINE void multiply(const T* a, const T* b, int64_t depth, int64_t row, int64_t column,
                               int64_t columns, bool begins) const {
    Vec<T> sum[kRows][kVectors];
    clear_tile<T>(sum);
    multiply_tile<ScalarArithmetic<T>, kRows, kVectors, true>(a, kWidth, b, kColumns, kWidth, depth,
                                                              sum);
    T* c = static_cast<T*>(args.c) + row * args.columns + column;
    const int64_t count = args.rows - row;
    Vec<T> start[kVectors] = {};
    if (begins && args.bias != nullptr)
      for (int v = 0; v < kVectors; ++v)
        start[v] =
            load_n(static_cast<const T*>(args.bias) + column + v * kWidth, columns - v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) break;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        T* out = c + r * args.columns + v * kWidth;
        const int64_t left = columns - v * kWidth;
        store_n(out, sum[r][v] + (begins ? start[v] : load_n(out, left)), left);
      }
    }
  }

  void run() const {
    parallel_for(args.threads, blocks, kBlocksPerPiece, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) pack_rows(block);
    });
    const int64_t panels = ceiling(args.columns, kColumns);
    const int64_t wanted = ceiling(int64_t(args.threads) * kPiecesPerThread, panels);
    const int64_t groups = smaller(wanted, blocks);
    parallel_for(args.threads, panels * groups, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t panel = item / groups, group = item % groups;
        multiply_panel(panel, blocks * group / groups, blocks * (group + 1) / groups);
      }
    });
  }
};

template <typename T>
Status run(const MatrixProductArgs& args) {
  constexpr int64_t kWidth = kLanes<T>;
  constexpr int64_t kElements = kPackedBytes / int64_t(sizeof(T));
  Status status;
  const int64_t most =
      smaller(ceiling(args.rows, kWidth), 1 + kElements / (args.depth * kWidth)) * kWidth;
  T* packed = static_cast<T*>(thread_scratch(size_t(most * args.depth) * sizeof(T)));
  if (packed == nullptr) {
    status.code = kOutOfMemory;
    return status;
  }
  for (int64_t row = 0; row < args.rows; row += most)
    Product<T>{args, row, smaller(most, args.rows - row), packed}.run();
  return status;
}

}  // namespace

Status matrix_product(const MatrixProductArgs& args) {
  if (args.dtype == kFloat32) return run<float>(args);
  if (args.dtype == kFloat64) return run<double>(args);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
