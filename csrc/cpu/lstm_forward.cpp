// The loop over time of an LSTM with projection (Hochreiter, Schmidhuber 1997; Sak, Senior,
// Beaufays 2014).
//
// One direction runs over the whole sequence, so that its weights stay in whatever cache holds
// them. What the input contributes to the gates is one product for a few steps at a time: enough
// rows to read weight_ih once for all of them, few enough for a cache. A step has two products,
// each followed by a barrier over the team: the gates, whose four vectors of the same units meet in
// registers and become c and o * tanh(c) at once, and the projection. Threads share units and
// outputs. A row's sums are added up in the order of the depth, so its result does not depend on
// how many threads or other rows there are.
#include "cpu/kernel_table.h"
#include "cpu/lstm_call.h"
#include "cpu/lstm_forward_state.h"
#include "cpu/lstm_inputs.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

// bfloat16 states with bfloat16 weights: without rounding anything, on whatever the CPU has.
#if defined(CTXFAST_AVX512_BF16)
using PairWeight = HalfPairWeight;
#else
using PairWeight = HalfWeight;
#endif

template <typename S, typename W>
struct Forward : ForwardState<S, W> {
  using State = ForwardState<S, W>;
  using T = typename State::T;
  using Element = typename State::Element;
  using Tiles = typename State::Tiles;
  using State::ahead, State::block_sums, State::cell, State::cell_stride, State::finish,
      State::full, State::full_parts, State::gate_rows, State::gates_block, State::given,
      State::input, State::input_extreme, State::input_parts, State::input_rows,
      State::input_stride, State::kBlock, State::kChecks, State::kInputFirst, State::kSplits,
      State::kWidth, State::layout, State::lowered, State::lowering, State::magnitude,
      State::masked, State::multiply_on_tiles, State::next_block, State::note, State::on_tiles,
      State::order, State::ordinary, State::output_of, State::padded, State::plain, State::sizes,
      State::space, State::split, State::split_row, State::start, State::state,
      State::state_extreme, State::state_parts, State::state_stride, State::sums, State::way;
  using State::ForwardState;

  // Adds up what the input contributes to the gates of this thread's units, from step `first` on.
  // Returns the step after the last one that it took.
  int64_t input_product(int64_t first, const Team& team) const {
    int64_t rows = 0, last = first;
    while (last < sizes.steps && order.active[last] > 0 &&
           rows + order.active[last] <= input_rows(sizes)) {
      for (int64_t i = 0; i < order.active[last]; ++i, ++rows) {
        if (rows % team.size != team.rank) continue;
        const S* x = static_cast<const S*>(way.input) + order.row[i] * way.input_stride[0] +
                     order.position(i, last, way.reverse) * way.input_stride[1];
        Element* line = input + rows * input_stride;
        for (int64_t k = 0; k < input_stride; k += kWidth)
          store(line + k, load_n(x + k, sizes.inputs - k));
        if constexpr (kSplits)
          split_row(input, input_parts, rows, input_stride, input_extreme + first);
      }
      ++last;
    }
    team.wait();
    const int64_t words = layout.words[kInputPanel];
    const bool tiles = on_tiles(rows, input_extreme + first);
    team.share(blocks(), [&](int64_t block, int64_t end) {
      const typename W::Word* weights = gates_block(kInputPanel, block, team);
      const T* scales = layout.scales_of(way.packed, kInputPanel, block * kBlock);
      Vec<T> bias[kGates] = {};
      if (way.bias != nullptr)
        for (int g = 0; g < kGates; ++g)
          bias[g] = load_n(static_cast<const S*>(way.bias) + g * sizes.hidden + block * kWidth,
                           sizes.hidden - block * kWidth);
      T* out = given + block * input_rows(sizes) * kBlock;
      if (tiles) {
        multiply_on_tiles(input_parts, input_rows(sizes), input_stride, weights, kBlock, kWidth,
                          words, next_block(kInputPanel, block, end), out, kBlock, rows, kGates,
                          team);
        for (int64_t r = 0; r < rows; ++r)
          for (int g = 0; g < kGates; ++g) {
            T* of = out + r * kBlock + g * kWidth;
            Vec<T> sum = lowered(load(of));
            if constexpr (W::kScaled) sum = sum * load(scales + g * kWidth);
            store(of, sum + bias[g]);
          }
        return;
      }
      for_row_tiles(rows, [&](auto count, int64_t row, int64_t tile) {
        constexpr int kRows = decltype(count)::value;
        Vec<T> sum[kRows][kGates] = {};
        multiply_in_pieces<W, kRows, kGates>(input + row * input_stride, input_stride, weights,
                                             kBlock, kWidth, words, sum,
                                             ahead(kInputPanel, block, end, tile));
        for (int r = 0; r < kRows; ++r) {
          for (int g = 0; g < kGates; ++g) {
            if constexpr (W::kScaled) sum[r][g] = sum[r][g] * load(scales + g * kWidth);
            store(out + (row + r) * kBlock + g * kWidth, sum[r][g] + bias[g]);
          }
        }
      });
    });
    team.wait();
    return last;
  }

