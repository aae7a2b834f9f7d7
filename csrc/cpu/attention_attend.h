// Attention forward of a range of query rows of one (sequence, head): through the keys in blocks
// that fit the second cache level. Keys are packed transposed, values by rows; for a few query rows
// at a time the scores are computed, turned into weights and multiplied with the values. One block
// of keys needs no running state: the output is written once. Short sequences spend as long waiting
// for their rows as computing: rows that a product can read where they lie are not copied, and
// those of the next head are prefetched.
#pragma once

#include "cpu/attention_apart.h"
#include "cpu/attention_workspace.h"

CTXFAST_NAMESPACE_BEGIN

template <typename Storage>
struct Attend {
  using T = Compute<Storage>;
  using Word = WordOf<Storage>;
  static constexpr int kPack = Arithmetic<Storage>::kPack;
  static constexpr bool kPlain = kWordIsElement<Storage>;

  // In memory that is there; those of <new> would be shared by all instruction sets.
  static void* operator new(size_t, void* place) { return place; }

  const AttentionForwardArgs& args;
  const AttentionArgs& common;
  const AttentionSequence& sequence;
  const int64_t index, head;  // of the sequence
  const ForwardWorkspace<Storage>& work;
  const int64_t depth, words, width, state_width, block;
  const ScoreTerms terms;
  const DropoutRow dropout;
  const T factor;
  const bool prefetches;
  mutable const Word* values;  // of the keys at hand, and the words from one row to the next
  mutable int64_t value_row;
  mutable int64_t shown_values;          // how many of them are packed, where a word is a pair
  mutable int64_t alone = -1;            // the row that is attended without neighbours
  mutable uint8_t shown[kLongestBlock];  // the keys of the block at hand that it attends

  Attend(const AttentionForwardArgs& args_, const AttentionSequence& sequence_, int64_t index_,
         int64_t head_, const ForwardWorkspace<Storage>& work_)
      : args(args_),
        common(args_.common),
        sequence(sequence_),
        index(index_),
        head(head_),
        work(work_),
        depth(common.head_dim),
        words(words_of<Storage>(depth)),
        width(round_up(depth, kLanes<T>)),
        state_width(forward_state_width<Storage>(depth)),
        block(keys_per_block(depth)),
        terms(common, index_, head_, sequence_.holes),
        dropout{common.seed, common.dropout_threshold, head_, index_},
        factor(T(common.scale * kLog2E)),
        prefetches(sequence_.key_length <= kPrefetchedKeys<Storage> &&
                   head_ + 1 < args_.common.heads) {}

  // Row i of the next head, as a query and as a key.
  void prefetch(int64_t i) const {
    const int64_t bytes = depth * int64_t(sizeof(Storage));
    const auto next = [&](const void* base, const int64_t (&stride)[3], int64_t row) {
      prefetch_bytes(rows_of(base, stride, row) + stride[1], bytes);
    };
    next(common.query, common.query_stride, sequence.query_start + i);
    if (i >= sequence.key_length) return;
    next(common.key, common.key_stride, sequence.key_start + i);
    next(common.value, common.value_stride, sequence.key_start + i);
  }

  const Storage* rows_of(const void* base, const int64_t (&stride)[3], int64_t row) const {
    return static_cast<const Storage*>(base) + index * stride[0] + head * stride[1] +
           row * stride[2];
  }
  Storage* output_row(int64_t i) const {
    return static_cast<Storage*>(args.output) + index * args.output_stride[0] +
           head * args.output_stride[1] + (sequence.query_start + i) * args.output_stride[2];
  }
  T* lse_of(int64_t i) const {
    return static_cast<T*>(args.lse) + index * args.lse_stride[0] + head * args.lse_stride[1] +
           sequence.query_start + i;
  }

