// Matrix products of training: both operands are packed into panels as a register tile reads them
// (Goto and van de Geijn 2008), whichever way they lie in memory, so that the transposed operands
// of a linear layer's gradients need no copy of their own.
//
// A part of B that the last cache level holds is packed by all threads; then each of them packs
// blocks of the rows of A for its own second level, sums them on the way (the gradient of the bias)
// and multiplies them with that part. So memory gives A and C once for a part, and B once in all.
//
// An element is a sum of sums over pieces of the depth, whose rounding errors do not grow with the
// depth as those of one running sum do: gradients of an LSTM have depths of thousands. The order
// depends on the depth alone.
#include "cpu/matrix_product.h"

#include "cpu/amx_matrix_product.h"
#include "cpu/kernel_table.h"
#include "cpu/matrix_tile.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

// Sums that fill the vector registers beside their operands.
#if defined(CTXFAST_AVX512)
constexpr int kMostRows = 8, kVectors = 3;
#else
constexpr int kMostRows = 4, kVectors = 3;
#endif
constexpr int64_t kDepth = 256;       // of a piece
constexpr int64_t kBlockRows = 64;    // of A that a thread packs at a time
constexpr int64_t kFewestRows = 32;   // of a block, where smaller ones occupy more threads
constexpr int64_t kBlockPanels = 12;  // that a block meets: C stays in the second cache level too
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kPackedBytes = 2 << 20;  // of B at a time, for the last cache level
constexpr int64_t kPackedDepth = 16;       // of B that a thread packs at a time

CTXFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CTXFAST_INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
struct Product {
  static constexpr int kWidth = kLanes<T>;
  static constexpr int kColumns = kVectors * kWidth;
  static constexpr int kRows = kMostRows < kWidth ? kMostRows : kWidth;

  const MatrixProductArgs& args;
  // Pieces as equal as possible: how a sum is rounded depends on the depth alone.
  int64_t pieces = ceiling(args.depth, kDepth);
  int64_t piece = ceiling(args.depth, pieces);
  // The part of B that is packed at a time, and where it goes: [pieces][panels][depth][kColumns].
  int64_t part_columns = 0, part_pieces = 0;
  T* packed = nullptr;

  int64_t begin_column = 0, begin_depth = 0, end_column = 0, end_depth = 0;  // of this part

  int64_t panels() const { return ceiling(end_column - begin_column, kColumns); }
  T* panel_at(int64_t panel, int64_t k) const {
    const int64_t depth = smaller(piece, args.depth - k);
    return packed + ((k - begin_depth) * panels() + panel * depth) * kColumns;
  }

  // Depths [first, last) of a piece that begins at k, of all columns.
  void pack_depths(int64_t k, int64_t first, int64_t last) const {
    const T* source = static_cast<const T*>(args.b);
    for (int64_t panel = 0; panel < panels(); ++panel) {
      const int64_t column = begin_column + panel * kColumns;
      pack_vectors<kVectors>(source + first * args.b_depth + column * args.b_column, args.b_depth,
                             args.b_column, last - first, smaller(kColumns, args.columns - column),
                             panel_at(panel, k) + (first - k) * kColumns);
    }
  }

  // Rows [first, last) of this part's columns that lie in its panels [from, to).
  CTXFAST_NOINLINE void multiply_block(int64_t first, int64_t last, int64_t from,
                                       int64_t to) const {
    alignas(64) T a[kDepth * kBlockRows];
    double sums[kBlockRows] = {};
    const bool summing = args.row_sums != nullptr && begin_column == 0 && from == 0;
    for (int64_t k = begin_depth; k < end_depth; k += piece) {
      const int64_t depth = smaller(piece, args.depth - k);
      pack_block(first, last, k, depth, a);
      if (summing) add_rows(a, last - first, depth, sums);
      for (int64_t panel = from; panel < to; ++panel)
        multiply_panel(a, panel_at(panel, k), depth, first, last, begin_column + panel * kColumns,
                       k == 0);
    }
    if (!summing) return;
    T* out = static_cast<T*>(args.row_sums);
    for (int64_t row = first; row < last; ++row)
      out[row] = T((begin_depth == 0 ? 0 : double(out[row])) + sums[row - first]);
  }

  // [blocks of kWidth rows][depth][kWidth]
  CTXFAST_INLINE void pack_block(int64_t first, int64_t last, int64_t k, int64_t depth,
                                 T* out) const {
    const T* source = static_cast<const T*>(args.a) + first * args.a_row + k * args.a_depth;
    for (int64_t row = 0; row < last - first; row += kWidth)
      pack_vectors<1>(source + row * args.a_row, args.a_depth, args.a_row, depth,
                      smaller(kWidth, last - first - row), out + row * depth);
  }

  static CTXFAST_INLINE void add_rows(const T* a, int64_t rows, int64_t depth, double* sums) {
    for (int64_t row = 0; row < rows; row += kWidth)
      for (int64_t d = 0; d < depth; ++d)
        for (int r = 0; r < kWidth; ++r) sums[row + r] += double(a[row * depth + d * kWidth + r]);
  }

