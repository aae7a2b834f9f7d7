// What the threads of an attention call have to do: sequences, and pieces of their query rows, longest work first.
#pragma once

#include "cpu/attention.h"

namespace ctxfast {

struct AttentionSequence {
  int64_t query_start, key_start;      // first row in the packed layout; 0 in the padded one
  int64_t query_length, key_length;
  int64_t key_begin, key_end;  // the keys outside [key_begin, key_end) are masked by key_padding_mask
  bool holes;                  // and so are some inside
};

struct AttentionPiece {
  int64_t sequence;
  int64_t begin, end;  // query rows
};

struct AttentionPlan {
  const AttentionSequence* sequences;
  const AttentionPiece* pieces;  // for every head
  int64_t piece_count;
};

// Splits sequences so that the threads can be kept busy; a piece of a sequence with more than `chunk` keys has at most
// `row_limit` rows, a multiple of `row_step` unless it is the last. The plan lives in the calling
// thread's scratch. Checks the offsets of packed sequences: kNotMonotone with argument 0 (queries) or 1 (keys) and the
// sequence as value.
Status plan_attention(const AttentionArgs& args, int64_t chunk, int64_t row_limit, int64_t row_step,
                      AttentionPlan* plan) noexcept;

}  // namespace ctxfast
