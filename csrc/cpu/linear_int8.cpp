// A linear layer on 8-bit integers with dynamic quantisation of its input, vector by vector as in
// Dettmers et al., "LLM.int8()" (2022), but over the whole range of a row: activations behind a
// GELU are hardly ever negative.
//
// A task quantises a block of rows into scratch memory, where they stay in the second cache level,
// and multiplies them by one panel of 32 output columns, or two, after another. The integer sums of
// a tile are scaled, and take bias and activation, before they leave the first cache level; on
// matrix tiles, while the next ones are multiplied (amx_panel.h).
#include "cpu/linear_int8.h"

#include "cpu/amx_panel.h"
#include "cpu/gelu.h"
#include "cpu/kernel_table.h"
#include "cpu/linear_int8_rows.h"
#include "cpu/matrix_tile.h"
#include "cpu/parallel.h"
#include "cpu/rounded.h"

CTXFAST_NAMESPACE_BEGIN

template <>
struct VecOf<int32_t> {
  typedef int32_t type __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias));
  typedef int32_t unaligned
      __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias, aligned(1)));
};

namespace {

constexpr int64_t kPanel = 32;       // columns
constexpr int64_t kGroup = 2;        // panels that a task takes at a time
constexpr int64_t kRowLimit = 384;   // rows of a task, at most
constexpr int64_t kEnoughRows = 48;  // of a task that reads all of the weight

// Four unsigned bytes of the input by four signed ones of each column: exact, without saturation.
struct ByteProducts {
  using Accumulator = int32_t;
  using Word = uint32_t;
  static CTXFAST_INLINE Vec<int32_t> multiply_add(Word a, Vec<int32_t> b, Vec<int32_t> c) {
#if defined(CTXFAST_AVX512_VNNI)
    return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)c, _mm512_set1_epi32(int(a)), (__m512i)b);
#else
    c += int32_t(a & 0xff) * ((b << 24) >> 24);
    c += int32_t(a >> 8 & 0xff) * ((b << 16) >> 24);
    c += int32_t(a >> 16 & 0xff) * ((b << 8) >> 24);
    return c + int32_t(a >> 24) * (b >> 24);
#endif
  }
  static CTXFAST_INLINE Vec<int32_t> load_words(const Word* p) {
    return *(const VecOf<int32_t>::unaligned*)p;
  }
};

// What the sums of some columns take to become results; n: how many of the vector's lanes count.
struct Columns {
  Vec<float> scale, sum, bias;
  Columns() : scale(), sum(), bias() {}
  Columns(const LinearInt8Args& args, int64_t column, int64_t n)
      : scale(load_n(args.scales + column, n)),
        sum(load_n(args.sums + column, n)),
        bias(args.bias == nullptr ? Vec<float>{} : load_n(args.bias + column, n)) {}

  template <typename Output, Activation kActivation>
  CTXFAST_INLINE Vec<float> result(const int32_t* sums, float low, float step) const {
    const Vec<int32_t> products = ByteProducts::load_words((const uint32_t*)sums);
    const Vec<float> offset = low * sum + bias;
    const Vec<float> y = __builtin_convertvector(products, Vec<float>) * (step * scale) + offset;
    return activate<Output, kActivation>(y);
  }
};

// From the sums [rows, ldc] of some columns to their results.
template <typename Output, Activation kActivation>
CTXFAST_INLINE void finish_tile(const LinearInt8Args& args, const int32_t* sums, int64_t ldc,
                                const float* low, const float* step, int64_t rows, int64_t column,
                                int64_t columns, Output* output) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t at = column + c, left = columns - c;
    const Columns vector(args, at, left);
    for (int64_t r = 0; r < rows; ++r)
      store_rounded(
          output + r * args.columns + at,
          vector.template result<Output, kActivation>(sums + r * ldc + c, low[r], step[r]), left);
  }
}

#if defined(CTXFAST_AMX)
// Rows of a task by its panels, for PanelProduct.
template <typename Output, Activation kActivation>
struct ManyRows : ByteTiles {
  const LinearInt8Args& args;
  const Rows& rows;
  const int64_t first, count;
  char* space;
  const int64_t width = args.columns;
  // Of the block whose sums are complete.
  const int32_t* sums = nullptr;
  const float *low = nullptr, *step = nullptr;
  Columns columns[2] = {};
  Output* results = nullptr;

  MatrixPanel panel(int64_t index) const {
    const int64_t words = (args.depth + 3) / 4;
    const char* panels = reinterpret_cast<const char*>(args.panels);
    return matrix_panel(panels + index * words * kPanelRowBytes, words, space);
  }

  int64_t output_row() const { return width * int64_t(sizeof(Output)); }
  const char* output(int64_t block, int64_t index) const {
    return static_cast<const char*>(args.output) + (first + block * kBlockRows) * output_row() +
           index * kBlockColumns * int64_t(sizeof(Output));
  }

