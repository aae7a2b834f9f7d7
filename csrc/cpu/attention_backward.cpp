// Attention backward (Dao et al. 2022) on CPU: the weights are computed again from the log-sum-exp.
// A task is a range of query rows and a range of keys of one (sequence, head). It goes through the
// keys in blocks and, for each, through the query rows in steps, so every sum runs over ascending
// rows or keys, step by step: the result has the same bits however the work is split and on however
// many threads.
//
// Whole (sequence, head) pairs need five products. Where they are too few for the threads, the
// gradients of queries and of keys and values are separate tasks, with seven products; so is the
// gradient of a bias that sequences or heads share.
#include "cpu/attention_differentiate.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

// Adds the partial gradients of a bias that is broadcast over rows or columns, sequence by
// sequence, head by head.
template <typename T>
void reduce_bias(const AttentionBackwardArgs& args) {
  const int64_t (&stride)[4] = args.grad_bias_stride;
  const T* partial = static_cast<const T*>(args.partial_bias);
  for (int64_t b = 0; b < args.common.batch; ++b)
    for (int64_t h = 0; h < args.common.heads; ++h, partial += args.partial_bias_length) {
      T* total = static_cast<T*>(args.grad_bias) + b * stride[0] + h * stride[1];
      const int64_t step = stride[3] != 0 ? stride[3] : stride[2];
      for (int64_t n = 0; n < args.partial_bias_length; ++n) total[n * step] += partial[n];
    }
}

template <typename Storage>
Status run(const AttentionBackwardArgs& args) {
  using T = Compute<Storage>;
  const AttentionArgs& common = args.common;
  const int64_t heads = common.heads;
  AttentionPlan plan;
  Status status = plan.read(common);
  if (status.code != kOk) return status;

  AttentionSizes sizes = {keys_per_block(common.head_dim), words_of<Storage>(common.head_dim),
                          round_up(common.head_dim, kLanes<T>), plan.longest_query(),
                          plan.longest_query()};
  const bool whole = plan.whole_is_balanced(common);
  if (!whole) sizes.state_rows = smaller(plan.longest_query(), kBackwardRowLimit<Storage>);
  const bool bias = args.grad_bias != nullptr;
  const bool bias_by_row = bias && args.grad_bias_stride[2] != 0;
  // A matrix of the bias that several (sequence, head) share has one owner for each of its rows.
  const bool shared = bias_by_row && args.grad_bias_stride[3] != 0 &&
                      ((args.grad_bias_stride[0] == 0 && common.batch > 1) ||
                       (args.grad_bias_stride[1] == 0 && heads > 1));
  int32_t failed = 0;
  const auto task = [&](int64_t index, int64_t head, int wanted, Range queries, Range keys) {
    void* memory = thread_scratch(BackwardWorkspace<Storage>(nullptr, sizes).bytes);
    if (memory == nullptr) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    const BackwardWorkspace<Storage> work(memory, sizes);
    [[maybe_unused]] const ProductScope<Storage> scope;
    const Differentiate<Storage> differentiate(args, plan.sequence(index), index, head, wanted,
                                               work, sizes);
    differentiate.run(queries, keys);
  };

  const int own_bias = bias && !shared ? kGradBias : 0;
  if (whole) {
    const AttentionPieces pieces = plan.whole(common);
    const int64_t items = pieces.count * heads;
    parallel_for(common.threads, items, heads_together(common, items),
                 [&](int64_t first, int64_t last) {
                   for (int64_t item = first; item < last; ++item) {
                     const AttentionPiece& piece = pieces.items[item / heads];
                     const AttentionSequence& sequence = plan.sequence(piece.sequence);
                     task(piece.sequence, item % heads, kGradQuery | kGradKeyValue | own_bias,
                          {0, sequence.query_length}, {0, sequence.key_length});
                   }
                 });
  } else {
    // A column of the bias is owned by the task of its key, a row by the task of its query.
    const AttentionPieces by_key = plan.split(common, {true, sizes.block, sizes.block, 0});
    const AttentionPieces by_row =
        plan.split(common, {false, kBackwardStep<Storage>, kBackwardRowLimit<Storage>, 0});
    const int64_t key_items = by_key.count * heads;
    const bool bias_by_key = bias && !bias_by_row && args.grad_bias_stride[3] != 0;
    parallel_for(common.threads, key_items + by_row.count * heads, 1, [&](int64_t item, int64_t) {
      const bool keys = item < key_items;
      if (!keys) item -= key_items;
      const AttentionPiece& piece = (keys ? by_key : by_row).items[item / heads];
      const AttentionSequence& sequence = plan.sequence(piece.sequence);
      const int bias_here = bias_by_key == keys ? own_bias : 0;
      if (keys)
        task(piece.sequence, item % heads, kGradKeyValue | bias_here, {0, sequence.query_length},
             {piece.begin, piece.end});
      else
        task(piece.sequence, item % heads, kGradQuery | bias_here, {piece.begin, piece.end},
             {0, sequence.key_length});
    });
  }
  if (shared) {
    const int64_t slices_b = args.grad_bias_stride[0] == 0 ? 1 : common.batch;
    const int64_t slices_h = args.grad_bias_stride[1] == 0 ? 1 : heads;
    const int64_t steps =
        (plan.longest_query() + kBackwardStep<Storage> - 1) / kBackwardStep<Storage>;
    parallel_for(common.threads, slices_b * slices_h * steps, 1, [&](int64_t item, int64_t) {
      const int64_t slice = item / steps, row = item % steps * kBackwardStep<Storage>;
      const int64_t b0 = slice / slices_h, h0 = slice % slices_h;
      for (int64_t b = slices_b == 1 ? 0 : b0; b < (slices_b == 1 ? common.batch : b0 + 1); ++b)
        for (int64_t h = slices_h == 1 ? 0 : h0; h < (slices_h == 1 ? heads : h0 + 1); ++h) {
          const AttentionSequence& sequence = plan.sequence(b);
          if (row >= sequence.query_length) continue;
          task(b, h, kGradBias, {row, smaller(row + kBackwardStep<Storage>, sequence.query_length)},
               {0, sequence.key_length});
        }
    });
  } else if (bias && args.partial_bias != nullptr) {
    reduce_bias<T>(args);
  }
  if (common.cu_seqlens_q != nullptr) {
    clear_packed_rows<Storage>(common, args.grad_query, args.grad_query_stride,
                               common.cu_seqlens_q[common.batch], common.seqlen_q);
    clear_packed_rows<Storage>(common, args.grad_key, args.grad_key_stride,
                               common.cu_seqlens_k[common.batch], common.seqlen_k);
    clear_packed_rows<Storage>(common, args.grad_value, args.grad_value_stride,
                               common.cu_seqlens_k[common.batch], common.seqlen_k);
  }
  if (failed) status.code = kOutOfMemory;
  return status;
}

}  // namespace

Status attention_backward(const AttentionBackwardArgs& args) {
  if (args.common.dtype == kFloat32) return run<float>(args);
  if (args.common.dtype == kFloat64) return run<double>(args);
  if (args.common.dtype == kBfloat16) return run<bfloat16>(args);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