  void clear_rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      __builtin_memset(output_row(i), 0, depth * sizeof(Storage));
      *lse_of(i) = -T(__builtin_huge_val());
    }
  }

  // What rows [begin, end) of the piece that starts at row `origin` have to do with a block of
  // keys.
  struct Step {
    int64_t origin, begin, rows;
    KeyRange range;     // keys that some row attends
    bool starts, ends;  // with this block of keys
    int64_t slot;       // of what is kept of the rows; nothing is of rows that are done at once

    Step() = default;
    static void* operator new(size_t, void* place) { return place; }
    Step(const Attend& attend, int64_t origin_, int64_t begin_, int64_t end, int64_t packed)
        : origin(origin_), begin(begin_), rows(end - begin_) {
      range = {key_range(attend.common, attend.sequence, begin).begin,
               key_range(attend.common, attend.sequence, end - 1).end};
      starts = packed / attend.block == range.begin / attend.block;
      ends = packed / attend.block == (range.end - 1) / attend.block;
      slot = starts && ends ? 0 : begin - origin;
    }
    bool meets(int64_t packed, int64_t block) const {
      return range.begin < range.end && packed / block >= range.begin / block &&
             packed / block <= (range.end - 1) / block;
    }
    // The rows from `first` on, at most `count`.
    Step part(int64_t first, int64_t count) const {
      Step some = *this;
      some.begin += first;
      some.rows = smaller(count, rows - first);
      some.slot = starts && ends ? 0 : slot + first;
      return some;
    }
  };

  struct RowLevel {
    T factor, level;  // weights are 2^(factor s - level)
  };

  // The scores of row r of a step made ready to be weighed; what earlier blocks have left of the
  // row is multiplied with rescale[r] from now on.
  CTXFAST_INLINE RowLevel open_row(const Step& step, int64_t r, T* scores, int64_t key0,
                                   int64_t columns) const {
    const int64_t i = step.begin + r;
    const T minus_infinity = -T(__builtin_huge_val());
    const KeyRange range = key_range(common, sequence, i);
    T f = factor;
    if (terms.any) {
      apply_terms<T>(terms, i, factor, key0, key0, key0 + columns, sequence.key_length, scores);
      f = T(1);
    }
    fill_outside<T>(scores, range.begin - key0, range.end - key0, columns, minus_infinity);
    T* maximum = work.maximum + step.slot + r;
    T peak = row_maximum(scores, columns) * f;
    if (!step.starts) peak = peak < *maximum ? *maximum : peak;
    // A row that has met no key yet has maximum -inf; 0 keeps its weights at 2^-inf = 0.
    const T level = peak == minus_infinity ? T(0) : peak;
    if (!step.starts) work.rescale[r] = exp2_nonpositive<false>(splat<T>(*maximum - level))[0];
    *maximum = peak;
    return {f, level};
  }

  // part: the sum of the row's weights
  CTXFAST_INLINE void close_row(const Step& step, int64_t r, T part) const {
    T* sum = work.sum + step.slot + r;
    *sum = step.starts ? part : *sum * work.rescale[r] + part;
  }

  // The rows of a step against the packed keys [packed, packed_end).
  void attend_rows(const Step& step, int64_t packed, int64_t packed_end) const {
    const int64_t low = step.range.begin, high = step.range.end;
    const int64_t begin = step.begin, rows = step.rows;

    // Whole vectors of keys that some row attends, counted from `packed`.
    constexpr int64_t kAlign = greater(kLanes<T>, kDepthStep<Storage>);
    const int64_t from = greater(low - packed, 0) / kAlign * kAlign;
    const int64_t to = round_up(smaller(high, packed_end) - packed, kLanes<T>);
    const int64_t columns = to - from, key0 = packed + from;
    // Tiles of scores are columns of lines: an odd number of lines from row to row spreads them
    // over the sets of the first cache level.
    const int64_t stride = kMatrix<Storage> ? columns | kLanes<T> : block;
    const Storage* query = rows_of(common.query, common.query_stride, sequence.query_start + begin);
    const Word* queries = work.queries;
    int64_t query_row = words;
    if constexpr (kPlain) {
      queries = query;
      query_row = common.query_stride[2];
    } else {
      pack_rows<Storage>(query, common.query_stride[2], rows, depth, work.queries);
    }

    const ScoreTile<Storage> scores_tile = {queries, work.keys + from * words, query_row,
                                            words,   summed_words(columns),    work.scores,
                                            stride};
    for_each_product<Storage>(rows, columns / kLanes<T>, scores_tile);

    for (int64_t r = 0; r < rows; ++r) {
      T* scores = work.scores + r * stride;
      if (prefetches) prefetch(begin + r);
      const RowLevel row = open_row(step, r, scores, key0, columns);
      const T part =
          weigh<Storage>(scores, columns, row.factor, row.level, dropout, begin + r, key0);
      end_weights<Storage>(scores, columns);
      close_row(step, r, part);
    }

    T factors[kForwardStep<Storage>];
    if (step.ends) finish_rows(step, factors);
    const Word* weights = reinterpret_cast<const Word*>(work.scores);
    // Keys that no row attends take no part: a weight of 0 does not hide a NaN.
    const int64_t idle = kPack == 1 ? greater(low - key0, 0) : 0;
    if constexpr (kPack == 2) show_values(step, from, packed, packed_end);
    ValueTile<Storage> tile = {weights + idle,
                               values + (from / kPack + idle) * value_row,
                               stride,
                               words_of<Storage>(smaller(high, packed_end) - key0) - idle,
                               value_row,
                               state_width,
                               work.state + step.slot * state_width,
                               step.starts ? nullptr : work.rescale,
                               step.ends ? factors : nullptr,
                               output_row(begin),
                               args.output_stride[2],
                               depth};
    for_each_product<Storage>(rows, width / kLanes<T>, tile);
  }

  // Log-sum-exp of the rows, and what their weighted sums are multiplied by.
  void finish_rows(const Step& step, T* factors) const {
    const T kept = kept_factor<T>(common.dropout_threshold);
    const T *maximum = work.maximum + step.slot, *sum = work.sum + step.slot;
    for (int64_t r = 0; r < step.rows; r += kLanes<T>) {
      const int64_t n = step.rows - r;
      const Vec<T> total = load_n(sum + r, n);
      store_n(factors + r, total == T(0) ? Vec<T>{} : splat<T>(kept) / total, n);
      const Vec<T> lse = load_n(maximum + r, n) * T(kLn2) + log<T>(total);
      store_n(lse_of(step.begin + r), lse, n);
    }
  }

  // Clears the rows of steps that attend nothing.
  void clear_idle_rows(int64_t begin, int64_t end, int64_t step) const {
    for (int64_t row = begin; row < end; row += step) {
      const int64_t stop = smaller(row + step, end);
      if (key_range(common, sequence, row).begin >= key_range(common, sequence, stop - 1).end)
        clear_rows(row, stop);
    }
  }

  // Of the block of keys at `packed`, those that are seen: from `low` on.
  RowFilter key_filter(int64_t packed, int64_t low) const {
    if (alone < 0) return terms.key_filter(packed, low);
    return {low - packed, shown + packed % block, 1};
  }

  // Keys [packed, packed_end); those before `low` are not seen.
  void pack_keys(int64_t packed, int64_t packed_end, int64_t low) const {
    pack_transposed<Storage>(rows_of(common.key, common.key_stride, sequence.key_start + packed),
                             common.key_stride[2], packed_end - packed, depth,
                             key_filter(packed, low), work.keys);
  }

  // Keys and values [packed, packed_end).
  void pack_block(int64_t packed, int64_t packed_end, int64_t low) const {
    const int64_t count = packed_end - packed, row = sequence.key_start + packed;
    if (alone >= 0)
      for (int64_t j = packed; j < packed_end; ++j) shown[j % block] = shows<T>(terms, alone, j);
    const RowFilter filter = key_filter(packed, low);
    pack_keys(packed, packed_end, low);
    const Storage* value = rows_of(common.value, common.value_stride, row);
    values = work.values;
    value_row = width;
    if constexpr (kPlain) {
      if (count <= kUnpackedKeys && depth == width && filter.shows_all()) {
        values = value;
        value_row = common.value_stride[2];
        return;
      }
    }
    if constexpr (kPack == 2)
      shown_values = 0;
    else
      pack_columns<Storage>(value, common.value_stride[2], count, depth, width, filter,
                            work.values);
  }

  // Packs the values up to the last key that a row of the step attends, and clears those from
  // `from` to the first one: no later step attends fewer of the one or more of the other.
  void show_values(const Step& step, int64_t from, int64_t packed, int64_t packed_end) const {
    const int64_t end = smaller(step.range.end, packed_end) - packed;
    if (end > shown_values) {
      const int64_t first = shown_values / kDepthStep<Storage> * kDepthStep<Storage>;
      const int64_t row = sequence.key_start + packed + first;
      pack_columns<Storage>(rows_of(common.value, common.value_stride, row), common.value_stride[2],
                            end - first, depth, width, key_filter(packed + first, step.range.begin),
                            work.values + first / kPack * width);
      shown_values = end;
    }
    for (int64_t row = from; row < step.range.begin - packed; ++row) {
      uint16_t* half = reinterpret_cast<uint16_t*>(work.values + row / kPack * width) + row % kPack;
      for (int64_t c = 0; c < width; ++c) half[c * kPack] = 0;
    }
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t low = key_range(common, sequence, begin).begin;
    const int64_t high = key_range(common, sequence, end - 1).end;
    clear_idle_rows(begin, end, kForwardStep<Storage>);
    for (int64_t first = low / block * block; first < high; first += block) {
      const int64_t packed = greater(first, low / 64 * 64);
      const int64_t packed_end = smaller(first + block, high);
      pack_block(packed, packed_end, low);
      for (int64_t i = begin; i < end; i += kForwardStep<Storage>) {
        const Step step(*this, begin, i, smaller(i + kForwardStep<Storage>, end), packed);
        if (step.meets(packed, block)) attend_rows(step, packed, packed_end);
      }
    }
  }

  // A value that is not finite reaches every row of a step in which some row attends it, since a
  // weight of 0 does not hide it. Rows that are not finite are attended once more, each without
  // neighbours and with no other keys than its own. A log-sum-exp that is a number was right and
  // stays: so do all bits of the gradients.
  void part_rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      if (finite_row(output_row(i), depth)) continue;
      T* lse = lse_of(i);
      const T before = *lse;
      alone = i;
      run(i, i + 1);
      if (before == before) *lse = before;
    }
  }
};

// Whether rows of a sequence may attend different keys.
inline bool parts_rows(const AttentionArgs& args) {
  return args.window_left >= 0 || args.window_right >= 0 || args.attn_mask != nullptr ||
         args.bias != nullptr;
}

CTXFAST_NAMESPACE_END
