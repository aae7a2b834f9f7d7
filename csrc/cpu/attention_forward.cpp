// Attention forward (Dao et al. 2022; Dao 2023) on CPU. A work item is a range of query rows of one
// (sequence, head).
#include "cpu/amx_attention.h"
#include "cpu/amx_attention_bf16.h"
#include "cpu/attention_attend.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

// Work items one after the other.
template <typename Rows, typename Workspace>
struct InTurn {
  const Workspace& work;
  void run(const AttentionForwardArgs& args, const AttentionSequence& sequence, int64_t index,
           int64_t head, int64_t begin, int64_t end) const {
    Rows(args, sequence, index, head, work).run(begin, end);
  }
  void finish() const {}
};

template <typename Storage>
struct ForwardTask {
  using Workspace = ForwardWorkspace<Storage>;
  using Items = InTurn<Attend<Storage>, Workspace>;
};
#if defined(CTXFAST_AMX)
template <>
struct ForwardTask<float> {
  using Workspace = SplitForwardWorkspace;
  using Items = InTurn<SplitAttend, Workspace>;
};
template <>
struct ForwardTask<bfloat16> {
  using Workspace = CellWorkspace;
  using Items = CellPipeline;
};
#endif

template <typename Storage>
Status run(const AttentionForwardArgs& args) {
  using T = Compute<Storage>;
  using Task = ForwardTask<Storage>;
  const AttentionArgs& common = args.common;
  const AttentionSizes sizes = {keys_per_block(common.head_dim), words_of<Storage>(common.head_dim),
                                round_up(common.head_dim, kLanes<T>), 0, 0};
  AttentionPlan plan;
  Status status = plan.read(common);
  if (status.code != kOk) return status;
  const AttentionPieces pieces =
      plan.split(common, {false, kForwardPiece<Storage>, kForwardRowLimit<Storage>, sizes.block});

  int32_t failed = 0;
  const int64_t count = pieces.count * common.heads;
  const int64_t grain = heads_together(common, count);
  parallel_for(common.threads, count, grain, [&](int64_t first, int64_t last) {
    void* memory = thread_scratch(typename Task::Workspace(nullptr, sizes).bytes);
    if (memory == nullptr) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    const typename Task::Workspace work(memory, sizes);
    [[maybe_unused]] const ProductScope<Storage> scope;
    typename Task::Items items{work};
    for (int64_t item = first; item < last; ++item) {
      const AttentionPiece& piece = pieces.items[item / common.heads];
      items.run(args, plan.sequence(piece.sequence), piece.sequence, item % common.heads,
                piece.begin, piece.end);
    }
    items.finish();
    if (!parts_rows(common)) return;
    memory = thread_scratch(ForwardWorkspace<Storage>(nullptr, sizes).bytes);
    if (memory == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    const ForwardWorkspace<Storage> single(memory, sizes);
    for (int64_t item = first; item < last; ++item) {
      const AttentionPiece& piece = pieces.items[item / common.heads];
      Attend<Storage>(args, plan.sequence(piece.sequence), piece.sequence, item % common.heads,
                      single)
          .part_rows(piece.begin, piece.end);
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
