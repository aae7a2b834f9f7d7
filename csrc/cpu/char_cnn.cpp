// Character convolutions of all widths, their maximum over positions and the activation (Peters et
// al., 2018; Kim et al., 2016), without a [tokens, filters, positions] array: windows are rows of a
// small matrix product whose maxima stay in registers. Threads take tokens; a panel of filters
// serves a few tokens while it is in the first cache.
#include "cpu/char_cnn_windows.h"
#include "cpu/kernel_table.h"
#include "cpu/lstm_cell.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

constexpr int64_t kTokensPerPiece = 16;

template <typename Storage>
Status run(const CharCnnArgs& args) {
  using T = Compute<Storage>;
  Status status;
  const Panels<T> panels(args);
  T* packed = static_cast<T*>(thread_scratch(sizeof(T) * panels.packed, kPlanScratch));
  if (packed == nullptr) {
    status.code = kOutOfMemory;
    return status;
  }
  panels.for_each(
      [&](const Panel& panel) { pack_panel<Storage>(args, panel, packed + panel.packed_offset); });
  int64_t grain = (args.tokens + 2 * args.threads - 1) / (2 * args.threads);
  if (grain > kTokensPerPiece) grain = kTokensPerPiece;
  const int64_t token_size = args.characters * args.channels;
  const Storage* bias = static_cast<const Storage*>(args.bias);
  int32_t failed = 0;
  parallel_for(args.threads, args.tokens, grain, [&](int64_t first, int64_t last) {
    T* x = static_cast<T*>(thread_scratch(sizeof(T) * token_size * (last - first)));
    if (x == nullptr) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    int64_t distinct[kTokensPerPiece];
    for (int64_t t = first; t < last; ++t) {
      distinct[t - first] = distinct_characters(args, t);
      embed_token<Storage>(args, t, args.characters, x + (t - first) * token_size);
    }
    panels.for_each([&](const Panel& panel) {
      const int64_t width = args.widths[panel.group];
      for (int64_t t = first; t < last; ++t) {
        Best<T, false> best;
        best_windows<T, false>(x + (t - first) * token_size, args.channels,
                               packed + panel.packed_offset, panel.depth,
                               windows_of(args, distinct[t - first], width), best);
        Storage* out = static_cast<Storage*>(args.output) + t * panels.filters + panel.filter;
        for (int c = 0; c < kTileColumns && c * kLanes<T> < panel.count; ++c) {
          const int64_t left = panel.count - c * kLanes<T>;
          const Vec<T> z = best.value[c] + load_n(bias + panel.filter + c * kLanes<T>, left);
          store_n(out + c * kLanes<T>, args.relu ? vmax(Vec<T>{}, z) : tanh<T>(z), left);
        }
      }
    });
  });
  if (failed) status.code = kOutOfMemory;
  return status;
}

}  // namespace

Status char_cnn(const CharCnnArgs& args) {
  const Status status = check_characters(args);
  if (status.code != kOk) return status;
  if (args.dtype == kFloat32) return run<float>(args);
  if (args.dtype == kFloat64) return run<double>(args);
  if (args.dtype == kBfloat16) return run<bfloat16>(args);
  Status unsupported;
  unsupported.code = kUnsupportedDtype;
  return unsupported;
}

CTXFAST_NAMESPACE_END
