// Back through time for an LSTM with projection (Werbos 1990): what cannot be put off until after
// the loop. The gradients of the weights and of the input are single products of what this leaves
// behind.
//
// A step has two products. dprojected W_hr gives the gradient of o * tanh(c), from which the
// gradients of the gates follow in registers; dgates W_hh gives that of the state before, from
// which the next dprojected follows. A thread takes a chunk of units through both, so that what
// lies between them stays in its caches. It leaves what the chunk contributes to the gradient of
// the state; threads then share the outputs to sum these up, in a fixed order. A barrier over the
// team follows each half.
#include "cpu/kernel_table.h"
#include "cpu/lstm_backward_state.h"
#include "cpu/lstm_call.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

template <typename S, typename W>
struct Backward : BackwardState<S, W> {
  using State = BackwardState<S, W>;
  using T = typename State::T;
  using Workspace = typename State::Workspace;
  using State::BackwardState;
  using State::cell_stride, State::clear_gates, State::dcell, State::dprojected,
      State::dprojected_parts, State::dstate, State::extreme, State::finish, State::kWidth,
      State::layout, State::multiply, State::note, State::on_tiles, State::order, State::padded,
      State::partial, State::partial_scale, State::sizes, State::split, State::start,
      State::state_stride, State::way, State::workspace;

  int64_t state_vectors() const { return (sizes.features + kWidth - 1) / kWidth; }
  int64_t unit_vectors() const { return (sizes.hidden + kWidth - 1) / kWidth; }
  int64_t chunk_vectors() const { return layout.chunks.size / kWidth; }

  // dstate of the rows of a step: the sum of what the chunks have left.
  void add_chunks(int64_t rows, int64_t first, int64_t last) const {
    const int64_t size = padded(sizes.batch) * state_stride;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t column = first * kWidth; column < last * kWidth; column += kWidth) {
        Vec<T> sum = {};
        for (int64_t chunk = 0; chunk < layout.chunks.count; ++chunk)
          sum += partial_scale[chunk] * load(partial + chunk * size + i * state_stride + column);
        store_n(dstate + i * state_stride + column, sum, sizes.features - column);
      }
  }

  // dprojected of a step, for vectors [first, last): the state's gradient through mask and clip.
  void project_gradients(int64_t step, int64_t first, int64_t last) const {
    Vec<T> largest = {};
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
          const T* projected =
              this->template at<T>(way.kept_projected, row, position, sizes.features) + column;
          value = inside<T>(value, load_n(projected, n), T(sizes.proj_clip));
        }
        store_n(dprojected + i * state_stride + column, value, n);
        split(value, dprojected_parts, i, state_stride, column, n);
        largest = vmax(State::magnitude(value), largest);
        if (way.dprojected != nullptr)
          store_n(this->template at<S>(way.dprojected, row, position, sizes.features) + column,
                  value, n);
      }
    }
    note(largest, extreme + step);
  }

  // The gradients of the gates of one row and one vector of units, place of its chunk.
  CTXFAST_INLINE void gate_gradients(Vec<T> full, int64_t i, int64_t step, int64_t unit,
                                     int64_t place, const Workspace& space, Vec<T>& largest) const {
    const int64_t hidden = sizes.hidden, n = hidden - unit, row = order.row[i];
    const int64_t position = order.position(i, step, way.reverse);
    const S* gates = this->template at<S>(way.kept_gates, row, position, kGates * hidden) + unit;
    const Vec<T> in = load_n(gates, n), forget = load_n(gates + hidden, n),
                 candidate = load_n(gates + 2 * hidden, n), out = load_n(gates + 3 * hidden, n);
    const Vec<T> cell =
        load_n(this->template at<T>(way.kept_cells, row, position, hidden) + unit, n);
    Vec<T> before;
    if (step == 0) {
      before = load_n(static_cast<const T*>(way.c0) + row * hidden + unit, n);
    } else {
      const int64_t earlier = position + (way.reverse ? 1 : -1);
      before = clip<T>(load_n(this->template at<T>(way.kept_cells, row, earlier, hidden) + unit, n),
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
      store_n(this->template at<S>(way.full, row, position, hidden) + unit, out * tanh_c, n);
    S* stored = this->template at<S>(way.dgates, row, position, kGates * hidden) + unit;
    for (int g = 0; g < kGates; ++g) {
      const int64_t column = g * layout.chunks.size + place;
      store_n(stored + g * hidden, found[g], n);
      store(space.dgates + i * space.stride + column, found[g]);
      split(found[g], space.parts, i, space.stride, column, kWidth);
      largest = vmax(State::magnitude(found[g]), largest);
    }
  }

  // A chunk of units of a step.
  void chunk_step(int64_t step, int64_t rows, int64_t chunk, const Team& team) const {
    const Workspace space = workspace(team);
    const int64_t begin = chunk * chunk_vectors(), depth = layout.chunks.depth();
    const int64_t after = begin + chunk_vectors();
    const int64_t end = after < unit_vectors() ? after : unit_vectors();
    const T* full = dprojected + begin * kWidth;
    int64_t full_stride = state_stride;
    T lower = T(1);
    const auto projection = layout.vectors_of(way.packed, kProjectionPanel);
    const auto states = layout.vectors_of(way.packed, kStatePanel);
    const int64_t word = chunk * depth / W::kPack, words = depth / W::kPack;
    if (sizes.projected) {
      lower = multiply({dprojected, dprojected_parts, state_stride}, on_tiles(rows, extreme[step]),
                       projection, 0, projection.words, states.at(0, word), space.dfull,
                       full_stride = space.full_stride, rows, begin, end, space);
      full = space.dfull;
    }
    Vec<T> largest = {};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t place = 0; place < layout.chunks.size; place += kWidth) {
        const int64_t unit = begin * kWidth + place;
        if (unit >= sizes.hidden) {
          clear_gates(i, place, space);
          continue;
        }
        gate_gradients(lower * load(full + i * full_stride + place), i, step, unit, place, space,
                       largest);
      }
    int32_t large = 0;
    note(largest, &large);
    const int64_t next = after < unit_vectors() ? after : 0;
    partial_scale[chunk] =
        multiply({space.dgates, space.parts, space.stride}, on_tiles(rows, large), states, word,
                 words, sizes.projected ? projection.at(next) : states.at(0, word),
                 partial + chunk * padded(sizes.batch) * state_stride, state_stride, rows, 0,
                 state_vectors(), space);
  }

  void run(const Team& team) const {
#if defined(CTXFAST_AMX)
    const MatrixTiles tiles;
#endif
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
      team.share(layout.chunks.count,
                 [&](int64_t chunk, int64_t) { chunk_step(step, rows, chunk, team); });
      team.wait();
      team.share_vectors(state_vectors(), [&](int64_t first, int64_t last) {
        add_chunks(rows, first, last);
        if (step > 0) project_gradients(step - 1, first, last);
      });
      team.wait();
    }
    finish(team);
  }
};

