// Attention forward (Dao et al. 2022; Dao 2023) on CPU. A work item is a range of query rows of one
// (sequence, head). It goes through the keys in blocks that fit the second cache level: keys are
// packed transposed, values by rows; for a few query rows at a time the scores are computed, turned
// into weights and multiplied with the values. One block of keys needs no running state: the output
// is written once. Short sequences spend as long waiting for their rows as computing: rows that a
// product can read where they lie are not copied, and those of the next head are prefetched.
#include "cpu/attention_workspace.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

template <typename Storage>
struct Attend {
  using T = Compute<Storage>;
  using Word = WordOf<Storage>;
  static constexpr int kPack = Arithmetic<Storage>::kPack;
  static constexpr bool kPlain = kWordIsElement<Storage>;

  const AttentionForwardArgs& args;
  const AttentionArgs& common;
  const AttentionSequence& sequence;
  const int64_t index, head;  // of the sequence
  const ForwardWorkspace<Storage>& work;
  const int64_t depth, words, width, block;
  const ScoreTerms terms;
  const DropoutRow dropout;
  const T factor;
  const bool prefetches;
  mutable const Word* values;  // of the keys at hand, and the words from one row to the next
  mutable int64_t value_row;

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

  // Rows [begin, end) of the piece that starts at row `origin`, against the packed keys [packed,
  // packed_end).
  void attend_rows(int64_t origin, int64_t begin, int64_t end, int64_t packed,
                   int64_t packed_end) const {
    const int64_t low = key_range(common, sequence, begin).begin;
    const int64_t high = key_range(common, sequence, end - 1).end;
    const int64_t first_block = low / block, last_block = (high - 1) / block;
    const int64_t this_block = packed / block;
    if (low >= high || this_block < first_block || this_block > last_block) return;
    const bool starts = this_block == first_block, ends = this_block == last_block;

    // Whole vectors of keys that some row attends, counted from `packed`.
    constexpr int64_t kAlign = greater(kLanes<T>, kDepthStep<Storage>);
    const int64_t from = greater(low - packed, 0) / kAlign * kAlign;
    const int64_t to = round_up(smaller(high, packed_end) - packed, kLanes<T>);
    const int64_t columns = to - from, key0 = packed + from;
    const int64_t rows = end - begin;
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

    const int64_t slot =
        starts && ends ? 0 : begin - origin;  // nothing is kept of rows that are done at once
    T* maximum = work.maximum + slot;
    T* sum = work.sum + slot;
    for (int64_t r = 0; r < rows; ++r) {
      T* scores = work.scores + r * stride;
      const int64_t i = begin + r;
      const KeyRange range = key_range(common, sequence, i);
      if (prefetches) prefetch(i);
      T f = factor;
      if (terms.any) {
        apply_terms<T>(terms, i, factor, key0, key0, key0 + columns, sequence.key_length, scores);
        f = T(1);
      }
      fill_outside<T>(scores, range.begin - key0, range.end - key0, columns,
                      -T(__builtin_huge_val()));
      T peak = row_maximum(scores, columns) * f;
      if (!starts) peak = peak < maximum[r] ? maximum[r] : peak;
      // A row that has met no key yet has maximum -inf; 0 keeps its weights at 2^-inf = 0.
      const T level = peak == -T(__builtin_huge_val()) ? T(0) : peak;
      const T part = weigh<Storage>(scores, columns, f, level, dropout, i, key0);
      end_weights<Storage>(scores, columns);
      if (starts) {
        sum[r] = part;
      } else {
        work.rescale[r] = exp2_nonpositive<false>(splat<T>(maximum[r] - level))[0];
        sum[r] = sum[r] * work.rescale[r] + part;
      }
      maximum[r] = peak;
    }

    T factors[kForwardStep<Storage>];
    if (ends) finish_rows(begin, rows, maximum, sum, factors);
    const Word* weights = reinterpret_cast<const Word*>(work.scores);
    ValueTile<Storage> tile = {weights,
                               values + from / kPack * value_row,
                               stride,
                               words_of<Storage>(smaller(high, packed_end) - key0),
                               value_row,
                               width,
                               work.state + slot * width,
                               starts ? nullptr : work.rescale,
                               ends ? factors : nullptr,
                               output_row(begin),
                               args.output_stride[2],
                               depth};
    for_each_product<Storage>(rows, width / kLanes<T>, tile);
  }

