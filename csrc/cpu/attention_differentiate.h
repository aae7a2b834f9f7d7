// How a task of the attention backward goes through its query rows and keys.
#pragma once

#include "cpu/attention_task.h"

CTXFAST_NAMESPACE_BEGIN

// Which sums of the rows at hand start or end here, so that they need no memory in between.
struct Passage {
  bool keys_start, keys_end;  // gradients of keys and values
  bool queries_whole;         // gradients of queries, start and end
};

template <typename Storage>
struct Differentiate : GradientTask<Storage> {
  using Task = GradientTask<Storage>;
  using Task::args, Task::common, Task::sequence, Task::head, Task::wanted, Task::terms,
      Task::dropout, Task::kept;
  using Task::rows_of, Task::query_row, Task::key_row, Task::attends;
  using typename Task::T;
  using Word = WordOf<Storage>;
  static constexpr int kPack = Arithmetic<Storage>::kPack;

  const BackwardWorkspace<Storage>& work;
  const AttentionSizes sizes;
  const bool hides;  // some rows do not attend some keys that are multiplied
  mutable RowsApart<Storage, kLongestBlock> keys_apart;  // of the block at hand

  Differentiate(const AttentionBackwardArgs& args_, const AttentionSequence& sequence_,
                int64_t index_, int64_t head_, int wanted_, const BackwardWorkspace<Storage>& work_,
                const AttentionSizes& sizes_)
      : Task(args_, sequence_, index_, head_, wanted_),
        work(work_),
        sizes(sizes_),
        hides(common.window_left >= 0 || common.window_right >= 0 || terms.any ||
              sequence.key_begin > 0) {}

  bool in_one_block(KeyRange range) const {
    return range.begin / sizes.block == (range.end - 1) / sizes.block;
  }

  // What a task has to know of each of its query rows.
  void read_rows(Range queries) const {
    const T infinity = __builtin_huge_val();
    for (int64_t i = queries.begin; i < queries.end; ++i) {
      const int64_t row = sequence.query_start + i, at = i - queries.begin;
      const T lse = *rows_of(static_cast<const T*>(args.lse), args.lse_stride, row);
      work.live[at] = lse != -infinity;
      work.delta[at] = work.grad_lse[at] = T(0);
      work.lse[at] = infinity;
      work.correction[at] = T(1);
      if (!work.live[at]) continue;
      const double exact = double(lse) * kLog2E;
      work.lse[at] = T(exact);
      work.correction[at] = T(1) - T((exact - double(work.lse[at])) * kLn2);
      if (args.grad_lse != nullptr)
        work.grad_lse[at] =
            *rows_of(static_cast<const T*>(args.grad_lse), args.grad_lse_stride, row);
      if (in_one_block(key_range(common, sequence, i))) continue;
      const T delta = this->dot(query_row(args.grad_output, args.grad_output_stride, i),
                                query_row(args.output, args.output_stride, i));
      work.delta[at] =
          delta * T(0) == T(0) ? delta : work.correction[at] * this->delta_of_keys(i, work.lse[at]);
    }
  }

  // A [rows, depth] and B [rows, width] forms of queries or output gradients; for kPack == 1 one
  // copy serves both.
  void pack_both(const Storage* rows, int64_t stride, int64_t count, const uint8_t* live,
                 Word* left, Word* right) const {
    const RowFilter filter = {0, live, 1};
    pack_columns<Storage>(rows, stride, count, common.head_dim, sizes.width, filter, right);
    if constexpr (kPack == 2) pack_rows<Storage>(rows, stride, count, common.head_dim, left);
  }

