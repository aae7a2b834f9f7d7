// The float product of matrix_product.cpp on matrix tiles, which multiply bfloat16, by the parts of
// amx_pack.h (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype
// For Higher-Precision Computations", 2019). Of the nine products of parts the six largest are
// summed; the others are below the rounding of a float product. Two parts (three products) or one
// are multiplied where no more is asked for.
//
// A thread packs a chunk of the rows of A for its second cache level, and blocks of the columns of
// B meet it one after the other. Where few chunks meet B, a thread splits the next block while the
// tiles multiply; where many do, all threads split a portion of B first, for the last cache level.
// Tiles leave the vector units idle: results are finished in their pauses too.
//
// An element is a sum of sums over pieces of the depth, whose rounding errors do not grow with the
// depth. The order depends on the depth alone.
#pragma once

#include "cpu/amx_division.h"
#include "cpu/amx_split_block.h"
#include "cpu/amx_split_results.h"
#include "cpu/parallel.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

template <int kParts>
struct SplitProduct {
  static constexpr int64_t kStepBytes = kSplitStepBytes<kParts>;
  static constexpr int64_t kPieceSteps = 512 / kSplitStep;  // of a piece of the depth, at most
  static constexpr int64_t kLastSteps = 768 / kSplitStep;   // that stay in one piece
  static constexpr int64_t kMostBlocks = 12;                // of rows that a thread packs at a time
  static constexpr int64_t kRowBytes = 5 << 18;  // of them: the most of the second cache level
  static constexpr int64_t kPortionBytes = 8 << 20;

  const MatrixProductArgs args;
  const SplitSource a, b;
  // Where it is a linear layer, what makes its results of complete sums.
  const LinearArgs* linear = nullptr;
  const LinearFinish finish = nullptr;
  int64_t row_blocks, column_blocks, steps;
  int64_t pieces, piece_steps;  // of the depth, as equal as possible

  // The portion of B that is split at a time, [pieces][blocks][steps], and where it goes; null
  // where each chunk splits what it meets.
  int64_t portion_blocks, portion_pieces;
  char* portion = nullptr;
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
    return {kFloat32,   args.input,       args.input_stride, 1,       nullptr,   0,
            0,          nullptr,          args.output,       nullptr, args.rows, args.columns,
            args.depth, args.float_parts, args.threads};
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
        pieces(steps <= kLastSteps ? 1 : ceiling(steps, kPieceSteps)),
        piece_steps(ceiling(steps, pieces)) {
    const int64_t most = kPortionBytes / block_bytes();
    portion_blocks = ceiling(column_blocks, ceiling(column_blocks, most));
    portion_pieces = smaller(pieces, most / portion_blocks);
  }

  int64_t steps_of(int64_t piece) const {
    return smaller(piece_steps, steps - piece * piece_steps);
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

  // A block of columns of the portion.
  char* portion_at(int64_t piece, int64_t block) const {
    const int64_t blocks = end_block - begin_block;
    const int64_t before = (piece - begin_piece) * piece_steps * blocks;
    return portion + (before + (block - begin_block) * steps_of(piece)) * kStepBytes;
  }

  // A step of a piece of the depth of a block.
  const float* columns_at(int64_t piece, int64_t block, int64_t step = 0) const {
    return b.block(block, (piece * piece_steps + step) * kSplitStep);
  }
  SplitExtent extent_at(int64_t piece, int64_t block, int64_t step = 0) const {
    return {args.columns - block * kSplitBlock,
            args.depth - (piece * piece_steps + step) * kSplitStep};
  }

  // Fills the portion in the order in which B lies in memory.
  void split_portion() {
    const int64_t blocks = end_block - begin_block, first = begin_piece * piece_steps;
    const int64_t count = smaller(end_piece * piece_steps, steps) - first;
    const auto split = [&](int64_t block, int64_t step, SplitColumns<kParts>& columns) {
      block += begin_block;
      step += first;
      const int64_t piece = step / piece_steps;
      step %= piece_steps;
      const float* from = columns_at(piece, block, step);
      columns.begin(from, from + (b.by_blocks() ? kSplitStep * b.depth_stride : b.block_stride),
                    extent_at(piece, block, step), 1, portion_at(piece, block) + step * kStepBytes);
      columns.finish();
    };
    parallel_for(args.threads, b.by_blocks() ? blocks : count, 1, [&](int64_t item, int64_t) {
      SplitColumns<kParts> columns(b);
      for (int64_t i = 0; i < (b.by_blocks() ? count : blocks); ++i)
        b.by_blocks() ? split(item, i, columns) : split(i, item, columns);
      note(columns.largest(), &largest_b);
    });
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
          pack_row_step<kParts>(a, from, there, out + (block * count + step) * kStepBytes, largest);
      if (row_sums != nullptr) add_rows(a, from, there, row_sums + block * kSplitBlock);
    };
    if (a.by_blocks()) {
      for (int64_t block = 0; block < last - first; ++block)
        for (int64_t step = 0; step < count; ++step) pack(block, step);
    } else {
      for (int64_t step = 0; step < count; ++step)
        for (int64_t block = 0; block < last - first; ++block) pack(block, step);
    }
    return largest;
  }

