// The loop over time of an LSTM with projection (Hochreiter, Schmidhuber 1997; Sak, Senior,
// Beaufays 2014).
//
// One direction runs over the whole sequence, so that its weights stay in whatever cache holds
// them. What the input contributes to the gates is one product for a few steps at a time: enough
// rows to read weight_ih once for all of them, few enough for a cache. A step has two products,
// each followed by a barrier over the team: the gates, whose four vectors of the same units meet in
// registers and become c and o * tanh(c) at once, and the projection. Threads split units and
// outputs. A row's sums are added up in the order of the depth, so its result does not depend on
// how many threads or other rows there are.
#include "cpu/kernel_table.h"
#include "cpu/lstm_cell.h"
#include "cpu/lstm_plain.h"
#include "cpu/lstm_team.h"
#include "cpu/lstm_tiles.h"
#include "cpu/lstm_weights.h"

CTXFAST_NAMESPACE_BEGIN

namespace {

// bfloat16 states with bfloat16 weights: without rounding anything, on whatever the CPU has.
#if defined(CTXFAST_AVX512_BF16)
using PairWeight = HalfPairWeight;
#else
using PairWeight = HalfWeight;
#endif

// Rows that the product with the input takes at a time, or those of one step where they are more.
constexpr int64_t kInputRows = 128;

template <typename S, typename W>
struct Forward {
  using T = Compute<S>;
  using Element = typename W::Element;
  // Tiles multiply parts of the numbers: bfloat16 states are one part.
  static constexpr int kParts = sizeof(S) == 2 ? 1 : 3;
  using Tiles = TileProduct<W, kParts>;
  static constexpr bool kSplits = Tiles::kUsed && sizeof(Element) != sizeof(bfloat16);
  static constexpr int64_t kWidth = kLanes<T>;
  static constexpr int64_t kBlock = kGates * kWidth;  // the gates of a vector of units

  const LstmSizes& sizes;
  const LstmForwardDirection& way;
  const RowOrder& order;
  const PackedLayout<W>& layout;
  // Row strides are whole vectors and one more, so that rows do not share a set of the cache.
  int64_t input_stride, state_stride, cell_stride;
  T* given;           // what the input contributes, [ceil(H / L)][input_rows][4][L]
  T* sums;            // of the projection [B, P]
  T* cell;            // c [B, H]
  Element* input;     // [input_rows, K]
  Element* state[2];  // h [B, P]; the second one only without projection, where a step writes the
                      // other
  Element* full;      // o * tanh(c) [B, H]
  T* arranged;        // for each thread what it makes of plain weights at a time
  bfloat16* input_parts;  // of the numbers of `input`, `state` and `full`: for tiles
  bfloat16* state_parts[2];
  bfloat16* full_parts;
  // By step: whether the input from it on, the state before it, has numbers that parts do not hold.
  int32_t *input_extreme, *state_extreme;
  T* tile_space;  // for each thread the sums of a block and what its tiles are arranged in

  static int64_t stride(int64_t columns) { return round_up(columns, kWidth) + kWidth; }
  static int64_t input_rows(const LstmSizes& s) {
    const int64_t all = s.batch * s.steps, wanted = s.batch > kInputRows ? s.batch : kInputRows;
    return padded(all < wanted ? all : wanted);
  }
  // Tiles read and write whole ones.
  static constexpr int64_t kRowsOfTile = 16;
  static int64_t padded(int64_t rows) { return Tiles::kUsed ? round_up(rows, kRowsOfTile) : rows; }
  static int64_t parts_size(int64_t rows, int64_t row_stride) {
    return kSplits
               ? kParts * padded(rows) * row_stride * int64_t(sizeof(bfloat16)) / int64_t(sizeof(T))
               : 0;
  }
  static int64_t tile_space_size(const LstmSizes& s) {
    if constexpr (Tiles::kUsed)
      return padded(s.batch) * kBlock + Tiles::kSpace / int64_t(sizeof(T));
    return 0;
  }
  // Elements of plain weights that a thread arranges at a time: a block of a gates panel, or a
  // piece of four vectors of the projection. No more than the second cache level holds.
  static int64_t arranged_size(const LstmSizes& s) {
    const int64_t deepest = s.inputs > s.features ? s.inputs : s.features;
    return W::kPlain ? (deepest > kDepthPiece ? deepest : kDepthPiece) * kBlock : 0;
  }
  static constexpr bool kChecks = kSplits && kParts == 3;
  static int64_t flags(const LstmSizes& s) {
    return kChecks ? round_up(2 * (s.steps + 1), kWidth) : 0;
  }
  static int64_t elements(const LstmSizes& s) {
    const int64_t batch = padded(s.batch), rows = input_rows(s);
    return round_up(flags(s) + rows * (kGates * round_up(s.hidden, kWidth) + stride(s.inputs)) +
                        batch * (3 * stride(s.features) + 2 * stride(s.hidden)) +
                        parts_size(rows, stride(s.inputs)) +
                        2 * parts_size(batch, stride(s.features)) +
                        parts_size(batch, stride(s.hidden)) +
                        s.threads * (arranged_size(s) + tile_space_size(s)),
                    kWidth);
  }

