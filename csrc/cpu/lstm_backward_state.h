// What the loop of lstm_backward.cpp works on, for one direction: the gradients of states of all
// rows, with the parts that matrix tiles multiply, and what each thread holds of a chunk of units.
#pragma once

#include "cpu/lstm_cell.h"
#include "cpu/lstm_team.h"
#include "cpu/lstm_tiles.h"

CTXFAST_NAMESPACE_BEGIN

template <typename S, typename W>
struct BackwardState {
  using T = Compute<S>;
  using Tiles = TileProduct<W, 3>;
  static constexpr int64_t kWidth = kLanes<T>;

  // Of a thread, for a chunk of units.
  struct Workspace {
    T* dfull;  // gradient of o * tanh(c) [B, units]
    int64_t full_stride;
    T* dgates;  // [B, 4 units]
    int64_t stride;
    bfloat16* parts;  // of dgates
    char* tiles;
  };

  const LstmSizes& sizes;
  const LstmBackwardDirection& way;
  const RowOrder& order;
  const PackedLayout<W>& layout;
  int64_t state_stride, cell_stride;
  T* dstate;                   // dh [B, P]
  T* dprojected;               // [B, P]
  bfloat16* dprojected_parts;  // of it
  T* dcell;                    // dc [B, H]
  T* partial;                  // what each chunk contributes to dh [chunks][B, P]
  T* partial_scale;            // [chunks], to be multiplied with
  int32_t* extreme;            // [T]: whether dprojected has numbers that parts do not hold
  char* workspaces;

  // Rows of whole tiles, an odd number of lines apart: they do not share a set of the cache.
  static constexpr int64_t kApart = Tiles::kUsed ? 32 : kWidth;
  static constexpr int64_t kRowsOfTile = 16;
  static int64_t stride(int64_t columns) { return round_up(columns, kApart) + kApart; }
  static int64_t padded(int64_t rows) { return Tiles::kUsed ? round_up(rows, kRowsOfTile) : rows; }
  static int64_t parts_bytes(const LstmSizes& s, int64_t row_stride) {
    return Tiles::kUsed ? 3 * padded(s.batch) * row_stride * int64_t(sizeof(bfloat16)) : 0;
  }
  static int64_t space_bytes() {
    if constexpr (Tiles::kUsed) return Tiles::kSpace;
    return 0;
  }
  static int64_t workspace_bytes(const LstmSizes& s, const PackedLayout<W>& layout) {
    const int64_t units = stride(layout.chunks.size), gates = stride(layout.chunks.depth());
    return round_up(padded(s.batch) * (units + gates) * int64_t(sizeof(T)) + parts_bytes(s, gates) +
                        space_bytes(),
                    64);
  }
  static int64_t shared_bytes(const LstmSizes& s, const PackedLayout<W>& layout) {
    const int64_t rows = padded(s.batch), chunks = layout.chunks.count;
    return round_up((rows * ((2 + chunks) * stride(s.features) + stride(s.hidden)) + chunks) *
                            int64_t(sizeof(T)) +
                        s.steps * int64_t(sizeof(int32_t)) + 64 +
                        parts_bytes(s, stride(s.features)),
                    64);
  }
  static int64_t bytes(const LstmSizes& s, const PackedLayout<W>& layout) {
    return shared_bytes(s, layout) + s.threads * workspace_bytes(s, layout);
  }

  BackwardState(const LstmSizes& s, const LstmBackwardDirection& w, const RowOrder& o,
                const PackedLayout<W>& l, char* memory)
      : sizes(s), way(w), order(o), layout(l) {
    state_stride = stride(s.features);
    cell_stride = stride(s.hidden);
    const int64_t rows = padded(s.batch);
    workspaces = memory + shared_bytes(s, l);
    dprojected_parts = reinterpret_cast<bfloat16*>(memory);
    dstate = reinterpret_cast<T*>(memory + parts_bytes(s, state_stride));
    dprojected = dstate + rows * state_stride;
    dcell = dprojected + rows * state_stride;
    partial = dcell + rows * cell_stride;
    partial_scale = partial + l.chunks.count * rows * state_stride;
    extreme = reinterpret_cast<int32_t*>(partial_scale + l.chunks.count);
  }

