// Gradients of the character convolutions: of each token and filter only the window that won the
// maximum counts, and it is found again rather than kept. Threads take panels of filters, so each
// gradient of a filter has one owner and tokens are added in order; gradients of the characters are
// kept per panel and added in the order of the panels. Bit for bit the same from run to run.
#include "cpu/char_cnn_windows.h"
#include "cpu/kernel_table.h"
#include "cpu/lstm_cell.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

// y[0 .. n) += a * x[0 .. n)
template <typename T>
CTXFAST_INLINE void add_scaled(T a, const T* x, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(y + i, load(y + i) + a * load(x + i));
  if (i < n) store_n(y + i, load_n(y + i, n - i) + a * load_n(x + i, n - i), n - i);
}

template <typename T>
struct Backward {
  const CharCnnBackwardArgs& all;
  const CharCnnArgs& args;
  const Panels<T>& panels;

  void token(const Panel& panel, int64_t t, const T* packed, T* x, T* dx, T* dembedding) const {
    const int64_t channels = args.channels, size = args.characters * channels;
    embed_token<T>(args, t, args.characters, x);
    for (int64_t i = 0; i < size; ++i) dx[i] = T(0);
    Best<T, true> best;
    best_windows<T, true>(x, channels, packed, panel.depth,
                          windows_of(args, distinct_characters(args, t), args.widths[panel.group]),
                          best);
    T value[kPanel<T>], place[kPanel<T>];
    for (int c = 0; c < kTileColumns; ++c) {
      store(value + c * kLanes<T>, best.value[c]);
      store(place + c * kLanes<T>, best.place[c]);
    }
    const T* grad = static_cast<const T*>(all.grad_output) + t * panels.filters + panel.filter;
    const T* bias = static_cast<const T*>(args.bias) + panel.filter;
    const T* weight = static_cast<const T*>(args.weight) + panel.weight_offset;
    T* dweight = static_cast<T*>(all.grad_weight) + panel.weight_offset;
    T* dbias = static_cast<T*>(all.grad_bias) + panel.filter;
    for (int64_t f = 0; f < panel.count; ++f) {
      const T z = value[f] + bias[f];
      T g = grad[f];
      if (args.relu) {
        if (!(z > T(0))) continue;
      } else {
        const T y = tanh<T>(splat<T>(z))[0];
        g *= T(1) - y * y;
      }
      const int64_t window = int64_t(place[f]) * channels;
      add_scaled(g, x + window, dweight + f * panel.depth, panel.depth);
      add_scaled(g, weight + f * panel.depth, dx + window, panel.depth);
      dbias[f] += g;
    }
    for (int64_t m = 0; m < args.characters; ++m)
      add_scaled(T(1), dx + m * channels, dembedding + character_at(args, t, m) * channels,
                 channels);
  }
};

template <typename T>
Status run(const CharCnnBackwardArgs& all) {
  const CharCnnArgs& args = all.forward;
  const Panels<T> panels(args);
  const int64_t table = args.vocabulary * args.channels;
  const int64_t token_size = args.characters * args.channels;
  Status status;
  T* tables = static_cast<T*>(thread_scratch(sizeof(T) * panels.count * table, kPlanScratch));
  if (tables == nullptr) {
    status.code = kOutOfMemory;
    return status;
  }
  for (int64_t i = 0; i < panels.count * table; ++i) tables[i] = T(0);
  const Backward<T> backward = {all, args, panels};
  int32_t failed = 0;
  parallel_for(args.threads, panels.count, 1, [&](int64_t first, int64_t last) {
    int64_t number = 0;
    panels.for_each([&](const Panel& panel) {
      const int64_t own = number++;
      if (own < first || own >= last) return;
      T* packed =
          static_cast<T*>(thread_scratch(sizeof(T) * (panel.depth * kPanel<T> + 2 * token_size)));
      if (packed == nullptr) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      T* x = packed + panel.depth * kPanel<T>;
      pack_panel<T>(args, panel, packed);
      for (int64_t t = 0; t < args.tokens; ++t)
        backward.token(panel, t, packed, x, x + token_size, tables + own * table);
    });
  });
  if (failed) status.code = kOutOfMemory;
  T* dembedding = static_cast<T*>(all.grad_embedding);
  for (int64_t panel = 0; panel < panels.count; ++panel)
    add_scaled(T(1), tables + panel * table, dembedding, table);
  return status;
}

}  // namespace

// The gradients must hold zeros.
Status char_cnn_backward(const CharCnnBackwardArgs& args) {
  const Status status = check_characters(args.forward);
  if (status.code != kOk) return status;
  if (args.forward.dtype == kFloat32) return run<float>(args);
  if (args.forward.dtype == kFloat64) return run<double>(args);
  Status unsupported;
  unsupported.code = kUnsupportedDtype;
  return unsupported;
}

CTXFAST_NAMESPACE_END