  Forward(const LstmSizes& s, const LstmForwardDirection& w, const RowOrder& o,
          const PackedLayout<W>& l, T* memory)
      : sizes(s), way(w), order(o), layout(l) {
    input_stride = stride(s.inputs);
    state_stride = stride(s.features);
    cell_stride = stride(s.hidden);
    input_extreme = reinterpret_cast<int32_t*>(memory);
    state_extreme = input_extreme + s.steps + 1;
    given = memory + flags(s);
    const int64_t batch = padded(s.batch), rows = input_rows(s);
    sums = given + rows * kGates * round_up(s.hidden, kWidth);
    cell = sums + batch * state_stride;
    input = reinterpret_cast<Element*>(cell + batch * cell_stride);
    state[0] = input + rows * input_stride;
    state[1] = state[0] + batch * state_stride;
    full = state[1] + batch * state_stride;
    arranged = reinterpret_cast<T*>(full + batch * cell_stride);
    if constexpr (Tiles::kUsed) {
      tile_space = arranged + s.threads * arranged_size(s);
      T* parts = tile_space + s.threads * tile_space_size(s);
      const auto take = [&](Element* whole, int64_t count, int64_t row_stride) {
        if constexpr (kSplits) {
          bfloat16* own = reinterpret_cast<bfloat16*>(parts);
          parts += parts_size(count, row_stride);
          return own;
        } else {
          return whole;
        }
      };
      input_parts = take(input, rows, input_stride);
      for (int k = 0; k < 2; ++k) state_parts[k] = take(state[k], batch, state_stride);
      full_parts = take(full, batch, cell_stride);
    }
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
      if constexpr (kSplits) {
        for (int64_t k = 0; k < cell_stride; k += kWidth)
          split(Vec<T>{}, full_parts, i, cell_stride, k, kWidth);
        split_row(state[0], state_parts[0], i, state_stride, state_extreme);
        split_row(state[1], state_parts[1], i, state_stride, state_extreme);
      }
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

  // Writes the parts of a vector of row i.
  CTXFAST_INLINE void split(Vec<T> value, bfloat16* parts, int64_t i, int64_t row_stride,
                            int64_t column, int64_t n) const {
    if constexpr (kSplits)
      store_parts<kParts>(
          value, parts + i * row_stride + column,
          padded(parts == input_parts ? input_rows(sizes) : sizes.batch) * row_stride, n);
  }
  // Those of a whole row; notes numbers that parts do not hold.
  void split_row(const Element* whole, bfloat16* parts, int64_t i, int64_t row_stride,
                 int32_t* extreme) const {
    Vec<T> largest = {};
    for (int64_t k = 0; k < row_stride; k += kWidth) {
      const Vec<T> value = load(whole + i * row_stride + k);
      split(value, parts, i, row_stride, k, kWidth);
      largest = vmax(magnitude(value), largest);
    }
    note(largest, extreme);
  }
  static CTXFAST_INLINE Vec<T> magnitude(Vec<T> value) { return value < T(0) ? -value : value; }
  static CTXFAST_INLINE void note(Vec<T> largest, int32_t* extreme) {
    if (kChecks && reduce_max(largest) >= T(kOrdinaryBound))
      __atomic_store_n(extreme, 1, __ATOMIC_RELAXED);
  }

  // Whether a panel is multiplied on tiles with so many rows, with or without extreme numbers.
  bool on_tiles(int64_t rows, const int32_t* extreme) const {
    if constexpr (Tiles::kUsed)
      return rows >= Tiles::kFewestRows && !(kChecks && *extreme != 0) &&
             (kParts == 1 || ordinary());
    return false;
  }
  // Plain weights do not run on tiles; where they are skipped they are looked at a block at a time.
  bool ordinary() const {
    return way.packed == nullptr || static_cast<const LstmPackedHeader*>(way.packed)->ordinary != 0;
  }

  // C [rows, columns vectors] = A B, `words` of the depth from word k of rows and panel on.
  CTXFAST_INLINE void multiply_on_tiles(const bfloat16* parts, int64_t part_rows,
                                        int64_t row_stride, const typename W::Word* b, int64_t ldb,
                                        int64_t next_column, int64_t words, const void* ahead, T* c,
                                        int64_t ldc, int64_t rows, int columns,
                                        const Team& team) const {
    if constexpr (Tiles::kUsed) {
      char* space = reinterpret_cast<char*>(tile_space + team.rank * tile_space_size(sizes) +
                                            padded(sizes.batch) * kBlock);
      constexpr int64_t piece = kDepthPiece / W::kPack;
      for (int64_t k = 0; k < words; k += piece) {
        const int64_t part = words - k < piece ? words - k : piece;
        const PartRows a = {parts + k * W::kPack, row_stride, part_rows * row_stride};
        Tiles::multiply(a, b + k * ldb, ldb, next_column, part,
                        static_cast<const char*>(ahead) + k * ldb * int64_t(sizeof *b), c, ldc,
                        rows, columns, k == 0, space);
      }
    }
  }
  T* block_sums(const Team& team) const { return tile_space + team.rank * tile_space_size(sizes); }
  static constexpr T lowering() {
    if constexpr (Tiles::kUsed) return T(Tiles::kLower);
    return T(1);
  }
  static CTXFAST_INLINE Vec<T> lowered(Vec<T> sum) { return sum * lowering(); }

  void finish(const Team& team) const {
    for (int64_t i = team.rank; i < sizes.batch; i += team.size) {
      const int64_t row = order.row[i], features = sizes.features, hidden = sizes.hidden;
      const Element* h = state[sizes.projected ? 0 : order.length[i] % 2] + i * state_stride;
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

  // The weights [4H, depth] of a gates panel that a block at a time is made of, or nullptr where
  // the panel is packed.
  const T* plain(Panel panel) const {
    if (!W::kPlain) return nullptr;
    if (panel == kInputPanel) return static_cast<const T*>(way.weight_ih);
    return static_cast<const T*>(way.packed == nullptr ? way.weight_hh : nullptr);
  }

  // Its rows of a gate, from the first unit of a block on.
  const T* gate_rows(Panel panel, int64_t gate, int64_t block) const {
    return plain(panel) + (gate * sizes.hidden + block * kWidth) * layout.words[panel];
  }
  T* space(const Team& team) const { return arranged + team.rank * arranged_size(sizes); }

  // A block of a gates panel.
  const typename W::Word* gates_block(Panel panel, int64_t block, const Team& team) const {
    const int64_t depth = layout.words[panel];
    if constexpr (W::kPlain) {
      if (plain(panel) != nullptr) {
        T* out = space(team);
        for (int g = 0; g < kGates; ++g)
          pack_vectors<1>(gate_rows(panel, g, block), 1, depth, depth,
                          sizes.hidden - block * kWidth, out + g * kWidth, kBlock);
        return out;
      }
    }
    return layout.words_of(way.packed, panel) + block * depth * kBlock;
  }

  // What a tile of rows asks for while it multiplies a block: its share of the next one, where
  // there is one, of plain weights the rows of a gate.
  CTXFAST_INLINE const void* ahead(Panel panel, int64_t block, int64_t end, int64_t tile) const {
    const int64_t words = layout.words[panel], next = block + 1 < end ? block + 1 : block;
    if (plain(panel) != nullptr) return gate_rows(panel, tile < kGates ? tile : 0, next);
    const int64_t bytes = words * kBlock * int64_t(sizeof(typename W::Word));
    const int64_t begin = tile * words * kLineBytes;
    return reinterpret_cast<const char*>(layout.words_of(way.packed, panel)) + next * bytes +
           (begin < bytes ? begin : 0);
  }

  // What follows a block in a packed panel, or the last one once more.
  const void* next_block(Panel panel, int64_t block, int64_t end) const {
    return layout.words_of(way.packed, panel) +
           (block + 1 < end ? block + 1 : block) * layout.words[panel] * kBlock;
  }

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
    const int64_t begin = team.begin(blocks()), end = team.end(blocks());
    const bool tiles = on_tiles(rows, input_extreme + first);
    for (int64_t block = begin; block < end; ++block) {
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
        continue;
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
    }
    return last;
  }

  // recurrent: the state's part of the four gates of one row and one vector of units; x: the
  // input's.
  CTXFAST_INLINE void finish_cell(const Vec<T> (&recurrent)[kGates], const T* scales, const T* x,
                                  int64_t i, int64_t step, int64_t unit) const {
    const int64_t n = sizes.hidden - unit, hidden = sizes.hidden, row = order.row[i];
    const int64_t position = order.position(i, step, way.reverse);
    Vec<T> z[kGates];
    for (int g = 0; g < kGates; ++g) {
      z[g] = recurrent[g];
      if constexpr (W::kScaled) z[g] = z[g] * load(scales + g * kWidth);
      z[g] = load(x + g * kWidth) + z[g];
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
    const int64_t words = layout.words[kStatePanel], end = team.end(blocks());
    const Element* h = state[sizes.projected ? 0 : step % 2];
    const bool tiles = on_tiles(rows, state_extreme + step);
    for (int64_t block = team.begin(blocks()); block < end; ++block) {
      const T* x = given + (block * input_rows(sizes) + before) * kBlock;
      const bool none = zero && is_ordinary(block);
      if constexpr (W::kPlain) {
        if (rows == 1 && plain(kStatePanel) != nullptr) {
          Vec<T> sum[kGates] = {};
          for (int g = 0; g < kGates && !none; ++g)
            sum[g] = multiply_plain_row(h, gate_rows(kStatePanel, g, block), words,
                                        sizes.hidden - block * kWidth);
          finish_cell(sum, nullptr, x, 0, step, block * kWidth);
          continue;
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
        continue;
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
    }
  }

  bool on_projection_tiles(int64_t rows) const {
    constexpr int32_t never = 0;  // |o tanh(c)| <= 1
    return way.packed != nullptr && on_tiles(rows, &never);
  }

  // sums [B, vectors first .. last) = full weight_hr^T
  void project(int64_t rows, int64_t first, int64_t last, const Team& team) const {
    if (on_projection_tiles(rows)) {
      const int64_t words = layout.words[kProjectionPanel];
      for (int64_t vector = first; vector < last;) {
        const int columns = last - vector >= kGates ? kGates : 1;
        const typename W::Word* b =
            layout.words_of(way.packed, kProjectionPanel) + vector * words * kWidth;
        multiply_on_tiles(full_parts, padded(sizes.batch), cell_stride, b, kWidth, words * kWidth,
                          words, b, sums + vector * kWidth, state_stride, rows, columns, team);
        vector += columns;
      }
      return;
    }
    if constexpr (W::kPlain) {
      if (way.packed == nullptr)
        return multiply_plain<W>(full, cell_stride, static_cast<const T*>(way.weight_hr),
                                 sizes.hidden, sizes.features, space(team), sums, state_stride,
                                 rows, first, last);
    }
    multiply_vectors<W>(full, cell_stride, layout.words_of(way.packed, kProjectionPanel),
                        layout.words[kProjectionPanel], sums, state_stride, rows, first, last);
  }

  void projection_step(int64_t step, int64_t rows, const Team& team) const {
    const int64_t vectors = (sizes.features + kWidth - 1) / kWidth;
    const int64_t begin = team.begin(vectors), end = team.end(vectors);
    const T* scales = layout.scales_of(way.packed, kProjectionPanel);
    project(rows, begin, end, team);
    const T lower = on_projection_tiles(rows) ? lowering() : T(1);
    Vec<T> largest = {};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = order.row[i], position = order.position(i, step, way.reverse);
      for (int64_t column = begin * kWidth; column < end * kWidth; column += kWidth) {
        const int64_t n = sizes.features - column;
        Vec<T> projected = lower * load(sums + i * state_stride + column);
        if constexpr (W::kScaled) projected = projected * load(scales + column);
        if (way.kept_projected != nullptr)
          store_n(kept<T>(way.kept_projected, row, position, sizes.features) + column, projected,
                  n);
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
      if (step == next) {
        next = input_product(step, team);
        before = 0;
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
Status run(const LstmForwardArgs& args) {
  using Way = Forward<S, W>;
  using T = Compute<S>;
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
  const bool together = args.count * layout.recurrent_bytes() <= kTogetherBytes;
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
  if (dtype == kBfloat16 && args.weight == kBfloat16Weight) return run<bfloat16, PairWeight>(args);
  if (dtype == kBfloat16 && args.weight == kInt8Weight) return run<bfloat16, ByteWeight>(args);
  Status status;
  status.code = kUnsupportedDtype;
  return status;
}

CTXFAST_NAMESPACE_END