  // Query rows [begin, end) of a task that starts at row `origin`, against keys [block, block_end).
  void add_rows(int64_t origin, int64_t begin, int64_t end, int64_t block, int64_t block_end,
                Passage passage) const {
    const int64_t low = greater(key_range(common, sequence, begin).begin, block);
    const int64_t high = smaller(key_range(common, sequence, end - 1).end, block_end);
    if (low >= high) return;
    constexpr int64_t kAlign = greater(kLanes<T>, kDepthStep<Storage>);
    const int64_t from = (low - block) / kAlign * kAlign;
    const int64_t columns = round_up(high - block, kLanes<T>) - from, key0 = block + from;
    const int64_t rows = end - begin, depth = (rows + kPack - 1) / kPack;
    const int64_t words = sizes.words, width = sizes.width;
    const uint8_t* live = work.live + (begin - origin);

    pack_both(query_row(common.query, common.query_stride, begin), common.query_stride[2], rows,
              live, work.query_rows, work.query_columns);
    pack_both(query_row(args.grad_output, args.grad_output_stride, begin),
              args.grad_output_stride[2], rows, live, work.grad_rows, work.grad_columns);
    const int64_t row_stride = kPack == 1 ? width : words;
    const int64_t part = summed_words(columns);
    const int64_t stride = work.score_stride(sizes);
    const ScoreTile<Storage> score_tile = {
        work.query_rows, work.keys + from * words, row_stride, words, part, work.scores, stride};
    for_each_product<Storage>(rows, columns / kLanes<T>, score_tile);
    const ScoreTile<Storage> grad_tile = {
        work.grad_rows, work.values + from * words, row_stride, words,
        part,           work.grad_scores,           stride};
    for_each_product<Storage>(rows, columns / kLanes<T>, grad_tile);

    const GradientRows<Storage> stage = {terms,
                                         dropout,
                                         T(common.scale * kLog2E),
                                         kept,
                                         this->bias_gradient(),
                                         work.lse - origin,
                                         work.delta - origin,
                                         work.correction - origin,
                                         work.grad_lse - origin,
                                         block,
                                         block + sizes.block,
                                         sequence.key_length,
                                         stride,
                                         work.scores,
                                         work.grad_scores,
                                         work.grad_pairs};
    const auto range_of = [&](int64_t i) { return key_range(common, sequence, i); };
    const bool prefetches =
        sequence.key_length <= kPrefetchedKeys<Storage> && head + 1 < common.heads;
    // Rows of more lines than these would displace what the products read.
    constexpr bool kAsks = sizeof(Storage) == 2;
    const bool writes_queries = kAsks && (wanted & kGradQuery) && passage.queries_whole;
    const bool writes_keys = kAsks && (wanted & kGradKeyValue) && passage.keys_end;
    for (int64_t r = 0; r < rows; r += kPack) {
      if (prefetches)
        for (int64_t i = begin + r; i < begin + r + kPack; ++i) this->prefetch(i);
      if (writes_queries)
        for (int64_t n = r; n < smaller(r + kPack, rows); ++n)
          this->prefetch_query_result(begin + n);
      if (writes_keys)
        for (int64_t j = key0 + r; j < smaller(key0 + r + kPack, high); ++j)
          this->prefetch_key_results(j);
      stage.run(r, rows, begin + r, key0, columns, range_of);
    }

    const int64_t step =
        kPack * stride;  // from one word row of the transposed operands to the next
    const int64_t keys = high - key0;
    const KeyRange at_hand = {key0, high};
    if (wanted & kGradKeyValue) {
      const Word* weights = reinterpret_cast<const Word*>(work.scores);
      const Word* grads = reinterpret_cast<const Word*>(work.grad_scores);
      AccumulateTile<Storage, true> tile = {weights,
                                            step,
                                            work.grad_columns,
                                            depth,
                                            width,
                                            work.grad_values + from * width,
                                            passage.keys_start,
                                            kept,
                                            nullptr,
                                            args.grad_value_stride[2],
                                            common.head_dim};
      const int64_t row = sequence.key_start + key0;
      if (passage.keys_end)
        tile.output = rows_of(static_cast<Storage*>(args.grad_value), args.grad_value_stride, row);
      add_rows_apart(stage, work.scores, args.grad_output, args.grad_output_stride, begin, rows,
                     live, at_hand, &tile);
      for_each_product<Storage>(keys, width / kLanes<T>, tile);
      tile.left = grads;
      tile.right = work.query_columns;
      tile.total = work.grad_keys + from * width;
      tile.starts = passage.keys_start;
      tile.scale = T(common.scale);
      tile.output_stride = args.grad_key_stride[2];
      if (passage.keys_end)
        tile.output = rows_of(static_cast<Storage*>(args.grad_key), args.grad_key_stride, row);
      add_rows_apart(stage, work.grad_scores, common.query, common.query_stride, begin, rows, live,
                     at_hand, &tile);
      for_each_product<Storage>(keys, width / kLanes<T>, tile);
    }
    if (wanted & kGradQuery) {
      const Word* grads =
          kPack == 1 ? reinterpret_cast<const Word*>(work.grad_scores) : work.grad_pairs;
      AccumulateTile<Storage, false> tile = {grads,
                                             stride / kPack,
                                             work.key_columns + from / kPack * width,
                                             (keys + kPack - 1) / kPack,
                                             width,
                                             work.grad_queries + (begin - origin) * width,
                                             passage.queries_whole,
                                             T(common.scale),
                                             nullptr,
                                             args.grad_query_stride[2],
                                             common.head_dim};
      if (passage.queries_whole)
        tile.output = rows_of(static_cast<Storage*>(args.grad_query), args.grad_query_stride,
                              sequence.query_start + begin);
      add_keys_apart(stage, begin, rows, block, at_hand, &tile);
      for_each_product<Storage>(rows, width / kLanes<T>, tile);
    }
  }

  // The part of a product over `rows` query rows from `begin` on that comes of rows that are not
  // finite; in the right operand they are zero from now on.
  void add_rows_apart(const GradientRows<Storage>& stage, const T* weights, const void* base,
                      const int64_t (&stride)[3], int64_t begin, int64_t rows, const uint8_t* live,
                      KeyRange at_hand, AccumulateTile<Storage, true>* product) const {
    if (!hides) return;
    RowsApart<Storage, kBackwardStep<Storage>> apart;
    apart.find(query_row(base, stride, begin), stride[2], rows, common.head_dim, {0, live, 1});
    if (apart.count == 0) return;
    apart.clear(const_cast<Word*>(product->right), sizes.width);
    product->start(at_hand.end - at_hand.begin);
    for (int64_t n = 0; n < apart.count; ++n) {
      const int64_t r = apart.rows[n], i = begin + r;
      for (int64_t j = at_hand.begin; j < at_hand.end; ++j)
        if (attends(i, j))
          add_row(query_row(base, stride, i), common.head_dim,
                  stage.word_element(weights, r, j - at_hand.begin),
                  product->total + (j - at_hand.begin) * sizes.width);
    }
  }

