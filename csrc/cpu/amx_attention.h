// Attention forward of float on matrix tiles: both products run on the three bfloat16 parts of
// their operands (amx_pack.h). Keys and values are split once for a block of keys, queries and
// weights once for 32 rows; while the weights of some rows are computed, tiles multiply those of
// the rows before with the values and the queries of the rows behind with the keys.
//
// Rows and keys that three parts do not hold, infinities and numbers near the lower end of the
// range, are multiplied in float. So are values of no number, which must not reach rows that give
// them no weight.
#pragma once

#include "cpu/amx_stream.h"
#include "cpu/attention_attend.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

constexpr int64_t kSplitKeys = kLongestBlock / kSplitBlock;  // blocks of a block of keys, at most

struct SplitForwardWorkspace : ForwardWorkspace<float> {
  char *split_keys, *split_values, *split_queries, *weights[2];
  float *split_scores[2], *shown;
  int64_t value_bytes;  // of a block of columns of the values

  // From row to row of the scores: an odd number of lines spreads them over the sets of the first
  // cache level.
  static constexpr int64_t score_stride(int64_t columns) { return columns + 16; }

  SplitForwardWorkspace(void* memory, const AttentionSizes& sizes)
      : ForwardWorkspace<float>(memory, sizes) {
    char* start = static_cast<char*>(memory);
    Divider divider(start == nullptr ? nullptr : start + bytes);
    const int64_t key_blocks = sizes.block / kSplitBlock;
    const int64_t depth = round_up(sizes.width, kSplitStep);
    const int64_t steps = depth / kSplitStep;
    value_bytes = key_blocks * kSplitStepBytes<>;
    split_keys = divider.take<char>((key_blocks * steps + 1) * kSplitStepBytes<>);
    split_values = divider.take<char>((key_blocks * steps + 1) * kSplitStepBytes<>);
    split_queries = divider.take<char>((steps + 1) * kSplitStepBytes<>);
    shown = divider.take<float>(kSplitBlock * depth);
    for (int i = 0; i < 2; ++i) {
      weights[i] = divider.take<char>((key_blocks + 1) * kSplitStepBytes<>);
      split_scores[i] = divider.take<float>(kSplitBlock * score_stride(sizes.block));
    }
    bytes += divider.used();
  }
};

struct SplitAttend : Attend<float> {
  const SplitForwardWorkspace& split;
  const int64_t steps;                 // of the depth
  mutable float most_key[kSplitKeys];  // largest magnitudes of the blocks of keys at hand
  mutable bool values_fit[kSplitKeys];
  mutable bool whole_packed;  // whether they are packed as floats, too

  SplitAttend(const AttentionForwardArgs& args_, const AttentionSequence& sequence_, int64_t index_,
              int64_t head_, const SplitForwardWorkspace& work_)
      : Attend<float>(args_, sequence_, index_, head_, work_),
        split(work_),
        steps((depth + kSplitStep - 1) / kSplitStep) {}

  // Fewer rows or keys leave too much of the tiles empty.
  bool pays() const {
    constexpr int64_t kFewest = 192;
    return sequence.query_length >= kFewest && sequence.key_end - sequence.key_begin >= kFewest;
  }

  static constexpr float kTiny = 0x1p-80f;
  // Whether products of numbers up to these magnitudes are exact in three parts, or nearly so.
  static bool fits(float a, float b) {
    const bool tiny = a < kTiny || b < kTiny || a * b < kTiny;
    return a - a == 0 && b - b == 0 && (!tiny || a == 0 || b == 0);
  }
  static bool finite(const float* rows, int64_t stride, int64_t count, int64_t columns) {
    Vec<float> sum = {};
    for (int64_t row = 0; row < count; ++row)
      for (int64_t c = 0; c < columns; c += 16)
        sum += load_n(rows + row * stride + c, columns - c) * 0.0f;
    return reduce_add(sum) == 0;
  }

  // Rows of a block of keys: as they lie, or a copy where some are hidden.
  const float* shown_rows(const float* rows, int64_t* stride, int64_t first, int64_t count,
                          const RowFilter& filter) const {
    bool all = true;
    for (int64_t row = first; row < first + count && all; ++row) all = filter(row);
    if (all) return rows;
    const int64_t width = steps * kSplitStep;
    for (int64_t row = 0; row < count; ++row)
      for (int64_t c = 0; c < width; c += 16)
        store(split.shown + row * width + c,
              load_n(rows + row * *stride + c, filter(first + row) ? depth - c : 0));
    *stride = width;
    return split.shown;
  }

