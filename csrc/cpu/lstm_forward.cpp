// The loop over time of an LSTM with projection (Hochreiter, Schmidhuber 1997; Sak, Senior,
// Beaufays 2014).
//
// One direction runs over the whole sequence, so that its weights stay in whatever cache holds
// them. A step has two products, each followed by a barrier over the team: the gates, whose four
// vectors of the same units meet in registers and become c and o * tanh(c) at once, and the
// projection. Threads split units and outputs. A row's sums are added up in the order of the depth,
// so its result does not depend on how many threads or other rows there are.
#include "cpu/kernel_table.h"
#include "cpu/lstm_cell.h"
#include "cpu/lstm_team.h"
#include "cpu/lstm_weights.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

template <typename S, typename W>
struct Forward {
  using T = Compute<S>;
  static constexpr int64_t kWidth = kLanes<T>;

  const LstmSizes& sizes;
  const LstmForwardDirection& way;
  const RowOrder& order;
  const PackedLayout<W>& layout;
  // Row strides are whole vectors and one more, so that rows do not share a set of the cache.
  int64_t state_stride, cell_stride;
  T* state[2];  // h [B, P]; the second one only without projection, where a step writes the other
  T* cell;      // c [B, H]
  T* full;      // o * tanh(c) [B, H]

  static int64_t stride(int64_t columns) { return round_up(columns, kWidth) + kWidth; }
  static int64_t elements(const LstmSizes& sizes) {
    return sizes.batch * (2 * stride(sizes.features) + 2 * stride(sizes.hidden));
  }

  Forward(const LstmSizes& s, const LstmForwardDirection& w, const RowOrder& o,
          const PackedLayout<W>& l, T* memory)
      : sizes(s), way(w), order(o), layout(l) {
    state_stride = stride(s.features);
    cell_stride = stride(s.hidden);
    state[0] = memory;
    state[1] = state[0] + s.batch * state_stride;
    cell = state[1] + s.batch * state_stride;
    full = cell + s.batch * cell_stride;
  }

  const S* gates_of(int64_t row, int64_t position) const {
    return static_cast<const S*>(way.gates) + row * way.gates_stride[0] +
           position * way.gates_stride[1];
  }
  S* output_of(int64_t row, int64_t position) const {
    return static_cast<S*>(way.output) + row * way.output_stride[0] +
           position * way.output_stride[1];
  }
  template <typename P>
  P* kept(void* base, int64_t row, int64_t position, int64_t columns) const {
    return static_cast<P*>(base) + (row * sizes.steps + position) * columns;
  }

  void start(const Team& team) const {
    for (int64_t i = team.rank; i < sizes.batch; i += team.size) {
      const int64_t row = order.row[i], features = sizes.features, hidden = sizes.hidden;
      for (int64_t k = 0; k < state_stride; k += kWidth)
        for (int s = 0; s < 2; ++s) store(state[s] + i * state_stride + k, Vec<T>{});
      for (int64_t k = 0; k < cell_stride; k += kWidth) {
        store(cell + i * cell_stride + k, Vec<T>{});
        store(full + i * cell_stride + k, Vec<T>{});
      }
      copy(static_cast<const S*>(way.h0) + row * features, state[0] + i * state_stride, features);
      copy(static_cast<const T*>(way.c0) + row * hidden, cell + i * cell_stride, hidden);
      for (int64_t t = order.length[i]; t < sizes.steps; ++t) {
        clear(output_of(row, t), features);
        if (way.kept_gates != nullptr) {
          clear(kept<S>(way.kept_gates, row, t, kGates * hidden), kGates * hidden);
          clear(kept<T>(way.kept_cells, row, t, hidden), hidden);
        }
        if (way.kept_projected != nullptr)
          clear(kept<T>(way.kept_projected, row, t, features), features);
      }
    }
  }

  void finish(const Team& team) const {
    for (int64_t i = team.rank; i < sizes.batch; i += team.size) {
      const int64_t row = order.row[i], features = sizes.features, hidden = sizes.hidden;
      const T* h = state[sizes.projected ? 0 : order.length[i] % 2] + i * state_stride;
      for (int64_t k = 0; k < features; k += kWidth)
        store_n(static_cast<S*>(way.h) + row * features + k, load(h + k), features - k);
      for (int64_t k = 0; k < hidden; k += kWidth)
        store_n(static_cast<T*>(way.c) + row * hidden + k, load(cell + i * cell_stride + k),
                hidden - k);
    }
  }

  Vec<T> masked(Vec<T> h, int64_t row, int64_t column, int64_t n) const {
    if (way.mask == nullptr) return h;
    return h * load_n(static_cast<const T*>(way.mask) + row * sizes.features + column, n);
  }