  // The same for a product over keys.
  void add_keys_apart(const GradientRows<Storage>& stage, int64_t begin, int64_t rows,
                      int64_t block, KeyRange at_hand,
                      AccumulateTile<Storage, false>* product) const {
    if (keys_apart.count == 0) return;
    product->start(rows);
    for (int64_t n = 0; n < keys_apart.count; ++n) {
      const int64_t j = block + keys_apart.rows[n];
      if (j < at_hand.begin || j >= at_hand.end) continue;
      for (int64_t r = 0; r < rows; ++r)
        if (attends(begin + r, j))
          add_row(key_row(common.key, common.key_stride, j), common.head_dim,
                  stage.word_element(work.grad_scores, r, j - at_hand.begin),
                  product->total + r * sizes.width);
    }
  }

  void write_rows(const T* from, int64_t count, T scale, Storage* to, int64_t stride) const {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t d = 0; d < common.head_dim; d += kLanes<T>)
        store_n(to + row * stride + d, load(from + row * sizes.width + d) * scale,
                common.head_dim - d);
  }

  void run(Range queries, Range keys) const {
    const int64_t rows = queries.end - queries.begin, width = sizes.width, block = sizes.block;
    read_rows(queries);
    int64_t low = 0, high = 0;
    if (rows > 0) {
      low = key_range(common, sequence, queries.begin).begin;
      high = key_range(common, sequence, queries.end - 1).end;
    }
    // Without a window every row meets the same keys.
    const bool even = rows > 0 && low < high && common.window_left < 0 && common.window_right < 0;
    const bool queries_whole = even && low >= keys.begin && keys.end - keys.begin <= block;
    if ((wanted & kGradQuery) && !queries_whole)
      __builtin_memset(work.grad_queries, 0, rows * width * sizeof(T));
    for (int64_t first = keys.begin; first < keys.end; first += block) {
      const int64_t last = smaller(first + block, keys.end), packed_end = smaller(last, high);
      const bool keys_whole = even && low <= first && packed_end == last;
      if ((wanted & kGradKeyValue) && !keys_whole) {
        __builtin_memset(work.grad_keys, 0, (last - first) * width * sizeof(T));
        __builtin_memset(work.grad_values, 0, (last - first) * width * sizeof(T));
      }
      if (packed_end > first && last > low) {
        pack_keys(first, packed_end, greater(low, first));
        for (int64_t i = queries.begin; i < queries.end; i += kBackwardStep<Storage>) {
          const int64_t stop = smaller(i + kBackwardStep<Storage>, queries.end);
          add_rows(
              queries.begin, i, stop, first, packed_end,
              {keys_whole && i == queries.begin, keys_whole && stop == queries.end, queries_whole});
        }
      }
      if ((wanted & kGradKeyValue) && !keys_whole) {
        const int64_t row = sequence.key_start + first;
        write_rows(work.grad_keys, last - first, T(common.scale),
                   rows_of(static_cast<Storage*>(args.grad_key), args.grad_key_stride, row),
                   args.grad_key_stride[2]);
        write_rows(work.grad_values, last - first, kept,
                   rows_of(static_cast<Storage*>(args.grad_value), args.grad_value_stride, row),
                   args.grad_value_stride[2]);
      }
    }
    if ((wanted & kGradQuery) && !queries_whole)
      write_rows(work.grad_queries, rows, T(common.scale),
                 rows_of(static_cast<Storage*>(args.grad_query), args.grad_query_stride,
                         sequence.query_start + queries.begin),
                 args.grad_query_stride[2]);
  }

  void pack_keys(int64_t block, int64_t end, int64_t visible) const {
    const int64_t count = end - block;
    const RowFilter filter = terms.key_filter(block, visible);
    const Storage* keys = key_row(common.key, common.key_stride, block);
    const Storage* values = key_row(common.value, common.value_stride, block);
    pack_transposed<Storage>(keys, common.key_stride[2], count, common.head_dim, filter, work.keys);
    pack_transposed<Storage>(values, common.value_stride[2], count, common.head_dim, filter,
                             work.values);
    if (!(wanted & kGradQuery)) return;
    pack_columns<Storage>(keys, common.key_stride[2], count, common.head_dim, sizes.width, filter,
                          work.key_columns);
    if (!hides) return;
    keys_apart.find(keys, common.key_stride[2], count, common.head_dim, filter);
    keys_apart.clear(work.key_columns, sizes.width);
  }
};

CTXFAST_NAMESPACE_END
