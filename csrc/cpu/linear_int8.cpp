// A linear layer on 8-bit integers with dynamic quantisation of its input, vector by vector as in
// Dettmers et al., "LLM.int8()" (2022), but over the whole range of a row: activations behind a
// GELU are hardly ever negative.
//
// A task quantises a block of rows into scratch memory, where they stay in the second cache level,
// and multiplies them by one panel of 64 output columns after another. The integer sums of a tile
// are scaled, and take bias and activation, before they leave the first cache level.
#include "cpu/linear_int8.h"

#include "cpu/amx_int8.h"
#include "cpu/gelu.h"
#include "cpu/kernel_table.h"
#include "cpu/matrix_tile.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

template <>
struct VecOf<int32_t> {
  typedef int32_t type __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias));
  typedef int32_t unaligned
      __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias, aligned(1)));
};

namespace {

constexpr int64_t kPanel = 64;      // columns
constexpr int64_t kRowLimit = 384;  // rows of a task, at most
#if defined(CTXFAST_AMX)
constexpr int64_t kByteLimit = 1 << 20;  // of its rows: half of the second cache level
constexpr int64_t kTaskRows = kByteBlockRows;
#else
constexpr int64_t kByteLimit = 1 << 19;
constexpr int64_t kTaskRows = kTileRows;  // what the rows of a task are a multiple of
#endif
constexpr int64_t kEnoughRows = 48;  // of a task that reads all of the weight
constexpr float kLevels = 255.0f;    // steps of an unsigned byte
constexpr int kWidth = kLanes<float>;

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

// What a task multiplies: rows of bytes, and what brings their products back to scale. 64 bytes of
// a row lie together: all of a row in a line, or in matrix tiles, [blocks][steps][tiles][16
// rows][64].
struct Rows {
  uint8_t* bytes;
  float *low, *step;
  int64_t tiles;  // of a block; 0: lines
  int64_t steps;  // of 64 bytes, the last one perhaps with fewer

  int64_t step_bytes() const { return tiles == 0 ? kLineBytes : tiles * kTileBytes; }
  uint8_t* row(int64_t index, int64_t words) const {
    if (tiles == 0) return bytes + index * words * int64_t(sizeof(uint32_t));
    const int64_t tile = index / kMatrix;
    return bytes + (tile / tiles * steps * tiles + tile % tiles) * kTileBytes +
           index % kMatrix * kLineBytes;
  }

  static constexpr int64_t kMatrix = 16, kTileBytes = kMatrix * kLineBytes;
};

// To the nearest integer, ties to even. By instruction where there is one: a fused multiply-add in
// round_to_integer would break ties otherwise than the definition does.
CTXFAST_INLINE Mask<float> nearest(Vec<float> x) {
#if defined(CTXFAST_AVX512)
  return (Mask<float>)_mm512_cvtps_epi32(x);
#elif defined(CTXFAST_AVX2)
  return (Mask<float>)_mm256_cvtps_epi32(x);
#else
  return __builtin_convertvector(round_to_integer(x), Mask<float>);
#endif
}

typedef uint8_t Bytes __attribute__((vector_size(kWidth), aligned(1), may_alias));

// The row's bytes from k on lie at bytes + k / 64 * step_bytes + k % 64.
template <typename Input>
CTXFAST_INLINE void quantize_row(const Input* input, int64_t depth, uint8_t* bytes,
                                 int64_t step_bytes, float* low, float* step) {
  constexpr int kAtOnce = 4;  // hides the latency of what is compared
  Vec<float> least[kAtOnce], most[kAtOnce], poison[kAtOnce];
  for (int i = 0; i < kAtOnce; ++i) {
    least[i] = most[i] = splat(to_compute(input[0]));
    poison[i] = Vec<float>{};
  }
  const auto look = [&](Vec<float> x, int i) {
    least[i] = vmin(x, least[i]);
    most[i] = vmax(x, most[i]);
    // A NaN may escape the two others, and no infinity may pass as a range.
    poison[i] = x * 0.0f + poison[i];
  };
  int64_t k = 0;
  for (; k + kAtOnce * kWidth <= depth; k += kAtOnce * kWidth)
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) look(load(input + k + i * kWidth), i);
  for (; k + kWidth <= depth; k += kWidth) look(load(input + k), 0);
  for (int i = 1; i < kAtOnce; ++i) {
    least[0] = vmin(least[i], least[0]);
    most[0] = vmax(most[i], most[0]);
    poison[0] += poison[i];
  }
  float first = -reduce_max(-least[0]), last = reduce_max(most[0]), bad = reduce_add(poison[0]);
  for (int64_t i = k; i < depth; ++i) {
    const float x = to_compute(input[i]);
    first = x < first ? x : first;
    last = larger(x, last);
    bad += x - x;
  }
  const float range = last - first;
  const float scale = range > 1e-30f ? kLevels / range : 0.0f;
  *low = first;
  *step = (range > 1e-30f ? range / kLevels : 0.0f) + bad;
  for (int64_t line = 0; line < depth; line += kLineBytes, bytes += step_bytes) {
    const int64_t here = depth - line < kLineBytes ? depth - line : kLineBytes;
    for (k = 0; k < here; k += kWidth) {
      const int64_t count = here - k < kWidth ? here - k : kWidth;
      const Vec<float> level = (load_n(input + line + k, count) - first) * scale;
      const Bytes byte = __builtin_convertvector(nearest(level), Bytes);
      if (count == kWidth) {
        *(Bytes*)(bytes + k) = byte;
      } else {
        for (int64_t i = 0; i < count; ++i) bytes[k + i] = byte[i];
        for (int64_t i = count; (line + k + i) % 4 != 0; ++i) bytes[k + i] = 0;
      }
    }
  }
}