  // Keys and values [packed, packed_end). What a block of keys holds does not depend on the rows of
  // the task.
  void split_block(int64_t packed, int64_t packed_end) const {
    whole_packed = false;
    const RowFilter filter = terms.key_filter(packed, sequence.key_begin);
    for (int64_t first = 0; first < packed_end - packed; first += kSplitBlock) {
      const int64_t index = first / kSplitBlock;
      const int64_t count = smaller(kSplitBlock, packed_end - packed - first);
      const int64_t row = sequence.key_start + packed + first;
      int64_t stride = common.key_stride[2];
      const float* rows =
          shown_rows(rows_of(common.key, common.key_stride, row), &stride, first, count, filter);
      const SplitSource keys(rows, stride, 1);
      SplitColumns<> key_columns(keys);
      key_columns.begin(rows, rows, {count, depth}, steps,
                        split.split_keys + index * steps * kSplitStepBytes<>);
      key_columns.finish();
      most_key[index] = reduce_max(key_columns.largest());

      stride = common.value_stride[2];
      rows = shown_rows(rows_of(common.value, common.value_stride, row), &stride, first, count,
                        filter);
      const SplitSource values(rows, 1, stride);
      SplitColumns<> value_columns(values);
      for (int64_t step = 0; step < steps; ++step) {
        const float* from = values.block(step, 0);
        value_columns.begin(
            from, from, {depth - step * kSplitBlock, count}, 1,
            split.split_values + step * split.value_bytes + index * kSplitStepBytes<>);
        value_columns.finish();
      }
      const float most = reduce_max(value_columns.largest());
      values_fit[index] = fits(most, 1) && finite(rows, stride, count, depth);
    }
  }

  struct SplitStep : Step {
    int64_t key0, from, columns;  // as in attend_rows; whole blocks
    float factors[kSplitBlock];
  };

  // The first step from *row on that meets the keys at hand and whose numbers fit, its queries
  // packed. Others that meet them are done at once.
  bool next_step(int64_t* row, int64_t begin, int64_t end, int64_t packed, int64_t packed_end,
                 SplitStep* found) const {
    for (; *row < end; *row += kSplitBlock) {
      const Step step(*this, begin, *row, smaller(*row + kSplitBlock, end), packed);
      if (!step.meets(packed, block)) continue;
      static_cast<Step&>(*found) = step;
      found->from = greater(step.range.begin - packed, 0) / kSplitBlock * kSplitBlock;
      found->columns =
          round_up(smaller(step.range.end, packed_end) - packed, kSplitBlock) - found->from;
      found->key0 = packed + found->from;
      if (!pack_queries(*found)) {
        attend_in_float(step, packed, packed_end);
        continue;
      }
      *row += kSplitBlock;
      return true;
    }
    return false;
  }

  bool pack_queries(const SplitStep& step) const {
    const SplitSource queries(
        rows_of(common.query, common.query_stride, sequence.query_start + step.begin),
        common.query_stride[2], 1);
    Vec<float> largest = {};
    for (int64_t k = 0; k < steps; ++k)
      largest = pack_row_step<>(queries, queries.block(0, k * kSplitStep),
                                {step.rows, depth - k * kSplitStep},
                                split.split_queries + k * kSplitStepBytes<>, largest);
    const float most = reduce_max(largest);
    bool all = true;
    for (int64_t j = step.from / kSplitBlock; j < (step.from + step.columns) / kSplitBlock; ++j)
      all = all && values_fit[j] && fits(most, most_key[j]);
    return all;
  }

  void attend_in_float(const Step& step, int64_t packed, int64_t packed_end) const {
    if (!whole_packed) pack_block(packed, packed_end, sequence.key_begin);
    whole_packed = true;
    for (int64_t r = 0; r < step.rows; r += kForwardStep<float>)
      attend_rows(step.part(r, kForwardStep<float>), packed, packed_end);
  }

  SplitJob scores_job(const SplitStep& step, float* scores) const {
    const int64_t block_bytes = steps * kSplitStepBytes<>;
    return {split.split_queries,
            split.split_keys + step.from / kSplitBlock * block_bytes,
            block_bytes,
            steps,
            step.columns / kSplitBlock,
            scores,
            split.score_stride(step.columns),
            true};
  }
  SplitJob values_job(const SplitStep& step, const char* weights) const {
    return {weights,
            split.split_values + step.from / kSplitBlock * kSplitStepBytes<>,
            split.value_bytes,
            step.columns / kSplitBlock,
            steps,
            work.state + step.slot * state_width,
            state_width,
            step.starts};
  }

