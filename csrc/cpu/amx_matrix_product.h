// The float product of matrix_product.cpp on matrix tiles, which multiply bfloat16, by the parts of
// amx_pack.h (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype
// For Higher-Precision Computations", 2019). Of the nine products of parts the six largest are
// summed; the others are below the rounding of a float product.
//
// All threads pack a portion of B; then each of them packs blocks of the rows of A for its own
// second cache level and multiplies them with that portion. An element is a sum of sums over pieces
// of the depth, whose rounding errors do not grow with the depth. The order depends on the depth
// alone.
#pragma once

#include "cpu/amx_linear.h"
#include "cpu/amx_split_block.h"
#include "cpu/matrix_product.h"
#include "cpu/parallel.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// sums[r] += the first `depth` elements of row r of a step of a block, 8 at a time in float.
CTXFAST_INLINE void add_rows(const SplitSource& a, const float* from, SplitExtent there,
                             double* sums) {
  const auto add = [&](Vec<float>(&x)[8], double* to) {
#pragma GCC unroll 3
    for (int half = 4; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int i = 0; i < half; ++i) x[i] += x[i + half];
    store(to, load(to) + (Vec<double>)_mm512_cvtps_pd(_mm512_castps512_ps256(x[0])));
    store(to + 8, load(to + 8) + (Vec<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps(x[0], 1)));
  };
  for (int64_t i = 0; i < kSplitBlock; i += 16)
    for (int64_t k = 0; k < kSplitStep && k < there.depth; k += 8) {
      Vec<float> x[16] = {};
      const float* first = from + i * a.stride + k * a.depth_stride;
      if (a.depth_stride == 1) {
        load_transposed(first, a.stride, there.depth - k < 8 ? there.depth - k : 8, there.count - i,
                        x);
      } else {
#pragma GCC unroll 8
        for (int d = 0; d < 8; ++d)
          x[d] = load_n(first + d * a.depth_stride, k + d < there.depth ? there.count - i : 0);
      }
      add(reinterpret_cast<Vec<float>(&)[8]>(x), sums + i);
    }
}

struct SplitProduct {
  static constexpr int64_t kPieceSteps = 512 / kSplitStep, kPortionBytes = 8 << 20;
  static constexpr int64_t kMostBlocks = 8;    // of rows that a thread packs at a time
  static constexpr int64_t kFewestBlocks = 2;  // where smaller ones occupy more threads
  static constexpr int64_t kItemsPerThread = 2;

  const MatrixProductArgs args;
  const SplitSource a, b;
  // Where it is a linear layer, what makes its results of complete sums.
  const LinearArgs* linear = nullptr;
  const LinearFinish finish = nullptr;
  int64_t row_blocks, column_blocks, steps;
  int64_t pieces, piece_steps;  // of the depth, as equal as possible
  // The portion of B that is packed at a time, [pieces][blocks][steps], and where it goes.
  int64_t portion_blocks, portion_pieces;
  char* packed = nullptr;
  int64_t begin_block = 0, end_block = 0, begin_piece = 0, end_piece = 0;

  uint32_t largest_a = 0, largest_b = 0;  // magnitude, as bits
  int out_of_memory = 0;

  static CTXFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static CTXFAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
  static CTXFAST_INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

  explicit SplitProduct(const MatrixProductArgs& args)
      : SplitProduct(args, {args.b, args.b_column, args.b_depth}, nullptr, nullptr) {}

  SplitProduct(const LinearArgs& args, LinearFinish finish)
      : SplitProduct(product_of(args), columns_of(args), &args, finish) {}

  static MatrixProductArgs product_of(const LinearArgs& args) {
    return {kFloat32,   args.input,  args.input_stride, 1,       nullptr,   0,
            0,          nullptr,     args.output,       nullptr, args.rows, args.columns,
            args.depth, args.threads};
  }
  static SplitSource columns_of(const LinearArgs& args) {
    static_assert(kSplitBlock == kPanelColumns, "a block of columns is a panel");
    if (args.panels == nullptr) return {args.weight, args.depth, 1};
    return {args.panels, 1, kPanelColumns, kPanelColumns * args.depth};
  }

  SplitProduct(const MatrixProductArgs& product, const SplitSource& columns,
               const LinearArgs* linear, LinearFinish finish)
      : args(product),
        a(args.a, args.a_row, args.a_depth),
        b(columns),
        linear(linear),
        finish(finish),
        row_blocks(ceiling(args.rows, kSplitBlock)),
        column_blocks(ceiling(args.columns, kSplitBlock)),
        steps(ceiling(args.depth, kSplitStep)),
        pieces(ceiling(steps, kPieceSteps)),
        piece_steps(ceiling(steps, pieces)) {
    const int64_t most = kPortionBytes / (piece_steps * kSplitStepBytes);
    portion_blocks = ceiling(column_blocks, ceiling(column_blocks, most));
    portion_pieces = smaller(pieces, most / portion_blocks);
  }