  // A chunk of the rows, blocks [first, last), by blocks [from, to) of columns: turn by turn a
  // piece of the depth of a block of columns.
  struct Chunk {
    SplitProduct& product;
    const int64_t first, last, from, to;
    char* const rows;  // and behind them two blocks of columns
    const int64_t count = last - first, width = to - from;
    SplitColumns<kParts> columns{product.b};
    SplitResults results{product.args, product.linear, product.finish, product.pieces};

    int64_t piece_of(int64_t turn) const { return product.begin_piece + turn / width; }
    int64_t block_of(int64_t turn) const { return from + turn % width; }
    char* split_of(int64_t turn) const {
      if (product.portion != nullptr) return product.portion_at(piece_of(turn), block_of(turn));
      return rows + (count + turn % 2) * product.block_bytes();
    }

    void begin_columns(int64_t turn, int64_t next) {
      const int64_t piece = piece_of(turn), block = block_of(turn);
      columns.begin(product.columns_at(piece, block),
                    product.columns_at(piece_of(next), block_of(next)),
                    product.extent_at(piece, block), product.steps_of(piece), split_of(turn));
    }

    void run() {
      const int64_t turns = (product.end_piece - product.begin_piece) * width;
      const bool splits = product.portion == nullptr;
      alignas(64) double row_sums[kMostBlocks * kSplitBlock] = {};
      const bool summing = product.args.row_sums != nullptr && from == 0;
      Vec<float> largest = {};
      if (splits) begin_columns(0, smaller(1, turns - 1));
      const MatrixTiles tiles;
      for (int64_t turn = 0; turn < turns; ++turn) {
        columns.finish();
        if (turn % width == 0)
          largest = product.pack_rows(first, last, piece_of(turn), rows,
                                      summing ? row_sums : nullptr, largest);
        if (splits && turn + 1 < turns) begin_columns(turn + 1, smaller(turn + 2, turns - 1));
        multiply(turn);
      }
      results.finish();
      note(largest, &product.largest_a);
      note(columns.largest(), &product.largest_b);
      if (summing)
        product.add_row_sums(first * kSplitBlock, smaller(last * kSplitBlock, product.args.rows),
                             row_sums);
    }

    // All rows by a block of columns. In the pauses, evenly: the results of the block before, and
    // of the next columns what there is to split or to bring from the last cache level.
    CTXFAST_NOINLINE void multiply(int64_t turn) {
      const int64_t piece = piece_of(turn), steps = product.steps_of(piece);
      const int64_t pauses = steps * kSplitProducts<kParts>, all_pauses = count * pauses;
      const char* split = split_of(turn);
      const char* ahead = split + steps * kStepBytes;
      const int64_t units = columns.left();
      const int64_t lines = product.portion == nullptr ? 0 : steps * kStepBytes / 64;
      int64_t units_due = 0, lines_due = 0;
      for (int64_t i = 0; i < count; ++i) {
        int64_t rows_due = 0;
        const auto beside = [&] {
          for (rows_due += results.height(); rows_due >= pauses; rows_due -= pauses)
            results.finish_row();
          for (units_due += units; units_due >= all_pauses; units_due -= all_pauses)
            columns.split_unit();
          for (lines_due += lines; lines_due >= all_pauses; lines_due -= all_pauses, ahead += 64)
            __builtin_prefetch(ahead, 0, 2);
        };
        multiply_blocks<kParts>(rows + i * steps * kStepBytes, split, steps,
                                results.next(first + i, block_of(turn)), beside);
        results.finish();
        results.begin(first + i, block_of(turn), piece);
      }
    }
  };

  int64_t block_bytes() const { return piece_steps * kStepBytes; }