  // The parts of the weights of 32 keys, as a row of each tile.
  static CTXFAST_INLINE void store_parts(char* out, Vec<float> x, Vec<float> y) {
    using Bits = VecOf<float>::bits;
    const Bits upper = Bits{} + 0xffff0000u;
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part, out += kSplitPartBytes) {
      const Bits low = (Bits)x & upper, high = (Bits)y & upper;
      *reinterpret_cast<Bits*>(out) = low >> 16 | high;
      x -= (Vec<float>)low;
      y -= (Vec<float>)high;
    }
    // Below the normal range a last part has bits that bfloat16 does not hold.
    *reinterpret_cast<Bits*>(out) = (Bits)x >> 16 | ((Bits)y & upper);
  }

  // As `weigh`, with the parts of the weights from `out` on.
  CTXFAST_INLINE float weigh_row(const float* scores, int64_t columns, RowLevel row, int64_t i,
                                 int64_t key0, char* out, SplitStream* stream) const {
    Vec<float> sum = {};
    uint64_t kept = 0;
    for (int64_t j = 0; j < columns; j += kSplitBlock, out += kSplitStepBytes<>) {
      Vec<float> x = split_weight(load(scores + j) * row.factor - row.level);
      Vec<float> y = split_weight(load(scores + j + 16) * row.factor - row.level);
      sum += x;
      sum += y;
      if (dropout.threshold != 0) {
        const int64_t key = key0 + j;
        if (j == 0 || key % 64 == 0)
          kept = kept_columns(dropout.seed, dropout.threshold, key / 64, i, dropout.head,
                              dropout.sequence);
        x = keep_lanes(x, kept >> (key % 64));
        y = keep_lanes(y, kept >> (key % 64 + 16));
      }
      store_parts(out, x, y);
      stream->advance(1);
    }
    return reduce_add(sum);
  }

  // 2^x for x <= 0 (or NaN)
  static CTXFAST_INLINE Vec<float> split_weight(Vec<float> x) {
    // Minimax for the relative error with p(0) = 1 (Remez exchange).
    constexpr float kCoefficients[] = {
        1.0f,           0.6931470444f,   0.2402293055f, 0.05548528062f, 0.009675451578f,
        0.00124678462f, 0.0002161291617f};
    return exp2_by_scaling(kCoefficients, x);
  }

  // Scores into weights, while the stream runs.
  CTXFAST_NOINLINE void weigh_rows(SplitStep* step, float* scores, char* weights,
                                   SplitStream* stream) const {
    const int64_t stride = split.score_stride(step->columns);
    for (int64_t r = 0; r < step->rows; ++r, scores += stride) {
      if (prefetches) prefetch(step->begin + r);
      const RowLevel row = open_row(*step, r, scores, step->key0, step->columns);
      char* out = weights + r / 16 * kTileBytes + r % 16 * 64;
      close_row(*step, r,
                weigh_row(scores, step->columns, row, step->begin + r, step->key0, out, stream));
      if (step->starts) continue;
      float* state = work.state + (step->slot + r) * state_width;
      for (int64_t c = 0; c < state_width; c += 16)
        store(state + c, load(state + c) * work.rescale[r]);
    }
    if (step->ends) finish_rows(*step, step->factors);
  }

  void write_rows(const SplitStep& step) const {
    if (!step.ends) return;
    const float* state = work.state + step.slot * state_width;
    for (int64_t r = 0; r < step.rows; ++r, state += state_width) {
      float* output = output_row(step.begin + r);
      for (int64_t c = 0; c < depth; c += 16)
        store_n(output + c, load(state + c) * step.factors[r], depth - c);
    }
  }

  void attend_block(int64_t begin, int64_t end, int64_t packed, int64_t packed_end) const {
    SplitStep ring[3];  // rows whose values, weights and scores are computed
    int64_t row = begin;
    bool more = next_step(&row, begin, end, packed, packed_end, &ring[0]);
    if (!more) return;
    {
      SplitStream stream;
      stream.add(scores_job(ring[0], split.split_scores[0]));
      stream.start(1);
      stream.finish();
    }
    for (int64_t n = 0; more; ++n) {
      SplitStep *before = &ring[(n + 2) % 3], *now = &ring[n % 3], *next = &ring[(n + 1) % 3];
      more = next_step(&row, begin, end, packed, packed_end, next);
      SplitStream stream;
      if (n > 0) stream.add(values_job(*before, split.weights[(n + 1) % 2]));
      if (more) stream.add(scores_job(*next, split.split_scores[(n + 1) % 2]));
      stream.start(now->rows * (now->columns / kSplitBlock));
      weigh_rows(now, split.split_scores[n % 2], split.weights[n % 2], &stream);
      stream.finish();
      if (n > 0) write_rows(*before);
      if (more) continue;
      SplitStream last;
      last.add(values_job(*now, split.weights[n % 2]));
      last.start(1);
      last.finish();
      write_rows(*now);
    }
  }

  void run(int64_t begin, int64_t end) const {
    if (!pays()) return Attend<float>::run(begin, end);
    const int64_t low = key_range(common, sequence, begin).begin;
    const int64_t high = key_range(common, sequence, end - 1).end;
    clear_idle_rows(begin, end, kSplitBlock);
    for (int64_t first = low / block * block; first < high; first += block) {
      const int64_t packed = greater(first, low / 64 * 64);
      const int64_t packed_end =
          smaller(first + block, smaller(round_up(high, kSplitBlock), sequence.key_end));
      split_block(packed, packed_end);
      attend_block(begin, end, packed, packed_end);
    }
  }
};

CTXFAST_NAMESPACE_END

#endif