  // recurrent: the state's part of the four gates of one row and one vector of units; x: the
  // input's, unless it lies where the gates are kept.
  CTXFAST_INLINE void finish_cell(const Vec<T> (&recurrent)[kGates], const T* scales, const T* x,
                                  int64_t i, int64_t step, int64_t unit) const {
    const int64_t n = sizes.hidden - unit, hidden = sizes.hidden, row = order.row[i];
    const int64_t position = order.position(i, step, way.reverse);
    S* gates = nullptr;
    if (way.kept_gates != nullptr)
      gates = this->template kept<S>(way.kept_gates, row, position, kGates * hidden) + unit;
    Vec<T> z[kGates];
    for (int g = 0; g < kGates; ++g) {
      z[g] = recurrent[g];
      if constexpr (W::kScaled) z[g] = z[g] * load(scales + g * kWidth);
      z[g] = (kInputFirst ? load_n(gates + g * hidden, n) : load(x + g * kWidth)) + z[g];
    }
    const Vec<T> in = sigmoid<T>(z[0]), forget = sigmoid<T>(z[1]), candidate = tanh<T>(z[2]),
                 out = sigmoid<T>(z[3]);
    T* c = cell + i * cell_stride + unit;
    const Vec<T> before_clip = forget * load(c) + in * candidate;
    const Vec<T> after = clip<T>(before_clip, T(sizes.cell_clip));
    store(c, after);
    const Vec<T> value = out * tanh<T>(after);
    if (gates != nullptr) {
      store_n(gates, in, n);
      store_n(gates + hidden, forget, n);
      store_n(gates + 2 * hidden, candidate, n);
      store_n(gates + 3 * hidden, out, n);
      store_n(this->template kept<T>(way.kept_cells, row, position, hidden) + unit, before_clip, n);
    }
    if (sizes.projected) {
      store(full + i * cell_stride + unit, rounded(static_cast<const S*>(nullptr), value));
      split(rounded(static_cast<const S*>(nullptr), value), full_parts, i, cell_stride, unit, n);
    } else {
      const Vec<T> h = rounded(static_cast<const S*>(nullptr), masked(value, row, unit, n));
      store_n(state[(step + 1) % 2] + i * state_stride + unit, h, n);
      split(h, state_parts[(step + 1) % 2], i, state_stride, unit, n);
      store_n(output_of(row, position) + unit, h, n);
    }
  }

  int64_t blocks() const { return (sizes.hidden + kWidth - 1) / kWidth; }

  // A state of zeros, with which a sequence usually starts, has no product.
  bool starts_at_zero() const {
    const S* h = static_cast<const S*>(way.h0);
    for (int64_t i = 0; i < sizes.batch * sizes.features; ++i)
      if (to_compute(h[i]) != T(0)) return false;
    return true;
  }

  // Whether zeros times a block of weight_hh are zeros.
  bool is_ordinary(int64_t block) const {
    if constexpr (W::kPlain) {
      if (plain(kStatePanel) != nullptr) {
        const int64_t left = sizes.hidden - block * kWidth, depth = layout.words[kStatePanel];
        for (int g = 0; g < kGates; ++g)
          if (!all_ordinary(gate_rows(kStatePanel, g, block),
                            (left < kWidth ? left : kWidth) * depth))
            return false;
        return true;
      }
    }
    return ordinary();
  }

