// What the loop of lstm_forward.cpp works on, for one direction: where the states of all rows lie,
// with the parts that matrix tiles multiply, and the weights' panels as a step reads them.
#pragma once

#include "cpu/lstm_cell.h"
#include "cpu/lstm_plain.h"
#include "cpu/lstm_team.h"
#include "cpu/lstm_tiles.h"
#include "cpu/lstm_weights.h"

CTXFAST_NAMESPACE_BEGIN

// Rows that the product with the input takes at a time, or those of one step where they are more.
constexpr int64_t kInputRows = 128;

template <typename S, typename W>
struct ForwardState {
  using T = Compute<S>;
  using Element = typename W::Element;
  // Tiles multiply parts of the numbers: bfloat16 states are one part.
  static constexpr int kParts = sizeof(S) == 2 ? 1 : 3;
  using Tiles = TileProduct<W, kParts>;
  static constexpr bool kSplits = Tiles::kUsed && sizeof(Element) != sizeof(bfloat16);
  static constexpr int64_t kWidth = kLanes<T>;
  static constexpr int64_t kBlock = kGates * kWidth;  // the gates of a vector of units
  // Whether what the input contributes has been computed before, and lies where gates are kept.
  static constexpr bool kInputFirst = !W::kPlain && !W::kPacksInput;

  const LstmSizes& sizes;
  const LstmForwardDirection& way;
  const RowOrder& order;
  const PackedLayout<W>& layout;
  // So that rows do not share a set of the cache.
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

  // Rows of parts are whole lines, an odd number of them.
  static constexpr int64_t kApart = Tiles::kUsed ? 32 : kWidth;
  static int64_t stride(int64_t columns) { return round_up(columns, kApart) + kApart; }
  static int64_t input_rows(const LstmSizes& s) {
    if (kInputFirst) return 0;
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

  ForwardState(const LstmSizes& s, const LstmForwardDirection& w, const RowOrder& o,
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
          padded(!kInputFirst && parts == input_parts ? input_rows(sizes) : sizes.batch) *
              row_stride,
          n);
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

  // C [rows, columns vectors] = A B, `words` words of the depth.
  CTXFAST_INLINE void multiply_on_tiles(const bfloat16* parts, int64_t part_rows,
                                        int64_t row_stride, const typename W::Word* b, int64_t ldb,
                                        int64_t next_column, int64_t words, const void* ahead, T* c,
                                        int64_t ldc, int64_t rows, int columns,
                                        const Team& team) const {
    if constexpr (Tiles::kUsed)
      Tiles::multiply({parts, row_stride, part_rows * row_stride}, b, ldb, next_column, words,
                      ahead, c, ldc, rows, columns,
                      reinterpret_cast<char*>(block_sums(team) + padded(sizes.batch) * kBlock));
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
};

CTXFAST_NAMESPACE_END
