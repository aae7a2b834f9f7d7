#include "attention_plan.h"

#include <algorithm>

#include "scratch.h"

namespace ctxfast {
namespace {

constexpr int64_t kPiecesPerThread = 4;  // enough that the last piece of a thread is a small part of its work

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

// Work of one query row in arbitrary units: its keys, and a share that does not depend on them.
int64_t row_cost(const AttentionArgs& args, const AttentionSequence& sequence) {
  int64_t keys = sequence.key_end - sequence.key_begin;
  if (args.window_left >= 0 && args.window_right >= 0)
    keys = std::min(keys, args.window_left + args.window_right + 1);
  return keys + 8;
}

}  // namespace

Status plan_attention(const AttentionArgs& args, int64_t chunk, int64_t row_limit, int64_t row_step,
                      AttentionPlan* plan) noexcept {
  const int64_t rows = args.cu_seqlens_q != nullptr ? args.seqlen_q : args.batch * args.seqlen_q;
  const int64_t most_pieces = args.batch + rows / row_step;
  const size_t sequence_bytes = args.batch * sizeof(AttentionSequence);
  void* memory = thread_scratch(sequence_bytes + most_pieces * sizeof(AttentionPiece) + 1, kPlanScratch);
  if (memory == nullptr) return failure(kOutOfMemory, 0, 0);
  auto* sequences = static_cast<AttentionSequence*>(memory);
  auto* pieces = reinterpret_cast<AttentionPiece*>(static_cast<char*>(memory) + sequence_bytes);

  int64_t total = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    AttentionSequence& sequence = sequences[b];
    sequence = AttentionSequence{0, 0, args.seqlen_q, args.seqlen_k, 0, 0, false};
    if (args.cu_seqlens_q != nullptr) {
      const Status status = read_offsets(args, b, &sequence);
      if (status.code != kOk) return status;
    }
    sequence.key_end = sequence.key_length;
    if (args.key_padding_mask != nullptr) read_key_padding(args, b, &sequence);
    total += sequence.query_length * row_cost(args, sequence);
  }

  const int64_t share = total * args.heads / (int64_t{args.threads} * kPiecesPerThread);
  int64_t count = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const AttentionSequence& sequence = sequences[b];
    int64_t step = std::max(share / row_cost(args, sequence), row_step);
    if (sequence.key_length > chunk) step = std::min(step, row_limit);
    step = step / row_step * row_step;
    for (int64_t row = 0; row < sequence.query_length; row += step)
      pieces[count++] = {b, row, std::min(row + step, sequence.query_length)};
  }
  const auto cost = [&](const AttentionPiece& piece) {
    return (piece.end - piece.begin) * row_cost(args, sequences[piece.sequence]);
  };
  std::sort(pieces, pieces + count, [&](const AttentionPiece& a, const AttentionPiece& b) {
    const int64_t left = cost(a), right = cost(b);
    if (left != right) return left > right;
    return a.sequence != b.sequence ? a.sequence < b.sequence : a.begin < b.begin;
  });
  *plan = {sequences, pieces, count};
  return Status();
}

}  // namespace ctxfast