  // before: the rows of earlier steps in `given`.
  void gates_step(int64_t step, int64_t before, int64_t rows, bool zero, const Team& team) const {
    const int64_t words = layout.words[kStatePanel];
    const Element* h = state[sizes.projected ? 0 : step % 2];
    const bool tiles = on_tiles(rows, state_extreme + step);
    team.share(blocks(), [&](int64_t block, int64_t end) {
      const T* x = given + (block * input_rows(sizes) + before) * kBlock;
      const bool none = zero && is_ordinary(block);
      if constexpr (W::kPlain) {
        if (rows == 1 && plain(kStatePanel) != nullptr) {
          Vec<T> sum[kGates] = {};
          for (int g = 0; g < kGates && !none; ++g)
            sum[g] = multiply_plain_row(h, gate_rows(kStatePanel, g, block), words,
                                        sizes.hidden - block * kWidth);
          finish_cell(sum, nullptr, x, 0, step, block * kWidth);
          return;
        }
      }
      const typename W::Word* weights = none ? nullptr : gates_block(kStatePanel, block, team);
      const T* scales = layout.scales_of(way.packed, kStatePanel, block * kBlock);
      if (tiles && !none) {
        T* c = block_sums(team);
        multiply_on_tiles(state_parts[sizes.projected ? 0 : step % 2], padded(sizes.batch),
                          state_stride, weights, kBlock, kWidth, words,
                          next_block(kStatePanel, block, end), c, kBlock, rows, kGates, team);
        for (int64_t i = 0; i < rows; ++i) {
          Vec<T> sum[kGates];
          for (int g = 0; g < kGates; ++g) sum[g] = lowered(load(c + i * kBlock + g * kWidth));
          finish_cell(sum, scales, x + i * kBlock, i, step, block * kWidth);
        }
        return;
      }
      for_row_tiles(rows, [&](auto count, int64_t first, int64_t tile) {
        constexpr int kRows = decltype(count)::value;
        Vec<T> sum[kRows][kGates] = {};
        if (!none)
          multiply_in_pieces<W, kRows, kGates>(h + first * state_stride, state_stride, weights,
                                               kBlock, kWidth, words, sum,
                                               ahead(kStatePanel, block, end, tile));
        for (int r = 0; r < kRows; ++r)
          finish_cell(sum[r], scales, x + (first + r) * kBlock, first + r, step, block * kWidth);
      });
    });
  }

  bool on_projection_tiles(int64_t rows) const {
    constexpr int32_t never = 0;  // |o tanh(c)| <= 1
    return way.packed != nullptr && on_tiles(rows, &never);
  }

  // sums [B, vectors first .. last) = full weight_hr^T
  void project(int64_t rows, int64_t first, int64_t last, const Team& team) const {
    if constexpr (W::kPlain) {
      if (way.packed == nullptr)
        return multiply_plain<W>(full, cell_stride, static_cast<const T*>(way.weight_hr),
                                 sizes.hidden, sizes.features, space(team), sums, state_stride,
                                 rows, first, last);
    }
    const auto panel = layout.vectors_of(way.packed, kProjectionPanel);
    if (on_projection_tiles(rows)) {
      for (int64_t vector = first; vector < last;) {
        const int columns = last - vector >= kGates ? kGates : 1;
        const typename W::Word* b = panel.at(vector);
        const bool more = W::kVectors > 1 && vector + columns < last;
        multiply_on_tiles(full_parts, padded(sizes.batch), cell_stride, b,
                          VectorsPanel<W>::kNextWord, panel.next_vector(), panel.words,
                          more ? panel.at(vector + columns) : b, sums + vector * kWidth,
                          state_stride, rows, columns, team);
        vector += columns;
      }
      return;
    }
    multiply_vectors<W>(full, cell_stride, panel, 0, panel.words, sums + first * kWidth,
                        state_stride, rows, first, last);
  }

  void projection_step(int64_t step, int64_t rows, const Team& team) const {
    const int64_t vectors = (sizes.features + kWidth - 1) / kWidth;
    team.share_vectors(vectors, [&](int64_t first, int64_t last) {
      project(rows, first, last, team);
      finish_projection(step, rows, first, last);
    });
  }