  CTXFAST_NOINLINE void multiply(int64_t first, int64_t last, int64_t from, int64_t to) {
    char* rows =
        static_cast<char*>(thread_scratch(size_t((last - first + 2) * block_bytes() + kStepBytes)));
    if (rows == nullptr) return __atomic_store_n(&out_of_memory, 1, __ATOMIC_RELAXED);
    Chunk{*this, first, last, from, to, rows}.run();
  }

  void add_row_sums(int64_t first, int64_t last, const double* found) const {
    float* sums = static_cast<float*>(args.row_sums);
    for (int64_t row = first; row < last; ++row)
      sums[row] = float((begin_piece == 0 ? 0 : double(sums[row])) + found[row - first]);
  }

  // From how many chunks on a portion is faster: what a thread splits on the way comes from memory
  // for each chunk, and lies scattered there unless it is a panel.
  int64_t many_chunks() const { return b.stride == 1 && b.by_blocks() ? 4 : 2; }

  Division divide(int64_t blocks) const {
    const StepCosts cost = {2 * kSplitProducts<kParts>, 5 * kParts,
                            (portion == nullptr ? 9 : 4) * kParts};
    const int64_t fewest = ceiling(row_blocks, most_blocks());
    return CTXFAST_ISA::divide(row_blocks, blocks, fewest, args.threads, cost);
  }
  int64_t most_blocks() const { return smaller(kMostBlocks, kRowBytes / block_bytes()); }

  // What lies between the begin and the end of blocks and pieces.
  void run_part() {
    if (portion != nullptr) split_portion();
    const int64_t blocks = end_block - begin_block;
    const Division by = divide(blocks);
    parallel_for(args.threads, by.chunks * by.groups, 1, [&](int64_t item, int64_t) {
      const int64_t chunk = item / by.groups, group = item % by.groups;
      multiply(row_blocks * chunk / by.chunks, row_blocks * (chunk + 1) / by.chunks,
               begin_block + blocks * group / by.groups,
               begin_block + blocks * (group + 1) / by.groups);
    });
  }

  // False where memory is not to be had.
  bool run() {
    if (ceiling(row_blocks, most_blocks()) >= many_chunks()) {
      const int64_t most = portion_blocks * portion_pieces * piece_steps + 1;
      portion = static_cast<char*>(thread_scratch(size_t(most * kStepBytes), kPlanScratch));
    }
    if (portion == nullptr) {
      portion_blocks = column_blocks;
      portion_pieces = pieces;
    }
    for (begin_block = 0; begin_block < column_blocks; begin_block = end_block) {
      end_block = smaller(begin_block + portion_blocks, column_blocks);
      for (begin_piece = 0; begin_piece < pieces && !out_of_memory; begin_piece = end_piece) {
        end_piece = smaller(begin_piece + portion_pieces, pieces);
        run_part();
      }
    }
    return !out_of_memory;
  }

  // Whether the parts of what was multiplied are as near to it as they should be: tiles take
  // numbers below the normal range for 0, and the parts of an infinity, or of what is rounded to
  // one, are no numbers.
  bool fits() const {
    constexpr float kTiny = 0x1p-80f, kHuge = 0x1.fep127f;
    float most_a, most_b;
    __builtin_memcpy(&most_a, &largest_a, sizeof(most_a));
    __builtin_memcpy(&most_b, &largest_b, sizeof(most_b));
    if (!(most_a <= kHuge && most_b <= kHuge)) return false;
    const bool tiny = most_a < kTiny || most_b < kTiny || most_a * most_b < kTiny;
    return !tiny || most_a == 0 || most_b == 0;
  }
};

// What is split must be used often enough.
inline bool split_pays(const MatrixProductArgs& args) {
  return args.rows >= 64 && args.columns >= kSplitBlock && args.depth >= kSplitStep;
}
inline bool split_pays(const LinearArgs& args) {
  return args.rows > 48 && args.rows * args.columns * args.depth >= (1 << 20);
}

// False where the product remains to be done in float. `finish` follows the arguments of a linear.
template <int kParts, typename Args, typename... Finish>
bool multiply_split(const Args& args, Finish... finish) {
  SplitProduct<kParts> product(args, finish...);
  return product.run() && product.fits();
}
template <typename Args, typename... Finish>
bool split_product(const Args& args, Finish... finish) {
  if (!split_pays(args)) return false;
  if (args.float_parts == 1) return multiply_split<1>(args, finish...);
  if (args.float_parts == 2) return multiply_split<2>(args, finish...);
  return multiply_split<3>(args, finish...);
}

CTXFAST_NAMESPACE_END

#endif
