// A linear layer on 8-bit integers with dynamic quantisation of its input, vector by vector as in
// Dettmers et al., "LLM.int8()" (2022), but over the whole range of a row: activations behind a
// GELU are hardly ever negative.
//
// A task quantises a block of rows into scratch memory, where they stay in the second cache level,
// and multiplies them by one panel of 64 output columns after another. The integer sums of a tile
// are scaled, and take bias and activation, before they leave the first cache level; on matrix
// tiles, while the next tile is multiplied.
#include "cpu/linear_int8.h"

#include "cpu/amx_int8.h"
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

constexpr int64_t kPanel = 64;       // columns
constexpr int64_t kRowLimit = 384;   // rows of a task, at most
constexpr int64_t kEnoughRows = 48;  // of a task that reads all of the weight

// Four unsigned bytes of the input by four signed ones of each column: exact, without saturation.
struct ByteProducts {
  using Accumulator = int32_t;
  using Word = uint32_t;
  static CTXFAST_INLINE Vec<int32_t> multiply_add(Word a, Vec<int32_t> b, Vec<int32_t> c) {
#if defined(CTXFAST_AVX512_BF16)
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
  Columns(const LinearInt8Args& args, int64_t column, int64_t n)
      : scale(load_n(args.scales + column, n)),
        sum(load_n(args.sums + column, n)),
        bias(args.bias == nullptr ? Vec<float>{} : load_n(args.bias + column, n)) {}

  template <typename Output, Activation kActivation>
  CTXFAST_INLINE void finish(const int32_t* sums, float low, float step, Output* output,
                             int64_t n) const {
    const Vec<int32_t> products = ByteProducts::load_words((const uint32_t*)sums);
    const Vec<float> offset = low * sum + bias;
    const Vec<float> y = __builtin_convertvector(products, Vec<float>) * (step * scale) + offset;
    store_rounded(output, activate<Output, kActivation>(y), n);
  }
};

#if defined(CTXFAST_AMX)
// 16 rows by 32 columns of the result.
struct Strip {
  int64_t row, column;
};

constexpr int64_t kGroupBytes = 1 << 18;  // of panels that all rows pass by while others come
constexpr int64_t kNearBytes = 1 << 14;   // by which one tile of rows is ahead of itself

// A task's rows by its panels, a group of panels at a time: a pair of row tiles stays in the first
// cache level while it meets those of a group. Meanwhile the next group is brought into the second
// level, and the sums of the block before are finished.
template <typename Output, Activation kActivation>
class Blocks {
 public:
  Blocks(const LinearInt8Args& args, const Rows& rows, int64_t first, int64_t count)
      : args_(args), rows_(rows), first_(first), count_(count) {}

  void run(int64_t begin, int64_t end) {
    const MatrixTiles tiles;
    const int64_t pairs = (count_ + kUnits - 1) / kUnits;
    int64_t group = kGroupBytes / panel_bytes_ < pairs ? kGroupBytes / panel_bytes_ : pairs;
    if (group < 1) group = 1;
    for (int64_t i = begin; i < end; i += group) {
      const int64_t stop = i + group < end ? i + group : end;
      look_ahead(i, stop, end);
      for (int64_t row = 0; row < count_; row += kUnits)
        for (int64_t panel = i; panel < stop; ++panel) multiply_panel(panel, row);
    }
    finish(0, kUnits);
  }

 private:
  static constexpr int64_t kNoRow = INT64_MAX / 2;
  static constexpr int64_t kUnits = 2 * kMatrixRows;  // rows of the two strips of a block
  static constexpr int64_t kLines = kStepBytes / kLineBytes;

  const uint8_t* panel_at(int64_t panel) const {
    return reinterpret_cast<const uint8_t*>(args_.panels) + panel * panel_bytes_;
  }

