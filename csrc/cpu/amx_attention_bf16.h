// Attention forward of bfloat16 on matrix tiles, in cells of 32 query rows and 64 keys, whose
// scores and weights stay in the first cache level. Three cells are under way: while vector units
// turn the scores of one into weights, tiles multiply the weights of the cell before with its
// values and the queries of the next with its keys. The next may be of another head or sequence.
//
// A row's level, which is subtracted from its scores, need not be its largest score, only near it:
// the first cell sets it, and it rises when weights become large.
#pragma once

#include "cpu/amx_product_stream.h"
#include "cpu/attention_attend.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

constexpr int64_t kCellRows = 32, kCellKeys = 64;

struct CellWorkspace : ForwardWorkspace<bfloat16> {
  float *cell_scores[2], *cell_state, *sums;  // state and sums of kForwardKeptRows rows
  char *cell_weights[2], *cell_queries;

  CellWorkspace(void* memory, const AttentionSizes& sizes)
      : ForwardWorkspace<bfloat16>(memory, sizes) {
    char* start = static_cast<char*>(memory);
    Divider divider(start == nullptr ? nullptr : start + bytes);
    for (int i = 0; i < 2; ++i) {
      cell_scores[i] = divider.take<float>(kCellRows * kCellKeys);
      cell_weights[i] = divider.take<char>(kCellKeys / 32 * kTileStep);
    }
    cell_queries = divider.take<char>(sizes.words / 16 * kTileStep);
    cell_state = divider.take<float>(kForwardKeptRows<bfloat16> * sizes.width);
    sums = divider.take<float>(kForwardKeptRows<bfloat16> * 16);
    bytes += divider.used();
  }
};

using CellAttend = Attend<bfloat16>;

// The rows of a step and the keys at hand, [packed, packed_end).
struct CellRow {
  const CellAttend* rows;
  CellAttend::Step step;
  int64_t packed, packed_end;
  bool first;  // of these keys
};

// The keys [packed + from, packed + from + columns) of a row of cells; whole steps of a product.
struct Cell {
  const CellRow* row = nullptr;  // nullptr: none
  int64_t from, columns;
  bool first, last;  // of the row

  int64_t key0() const { return row->packed + from; }
  bool starts() const { return first && row->step.starts; }
  bool ends() const { return last && row->step.ends; }
};

// The cells of a thread's work items. Nothing here is copied: a wide copy of what was just written
// waits for the store buffer, which waits for the tiles.
class CellPipeline {
 public:
  explicit CellPipeline(const CellWorkspace& work) : work_(work) {}

  // Query rows [begin, end) of a (sequence, head).
  void run(const AttentionForwardArgs& args, const AttentionSequence& sequence, int64_t index,
           int64_t head, int64_t begin, int64_t end) {
    if (sequence.key_length <= kFewKeys) {
      finish();
      return CellAttend(args, sequence, index, head, work_).run(begin, end);
    }
    void* place = places_[item_ % kUnderWay];
    const int64_t cells = cell_;
    const CellAttend& rows = *new (place) CellAttend(args, sequence, index, head, work_);
    const int64_t low = key_range(rows.common, sequence, begin).begin;
    const int64_t high = key_range(rows.common, sequence, end - 1).end;
    rows.clear_idle_rows(begin, end, kCellRows);
    for (int64_t first = low / rows.block * rows.block; first < high; first += rows.block) {
      const int64_t packed = greater(first, low / kCellKeys * kCellKeys);
      const int64_t packed_end = smaller(first + rows.block, high);
      bool opens = true;
      rows.pack_keys(packed, packed_end, low);
      for (int64_t i = begin; i < end; i += kCellRows) {
        CellRow& row = rows_[row_ % kUnderWay];
        new (&row.step) CellAttend::Step(rows, begin, i, smaller(i + kCellRows, end), packed);
        if (!row.step.meets(packed, rows.block)) continue;
        row.rows = &rows;
        row.packed = packed;
        row.packed_end = packed_end;
        row.first = opens;
        opens = false;
        push_row(row);
      }
    }
    if (cell_ != cells) ++item_;
  }

  // Brings all cells to their end.
  void finish() {
    for (; idle_ < 2; ++idle_) {
      cells_[cell_ % kUnderWay].row = nullptr;
      push();
    }
  }

 private:
  static constexpr int kUnderWay = 3;      // cells, and so rows of cells and items
  static constexpr int64_t kFewKeys = 48;  // whose cells would be nearly empty
  const CellWorkspace& work_;
  alignas(CellAttend) char places_[kUnderWay][sizeof(CellAttend)];
  CellRow rows_[kUnderWay];
  Cell cells_[kUnderWay];
  int64_t item_ = 0, row_ = 0, cell_ = 0;  // what comes next
  int idle_ = 2;                           // cells that were pushed last and are none
  uint32_t raised_ = 0;  // rows of the cell whose state is to be multiplied with rescale