CTXFAST_INLINE void put(float* p, Vec<float> v, int64_t n) { store_n(p, v, n); }
CTXFAST_INLINE void put(bfloat16* p, Vec<float> v, int64_t n) {
#if defined(CTXFAST_AVX512_BF16)
  _mm256_mask_storeu_epi16(p, lane_bits16(n), (__m256i)_mm512_cvtneps_pbh(v));
#else
  store_n(p, v, n);
#endif
}

// From the sums of a tile to its results.
template <typename Output, Activation kActivation>
void finish_tile(const LinearInt8Args& args, const int32_t* sums, int64_t stride, const float* low,
                 const float* step, int rows, int64_t column, int64_t columns, Output* output) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t at = column + c, left = columns - c;
    const Vec<float> scale = load_n(args.scales + at, left), sum = load_n(args.sums + at, left);
    const Vec<float> bias = args.bias == nullptr ? Vec<float>{} : load_n(args.bias + at, left);
    for (int r = 0; r < rows; ++r) {
      const Vec<int32_t> products =
          ByteProducts::load_words((const uint32_t*)sums + r * stride + c);
      const Vec<float> offset = low[r] * sum + bias;
      const Vec<float> y =
          __builtin_convertvector(products, Vec<float>) * (step[r] * scale) + offset;
      put(output + r * args.columns + at, activate<Output, kActivation>(y), left);
    }
  }
}

template <typename Output>
using FinishTile = void (*)(const LinearInt8Args&, const int32_t*, int64_t, const float*,
                            const float*, int, int64_t, int64_t, Output*);

template <typename Output>
FinishTile<Output> finish_for(Activation activation) {
  if (activation == kGelu) return finish_tile<Output, kGelu>;
  if (activation == kGeluTanh) return finish_tile<Output, kGeluTanh>;
  if (activation == kTanh) return finish_tile<Output, kTanh>;
  return finish_tile<Output, kNone>;
}

#if defined(CTXFAST_AMX)
constexpr int64_t kPieceSteps = 16;  // of half a panel: 32 KiB of the first cache level

// Rows [first, first + count), already quantised, by the panels [begin, end): blocks of two tiles
// of rows by halves of panels, or one tile of rows by panels.
template <typename Output>
void multiply_blocks(const LinearInt8Args& args, const Rows& rows, int64_t first, int64_t count,
                     int64_t begin, int64_t end, int32_t* sums) {
  const FinishTile<Output> finish = finish_for<Output>(args.activation);
  const int64_t words = (args.depth + 3) / 4,
                blocks = (count + kByteBlockRows - 1) / kByteBlockRows;
  const auto finish_block = [&](const int32_t* found, int64_t stride, int64_t row, int64_t column) {
    const int64_t left = args.columns - column, height = count - row;
    finish(args, found, stride, rows.low + row, rows.step + row,
           int(height < kByteBlockRows ? height : kByteBlockRows), column,
           left < stride ? left : stride,
           static_cast<Output*>(args.output) + (first + row) * args.columns);
  };
  const MatrixTiles tiles;
  alignas(64) char space[kByteStep];
  for (int64_t index = begin; index < end; ++index) {
    const BytePanel panel(args.panels + index * words * kBytePanelRow, words, space);
    const int64_t column = index * kPanel, steps = panel.count();
    if (rows.tiles == 1) {
      multiply_byte_row(reinterpret_cast<const char*>(rows.bytes), panel, sums);
      finish_block(sums, kPanel, 0, column);
      continue;
    }
    const int64_t halves = args.columns - column > kPanel / 2 ? 2 : 1;
    const int64_t pieces = (steps + kPieceSteps - 1) / kPieceSteps;
    const int64_t piece = (steps + pieces - 1) / pieces;
    for (int64_t half = 0; half < halves; ++half)
      for (int64_t from = 0; from < steps; from += piece) {
        const int64_t to = from + piece < steps ? from + piece : steps;
        const char* ahead = panel.steps + (steps + from) * kByteStep;  // of the next panel
        const int64_t lines =
            ((to - from) * kByteStep / kLineBytes + 2 * blocks - 1) / (2 * blocks);
        for (int64_t block = 0; block < blocks; ++block) {
          const char* left = reinterpret_cast<const char*>(rows.row(block * kByteBlockRows, words));
          int32_t* found = sums + block * kByteBlockRows * kByteBlockRows;
          if (half == 1)
            for (int64_t line = 0; line < 2 * lines; ++line, ahead += kLineBytes)
              __builtin_prefetch(ahead, 0, 2);
          multiply_byte_piece(left, panel, half, from, to, found);
          if (to == steps)
            finish_block(found, kByteBlockRows, block * kByteBlockRows, column + half * kPanel / 2);
        }
      }
  }
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

// Rows [first, first + count), already quantised, by the panels [begin, end).
template <typename Output>
void multiply(const LinearInt8Args& args, const Rows& rows, int64_t first, int64_t count,
              int64_t begin, int64_t end) {
  const FinishTile<Output> finish = finish_for<Output>(args.activation);
  const int64_t words = (args.depth + 3) / 4;
  alignas(64) int32_t sums[kTileRows * kPanel];
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * kPanel;
    const int64_t columns = args.columns - column < kPanel ? args.columns - column : kPanel;
    const int vectors = int((columns + kWidth - 1) / kWidth);
    const uint32_t* weight = (const uint32_t*)args.panels + panel * words * kPanel;
    for (int64_t row = 0; row < count;) {
      const int step = next_rows(count - row);
      for (int c = 0; c < vectors; c += kTileColumns) {
        const uint32_t* left = reinterpret_cast<const uint32_t*>(rows.bytes) + row * words;
        const Tile tile = {left, weight + c * kWidth, words, sums + c * kWidth};
        with_tile(step, vectors - c < kTileColumns ? vectors - c : kTileColumns, tile);
      }
      finish(args, sums, kPanel, rows.low + row, rows.step + row, step, column, columns,
             static_cast<Output*>(args.output) + (first + row) * args.columns);
      row += step;
    }
  }
}
#endif

