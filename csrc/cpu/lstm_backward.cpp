// Back through time for an LSTM with projection (Werbos 1990): what cannot be put off until after
// the loop. The gradients of the weights and of the input are single products of what this leaves
// behind.
//
// A step has two products, each followed by a barrier over the team. dprojected W_hr gives the
// gradient of o * tanh(c), from which the gradients of the gates follow in registers; dgates W_hh
// gives that of the state before, from which the next dprojected follows. Threads share units and
// outputs, and sums have a fixed order, as in the forward pass.
#include "cpu/kernel_table.h"
#include "cpu/lstm_cell.h"
#include "cpu/lstm_team.h"
#include "cpu/lstm_weights.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

template <typename S, typename W>
struct Backward {
  using T = Compute<S>;
  static constexpr int64_t kWidth = kLanes<T>;

  const LstmSizes& sizes;
  const LstmBackwardDirection& way;
  const RowOrder& order;
  const PackedLayout<W>& layout;
  int64_t state_stride, cell_stride, gates_stride;
  T* dstate;      // dh [B, P]
  T* dprojected;  // [B, P]
  T* dcell;       // dc [B, H]
  T* dfull;       // gradient of o * tanh(c) [B, H]
  T* dgates;      // [B, 4H]

  static int64_t stride(int64_t columns) { return round_up(columns, kWidth) + kWidth; }
  static int64_t elements(const LstmSizes& s) {
    return s.batch * (2 * stride(s.features) + 2 * stride(s.hidden) + stride(kGates * s.hidden));
  }

  Backward(const LstmSizes& s, const LstmBackwardDirection& w, const RowOrder& o,
           const PackedLayout<W>& l, T* memory)
      : sizes(s), way(w), order(o), layout(l) {
    state_stride = stride(s.features);
    cell_stride = stride(s.hidden);
    gates_stride = stride(kGates * s.hidden);
    dstate = memory;
    dprojected = dstate + s.batch * state_stride;
    dcell = dprojected + s.batch * state_stride;
    dfull = dcell + s.batch * cell_stride;
    dgates = dfull + s.batch * cell_stride;
  }

  template <typename P>
  P* at(void* base, int64_t row, int64_t position, int64_t columns) const {
    return static_cast<P*>(base) + (row * sizes.steps + position) * columns;
  }
  template <typename P>
  const P* at(const void* base, int64_t row, int64_t position, int64_t columns) const {
    return static_cast<const P*>(base) + (row * sizes.steps + position) * columns;
  }

  void start(const Team& team) const {
    const int64_t features = sizes.features, hidden = sizes.hidden, gates = kGates * hidden;
    for (int64_t i = team.rank; i < sizes.batch; i += team.size) {
      const int64_t row = order.row[i];
      // The words of a padded depth are read as well, against weights of 0: they must be finite.
      for (int64_t k = 0; k < state_stride; k += kWidth) {
        store(dstate + i * state_stride + k, Vec<T>{});
        store(dprojected + i * state_stride + k, Vec<T>{});
      }
      for (int64_t k = 0; k < gates_stride; k += kWidth)
        store(dgates + i * gates_stride + k, Vec<T>{});
      copy(static_cast<const S*>(way.grad_h) + row * features, dstate + i * state_stride, features);
      copy(static_cast<const T*>(way.grad_c) + row * hidden, dcell + i * cell_stride, hidden);
      for (int64_t t = order.length[i]; t < sizes.steps; ++t) {
        clear(at<S>(way.dgates, row, t, gates), gates);
        if (way.dprojected != nullptr) clear(at<S>(way.dprojected, row, t, features), features);
        if (way.full != nullptr) clear(at<S>(way.full, row, t, hidden), hidden);
      }
    }
  }

  void finish(const Team& team) const {
    const int64_t features = sizes.features, hidden = sizes.hidden;
    for (int64_t i = team.rank; i < sizes.batch; i += team.size) {
      const int64_t row = order.row[i];
      for (int64_t k = 0; k < features; k += kWidth)
        store_n(static_cast<S*>(way.dh0) + row * features + k, load(dstate + i * state_stride + k),
                features - k);
      for (int64_t k = 0; k < hidden; k += kWidth)
        store_n(static_cast<T*>(way.dc0) + row * hidden + k,
                load_n(dcell + i * cell_stride + k, hidden - k), hidden - k);
    }
  }

  int64_t state_vectors() const { return (sizes.features + kWidth - 1) / kWidth; }
  int64_t unit_vectors() const { return (sizes.hidden + kWidth - 1) / kWidth; }

  // dprojected of a step, for vectors [first, last): the state's gradient through mask and clip.
  void project_gradients(int64_t step, int64_t first, int64_t last) const {
    for (int64_t i = 0; i < order.active[step]; ++i) {
      const int64_t row = order.row[i], position = order.position(i, step, way.reverse);
      const S* grad = static_cast<const S*>(way.grad_output) + row * way.grad_output_stride[0] +
                      position * way.grad_output_stride[1];
      for (int64_t column = first * kWidth; column < last * kWidth; column += kWidth) {
        const int64_t n = sizes.features - column;
        Vec<T> value = load(dstate + i * state_stride + column) + load_n(grad + column, n);
        if (way.mask != nullptr)
          value =
              value * load_n(static_cast<const T*>(way.mask) + row * sizes.features + column, n);
        if (way.kept_projected != nullptr) {
          const T* projected = at<T>(way.kept_projected, row, position, sizes.features) + column;
          value = inside<T>(value, load_n(projected, n), T(sizes.proj_clip));
        }
        store_n(dprojected + i * state_stride + column, value, n);
        if (way.dprojected != nullptr)
          store_n(at<S>(way.dprojected, row, position, sizes.features) + column, value, n);
      }
    }
  }

