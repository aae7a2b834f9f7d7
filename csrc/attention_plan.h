// What the threads of an attention call have to do: sequences, and pieces of their rows, longest
// work first.
#pragma once

#include "cpu/attention.h"

namespace ctxfast {

struct AttentionSequence {
  int64_t query_start, key_start;  // first row in the packed layout; 0 in the padded one
  int64_t query_length, key_length;
  int64_t key_begin,
      key_end;  // the keys outside [key_begin, key_end) are masked by key_padding_mask
  bool holes;   // and so are some inside
};

struct AttentionPiece {
  int64_t sequence;
  int64_t begin, end;  // query rows, or keys
};

struct AttentionPieces {
  const AttentionPiece* items;  // for every head
  int64_t count;
};

struct PieceRule {
  bool keys;      // pieces of the keys instead of the query rows
  int64_t step;   // a piece has a multiple of this many rows, unless it is the last of its sequence
  int64_t limit;  // and at most this many
  int64_t unlimited_keys;  // but for sequences of at most so many keys there is no limit
};

// Lives in the calling thread's scratch until its next plan.
class AttentionPlan {
 public:
  // Reads and checks the lengths. kNotMonotone: argument 0 (cu_seqlens_q) or 1 (cu_seqlens_k),
  // value the sequence.
  Status read(const AttentionArgs& args) noexcept;

  // Splits every sequence so that all threads are kept busy to the end. At most two calls.
  AttentionPieces split(const AttentionArgs& args, const PieceRule& rule) noexcept;

  // One piece of all rows for every sequence.
  AttentionPieces whole(const AttentionArgs& args) noexcept;

  // Whether whole sequences are even enough pieces for the threads.
  bool whole_is_balanced(const AttentionArgs& args) const noexcept;

  const AttentionSequence& sequence(int64_t index) const noexcept { return sequences_[index]; }
  int64_t longest_query() const noexcept { return longest_query_; }

 private:
  AttentionPieces sort(const AttentionArgs& args, int64_t count, bool keys) noexcept;

  AttentionSequence* sequences_ = nullptr;
  AttentionPiece* pieces_ = nullptr;  // room for the next pieces
  int64_t total_ = 0, largest_ = 0, longest_query_ = 0;
};

constexpr int64_t kSmallestStep = 8;  // of any PieceRule

}  // namespace ctxfast
