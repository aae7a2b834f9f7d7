// Block sizes of the attention kernels and how they divide their scratch memory.
#pragma once

#include "cpu/attention_scores.h"

CTXFAST_NAMESPACE_BEGIN

// Query rows whose scores are computed together, and those of a task that keeps running state.
template <typename Storage>
constexpr int64_t kForwardStep = kMatrix<Storage> ? 32 : 24;
// Rows of a task begin at a multiple of these.
template <typename Storage>
constexpr int64_t kForwardPiece = kSplits<Storage> ? 96 : kForwardStep<Storage>;
template <typename Storage>
constexpr int64_t kForwardRowLimit =
    kSplits<Storage> ? 3 * kForwardPiece<Storage> : 10 * kForwardStep<Storage>;

// Rows that state is kept for: of a task, and of three steps that are done at once.
template <typename Storage>
constexpr int64_t kForwardKeptRows = kForwardRowLimit<Storage> + 3 * kForwardStep<Storage>;

// Elements from row to row of the state: whole vectors, or whole blocks of columns.
template <typename Storage>
CTXFAST_INLINE int64_t forward_state_width(int64_t head_dim) {
  return round_up(head_dim, kSplits<Storage> ? 32 : kLanes<Compute<Storage>>);
}
template <typename Storage>
constexpr int64_t kBackwardStep = kMatrix<Storage> ? 64 : 48;
template <typename Storage>
constexpr int64_t kBackwardRowLimit = 10 * kBackwardStep<Storage>;

// Sequences of at most so many keys have their next head prefetched, and their values unpacked.
template <typename Storage>
constexpr int64_t kPrefetchedKeys = kMatrix<Storage> ? 512 : 256;
constexpr int64_t kUnpackedKeys = 64;

// How many neighbouring heads a thread takes at once: their rows lie side by side in memory.
CTXFAST_INLINE int64_t heads_together(const AttentionArgs& args, int64_t items) {
  return greater(1, smaller(args.heads, items / (int64_t{args.threads} * 16)));
}

// Keys per block: what is packed of a block stays in the second cache level.
constexpr int64_t kLongestBlock = 512;
CTXFAST_INLINE int64_t keys_per_block(int64_t head_dim) {
  return head_dim <= 64 ? 512 : head_dim <= 128 ? 256 : 128;
}

// Hands out pieces of a block of memory; without one it only counts.
class Divider {
 public:
  explicit Divider(void* memory) : start_(static_cast<char*>(memory)) {}
  template <typename P>
  P* take(int64_t count) {
    P* piece = start_ == nullptr ? nullptr : reinterpret_cast<P*>(start_ + used_);
    used_ += round_up(count * int64_t(sizeof(P)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

struct AttentionSizes {
  int64_t block;       // keys
  int64_t words;       // of a row of head_dim elements
  int64_t width;       // head_dim rounded up to whole vectors
  int64_t rows;        // most query rows of a task
  int64_t state_rows;  // most query rows of a task that keeps something for each of them
};

template <typename Storage>
struct ForwardWorkspace {
  using T = Compute<Storage>;
  using Word = WordOf<Storage>;
  Word *keys, *values, *queries;
  T *scores, *state, *maximum, *sum, *rescale;
  int64_t bytes;

  ForwardWorkspace(void* memory, const AttentionSizes& sizes) {
    Divider divider(memory);
    keys = divider.take<Word>(sizes.block * sizes.words);
    values = divider.take<Word>(sizes.block * sizes.width);
    queries = divider.take<Word>(kForwardStep<Storage> * sizes.words);
    scores = divider.take<T>(kForwardStep<Storage> * (sizes.block + kLanes<T>));
    state = divider.take<T>(kForwardRowLimit<Storage> * forward_state_width<Storage>(sizes.width));
    maximum = divider.take<T>(kForwardKeptRows<Storage>);
    sum = divider.take<T>(kForwardKeptRows<Storage>);
    rescale = divider.take<T>(kForwardStep<Storage>);
    bytes = divider.used();
  }
};

template <typename Storage>
struct BackwardWorkspace {
  using T = Compute<Storage>;
  using Word = WordOf<Storage>;
  Word *keys, *values, *key_columns;  // of the block: transposed, transposed, by rows
  Word *query_rows, *query_columns, *grad_rows, *grad_columns;  // of the step: operands A and B
  T *scores, *grad_scores;                                      // [step, block]
  Word* grad_pairs;
  T *grad_keys, *grad_values;              // sums of the block
  T* grad_queries;                         // sums of the task
  T *lse, *correction, *delta, *grad_lse;  // of the task's query rows
  uint8_t* live;
  int64_t bytes;

  // From row to row of the scores. Tiles are columns of lines: a distance other than a power of two
  // spreads them over the sets of the first cache level.
  static CTXFAST_INLINE int64_t score_stride(const AttentionSizes& sizes) {
    return sizes.block + (kMatrix<Storage> ? kDepthStep<Storage> : 0);
  }

  BackwardWorkspace(void* memory, const AttentionSizes& sizes) {
    constexpr int64_t kStep = kBackwardStep<Storage>;
    constexpr bool kPairs = Arithmetic<Storage>::kPack == 2;
    Divider divider(memory);
    keys = divider.take<Word>(sizes.block * sizes.words);
    values = divider.take<Word>(sizes.block * sizes.words);
    key_columns = divider.take<Word>(sizes.block * sizes.width);
    query_columns = divider.take<Word>(kStep * sizes.width);
    grad_columns = divider.take<Word>(kStep * sizes.width);
    query_rows = kPairs ? divider.take<Word>(kStep * sizes.words) : query_columns;
    grad_rows = kPairs ? divider.take<Word>(kStep * sizes.words) : grad_columns;
    scores = divider.take<T>(kStep * score_stride(sizes));
    grad_scores = divider.take<T>(kStep * score_stride(sizes));
    grad_pairs = kPairs ? divider.take<Word>(kStep * score_stride(sizes) / 2) : nullptr;
    grad_keys = divider.take<T>(sizes.block * sizes.width);
    grad_values = divider.take<T>(sizes.block * sizes.width);
    grad_queries = divider.take<T>(round_up(sizes.state_rows, 16) * sizes.width);
    lse = divider.take<T>(sizes.rows);
    correction = divider.take<T>(sizes.rows);
    delta = divider.take<T>(sizes.rows);
    grad_lse = divider.take<T>(sizes.rows);
    live = divider.take<uint8_t>(sizes.rows);
    bytes = divider.used();
  }
};

// Zeroes rows [begin, end) of a packed tensor.
template <typename Storage>
CTXFAST_INLINE void clear_packed_rows(const AttentionArgs& args, void* base,
                                      const int64_t (&stride)[3], int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t head = 0; head < args.heads; ++head)
      __builtin_memset(static_cast<Storage*>(base) + head * stride[1] + row * stride[2], 0,
                       args.head_dim * sizeof(Storage));
}

CTXFAST_NAMESPACE_END