  // Log-sum-exp of the rows, and what their weighted sums are multiplied by.
  void finish_rows(int64_t begin, int64_t rows, const T* maximum, const T* sum, T* factors) const {
    const T kept = kept_factor<T>(common.dropout_threshold);
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> total = load_n(sum + r, rows - r);
      store_n(factors + r, total == T(0) ? Vec<T>{} : splat<T>(kept) / total, rows - r);
      const Vec<T> lse = load_n(maximum + r, rows - r) * T(kLn2) + log<T>(total);
      store_n(lse_of(begin + r), lse, rows - r);
    }
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t low = key_range(common, sequence, begin).begin;
    const int64_t high = key_range(common, sequence, end - 1).end;
    for (int64_t row = begin; row < end; row += kForwardStep<Storage>) {
      const int64_t stop = smaller(row + kForwardStep<Storage>, end);
      if (key_range(common, sequence, row).begin >= key_range(common, sequence, stop - 1).end)
        clear_rows(row, stop);
    }
    for (int64_t first = low / block * block; first < high; first += block) {
      const int64_t packed = greater(first, low / 64 * 64);
      const int64_t packed_end = smaller(first + block, high);
      const int64_t count = packed_end - packed;
      const int64_t row = sequence.key_start + packed;
      const RowFilter filter = terms.key_filter(packed, low);
      pack_transposed<Storage>(rows_of(common.key, common.key_stride, row), common.key_stride[2],
                               count, depth, filter, work.keys);
      const Storage* value = rows_of(common.value, common.value_stride, row);
      values = work.values;
      value_row = width;
      bool packs = true;
      if constexpr (kPlain) {
        if (count <= kUnpackedKeys && depth == width && filter.shows_all()) {
          packs = false;
          values = value;
          value_row = common.value_stride[2];
        }
      }
      if (packs)
        pack_columns<Storage>(value, common.value_stride[2], count, depth, width, filter,
                              work.values);
      for (int64_t i = begin; i < end; i += kForwardStep<Storage>)
        attend_rows(begin, i, smaller(i + kForwardStep<Storage>, end), packed, packed_end);
    }
  }
};

template <typename Storage>
Status run(const AttentionForwardArgs& args) {
  using T = Compute<Storage>;
  const AttentionArgs& common = args.common;
  const AttentionSizes sizes = {keys_per_block(common.head_dim), words_of<Storage>(common.head_dim),
                                round_up(common.head_dim, kLanes<T>), 0, 0};
  AttentionPlan plan;
  Status status = plan.read(common);
  if (status.code != kOk) return status;
  const AttentionPieces pieces =
      plan.split(common, {false, kForwardStep<Storage>, kForwardRowLimit<Storage>, sizes.block});

  int32_t failed = 0;
  const int64_t items = pieces.count * common.heads;
  const int64_t grain = heads_together(common, items);
  parallel_for(common.threads, items, grain, [&](int64_t first, int64_t last) {
    void* memory = thread_scratch(ForwardWorkspace<Storage>(nullptr, sizes).bytes);
    if (memory == nullptr) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    const ForwardWorkspace<Storage> work(memory, sizes);
    [[maybe_unused]] const ProductScope<Storage> scope;
    for (int64_t item = first; item < last; ++item) {
      const AttentionPiece& piece = pieces.items[item / common.heads];
      const Attend<Storage> attend(args, plan.sequence(piece.sequence), piece.sequence,
                                   item % common.heads, work);
      attend.run(piece.begin, piece.end);
    }
  });
  if (common.cu_seqlens_q != nullptr) {
    const int64_t used = common.cu_seqlens_q[common.batch];
    clear_packed_rows<Storage>(common, args.output, args.output_stride, used, common.seqlen_q);
    for (int64_t head = 0; head < common.heads; ++head)
      for (int64_t row = used; row < common.seqlen_q; ++row)
        static_cast<T*>(args.lse)[head * args.lse_stride[1] + row] = -T(__builtin_huge_val());
  }
  if (failed) status.code = kOutOfMemory;
  return status;
}

}  // namespace

Status attention_forward(const AttentionForwardArgs& args) {
  if (args.common.dtype == kFloat32) return run<float>(args);
  if (args.common.dtype == kFloat64) return run<double>(args);
  if (args.common.dtype == kBfloat16) return run<bfloat16>(args);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