  void push_row(CellRow& row) {
    // What is kept of rows that are done at once is in use for two more cells.
    if (row.step.starts && row.step.ends)
      row.step.slot = kForwardRowLimit<bfloat16> + row_ % kUnderWay * kCellRows;
    const int64_t from = greater(row.step.range.begin - row.packed, 0) / 32 * 32;
    const int64_t to = round_up(smaller(row.step.range.end, row.packed_end) - row.packed, 32);
    pack_queries(*row.rows, row.step);
    for (int64_t key = from; key < to;) {
      const int64_t next = smaller(round_up(key + 1, kCellKeys), to);
      Cell& cell = cells_[cell_ % kUnderWay];
      cell.row = &row;
      cell.from = key;
      cell.columns = next - key;
      cell.first = key == from;
      cell.last = next == to;
      push();
      idle_ = 0;
      key = next;
    }
    ++row_;
  }

  void pack_queries(const CellAttend& rows, const CellAttend::Step& step) const {
    const bfloat16* query = rows.rows_of(rows.common.query, rows.common.query_stride,
                                         rows.sequence.query_start + step.begin);
    char* to = work_.cell_queries;
    for (int64_t r = 0; r < step.rows;
         ++r, query += rows.common.query_stride[2], to += kMatrixBytes) {
      if (rows.prefetches) rows.prefetch(step.begin + r);
      for (int64_t k = 0; k < rows.words; k += 16)
        store(reinterpret_cast<float*>(to + k / 16 * kTileStep), load_row(query, k, rows.depth));
    }
  }

  float* state_of(const Cell& cell) const {
    return work_.cell_state + cell.row->step.slot * cell.row->rows->width;
  }

  ProductJob scores_job(const Cell& cell) const {
    const CellAttend& rows = *cell.row->rows;
    const int64_t tile_column = rows.words * kMatrixBytes;
    ProductJob job;
    job.a = work_.cell_queries;
    job.b = reinterpret_cast<const char*>(work_.keys) + cell.from / 16 * tile_column;
    job.b_row = kMatrixBytes;
    job.b_step = kTileBytes;
    job.b_column = tile_column;
    job.steps = rows.words / 16;
    job.columns = cell.columns / 16;
    job.c = reinterpret_cast<char*>(work_.cell_scores[cell_ % 2]);
    job.c_row = kCellKeys * 4;
    job.starts = true;
    return job;
  }
  ProductJob values_job(const Cell& cell) const {
    const int64_t row_bytes = cell.row->rows->width * 4;
    ProductJob job;
    job.a = work_.cell_weights[cell_ % 2];
    job.b = reinterpret_cast<const char*>(work_.values) + cell.from / 2 * row_bytes;
    job.b_row = row_bytes;
    job.b_step = kMatrixRows * row_bytes;
    job.b_column = kMatrixBytes;
    job.steps = cell.columns / 32;
    job.columns = cell.row->rows->width / 16;
    job.c = reinterpret_cast<char*>(state_of(cell));
    job.c_row = row_bytes;
    job.starts = cell.starts();
    return job;
  }

  // Takes up the next cell, and every other one further.
  void push() {
    const Cell &next = cells_[cell_ % kUnderWay], &now = cells_[(cell_ + 2) % kUnderWay];
    const Cell& before = cells_[(cell_ + 1) % kUnderWay];
    ProductJobs jobs;
    if (next.row != nullptr) jobs.add(scores_job(next));
    if (before.row != nullptr) {
      if (before.first) show_values(before);
      jobs.add(values_job(before));
    }
    if (now.row != nullptr)
      weigh(now, jobs);
    else
      ProductStream(jobs, 1).finish();
    if (raised_ != 0) rescale_state(now);
    if (before.row != nullptr && before.ends()) write_rows(before);
    ++cell_;
  }

  void show_values(const Cell& cell) const {
    const CellRow& row = *cell.row;
    if (row.first) row.rows->shown_values = 0;
    row.rows->show_values(row.step, cell.from, row.packed, row.packed_end);
  }

  // Scores into weights, while the stream runs.
  void weigh(const Cell& cell, const ProductJobs& jobs) {
    const CellAttend& rows = *cell.row->rows;
    const CellAttend::Step& step = cell.row->step;
    const KeyRange first = key_range(rows.common, rows.sequence, step.begin);
    const KeyRange last = key_range(rows.common, rows.sequence, step.begin + step.rows - 1);
    const bool whole = last.begin <= cell.key0() && first.end >= cell.key0() + cell.columns;
    if (whole && !rows.terms.any && rows.dropout.threshold == 0)
      weigh_rows<false>(cell, jobs);
    else
      weigh_rows<true>(cell, jobs);
  }