  // What to ask memory for during the panels [begin, stop) of a task that ends with panel `end`.
  void look_ahead(int64_t begin, int64_t stop, int64_t end) {
    const int64_t size = (stop - begin) * panel_bytes_;
    const uint8_t *last = panel_at(end), *ahead = panel_at(stop);
    if (count_ <= kMatrixRows) ahead = panel_at(begin) + kNearBytes;
    if (ahead > last) ahead = last;
    ahead_ = ahead;
    ahead_end_ = last - ahead < size ? last : ahead + size;
    const int64_t tiles = (count_ + kMatrixRows - 1) / kMatrixRows;  // each pair passes by twice
    lines_ = (kLines + tiles - 1) / tiles;
  }

  CTXFAST_INLINE void ask_ahead() {
    for (int64_t i = 0; i < lines_ && ahead_ < ahead_end_; ++i, ahead_ += kLineBytes)
      __builtin_prefetch(ahead_, 0, 2);
  }

  void multiply_panel(int64_t panel, int64_t row) {
    const int64_t column = panel * kPanel, next = column + kStripColumns;
    const BytePanel bytes = byte_panel(panel_at(panel), panel_bytes_ / kPanelRowBytes, tail_);
    if (row + kMatrixRows >= count_) return multiply<false>(bytes, 0, {row, column}, {row, next});
    multiply<true>(bytes, 0, {row, column}, {row + kMatrixRows, column});
    if (next < args_.columns)
      multiply<true>(bytes, kStripColumns, {row, next}, {row + kMatrixRows, next});
  }

  template <bool kTall>
  CTXFAST_INLINE void multiply(const BytePanel& panel, int64_t column, Strip first, Strip second) {
    const uint8_t* rows = rows_.bytes + row_offset(first.row, rows_.row_bytes);
    const int64_t share = (kUnits + panel.steps - 1) / panel.steps;
    int64_t unit = 0;
    multiply_bytes<kTall>(rows, panel, column, sums_[1 - done_], [&](int64_t) {
      ask_ahead();
      const int64_t end = unit + share < kUnits ? unit + share : kUnits;
      finish(unit, end);
      unit = end;
    });
    done_ = 1 - done_;
    strips_[0] = first;
    strips_[1] = second;
  }

  // Rows [unit, end) of the strips of the block that was multiplied last.
  CTXFAST_INLINE void finish(int64_t unit, int64_t end) const {
    while (unit < end) {
      const int64_t strip = unit / kMatrixRows, start = strip * kMatrixRows;
      const int64_t stop = end < start + kMatrixRows ? end : start + kMatrixRows;
      finish_rows(strips_[strip], unit - start, stop - start, sums_[done_] + strip * kStripSize);
      unit = stop;
    }
  }

  CTXFAST_INLINE void finish_rows(Strip strip, int64_t r, int64_t end, const int32_t* sums) const {
    const int64_t width = args_.columns, left = width - strip.column, rest = left - kWidth;
    if (left <= 0) return;
    if (strip.row + end > count_) end = count_ - strip.row;
    const Columns columns(args_, strip.column, left), others(args_, strip.column + kWidth, rest);
    Output* output =
        static_cast<Output*>(args_.output) + (first_ + strip.row) * width + strip.column;
    const float *low = rows_.low + strip.row, *step = rows_.step + strip.row;
    for (; r < end; ++r) {
      const int32_t* from = sums + r * kStripColumns;
      Output* to = output + r * width;
      columns.template finish<Output, kActivation>(from, low[r], step[r], to, left);
      others.template finish<Output, kActivation>(from + kWidth, low[r], step[r], to + kWidth,
                                                  rest);
    }
  }

  const LinearInt8Args& args_;
  const Rows& rows_;
  const int64_t first_, count_;
  const int64_t panel_bytes_ = (args_.depth + 3) / 4 * kPanelRowBytes;
  const uint8_t *ahead_ = nullptr, *ahead_end_ = nullptr;
  int64_t lines_ = 0;                             // of them, asked for after each step
  Strip strips_[2] = {{kNoRow, 0}, {kNoRow, 0}};  // of the block to be finished
  int done_ = 0;                                  // which of the sums are complete
  alignas(64) int32_t sums_[2][2 * kStripSize];
  alignas(64) uint8_t tail_[kStepBytes];
};

template <typename Output, Activation kActivation>
void multiply_blocks(const LinearInt8Args& args, const Rows& rows, int64_t first, int64_t count,
                     int64_t begin, int64_t end) {
  Blocks<Output, kActivation>(args, rows, first, count).run(begin, end);
}
#else
// One tile of integer sums, for `with_tile`.
struct Tile {
  const uint32_t *rows, *panel;
  int64_t words;
  int32_t* sums;  // [kTileRows, kPanel]