  // The results of some rows at once.
  void finish_rows(const int32_t* found, int64_t row, int64_t here, int64_t index) const {
    const int64_t column = index * kPanel, left = width - column;
    finish_tile<Output, kActivation>(args, found, kPanel, rows.low + row, rows.step + row, here,
                                     column, left < kPanel ? left : kPanel,
                                     static_cast<Output*>(args.output) + (first + row) * width);
  }

  bool complete(const int32_t* found, int64_t block, int64_t index) {
    const int64_t row = block * kBlockRows, column = index * kPanel;
    if (row + kBlockRows > count || column + kPanel > width) {
      finish_rows(found, row, count - row < kBlockRows ? count - row : kBlockRows, index);
      return false;
    }
    sums = found;
    low = rows.low + row;
    step = rows.step + row;
    for (int v = 0; v < 2; ++v) columns[v] = Columns(args, column + v * kWidth, kWidth);
    results = static_cast<Output*>(args.output) + (first + row) * width + column;
    return true;
  }

  CTXFAST_INLINE void finish() {
    const int32_t* from = sums;
    Output* to = results;
    const int64_t row = width;
#pragma GCC unroll 4
    for (int r = 0; r < kTurnRows; ++r, from += kBlockColumns, to += row) {
      const auto result = [&](int v) {
        return columns[v].template result<Output, kActivation>(from + v * kWidth, low[r], step[r]);
      };
      store_pair(to, result(0), result(1));
    }
    sums = from;
    low += kTurnRows;
    step += kTurnRows;
    results = to;
  }
};

template <typename Output, Activation kActivation>
void multiply_blocks(const LinearInt8Args& args, const Rows& rows, int64_t first, int64_t count,
                     int64_t begin, int64_t end) {
  alignas(64) char space[kBlockStepBytes];
  ManyRows<Output, kActivation> part = {{}, args, rows, first, count, space};
  const int64_t all = (args.columns + kPanel - 1) / kPanel;
  const int64_t last = end * kGroup < all ? end * kGroup : all;
  const MatrixTiles tiles;
  if (count <= kMatrixRows)
    return multiply_few_rows<ByteTiles>(
        reinterpret_cast<const char*>(rows.bytes), kGap, count, begin * kGroup, last,
        [&](int64_t index) { return part.panel(index); },
        [&](const int32_t* sums, int64_t row, int64_t here, int64_t index) {
          part.finish_rows(sums, row, here, index);
        });
  PanelProduct<ManyRows<Output, kActivation>> product(
      part, rows.bytes, rows.row_bytes / kMatrixBytes, (count + kBlockRows - 1) / kBlockRows,
      rows.sums);
  for (int64_t index = begin * kGroup; index < last; ++index) product.multiply(index);
  product.finish();
}
#else
constexpr int kPanelVectors = int(kPanel) / kWidth;

// One tile of integer sums, for `with_tile`. Vectors beyond a panel's are the next panel's. Each
// step asks for some lines of `ahead`, what is read after it, for the second cache level: memory is
// read while rows are multiplied by a panel that is there already.
struct Tile {
  const uint32_t *rows, *panel;
  int64_t words;
  int32_t* sums;  // [kTileRows, kGroup * kPanel]
  const char* ahead;
  int64_t ahead_lines;  // of a step