  CTXFAST_INLINE void multiply_panel(const T* a, const T* b, int64_t depth, int64_t first,
                                     int64_t last, int64_t column, bool begins) const {
    const int64_t columns = args.columns - column;
    for (int64_t row = first; row < last; row += kRows) {
      const int64_t place = row - first;
      const T* block = a + place / kWidth * depth * kWidth + place % kWidth;
      if (columns > 2 * kWidth) {
        multiply<3>(block, b, depth, row, last - row, column, begins);
      } else if (columns > kWidth) {
        multiply<2>(block, b, depth, row, last - row, column, begins);
      } else {
        multiply<1>(block, b, depth, row, last - row, column, begins);
      }
    }
  }

  template <int kUsed>
  CTXFAST_INLINE void multiply(const T* a, const T* b, int64_t depth, int64_t row, int64_t count,
                               int64_t column, bool begins) const {
    T* c = static_cast<T*>(args.c) + row * args.columns + column;
    const int64_t columns = args.columns - column;
    for (int r = 0; r < kRows && r < count; ++r)
      for (int v = 0; v < kUsed; ++v) __builtin_prefetch(c + r * args.columns + v * kWidth, 1);
    Vec<T> sum[kRows][kUsed];
    clear_tile<T>(sum);
    multiply_tile<ScalarArithmetic<T>, kRows, kUsed, true>(a, kWidth, b, kColumns, kWidth, depth,
                                                           sum);
    Vec<T> start[kUsed] = {};
    if (begins && args.bias != nullptr)
      for (int v = 0; v < kUsed; ++v)
        start[v] =
            load_n(static_cast<const T*>(args.bias) + column + v * kWidth, columns - v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) break;
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) {
        T* out = c + r * args.columns + v * kWidth;
        const int64_t left = columns - v * kWidth;
        store_n(out, sum[r][v] + (begins ? start[v] : load_n(out, left)), left);
      }
    }
  }

  void run_part() const {
    const int64_t slices = ceiling(piece, kPackedDepth);
    const int64_t count = ceiling(end_depth - begin_depth, piece);
    parallel_for(args.threads, count * slices, 1, [&](int64_t item, int64_t) {
      const int64_t k = begin_depth + item / slices * piece;
      const int64_t first = k + item % slices * kPackedDepth;
      const int64_t last = smaller(smaller(k + piece, args.depth), first + kPackedDepth);
      if (first < last) pack_depths(k, first, last);
    });
    const int64_t wanted = args.threads * kItemsPerThread;
    const int64_t most = ceiling(args.rows, kFewestRows);
    int64_t blocks = ceiling(args.rows, kBlockRows);
    if (blocks < wanted) blocks = smaller(wanted, most);
    const int64_t rows = ceiling(ceiling(args.rows, blocks), kRows) * kRows;
    blocks = ceiling(args.rows, rows);
    int64_t groups = ceiling(panels(), kBlockPanels);
    if (groups * blocks < wanted) groups = smaller(panels(), ceiling(wanted, blocks));
    parallel_for(args.threads, blocks * groups, 1, [&](int64_t item, int64_t) {
      const int64_t row = item / groups * rows, group = item % groups;
      multiply_block(row, smaller(row + rows, args.rows), panels() * group / groups,
                     panels() * (group + 1) / groups);
    });
  }

  void run() {
    const int64_t step = part_pieces * piece;
    for (begin_column = 0; begin_column < args.columns; begin_column = end_column) {
      end_column = smaller(begin_column + part_columns, args.columns);
      for (begin_depth = 0; begin_depth < args.depth; begin_depth = end_depth) {
        end_depth = smaller(begin_depth + step, args.depth);
        run_part();
      }
    }
  }
};

template <typename T>
Status run(const MatrixProductArgs& args) {
  using P = Product<T>;
  Status status;
  P product{args};
  const int64_t most = kPackedBytes / int64_t(sizeof(T)) / (product.piece * P::kColumns);
  const int64_t panels = ceiling(args.columns, P::kColumns);
  const int64_t parts = ceiling(panels, most);
  const int64_t width = ceiling(panels, parts);
  product.part_columns = width * P::kColumns;
  product.part_pieces = smaller(product.pieces, most / width);
  product.packed = static_cast<T*>(thread_scratch(
      size_t(product.part_columns * product.part_pieces * product.piece * int64_t(sizeof(T)))));
  if (product.packed == nullptr) {
    status.code = kOutOfMemory;
    return status;
  }
  product.run();
  return status;
}

}  // namespace

Status matrix_product(const MatrixProductArgs& args) {
#if defined(CTXFAST_AMX)
  if (args.dtype == kFloat32 && split_product(args)) return {};
#endif
  if (args.dtype == kFloat32) return run<float>(args);
  if (args.dtype == kFloat64) return run<double>(args);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
