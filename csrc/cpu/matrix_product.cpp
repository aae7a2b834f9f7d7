// A matrix product in blocks for the caches (Goto and van de Geijn 2008) whose sums are made of
// sums over short pieces of the depth, so that rounding errors do not grow with a long depth as
// those of a single running sum do: the gradients of an LSTM have depths of thousands.
//
// B is arranged once by all threads, a block of the depth and of the columns at a time; each thread
// then takes its share of the rows. The order of the additions depends on the depth alone.
#include "cpu/matrix_product.h"

#include "cpu/kernel_table.h"
#include "cpu/lstm_team.h"
#include "cpu/matrix_tile.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int64_t kDepthBlock = 768;    // with kTilesAtATime tiles of A: the second cache level
constexpr int64_t kColumnBlock = 1024;  // with kDepthBlock: a part of the last cache level
constexpr int64_t kTilesAtATime = 8;
constexpr int64_t kAhead = 16;
constexpr int64_t kLine = 4;  // rows of a transposed A that its tiles are cut from at a time

template <typename T>
struct Product {
  static constexpr int64_t kWidth = kLanes<T>;
  static constexpr int64_t kGroup = kTileColumns * kWidth;  // columns of a panel of B

  const MatrixProductArgs& args;
  T* panels;  // of B: [groups][depth][kGroup]
  T* tiles;   // of A, a thread's own: [kTilesAtATime][depth][kTileRows]

  static int64_t panel_elements(const MatrixProductArgs& args) {
    const int64_t columns = args.columns < kColumnBlock ? args.columns : kColumnBlock;
    return (columns + kGroup - 1) / kGroup * kGroup * depth_block(args);
  }
  static int64_t tile_elements(const MatrixProductArgs& args) {
    return kTilesAtATime * kTileRows * depth_block(args);
  }
  // Blocks of the depth are as equal as whole pieces allow.
  static int64_t depth_block(const MatrixProductArgs& args) {
    const int64_t blocks = (args.depth + kDepthBlock - 1) / kDepthBlock;
    const int64_t each = (args.depth + blocks - 1) / blocks;
    return (each + kSumPiece - 1) / kSumPiece * kSumPiece;
  }

  void arrange_b(int64_t column, int64_t columns, int64_t first, int64_t depth,
                 const Team& team) const {
    const T* source = static_cast<const T*>(args.b) + first * args.b_stride + column;
    for (int64_t k = team.begin(depth); k < team.end(depth); ++k) {
      const T* row = source + k * args.b_stride;
      for (int64_t c = 0; c < columns; c += kGroup) {
        T* out = panels + c * depth + k * kGroup;
        for (int64_t v = 0; v < kGroup; v += kWidth)
          store(out + v, load_n(row + c + v, columns - c - v));
      }
    }
  }

  // Each step of the depth lies on a page of its own: nothing but this asks for it early.
  void fetch_rows(int64_t begin, int64_t end, int64_t all, const T* source, int64_t first,
                  int64_t depth) const {
    constexpr int64_t kLineElements = 64 / int64_t(sizeof(T));
    for (int64_t k = first; k < first + kLine && k < depth; ++k)
      for (int64_t r = row_of(begin, all); r < row_of(end, all); r += kLineElements)
        __builtin_prefetch(source + r + k * args.a_stride[1]);
  }