  template <int kRows, int kColumns>
  void run() const {
    Vec<int32_t> sum[kRows][kColumns];
    clear_tile<int32_t>(sum);
    for (int64_t k = 0; k < words; ++k) {
      const char* line = ahead + k * ahead_lines * kLineBytes;
      for (int64_t i = 0; i < ahead_lines; ++i) __builtin_prefetch(line + i * kLineBytes, 0, 2);
      Vec<int32_t> right[kColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
        right[c] = ByteProducts::load_words(panel + k * kPanel + c % kPanelVectors * kWidth +
                                            c / kPanelVectors * words * kPanel);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c)
          sum[r][c] = ByteProducts::multiply_add(rows[r * words + k], right[c], sum[r][c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
        *(VecOf<int32_t>::unaligned*)(sums + r * kGroup * kPanel + c * kWidth) = sum[r][c];
  }
};

template <typename Output, Activation kActivation>
void multiply_blocks(const LinearInt8Args& args, const Rows& rows, int64_t first, int64_t count,
                     int64_t begin, int64_t end) {
  constexpr int64_t kColumns = kGroup * kPanel;
  constexpr int64_t kStepLines = kColumns * int64_t(sizeof(uint32_t)) / kLineBytes;
  static_assert(kPanelVectors % kTileColumns == 0 || kTileColumns % kPanelVectors == 0,
                "a tile begins where a panel does, or within one");
  const int64_t words = rows.row_bytes / 4;
  const uint32_t* inputs = reinterpret_cast<const uint32_t*>(rows.bytes);
  alignas(64) int32_t sums[kTileRows * kColumns];
  for (int64_t group = begin; group < end; ++group) {
    const int64_t column = group * kColumns;
    const int64_t columns = args.columns - column < kColumns ? args.columns - column : kColumns;
    const int vectors = int((columns + kWidth - 1) / kWidth);
    const uint32_t* weight = (const uint32_t*)args.panels + group * words * kColumns;
    const char* ahead = reinterpret_cast<const char*>(weight + words * kColumns);
    const int64_t tiles =
        (count + kTileRows - 1) / kTileRows * ((vectors + kTileColumns - 1) / kTileColumns);
    int64_t left = group + 1 < end ? kStepLines : 0;
    const int64_t share = (left + tiles - 1) / tiles;
    for (int64_t row = 0; row < count;) {
      const int step = next_rows(count - row);
      for (int c = 0; c < vectors; c += kTileColumns) {
        const int64_t lines = share < left ? share : left;
        const Tile tile = {inputs + row * words,
                           weight + c / kPanelVectors * words * kPanel + c % kPanelVectors * kWidth,
                           words,
                           sums + c * kWidth,
                           ahead,
                           lines};
        with_tile(step, vectors - c < kTileColumns ? vectors - c : kTileColumns, tile);
        ahead += lines * words * kLineBytes;
        left -= lines;
      }
      finish_tile<Output, kActivation>(
          args, sums, kColumns, rows.low + row, rows.step + row, step, column, columns,
          static_cast<Output*>(args.output) + (first + row) * args.columns);
      row += step;
    }
  }
}
#endif

// Rows [first, first + count), already quantised, by the groups of panels [begin, end).
using Multiply = void (*)(const LinearInt8Args&, const Rows&, int64_t, int64_t, int64_t, int64_t);

template <typename Output>
Multiply multiply_for(Activation activation) {
  if (activation == kGelu) return multiply_blocks<Output, kGelu>;
  if (activation == kGeluTanh) return multiply_blocks<Output, kGeluTanh>;
  if (activation == kTanh) return multiply_blocks<Output, kTanh>;
  return multiply_blocks<Output, kNone>;
}

// Tasks are blocks of rows, as equal as possible; too few blocks are divided among columns too, and
// their rows quantised once for each division.
struct Tasks {
  int64_t rows, blocks, groups, divisions;

  explicit Tasks(const LinearInt8Args& args) {
    const int64_t all = (args.columns + kGroup * kPanel - 1) / (kGroup * kPanel);
    const int64_t threads = args.threads;
    const int64_t fitting = kByteLimit / args.depth / kRowGroup * kRowGroup;
    const int64_t limit = fitting < kRowGroup   ? kRowGroup
                          : fitting > kRowLimit ? kRowLimit
                                                : fitting;
    blocks = (args.rows + limit - 1) / limit;
    if (args.rows >= threads * kEnoughRows) blocks = (blocks + threads - 1) / threads * threads;
    divisions = blocks < threads ? (threads + blocks - 1) / blocks : 1;
    if (divisions > all) divisions = all;
    rows = (args.rows + blocks - 1) / blocks;
    rows = (rows + kRowGroup - 1) / kRowGroup * kRowGroup;
    blocks = (args.rows + rows - 1) / rows;
    groups = (all + divisions - 1) / divisions;
  }
};

template <typename Input, typename Output>
Status run(const LinearInt8Args& args) {
  const Tasks tasks(args);
  const Multiply multiply = multiply_for<Output>(args.activation);
  const int64_t bytes = row_bytes(args.depth);
  const int64_t all = (args.columns + kGroup * kPanel - 1) / (kGroup * kPanel);
  int32_t failed = 0;
  parallel_for(args.threads, tasks.blocks * tasks.divisions, 1, [&](int64_t task, int64_t) {
    const int64_t sums = sum_count(tasks.rows);
    auto* scratch = static_cast<uint8_t*>(thread_scratch(size_t(
        tasks.rows * (bytes + 2 * int64_t(sizeof(float))) + sums * int64_t(sizeof(int32_t)))));
    if (scratch == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    auto* memory = reinterpret_cast<int32_t*>(scratch + tasks.rows * bytes);
    float* scales = reinterpret_cast<float*>(memory + sums);
    const Rows rows = {scratch, bytes, scales, scales + tasks.rows, memory};
    const int64_t first = task / tasks.divisions * tasks.rows;
    const int64_t count = args.rows - first < tasks.rows ? args.rows - first : tasks.rows;
    for (int64_t row = 0; row < count; ++row)
      quantize_row(static_cast<const Input*>(args.input) + (first + row) * args.input_stride,
                   args.depth, rows.bytes + row_offset(row, bytes), rows.low + row,
                   rows.step + row);
    const int64_t begin = task % tasks.divisions * tasks.groups, end = begin + tasks.groups;
    multiply(args, rows, first, count, begin, end < all ? end : all);
  });
  Status status;
  if (failed != 0) status.code = kOutOfMemory;
  return status;
}

}  // namespace

Status linear_int8(const LinearInt8Args& args) {
  const bool narrow_input = args.input_dtype == kBfloat16;
  if (args.output_dtype == kBfloat16)
    return narrow_input ? run<bfloat16, bfloat16>(args) : run<float, bfloat16>(args);
  return narrow_input ? run<bfloat16, float>(args) : run<float, float>(args);
}

CTXFAST_NAMESPACE_END