  template <int kRows, int kColumns>
  void run() const {
    Vec<int32_t> sum[kRows][kColumns];
    clear_tile<int32_t>(sum);
    multiply_tile<ByteProducts, kRows, kColumns>(rows, words, panel, kPanel, kWidth, words, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
        *(VecOf<int32_t>::unaligned*)(sums + r * kPanel + c * kWidth) = sum[r][c];
  }
};

// From the sums [rows, kPanel] of a tile to its results.
template <typename Output, Activation kActivation>
CTXFAST_INLINE void finish_tile(const LinearInt8Args& args, const int32_t* sums, const float* low,
                                const float* step, int rows, int64_t column, int64_t columns,
                                Output* output) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t at = column + c, left = columns - c;
    const Columns vector(args, at, left);
    for (int r = 0; r < rows; ++r)
      vector.finish<Output, kActivation>(sums + r * kPanel + c, low[r], step[r],
                                         output + r * args.columns + at, left);
  }
}

template <typename Output, Activation kActivation>
void multiply_blocks(const LinearInt8Args& args, const Rows& rows, int64_t first, int64_t count,
                     int64_t begin, int64_t end) {
  const int64_t words = rows.row_bytes / 4;
  const uint32_t* inputs = reinterpret_cast<const uint32_t*>(rows.bytes);
  alignas(64) int32_t sums[kTileRows * kPanel];
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * kPanel;
    const int64_t columns = args.columns - column < kPanel ? args.columns - column : kPanel;
    const int vectors = int((columns + kWidth - 1) / kWidth);
    const uint32_t* weight = (const uint32_t*)args.panels + panel * words * kPanel;
    for (int64_t row = 0; row < count;) {
      const int step = next_rows(count - row);
      for (int c = 0; c < vectors; c += kTileColumns) {
        const Tile tile = {inputs + row * words, weight + c * kWidth, words, sums + c * kWidth};
        with_tile(step, vectors - c < kTileColumns ? vectors - c : kTileColumns, tile);
      }
      finish_tile<Output, kActivation>(
          args, sums, rows.low + row, rows.step + row, step, column, columns,
          static_cast<Output*>(args.output) + (first + row) * args.columns);
      row += step;
    }
  }
}
#endif

// Rows [first, first + count), already quantised, by the panels [begin, end).
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
  int64_t rows, blocks, panels, divisions;

  explicit Tasks(const LinearInt8Args& args) {
    const int64_t all = (args.columns + kPanel - 1) / kPanel, threads = args.threads;
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
    panels = (all + divisions - 1) / divisions;
  }
};

template <typename Input, typename Output>
Status run(const LinearInt8Args& args) {
  const Tasks tasks(args);
  const Multiply multiply = multiply_for<Output>(args.activation);
  const int64_t bytes = row_bytes(args.depth), all = (args.columns + kPanel - 1) / kPanel;
  int32_t failed = 0;
  parallel_for(args.threads, tasks.blocks * tasks.divisions, 1, [&](int64_t task, int64_t) {
    auto* scratch = static_cast<uint8_t*>(thread_scratch(tasks.rows * (bytes + 2 * sizeof(float))));
    if (scratch == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    float* scales = reinterpret_cast<float*>(scratch + tasks.rows * bytes);
    const Rows rows = {scratch, bytes, scales, scales + tasks.rows};
    const int64_t first = task / tasks.divisions * tasks.rows;
    const int64_t count = args.rows - first < tasks.rows ? args.rows - first : tasks.rows;
    for (int64_t row = 0; row < count; ++row)
      quantize_row(static_cast<const Input*>(args.input) + (first + row) * args.input_stride,
                   args.depth, rows.bytes + row_offset(row, bytes), rows.low + row,
                   rows.step + row);
    const int64_t begin = task % tasks.divisions * tasks.panels, end = begin + tasks.panels;
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
