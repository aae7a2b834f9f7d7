#include "attention_plan.h"

#include <algorithm>

#include "scratch.h"

namespace ctxfast {
namespace {

constexpr int64_t kPiecesPerThread =
    4;  // enough that the last piece of a thread is a small part of its work

Status failure(StatusCode code, int argument, int64_t value) {
  Status status;
  status.code = code;
  status.argument = argument;
  status.value = value;
  return status;
}

Status read_offsets(const AttentionArgs& args, int64_t b, AttentionSequence* sequence) {
  const int32_t* offsets[2] = {args.cu_seqlens_q, args.cu_seqlens_k};
  const int64_t rows[2] = {args.seqlen_q, args.seqlen_k};
  const int64_t longest[2] = {args.max_seqlen_q, args.max_seqlen_k};
  for (int side = 0; side < 2; ++side) {
    const int64_t begin = offsets[side][b], end = offsets[side][b + 1];
    if ((b == 0 && begin != 0) || begin > end || end > rows[side] || end - begin > longest[side])
      return failure(kNotMonotone, side, b);
  }
  sequence->query_start = args.cu_seqlens_q[b];
  sequence->key_start = args.cu_seqlens_k[b];
  sequence->query_length = args.cu_seqlens_q[b + 1] - args.cu_seqlens_q[b];
  sequence->key_length = args.cu_seqlens_k[b + 1] - args.cu_seqlens_k[b];
  return Status();
}

void read_key_padding(const AttentionArgs& args, int64_t b, AttentionSequence* sequence) {
  const int64_t step = args.key_padding_mask_stride[1];
  const uint8_t* mask = args.key_padding_mask + b * args.key_padding_mask_stride[0];
  int64_t begin = 0, end = sequence->key_length;
  while (begin < end && !mask[begin * step]) ++begin;
  while (end > begin && !mask[(end - 1) * step]) --end;
  for (int64_t j = begin; j < end && !sequence->holes; ++j) sequence->holes = !mask[j * step];
  sequence->key_begin = begin;
  sequence->key_end = end;
}

// Work of one query row (or key) in arbitrary units: the keys (rows) it meets, and a share that
// does not depend on them.
int64_t row_cost(const AttentionArgs& args, const AttentionSequence& sequence, bool keys) {
  int64_t met = keys ? sequence.query_length : sequence.key_end - sequence.key_begin;
  if (args.window_left >= 0 && args.window_right >= 0)
    met = std::min(met, args.window_left + args.window_right + 1);
  return met + 8;
}

}  // namespace

Status AttentionPlan::read(const AttentionArgs& args) noexcept {
  const bool packed = args.cu_seqlens_q != nullptr;
  const int64_t rows = (args.seqlen_q + args.seqlen_k) * (packed ? 1 : args.batch);
  const int64_t most_pieces = 2 * args.batch + rows / kSmallestStep;
  const size_t bytes = args.batch * sizeof(AttentionSequence);
  void* memory = thread_scratch(bytes + most_pieces * sizeof(AttentionPiece) + 1, kPlanScratch);
  if (memory == nullptr) return failure(kOutOfMemory, 0, 0);
  sequences_ = static_cast<AttentionSequence*>(memory);
  pieces_ = reinterpret_cast<AttentionPiece*>(static_cast<char*>(memory) + bytes);
  for (int64_t b = 0; b < args.batch; ++b) {
    AttentionSequence& sequence = sequences_[b];
    sequence = AttentionSequence{0, 0, args.seqlen_q, args.seqlen_k, 0, 0, false};
    if (packed) {
      const Status status = read_offsets(args, b, &sequence);
      if (status.code != kOk) return status;
    }
    sequence.key_end = sequence.key_length;
    if (args.key_padding_mask != nullptr) read_key_padding(args, b, &sequence);
    const int64_t cost = sequence.query_length * row_cost(args, sequence, false);
    total_ += cost;
    largest_ = std::max(largest_, cost);
    longest_query_ = std::max(longest_query_, sequence.query_length);
  }
  return Status();
}

AttentionPieces AttentionPlan::sort(const AttentionArgs& args, int64_t count, bool keys) noexcept {
  const auto cost = [&](const AttentionPiece& piece) {
    return (piece.end - piece.begin) * row_cost(args, sequences_[piece.sequence], keys);
  };
  AttentionPiece* first = pieces_;
  pieces_ += count;
  std::sort(first, pieces_, [&](const AttentionPiece& a, const AttentionPiece& b) {
    const int64_t left = cost(a), right = cost(b);
    if (left != right) return left > right;
    return a.sequence != b.sequence ? a.sequence < b.sequence : a.begin < b.begin;
  });
  return {first, count};
}

AttentionPieces AttentionPlan::split(const AttentionArgs& args, const PieceRule& rule) noexcept {
  const int64_t share = total_ * args.heads / (int64_t{args.threads} * kPiecesPerThread);
  int64_t count = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const AttentionSequence& sequence = sequences_[b];
    const int64_t length = rule.keys ? sequence.key_length : sequence.query_length;
    int64_t step = std::max(share / row_cost(args, sequence, rule.keys), rule.step);
    if (sequence.key_length > rule.unlimited_keys) step = std::min(step, rule.limit);
    step = step / rule.step * rule.step;
    for (int64_t row = 0; row < length; row += step)
      pieces_[count++] = {b, row, std::min(row + step, length)};
  }
  return sort(args, count, rule.keys);
}

AttentionPieces AttentionPlan::whole(const AttentionArgs& args) noexcept {
  for (int64_t b = 0; b < args.batch; ++b) pieces_[b] = {b, 0, sequences_[b].query_length};
  return sort(args, args.batch, false);
}

bool AttentionPlan::whole_is_balanced(const AttentionArgs& args) const noexcept {
  return largest_ * args.threads * 3 <= total_ * args.heads || args.threads == 1;
}

}  // namespace ctxfast