  void finish_projection(int64_t step, int64_t rows, int64_t first, int64_t last) const {
    const T* scales = layout.scales_of(way.packed, kProjectionPanel);
    const T lower = on_projection_tiles(rows) ? lowering() : T(1);
    Vec<T> largest = {};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = order.row[i], position = order.position(i, step, way.reverse);
      for (int64_t column = first * kWidth; column < last * kWidth; column += kWidth) {
        const int64_t n = sizes.features - column;
        Vec<T> projected = lower * load(sums + i * state_stride + column);
        if constexpr (W::kScaled) projected = projected * load(scales + column);
        if (way.kept_projected != nullptr)
          store_n(
              this->template kept<T>(way.kept_projected, row, position, sizes.features) + column,
              projected, n);
        projected = masked(clip<T>(projected, T(sizes.proj_clip)), row, column, n);
        projected = rounded(static_cast<const S*>(nullptr), projected);
        store_n(state[0] + i * state_stride + column, projected, n);
        split(projected, state_parts[0], i, state_stride, column, n);
        if (kChecks) largest = vmax(magnitude(projected), largest);
        store_n(output_of(row, position) + column, projected, n);
      }
    }
    note(largest, state_extreme + step + 1);
  }

  void run(const Team& team) const {
#if defined(CTXFAST_AMX)
    const MatrixTiles tiles;
#endif
    start(team);
    team.wait();
    const bool zero = starts_at_zero();
    int64_t next = 0, before = 0;
    for (int64_t step = 0; step < sizes.steps && order.active[step] > 0; ++step) {
      if constexpr (!kInputFirst) {
        if (step == next) {
          next = input_product(step, team);
          before = 0;
        }
      }
      gates_step(step, before, order.active[step], zero && step == 0, team);
      before += order.active[step];
      team.wait();
      if (!sizes.projected) continue;
      projection_step(step, order.active[step], team);
      team.wait();
    }
    finish(team);
  }
};

template <typename S, typename W>
Status run(const LstmForwardArgs& given, WeightType weight, bool* ordinary = nullptr) {
  using Way = Forward<S, W>;
  using T = Compute<S>;
  LstmForwardArgs args = given;
  const LstmSizes& sizes = args.sizes;
  Status status;
  const PackedLayout<W> layout(sizes.inputs, sizes.hidden, sizes.features, sizes.projected, false);
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
  for (int direction = 0; direction < args.count; ++direction)
    for (int64_t i = 0; i < Way::flags(sizes); ++i) buffers[direction * elements + i] = T(0);
  const bool packs = args.directions[0].kept_gates != nullptr || !W::kPlain;
  return for_packed_directions(
      args, layout, weight, {false, packs}, ordinary, [&](int first, int count) {
        for_each_direction(sizes.threads, count, count > 1, [&](int k, const Team& team) {
          const int direction = first + k;
          const Way way(sizes, args.directions[direction], order, layout,
                        buffers + direction * elements);
          way.run(team);
        });
      });
}

#if defined(CTXFAST_AMX)
Status run_split(const LstmForwardArgs& args, bool* ordinary) {
  const Status status = multiply_inputs(args);
  if (status.code != kOk) return status;
  return run<float, SplitWeight>(args, kSplitWeight, ordinary);
}
#endif

}  // namespace

Status lstm_forward(const LstmForwardArgs& args) {
  const Dtype dtype = args.sizes.dtype;
  const WeightType weight = args.weight;
#if defined(CTXFAST_AMX)
  if (splits(args)) {
    bool ordinary = true;
    const Status status = run_split(args, &ordinary);
    if (ordinary) return status;
  }
#endif
  if (dtype == kFloat64 && weight == kPlainWeight)
    return run<double, PlainWeight<double> >(args, weight);
  if (dtype == kFloat32 && weight == kPlainWeight)
    return run<float, PlainWeight<float> >(args, weight);
  if (dtype == kFloat32 && weight == kBfloat16Weight) return run<float, HalfWeight>(args, weight);
  if (dtype == kFloat32 && weight == kInt8Weight) return run<float, ByteWeight>(args, weight);
  if (dtype == kBfloat16 && weight == kBfloat16Weight)
    return run<bfloat16, PairWeight>(args, weight);
  if (dtype == kBfloat16 && weight == kInt8Weight) return run<bfloat16, ByteWeight>(args, weight);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