// Tasks are blocks of rows, as equal as possible; too few blocks are divided among columns too, and
// their rows quantised once for each division.
struct Tasks {
  int64_t rows, blocks, panels, divisions;

  explicit Tasks(const LinearInt8Args& args) {
    const int64_t all = (args.columns + kPanel - 1) / kPanel, threads = args.threads;
    const int64_t fitting = kByteLimit / args.depth / kTaskRows * kTaskRows;
    const int64_t limit = fitting < kTaskRows   ? kTaskRows
                          : fitting > kRowLimit ? kRowLimit
                                                : fitting;
    blocks = (args.rows + limit - 1) / limit;
    if (args.rows >= threads * kEnoughRows) blocks = (blocks + threads - 1) / threads * threads;
    divisions = blocks < threads ? (threads + blocks - 1) / blocks : 1;
    if (divisions > all) divisions = all;
    rows = (args.rows + blocks - 1) / blocks;
    rows = (rows + kTaskRows - 1) / kTaskRows * kTaskRows;
    blocks = (args.rows + rows - 1) / rows;
    panels = (all + divisions - 1) / divisions;
  }
};

template <typename Input, typename Output>
Status run(const LinearInt8Args& args) {
  const Tasks tasks(args);
  const int64_t words = (args.depth + 3) / 4, all = (args.columns + kPanel - 1) / kPanel;
  int32_t failed = 0;
  parallel_for(args.threads, tasks.blocks * tasks.divisions, 1, [&](int64_t task, int64_t) {
    const int64_t first = task / tasks.divisions * tasks.rows;
    const int64_t count = args.rows - first < tasks.rows ? args.rows - first : tasks.rows;
#if defined(CTXFAST_AMX)
    const int64_t matrix_tiles = count <= kMatrixRows ? 1 : 2, steps = (words + 15) / 16;
    const int64_t row_bytes = tasks.rows * steps * kLineBytes;
    const int64_t sum_bytes = (tasks.rows + kMatrixRows) * kPanel * int64_t(sizeof(int32_t));
#else
    const int64_t matrix_tiles = 0, steps = 0, sum_bytes = 0;
    const int64_t row_bytes = tasks.rows * words * int64_t(sizeof(uint32_t));
#endif
    const int64_t scale_bytes = (2 * tasks.rows * int64_t(sizeof(float)) + 63) / 64 * 64;
    char* scratch = static_cast<char*>(thread_scratch(size_t(scale_bytes + sum_bytes + row_bytes)));
    if (scratch == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    float* scales = reinterpret_cast<float*>(scratch);
    const Rows rows = {reinterpret_cast<uint8_t*>(scratch + scale_bytes + sum_bytes), scales,
                       scales + tasks.rows, matrix_tiles, steps};
    for (int64_t row = 0; row < count; ++row)
      quantize_row(static_cast<const Input*>(args.input) + (first + row) * args.input_stride,
                   args.depth, rows.row(row, words), rows.step_bytes(), rows.low + row,
                   rows.step + row);
    const int64_t begin = task % tasks.divisions * tasks.panels;
    const int64_t end = begin + tasks.panels < all ? begin + tasks.panels : all;
#if defined(CTXFAST_AMX)
    multiply_blocks<Output>(args, rows, first, count, begin, end,
                            reinterpret_cast<int32_t*>(scratch + scale_bytes));
#else
    multiply<Output>(args, rows, first, count, begin, end);
#endif
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