  // z: the recurrent part of the four gates of one row and one vector of units.
  CTXFAST_INLINE void finish_cell(const Vec<T> (&recurrent)[kGates], const T* scales, int64_t i,
                                  int64_t step, int64_t unit) const {
    const int64_t n = sizes.hidden - unit, hidden = sizes.hidden, row = order.row[i];
    const int64_t position = order.position(i, step, way.reverse);
    const S* x = gates_of(row, position) + unit;
    Vec<T> z[kGates];
    for (int g = 0; g < kGates; ++g) {
      z[g] = recurrent[g];
      if constexpr (W::kScaled) z[g] = z[g] * load(scales + g * kWidth);
      z[g] = load_n(x + g * hidden, n) + z[g];
    }
    const Vec<T> in = sigmoid<T>(z[0]), forget = sigmoid<T>(z[1]), candidate = tanh<T>(z[2]),
                 out = sigmoid<T>(z[3]);
    T* c = cell + i * cell_stride + unit;
    const Vec<T> before_clip = forget * load(c) + in * candidate;
    const Vec<T> after = clip<T>(before_clip, T(sizes.cell_clip));
    store(c, after);
    const Vec<T> value = out * tanh<T>(after);
    if (way.kept_gates != nullptr) {
      S* gates = kept<S>(way.kept_gates, row, position, kGates * hidden) + unit;
      store_n(gates, in, n);
      store_n(gates + hidden, forget, n);
      store_n(gates + 2 * hidden, candidate, n);
      store_n(gates + 3 * hidden, out, n);
      store_n(kept<T>(way.kept_cells, row, position, hidden) + unit, before_clip, n);
    }
    if (sizes.projected) {
      store(full + i * cell_stride + unit, rounded(static_cast<const S*>(nullptr), value));
    } else {
      const Vec<T> h = rounded(static_cast<const S*>(nullptr), masked(value, row, unit, n));
      store_n(state[(step + 1) % 2] + i * state_stride + unit, h, n);
      store_n(output_of(row, position) + unit, h, n);
    }
  }

  // What the input contributes to the next units comes from memory: ask for it early.
  CTXFAST_INLINE void prefetch_gates(int64_t rows, int64_t step, int64_t unit) const {
    if (unit >= sizes.hidden) return;
    for (int64_t i = 0; i < rows; ++i) {
      const S* x = gates_of(order.row[i], order.position(i, step, way.reverse)) + unit;
      for (int g = 0; g < kGates; ++g) __builtin_prefetch(x + g * sizes.hidden);
    }
  }

  void gates_step(int64_t step, int64_t rows, const Team& team) const {
    const int64_t blocks = (sizes.hidden + kWidth - 1) / kWidth;
    const typename W::Word* panel = layout.words_of(way.packed, 0);
    const T* scales = layout.scales_of(way.packed, 0);
    const T* h = state[sizes.projected ? 0 : step % 2];
    for (int64_t block = team.begin(blocks); block < team.end(blocks); ++block) {
      prefetch_gates(rows, step, (block + 1) * kWidth);
      const typename W::Word* weights = panel + block * layout.words[0] * kGates * kWidth;
      for_row_tiles(rows, [&](auto count, int64_t first) {
        constexpr int kRows = decltype(count)::value;
        Vec<T> sum[kRows][kGates] = {};
        multiply_in_pieces<W, kRows, kGates>(h + first * state_stride, state_stride, weights,
                                             kGates * kWidth, kWidth, layout.words[0], sum);
        for (int r = 0; r < kRows; ++r)
          finish_cell(sum[r], scales + block * kGates * kWidth, first + r, step, block * kWidth);
      });
    }
  }

  void projection_step(int64_t step, int64_t rows, const Team& team) const {
    const int64_t vectors = (sizes.features + kWidth - 1) / kWidth;
    const int64_t begin = team.begin(vectors), end = team.end(vectors);
    const T* scales = layout.scales_of(way.packed, 1);
    T* h = state[0];
    multiply_vectors<W>(full, cell_stride, layout.words_of(way.packed, 1), layout.words[1], h,
                        state_stride, rows, begin, end);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = order.row[i], position = order.position(i, step, way.reverse);
      for (int64_t column = begin * kWidth; column < end * kWidth; column += kWidth) {
        const int64_t n = sizes.features - column;
        T* place = h + i * state_stride + column;
        Vec<T> projected = load(place);
        if constexpr (W::kScaled) projected = projected * load(scales + column);
        if (way.kept_projected != nullptr)
          store_n(kept<T>(way.kept_projected, row, position, sizes.features) + column, projected,
                  n);
        projected = masked(clip<T>(projected, T(sizes.proj_clip)), row, column, n);
        projected = rounded(static_cast<const S*>(nullptr), projected);
        store_n(place, projected, n);
        store_n(output_of(row, position) + column, projected, n);
      }
    }
  }

  void run(const Team& team) const {
    start(team);
    team.wait();
    for (int64_t step = 0; step < sizes.steps && order.active[step] > 0; ++step) {
      gates_step(step, order.active[step], team);
      team.wait();
      if (!sizes.projected) continue;
      projection_step(step, order.active[step], team);
      team.wait();
    }
    finish(team);
  }
};

template <typename S, typename W>
Status run(const LstmForwardArgs& args) {
  using Way = Forward<S, W>;
  using T = Compute<S>;
  const LstmSizes& sizes = args.sizes;
  Status status;
  const PackedLayout<W> layout(sizes.hidden, sizes.features, sizes.projected, false);
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

Status lstm_forward(const LstmForwardArgs& args) {
  const Dtype dtype = args.sizes.dtype;
  if (dtype == kFloat64 && args.weight == kPlainWeight)
    return run<double, PlainWeight<double> >(args);
  if (dtype == kFloat32 && args.weight == kPlainWeight)
    return run<float, PlainWeight<float> >(args);
  if (dtype == kFloat32 && args.weight == kBfloat16Weight) return run<float, HalfWeight>(args);
  if (dtype == kFloat32 && args.weight == kInt8Weight) return run<float, ByteWeight>(args);
  if (dtype == kBfloat16 && args.weight == kBfloat16Weight) return run<bfloat16, HalfWeight>(args);
  if (dtype == kBfloat16 && args.weight == kInt8Weight) return run<bfloat16, ByteWeight>(args);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