template <typename S, typename W>
Status run(const LstmBackwardArgs& given, WeightType weight, bool* ordinary = nullptr) {
  using Way = Backward<S, W>;
  LstmBackwardArgs args = given;
  const LstmSizes& sizes = args.sizes;
  Status status;
  const PackedLayout<W> layout(0, sizes.hidden, sizes.features, sizes.projected, true);
  const int64_t order_bytes = round_up(RowOrder::bytes(sizes), 64);
  const int64_t bytes = Way::bytes(sizes, layout);
  char* memory = static_cast<char*>(thread_scratch(order_bytes + args.count * bytes));
  if (memory == nullptr) {
    status.code = kOutOfMemory;
    return status;
  }
  const RowOrder order(sizes, memory);
  return for_packed_directions(
      args, layout, weight, {true, true}, ordinary, [&](int first, int count) {
        for_each_direction(sizes.threads, count, count > 1, [&](int direction, const Team& team) {
          const int k = first + direction;
          const Way way(sizes, args.directions[k], order, layout, memory + order_bytes + k * bytes);
          way.run(team);
        });
      });
}

}  // namespace

Status lstm_backward(const LstmBackwardArgs& args) {
  const Dtype dtype = args.sizes.dtype;
#if defined(CTXFAST_AMX)
  if (splits_weights(args.sizes, args.count)) {
    bool ordinary = true;
    const Status status = run<float, SplitWeight>(args, kSplitWeight, &ordinary);
    if (ordinary) return status;
  }
#endif
  if (dtype == kFloat64) return run<double, PlainWeight<double> >(args, kPlainWeight);
  if (dtype == kFloat32) return run<float, PlainWeight<float> >(args, kPlainWeight);
  if (dtype == kBfloat16) return run<bfloat16, HalfWeight>(args, kBfloat16Weight);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