  Workspace workspace(const Team& team) const {
    const int64_t rows = padded(sizes.batch);
    Workspace space;
    space.full_stride = stride(layout.chunks.size);
    space.stride = stride(layout.chunks.depth());
    char* memory = workspaces + team.rank * workspace_bytes(sizes, layout);
    space.parts = reinterpret_cast<bfloat16*>(memory);
    space.tiles = memory + parts_bytes(sizes, space.stride);
    space.dfull = reinterpret_cast<T*>(space.tiles + space_bytes());
    space.dgates = space.dfull + rows * space.full_stride;
    return space;
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
    for (int64_t t = team.rank; t < sizes.steps; t += team.size) extreme[t] = 0;
    for (int64_t i = team.rank; i < sizes.batch; i += team.size) {
      const int64_t row = order.row[i];
      // The words of a padded depth are read as well, against weights of 0: they must be finite.
      for (int64_t k = 0; k < state_stride; k += kWidth) {
        store(dstate + i * state_stride + k, Vec<T>{});
        store(dprojected + i * state_stride + k, Vec<T>{});
        split(Vec<T>{}, dprojected_parts, i, state_stride, k, kWidth);
      }
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

  // Writes the parts of a vector of row i.
  CTXFAST_INLINE void split(Vec<T> value, bfloat16* parts, int64_t i, int64_t row_stride,
                            int64_t column, int64_t n) const {
    if constexpr (Tiles::kUsed)
      store_parts<3>(value, parts + i * row_stride + column, padded(sizes.batch) * row_stride, n);
  }
  // The gates of a vector of units that is none.
  void clear_gates(int64_t i, int64_t place, const Workspace& space) const {
    for (int64_t column = place; column < layout.chunks.depth(); column += layout.chunks.size) {
      store(space.dgates + i * space.stride + column, Vec<T>{});
      split(Vec<T>{}, space.parts, i, space.stride, column, kWidth);
    }
  }
  static CTXFAST_INLINE Vec<T> magnitude(Vec<T> value) { return value < T(0) ? -value : value; }
  static CTXFAST_INLINE void note(Vec<T> largest, int32_t* extreme) {
    if (Tiles::kUsed && reduce_max(largest) >= T(kOrdinaryBound))
      __atomic_store_n(extreme, 1, __ATOMIC_RELAXED);
  }
  // Whether so many rows are multiplied on tiles, with or without extreme numbers.
  bool on_tiles(int64_t rows, int32_t extreme) const {
    if constexpr (Tiles::kUsed)
      return rows >= Tiles::kFewestRows && extreme == 0 &&
             static_cast<const LstmPackedHeader*>(way.packed)->ordinary != 0;
    return false;
  }

  struct Rows {
    const T* whole;
    const bfloat16* parts;
    int64_t stride;
  };

  // C [rows, vectors first .. last) = A [rows, `words` words] B, which begins at a word of the
  // depth of a panel of vectors. C starts at vector `first`, and is to be multiplied with what this
  // returns. What lies at `after` is read next.
  T multiply(const Rows& a, bool tiles, const VectorsPanel<W>& panel, int64_t word, int64_t words,
             const typename W::Word* after, T* c, int64_t ldc, int64_t rows, int64_t first,
             int64_t last, const Workspace& space) const {
    if constexpr (Tiles::kUsed) {
      if (tiles) {
        const PartRows from = {a.parts, a.stride, padded(sizes.batch) * a.stride};
        for (int64_t vector = first; vector < last;) {
          const int columns = last - vector >= 4 ? 4 : 1;
          const typename W::Word* next =
              vector + columns < last ? panel.at(vector + columns, word) : after;
          Tiles::multiply(from, panel.at(vector, word), VectorsPanel<W>::kNextWord,
                          panel.next_vector(), words, W::kVectors > 1 ? next : nullptr,
                          c + (vector - first) * kWidth, ldc, rows, columns, space.tiles);
          vector += columns;
        }
        return Tiles::kLower;
      }
    }
    multiply_vectors<W>(a.whole, a.stride, panel, word, words, c, ldc, rows, first, last);
    return T(1);
  }
};

CTXFAST_NAMESPACE_END
