// A linear layer on 8-bit integers with dynamic quantisation of its input, vector by vector as in
// Dettmers et al., "LLM.int8()" (2022), but over the whole range of a row: activations behind a
// GELU are hardly ever negative.
//
// A task quantises a block of rows into scratch memory, where they stay in the second cache level,
// and multiplies them by one panel of 64 output columns after another. The integer sums of a tile
// are scaled, and take bias and activation, before they leave the first cache level.
#include "cpu/linear_int8.h"

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

constexpr int64_t kPanel = 64;           // columns
constexpr int64_t kRowLimit = 384;       // rows of a task, at most
constexpr int64_t kByteLimit = 1 << 19;  // of its rows: half of the second cache level
constexpr int64_t kEnoughRows = 48;      // of a task that reads all of the weight
constexpr float kLevels = 255.0f;        // steps of an unsigned byte
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

// What a task multiplies: rows of bytes, and what brings their products back to scale.
struct Rows {
  uint32_t* words;  // [rows, depth / 4 rounded up]
  float *low, *step;
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

template <typename Input>
CTXFAST_INLINE void quantize_row(const Input* input, int64_t depth, uint8_t* bytes, float* low,
                                 float* step) {
  Vec<float> least = splat(to_compute(input[0])), most = least, poison = {};
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    const Vec<float> x = load(input + k);
    least = vmin(x, least);
    most = vmax(x, most);
    poison =
        x * 0.0f + poison;  // a NaN may escape the two others, and no infinity may pass as a range
  }
  float first = -reduce_max(-least), last = reduce_max(most), bad = reduce_add(poison);
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
  for (k = 0; k < depth; k += kWidth) {
    const Vec<float> level = (load_n(input + k, depth - k) - first) * scale;
    const Bytes byte = __builtin_convertvector(nearest(level), Bytes);
    const int64_t count = depth - k < kWidth ? depth - k : kWidth;
    if (count == kWidth) {
      *(Bytes*)(bytes + k) = byte;
    } else {
      for (int64_t i = 0; i < count; ++i) bytes[k + i] = byte[i];
    }
  }
  for (; depth % 4 != 0; ++depth) bytes[depth] = 0;
}

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

CTXFAST_INLINE void put(float* p, Vec<float> v, int64_t n) { store_n(p, v, n); }
CTXFAST_INLINE void put(bfloat16* p, Vec<float> v, int64_t n) {
#if defined(CTXFAST_AVX512_BF16)
  _mm256_mask_storeu_epi16(p, lane_bits16(n), (__m256i)_mm512_cvtneps_pbh(v));
#else
  store_n(p, v, n);
#endif
}

// From the sums [rows, kPanel] of a tile to its results.
template <typename Output, Activation kActivation>
void finish_tile(const LinearInt8Args& args, const int32_t* sums, const float* low,
                 const float* step, int rows, int64_t column, int64_t columns, Output* output) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t at = column + c, left = columns - c;
    const Vec<float> scale = load_n(args.scales + at, left), sum = load_n(args.sums + at, left);
    const Vec<float> bias = args.bias == nullptr ? Vec<float>{} : load_n(args.bias + at, left);
    for (int r = 0; r < rows; ++r) {
      const Vec<int32_t> products =
          ByteProducts::load_words((const uint32_t*)sums + r * kPanel + c);
      const Vec<float> offset = low[r] * sum + bias;
      const Vec<float> y =
          __builtin_convertvector(products, Vec<float>) * (step[r] * scale) + offset;
      put(output + r * args.columns + at, activate<Output, kActivation>(y), left);
    }
  }
}

template <typename Output>
using FinishTile = void (*)(const LinearInt8Args&, const int32_t*, const float*, const float*, int,
                            int64_t, int64_t, Output*);

template <typename Output>
FinishTile<Output> finish_for(Activation activation) {
  if (activation == kGelu) return finish_tile<Output, kGelu>;
  if (activation == kGeluTanh) return finish_tile<Output, kGeluTanh>;
  if (activation == kTanh) return finish_tile<Output, kTanh>;
  return finish_tile<Output, kNone>;
}

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
        const Tile tile = {rows.words + row * words, weight + c * kWidth, words, sums + c * kWidth};
        with_tile(step, vectors - c < kTileColumns ? vectors - c : kTileColumns, tile);
      }
      finish(args, sums, rows.low + row, rows.step + row, step, column, columns,
             static_cast<Output*>(args.output) + (first + row) * args.columns);
      row += step;
    }
  }
}

// Tasks are blocks of rows, as equal as possible; too few blocks are divided among columns too, and
// their rows quantised once for each division.
struct Tasks {
  int64_t rows, blocks, panels, divisions;

  explicit Tasks(const LinearInt8Args& args) {
    const int64_t all = (args.columns + kPanel - 1) / kPanel, threads = args.threads;
    const int64_t fitting = kByteLimit / args.depth / kTileRows * kTileRows;
    const int64_t limit = fitting < kTileRows   ? kTileRows
                          : fitting > kRowLimit ? kRowLimit
                                                : fitting;
    blocks = (args.rows + limit - 1) / limit;
    if (args.rows >= threads * kEnoughRows) blocks = (blocks + threads - 1) / threads * threads;
    divisions = blocks < threads ? (threads + blocks - 1) / blocks : 1;
    if (divisions > all) divisions = all;
    rows = (args.rows + blocks - 1) / blocks;
    rows = (rows + kTileRows - 1) / kTileRows * kTileRows;
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
    float* scratch =
        static_cast<float*>(thread_scratch(tasks.rows * (words + 2) * sizeof(uint32_t)));
    if (scratch == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    const Rows rows = {reinterpret_cast<uint32_t*>(scratch + 2 * tasks.rows), scratch,
                       scratch + tasks.rows};
    const int64_t first = task / tasks.divisions * tasks.rows;
    const int64_t count = args.rows - first < tasks.rows ? args.rows - first : tasks.rows;
    for (int64_t row = 0; row < count; ++row)
      quantize_row(static_cast<const Input*>(args.input) + (first + row) * args.input_stride,
                   args.depth, reinterpret_cast<uint8_t*>(rows.words + row * words), rows.low + row,
                   rows.step + row);
    const int64_t begin = task % tasks.divisions * tasks.panels, end = begin + tasks.panels;
    multiply<Output>(args, rows, first, count, begin, end < all ? end : all);
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