  // The gradients of the gates of one row and one vector of units.
  CTXFAST_INLINE void gate_gradients(Vec<T> full, int64_t i, int64_t step, int64_t unit) const {
    const int64_t hidden = sizes.hidden, n = hidden - unit, row = order.row[i];
    const int64_t position = order.position(i, step, way.reverse);
    const S* gates = at<S>(way.kept_gates, row, position, kGates * hidden) + unit;
    const Vec<T> in = load_n(gates, n), forget = load_n(gates + hidden, n),
                 candidate = load_n(gates + 2 * hidden, n), out = load_n(gates + 3 * hidden, n);
    const Vec<T> cell = load_n(at<T>(way.kept_cells, row, position, hidden) + unit, n);
    Vec<T> before;
    if (step == 0) {
      before = load_n(static_cast<const T*>(way.c0) + row * hidden + unit, n);
    } else {
      const int64_t earlier = position + (way.reverse ? 1 : -1);
      before = clip<T>(load_n(at<T>(way.kept_cells, row, earlier, hidden) + unit, n),
                       T(sizes.cell_clip));
    }
    T* dc = dcell + i * cell_stride + unit;
    const Vec<T> tanh_c = tanh<T>(clip<T>(cell, T(sizes.cell_clip)));
    const Vec<T> inner = load_n(dc, n) + full * out * (T(1) - tanh_c * tanh_c);
    const Vec<T> gradient = inside<T>(inner, cell, T(sizes.cell_clip));
    const Vec<T> found[kGates] = {
        gradient * candidate * in * (T(1) - in), gradient * before * forget * (T(1) - forget),
        gradient * in * (T(1) - candidate * candidate), full * tanh_c * out * (T(1) - out)};
    store_n(dc, gradient * forget, n);
    if (way.full != nullptr)
      store_n(at<S>(way.full, row, position, hidden) + unit, out * tanh_c, n);
    S* stored = at<S>(way.dgates, row, position, kGates * hidden) + unit;
    T* kept = dgates + i * gates_stride + unit;
    for (int g = 0; g < kGates; ++g) {
      store_n(stored + g * hidden, found[g], n);
      store_n(kept + g * hidden, found[g], n);
    }
  }

  // The gradients of the gates of vectors [first, last) of units.
  void units_step(int64_t step, int64_t rows, int64_t first, int64_t last) const {
    const T* full = dfull;
    int64_t full_stride = cell_stride;
    if (sizes.projected) {
      multiply_vectors<W>(dprojected, state_stride, layout.words_of(way.packed, kProjectionPanel),
                          layout.words[kProjectionPanel], dfull, cell_stride, rows, first, last);
    } else {
      full = dprojected;
      full_stride = state_stride;
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t unit = first * kWidth; unit < last * kWidth; unit += kWidth)
        gate_gradients(load(full + i * full_stride + unit), i, step, unit);
  }

  void run(const Team& team) const {
    int64_t step = sizes.steps;
    while (step > 0 && order.active[step - 1] == 0) --step;
    start(team);
    team.wait();
    team.share_vectors(state_vectors(), [&](int64_t first, int64_t last) {
      if (step > 0) project_gradients(step - 1, first, last);
    });
    team.wait();
    for (--step; step >= 0; --step) {
      const int64_t rows = order.active[step];
      team.share_vectors(unit_vectors(),
                         [&](int64_t first, int64_t last) { units_step(step, rows, first, last); });
      team.wait();
      team.share_vectors(state_vectors(), [&](int64_t first, int64_t last) {
        multiply_vectors<W>(dgates, gates_stride, layout.words_of(way.packed, kStatePanel),
                            layout.words[kStatePanel], dstate, state_stride, rows, first, last);
        if (step > 0) project_gradients(step - 1, first, last);
      });
      team.wait();
    }
    finish(team);
  }
};

template <typename S, typename W>
Status run(const LstmBackwardArgs& args) {
  using Way = Backward<S, W>;
  using T = Compute<S>;
  const LstmSizes& sizes = args.sizes;
  Status status;
  const PackedLayout<W> layout(0, sizes.hidden, sizes.features, sizes.projected, true);
  const int64_t order_bytes = round_up(RowOrder::bytes(sizes), 64);
  const int64_t elements = Way::elements(sizes);
  char* memory =
      static_cast<char*>(thread_scratch(order_bytes + args.count * elements * int64_t(sizeof(T))));
  if (memory == nullptr) {
    status.code = kOutOfMemory;
    return status;
  }
  const RowOrder order(sizes, memory);
  T* buffers = reinterpret_cast<T*>(memory + order_bytes);
  const bool together = args.count * layout.bytes <= kTogetherBytes;
  for_each_direction(sizes.threads, args.count, together, [&](int direction, const Team& team) {
    const Way way(sizes, args.directions[direction], order, layout, buffers + direction * elements);
    way.run(team);
  });
  return status;
}

}  // namespace

Status lstm_backward(const LstmBackwardArgs& args) {
  if (args.sizes.dtype == kFloat64) return run<double, PlainWeight<double> >(args);
  if (args.sizes.dtype == kFloat32) return run<float, PlainWeight<float> >(args);
  if (args.sizes.dtype == kBfloat16) return run<bfloat16, HalfWeight>(args);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