  // What is packed must be used often enough.
  static bool pays(const MatrixProductArgs& args) {
    return args.rows >= 64 && args.columns >= kSplitBlock && args.depth >= kSplitStep;
  }
  // With few rows the time is that of splitting the weight.
  static bool pays(const LinearArgs& args) {
    return args.rows >= 256 && args.rows * args.columns * args.depth >= (1 << 20);
  }

  int64_t blocks() const { return end_block - begin_block; }
  int64_t steps_of(int64_t piece) const {
    return smaller(piece_steps, steps - piece * piece_steps);
  }
  char* packed_at(int64_t piece, int64_t block) const {
    const int64_t before = (piece - begin_piece) * piece_steps * blocks();
    return packed + (before + (block - begin_block) * steps_of(piece)) * kSplitStepBytes;
  }

  // largest = max(largest, found), whichever thread comes first
  static void note(Vec<float> found, uint32_t* largest) {
    const float most = reduce_max(found);
    uint32_t bits, before = __atomic_load_n(largest, __ATOMIC_RELAXED);
    __builtin_memcpy(&bits, &most, sizeof(bits));
    while (before < bits && !__atomic_compare_exchange_n(largest, &before, bits, true,
                                                         __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  // Steps [first, last) of blocks [from, to) of columns. Where each goes is asked for while the one
  // before it is packed: the portion lies in the last cache level.
  void pack_columns(int64_t first, int64_t last, int64_t from, int64_t to) {
    Vec<float> largest = {};
    in_order(b, to - from, last - first, [&](int64_t block, int64_t step) {
      block += from;
      step += first;
      const int64_t piece = step / piece_steps;
      const int64_t column = block * kSplitBlock, k = step * kSplitStep;
      char* out = packed_at(piece, block) + step % piece_steps * kSplitStepBytes;
      const char* next = out + (b.by_blocks() ? 1 : steps_of(piece)) * kSplitStepBytes;
      for (int64_t byte = 0; byte < kSplitStepBytes; byte += 64)
        __builtin_prefetch(next + byte, 0, 2);
      largest = pack_column_step(b, b.block(block, k), {args.columns - column, args.depth - k}, out,
                                 largest);
    });
    note(largest, &largest_b);
  }

  void pack_portion() {
    const int64_t first = begin_piece * piece_steps, last = smaller(end_piece * piece_steps, steps);
    if (b.by_blocks()) {
      parallel_for(args.threads, blocks(), 1, [&](int64_t item, int64_t) {
        pack_columns(first, last, begin_block + item, begin_block + item + 1);
      });
    } else {
      parallel_for(args.threads, last - first, 1, [&](int64_t item, int64_t) {
        pack_columns(first + item, first + item + 1, begin_block, end_block);
      });
    }
  }

  // Calls visit(block, step) for all of them, in the order in which they lie in memory.
  template <typename Visit>
  static CTXFAST_INLINE void in_order(const SplitSource& source, int64_t blocks, int64_t steps,
                                      const Visit& visit) {
    if (source.by_blocks()) {
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t step = 0; step < steps; ++step) visit(block, step);
    } else {
      for (int64_t step = 0; step < steps; ++step)
        for (int64_t block = 0; block < blocks; ++block) visit(block, step);
    }
  }

  // [blocks][steps] of a piece; adds to row_sums unless it is null.
  Vec<float> pack_rows(int64_t first, int64_t last, int64_t piece, char* out, double* row_sums,
                       Vec<float> largest) const {
    const int64_t begin = piece * piece_steps, count = steps_of(piece);
    const auto pack = [&](int64_t block, int64_t step) {
      const int64_t row = (first + block) * kSplitBlock, k = (begin + step) * kSplitStep;
      const SplitExtent there = {args.rows - row, args.depth - k};
      const float* from = a.block(first + block, k);
      largest =
          pack_row_step(a, from, there, out + (block * count + step) * kSplitStepBytes, largest);
      if (row_sums != nullptr) add_rows(a, from, there, row_sums + block * kSplitBlock);
    };
    in_order(a, last - first, count, pack);
    return largest;
  }

  // Blocks [first, last) of rows by blocks [from, to) of columns.
  CTXFAST_NOINLINE void multiply(int64_t first, int64_t last, int64_t from, int64_t to) {
    const int64_t count = last - first;
    char* rows =
        static_cast<char*>(thread_scratch(size_t((count * piece_steps + 1) * kSplitStepBytes)));
    if (rows == nullptr) return __atomic_store_n(&out_of_memory, 1, __ATOMIC_RELAXED);
    alignas(64) double row_sums[kMostBlocks * kSplitBlock] = {};
    const bool summing = args.row_sums != nullptr && from == 0;
    Vec<float> largest = {};
    const MatrixTiles tiles;
    for (int64_t piece = begin_piece; piece < end_piece; ++piece) {
      largest = pack_rows(first, last, piece, rows, summing ? row_sums : nullptr, largest);
      const int64_t piece_bytes = steps_of(piece) * kSplitStepBytes;
      const int64_t lines = ceiling(kSplitStepBytes / 64, count);
      for (int64_t block = from; block < to; ++block) {
        const char* columns = packed_at(piece, block);
        const char* ahead = columns + piece_bytes;
        for (int64_t i = 0; i < count; ++i, ahead += lines * 64 * steps_of(piece))
          multiply_block(rows + i * piece_bytes, columns, steps_of(piece), ahead, lines, first + i,
                         block, piece);
      }
    }
    note(largest, &largest_a);
    if (summing)
      add_row_sums(first * kSplitBlock, smaller(last * kSplitBlock, args.rows), row_sums);
  }

  void add_row_sums(int64_t first, int64_t last, const double* found) const {
    float* sums = static_cast<float*>(args.row_sums);
    for (int64_t row = first; row < last; ++row)
      sums[row] = float((begin_piece == 0 ? 0 : double(sums[row])) + found[row - first]);
  }

  CTXFAST_INLINE void multiply_block(const char* rows, const char* columns, int64_t count,
                                     const char* ahead, int64_t lines, int64_t row_block,
                                     int64_t column_block, int64_t piece) const {
    const int64_t row = row_block * kSplitBlock, column = column_block * kSplitBlock;
    const int64_t height = smaller(kSplitBlock, args.rows - row), width = args.columns - column;
    float* c = static_cast<float*>(args.c) + row * args.columns + column;
    alignas(64) float sums[kSplitBlock * kSplitBlock];
    multiply_blocks(rows, columns, count, ahead, lines, c, args.columns, height, sums);
    const bool begins = piece == 0, ends = piece + 1 == pieces;
    if (linear != nullptr && ends) {
      if (!begins) add_block(c, height, width, sums);
      return finish(*linear, sums, kSplitBlock, row, height, column, smaller(kSplitBlock, width));
    }
    Vec<float> start[2] = {};
    if (begins && args.bias != nullptr)
      for (int v = 0; v < 2; ++v)
        start[v] = load_n(static_cast<const float*>(args.bias) + column + v * 16, width - v * 16);
    for (int64_t r = 0; r < height; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* out = c + r * args.columns + v * 16;
        const Vec<float> sum = load(sums + r * kSplitBlock + v * 16);
        const int64_t left = width - v * 16;
        store_n(out, sum + (begins ? start[v] : load_n(out, left)), left);
      }
  }

  // sums += what earlier pieces left in c
  CTXFAST_INLINE void add_block(const float* c, int64_t height, int64_t width, float* sums) const {
    for (int64_t r = 0; r < height; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* sum = sums + r * kSplitBlock + v * 16;
        store(sum, load(sum) + load_n(c + r * args.columns + v * 16, width - v * 16));
      }
  }

  void run_portion() {
    pack_portion();
    int64_t items = ceiling(row_blocks, kMostBlocks);
    if (args.threads > 1)
      items = larger(items,
                     smaller(args.threads * kItemsPerThread, ceiling(row_blocks, kFewestBlocks)));
    const int64_t count = ceiling(row_blocks, items);
    items = ceiling(row_blocks, count);
    const int64_t groups = smaller(blocks(), ceiling(args.threads, items));
    parallel_for(args.threads, items * groups, 1, [&](int64_t item, int64_t) {
      const int64_t first = item / groups * count, group = item % groups;
      multiply(first, smaller(first + count, row_blocks), begin_block + blocks() * group / groups,
               begin_block + blocks() * (group + 1) / groups);
    });
  }

  Status run() {
    Status status;
    const int64_t packed_steps = portion_blocks * portion_pieces * piece_steps + 1;
    packed =
        static_cast<char*>(thread_scratch(size_t(packed_steps * kSplitStepBytes), kPlanScratch));
    out_of_memory = packed == nullptr;
    for (begin_block = 0; begin_block < column_blocks && !out_of_memory; begin_block = end_block) {
      end_block = smaller(begin_block + portion_blocks, column_blocks);
      for (begin_piece = 0; begin_piece < pieces; begin_piece = end_piece) {
        end_piece = smaller(begin_piece + portion_pieces, pieces);
        run_portion();
      }
    }
    if (out_of_memory) status.code = kOutOfMemory;
    return status;
  }

  // Whether what was multiplied is exact in three parts: tiles take numbers below the normal range
  // for 0, and the parts of an infinity are no numbers.
  bool fits() const {
    constexpr float kTiny = 0x1p-80f;
    float most_a, most_b;
    __builtin_memcpy(&most_a, &largest_a, sizeof(most_a));
    __builtin_memcpy(&most_b, &largest_b, sizeof(most_b));
    if (!(most_a - most_a == 0 && most_b - most_b == 0)) return false;
    const bool tiny = most_a < kTiny || most_b < kTiny || most_a * most_b < kTiny;
    return !tiny || most_a == 0 || most_b == 0;
  }
};

CTXFAST_NAMESPACE_END

#endif