  // kAny: with whatever else there is to do for a row
  template <bool kAny>
  CTXFAST_NOINLINE void weigh_rows(const Cell& cell, const ProductJobs& jobs) {
    const CellAttend& rows = *cell.row->rows;
    const CellAttend::Step& step = cell.row->step;
    const int64_t slot = step.slot, count = step.rows, columns = cell.columns;
    const bool starts = cell.starts();
    const float factor = kAny && rows.terms.any ? 1.0f : rows.factor;
    ProductStream stream(jobs, count);
    float* scores = work_.cell_scores[(cell_ + 1) % 2];
    char* weights = work_.cell_weights[(cell_ + 1) % 2];
    for (int64_t r = 0; r < count; ++r, scores += kCellKeys, weights += kMatrixBytes) {
      uint64_t kept = ~uint64_t{0};
      if constexpr (kAny) kept = ready_row(cell, r, scores);
      float* level = work_.maximum + slot + r;
      if (starts || *level == kUnset) *level = row_maximum(scores, columns) * factor;
      float* sum = work_.sums + (slot + r) * 16;
      Vec<float> part = weigh_row<kAny>(scores, columns, factor, *level, kept, weights);
      if (_mm512_cmp_ps_mask(part, splat<float>(kMostPart), _CMP_NLT_UQ) != 0)
        part = weigh_again<kAny>(cell, r, scores, factor, kept, weights);
      store(sum, starts ? part : load(sum) + part);
      stream.advance();
    }
    stream.finish();
  }

  static constexpr float kUnset = -__builtin_huge_valf();  // of a row that has met no key yet
  // Weights up to this cost no accuracy, and leave values of any size to be multiplied.
  static constexpr float kMostPart = 65536.0f;

  // Applies everything to a row of scores that stands between a product and a weight; returns which
  // keys dropout keeps.
  uint64_t ready_row(const Cell& cell, int64_t r, float* scores) const {
    const CellAttend& rows = *cell.row->rows;
    const int64_t i = cell.row->step.begin + r, key0 = cell.key0(), columns = cell.columns;
    if (rows.terms.any)
      apply_terms<float>(rows.terms, i, rows.factor, key0, key0, key0 + columns,
                         rows.sequence.key_length, scores);
    const KeyRange range = key_range(rows.common, rows.sequence, i);
    fill_outside<float>(scores, range.begin - key0, range.end - key0, columns, kUnset);
    if (rows.dropout.threshold == 0) return ~uint64_t{0};
    return kept_columns(rows.dropout.seed, rows.dropout.threshold, key0 / 64, i, rows.dropout.head,
                        rows.dropout.sequence) >>
           (key0 % 64);
  }

  // The weights of a row, in pieces of 32 keys; returns their sum, lane by lane.
  template <bool kDrops>
  static CTXFAST_INLINE Vec<float> weigh_row(const float* scores, int64_t columns, float factor,
                                             float level, uint64_t kept, char* out) {
    Vec<float> sum = {};
    const float base = level == kUnset ? 0.0f : level;
#pragma GCC unroll 2
    for (int64_t j = 0; j < columns; j += 32, out += kTileStep) {
      Vec<float> x = weight_of<bfloat16>(load(scores + j) * factor - base);
      Vec<float> y = weight_of<bfloat16>(load(scores + j + 16) * factor - base);
      sum += x;
      sum += y;
      if constexpr (kDrops) {
        x = keep_lanes(x, kept >> j);
        y = keep_lanes(y, kept >> (j + 16));
      }
      _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(y, x));
    }
    return sum;
  }

  // Raises the level of a row whose weights have become large, or are not finite.
  template <bool kDrops>
  CTXFAST_NOINLINE Vec<float> weigh_again(const Cell& cell, int64_t r, const float* scores,
                                          float factor, uint64_t kept, char* out) {
    const int64_t row = cell.row->step.slot + r;
    float* level = work_.maximum + row;
    const float peak = row_maximum(scores, cell.columns) * factor;
    if (peak > *level) {
      work_.rescale[r] = exp2_nonpositive<false>(splat<float>(*level - peak))[0];
      float* sum = work_.sums + row * 16;
      store(sum, load(sum) * work_.rescale[r]);
      raised_ |= uint32_t{1} << r;
      *level = peak;
    }
    return weigh_row<kDrops>(scores, cell.columns, factor, *level, kept, out);
  }

  void rescale_state(const Cell& cell) {
    const int64_t width = cell.row->rows->width;
    for (; raised_ != 0; raised_ &= raised_ - 1) {
      const int r = __builtin_ctz(raised_);
      float* state = state_of(cell) + r * width;
      for (int64_t c = 0; c < width; c += 16) store(state + c, load(state + c) * work_.rescale[r]);
    }
  }

  void write_rows(const Cell& cell) const {
    const CellAttend& rows = *cell.row->rows;
    const CellAttend::Step& step = cell.row->step;
    float factors[kCellRows];
    for (int64_t r = 0; r < step.rows; ++r)
      work_.sum[step.slot + r] = reduce_add(load(work_.sums + (step.slot + r) * 16));
    rows.finish_rows(step, factors);
    const float* state = state_of(cell);
    for (int64_t r = 0; r < step.rows; ++r, state += rows.width) {
      bfloat16* output = rows.output_row(step.begin + r);
      for (int64_t c = 0; c < rows.depth; c += 16)
        store_rounded(output + c, load(state + c) * factors[r], rows.depth - c);
    }
  }
};

CTXFAST_NAMESPACE_END

#endif