  // Tiles begin .. end - 1 of a transposed A, the rows of each side by side for every step of the
  // depth.
  void arrange_a(int64_t begin, int64_t end, int64_t all, int64_t first, int64_t depth) const {
    const int64_t along = args.a_stride[1];
    const T* source = static_cast<const T*>(args.a) + first * along;
    for (int64_t k = 0; k < depth; k += kLine) {
      const int64_t last = depth - k < kLine ? depth : k + kLine;
      fetch_rows(begin, end, all, source, k + kAhead, depth);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int rows = rows_of(tile, all);
        const T* from = source + row_of(tile, all);
        T* out = tiles + (tile - begin) * kTileRows * depth;
        for (int64_t i = k; i < last; ++i)
          for (int r = 0; r < rows; ++r) out[i * rows + r] = from[r + i * along];
      }
    }
  }

  bool transposed() const { return args.a_stride[0] < args.a_stride[1]; }

  struct Tile {
    const T* a;
    int64_t a_stride;  // from row to row; 0: the rows are side by side
    const T* b;
    T* c;
    int64_t stride, depth, columns;
    bool first;  // the result begins with this block of the depth

    template <int kRows, int kColumns>
    CTXFAST_INLINE void run() const {
      for (int64_t k = 0; k < depth; k += kSumPiece) {
        Vec<T> sum[kRows][kColumns];
        clear_tile<T>(sum);
        const int64_t piece = depth - k < kSumPiece ? depth - k : kSumPiece;
        if (a_stride == 0) {
          multiply_tile<ScalarArithmetic<T>, kRows, kColumns, true>(
              a + k * kRows, kRows, b + k * kGroup, kGroup, kWidth, piece, sum);
        } else {
          multiply_tile<ScalarArithmetic<T>, kRows, kColumns>(a + k, a_stride, b + k * kGroup,
                                                              kGroup, kWidth, piece, sum);
        }
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kColumns; ++v) {
            T* out = c + r * stride + v * kWidth;
            const int64_t n = columns - v * kWidth;
            store_n(out, first && k == 0 ? sum[r][v] : load_n(out, n) + sum[r][v], n);
          }
      }
    }
  };

  void multiply_block(int64_t column, int64_t columns, int64_t first, int64_t depth,
                      const Team& team) const {
    const int64_t all = (args.rows + kTileRows - 1) / kTileRows;
    const int64_t last = team.end(all);
    for (int64_t begin = team.begin(all); begin < last; begin += kTilesAtATime) {
      const int64_t end = begin + kTilesAtATime < last ? begin + kTilesAtATime : last;
      if (transposed()) arrange_a(begin, end, all, first, depth);
      for (int64_t c = 0; c < columns; c += kGroup) {
        const int64_t left = columns - c < kGroup ? columns - c : kGroup;
        for (int64_t tile = begin; tile < end; ++tile) {
          const T* a = tiles + (tile - begin) * kTileRows * depth;
          if (!transposed())
            a = static_cast<const T*>(args.a) + row_of(tile, all) * args.a_stride[0] + first;
          T* out = static_cast<T*>(args.c) + row_of(tile, all) * args.columns + column + c;
          Tile body = {a,
                       transposed() ? 0 : args.a_stride[0],
                       panels + c * depth,
                       out,
                       args.columns,
                       depth,
                       left,
                       first == 0};
          with_tile(rows_of(tile, all), int((left + kWidth - 1) / kWidth), body);
        }
      }
    }
  }

  // Tiles are as equal as possible.
  int64_t row_of(int64_t tile, int64_t all) const { return args.rows * tile / all; }
  int rows_of(int64_t tile, int64_t all) const {
    return int(row_of(tile + 1, all) - row_of(tile, all));
  }

  void run(const Team& team) const {
    for (int64_t column = 0; column < args.columns; column += kColumnBlock) {
      const int64_t left = args.columns - column;
      const int64_t columns = left < kColumnBlock ? left : kColumnBlock;
      const int64_t block = depth_block(args);
      for (int64_t first = 0; first < args.depth; first += block) {
        const int64_t depth = args.depth - first < block ? args.depth - first : block;
        arrange_b(column, columns, first, depth, team);
        team.wait();
        multiply_block(column, columns, first, depth, team);
        team.wait();
      }
    }
  }
};

template <typename T>
Status run(const MatrixProductArgs& args) {
  Status status;
  if (args.rows == 0 || args.columns == 0) return status;
  if (args.depth == 0) {
    __builtin_memset(args.c, 0, size_t(args.rows * args.columns) * sizeof(T));
    return status;
  }
  using Whole = Product<T>;
  const int64_t shared = Whole::panel_elements(args), own = Whole::tile_elements(args);
  const int threads = args.threads < 1 ? 1 : args.threads;
  T* memory = static_cast<T*>(thread_scratch(size_t(shared + threads * own) * sizeof(T)));
  if (memory == nullptr) {
    status.code = kOutOfMemory;
    return status;
  }
  for_each_direction(threads, 1, false, [&](int, const Team& team) {
    Whole{args, memory, memory + shared + team.rank * own}.run(team);
  });
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
