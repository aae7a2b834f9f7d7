// LSTM with projection, forward, in one launch for a whole sequence: the recurrent weights stay on
// the chip.
//
// After Diamos et al., "Persistent RNNs: stashing recurrent weights on-chip" (ICML 2016), for LSTMP
// (Sak et al., 2014). Each block owns units of the cell: all four gate rows of each and its columns
// of the projection, in registers and shared memory. A step: gates of the own units from the whole
// state (tensor cores, weights as the first operand); the cell; the own units' share of the
// projection, for all features; and one sum over all blocks (exchange.cuh), which gives every block
// the next state. Directions and groups of rows are independent of each other.
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/lstm_math.cuh"
#include "cuda/lstm_rows.cuh"

namespace ctxfast {
namespace cuda {

template <class S>
struct ForwardShared {
  static constexpr int kTiles = S::kUnits / 8 / S::kWarps;             // of 8 units, of a warp
  static constexpr int kBlocks = S::kFeatures / 32;                    // of the state's features
  static constexpr int kFeatureTiles = S::kFeatures / 16 / S::kWarps;  // of 16 features, of a warp
  static constexpr int kUnitBlocks = S::kUnits / 32;
  static constexpr int kFullStride = S::kUnits + 32;
  static constexpr int kSharedBlocks = kBlocks - S::kRegisterBlocks;

  Words4 gates[S::kWarps][kTiles][kSharedBlocks ? kSharedBlocks : 1][4][kWarpSize];
  Words4 projection[S::kWarps][kFeatureTiles][kUnitBlocks][2][kWarpSize];
  alignas(16) typename S::T state[S::kRows * S::kStateStride];
  alignas(16) typename S::T full[S::kRows * kFullStride];
  alignas(16) float sums[S::kRows * S::kSumStride];
  RowGroup<S::kRows> rows;
  int late;
};

// The fragment layout of device.cuh with the columns of each 32 permuted in both operands, so that
// a lane's eight are neighbours in memory: lane % 4 owns columns 8 (lane % 4) and following, two of
// them for each of its registers.
template <class S>
class PersistentForward {
  using T = typename S::T;
  using Shared = ForwardShared<S>;
  static constexpr int kUnitTiles = Shared::kTiles;

 public:
  CTXFAST_DEVICE PersistentForward(const Lstm& args, const Exchange& exchange)
      : args_(args),
        own_(own_rank<S>()),
        direction_(args.directions[own_.direction]),
        shared_(*reinterpret_cast<Shared*>(shared_memory())),
        all_reduce_(exchange, own_, shared_.sums, &shared_.late),
        warp_(thread_index() / kWarpSize),
        lane_(thread_index() % kWarpSize),
        first_unit_((own_.cluster * S::kCluster + own_.rank) * S::kUnits) {}

  CTXFAST_DEVICE void run() {
    load_weights();
    const int groups = (args_.batch + S::kRows - 1) / S::kRows;
    for (int group = own_.slot; group < groups; group += grid_size().z) {
      shared_.rows.load(args_, group, S::kThreads);
      block_barrier();
      start();
      block_barrier();
      const int steps = shared_.rows.longest(0, S::kRows);
      if (steps > 0) load_inputs(0);
      for (int step = 0; step < steps; ++step) {
        compute_gates(step);
        cell(step);
        if (step + 1 < steps) load_inputs(step + 1);
        block_barrier();
        project();
        all_reduce_(active_rows(step), [&](int row, int feature, Floats4 sum) {
          finish_state(step, row, feature, sum);
        });
      }
      write_cells();
      block_barrier();
    }
  }

 private:
  CTXFAST_DEVICE int unit(int tile) const {
    return first_unit_ + (warp_ * kUnitTiles + tile) * 8 + lane_ / 4;
  }

  // Rows stand in falling order of their lengths, so tiles of rows retire from the end.
  CTXFAST_DEVICE int active_rows(int step) const {
    int rows = 8;
#pragma unroll
    for (int tile = 1; tile < S::kTiles; ++tile) {
      if (step < longest_[tile]) rows = 8 * (tile + 1);
    }
    return rows;
  }

  CTXFAST_DEVICE void load_weights() {
    const T* hh = static_cast<const T*>(direction_.weight_hh);
    const int column = lane_ % 4 * 8;
#pragma unroll
    for (int tile = 0; tile < kUnitTiles; ++tile) {
#pragma unroll
      for (int block = 0; block < Shared::kBlocks; ++block) {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t row = int64_t(gate) * S::kHidden + unit(tile);
          const T* source = hh + row * S::kFeatures + block * 32 + column;
          const Words4 w = read_constant(reinterpret_cast<const Words4*>(source));
          if (block < S::kRegisterBlocks) {
            weights_[tile][block][gate] = w;
          } else {
            write(&shared_.gates[warp_][tile][block - S::kRegisterBlocks][gate][lane_], w);
          }
        }
      }
    }
    const T* hr = static_cast<const T*>(direction_.weight_hr);
    for (int tile = 0; tile < Shared::kFeatureTiles; ++tile) {
      for (int block = 0; block < Shared::kUnitBlocks; ++block) {
        for (int half = 0; half < 2; ++half) {
          const int64_t row = (warp_ * Shared::kFeatureTiles + tile) * 16 + half * 8 + lane_ / 4;
          const T* source = hr + row * S::kHidden + first_unit_ + block * 32 + column;
          write(&shared_.projection[warp_][tile][block][half][lane_],
                read_constant(reinterpret_cast<const Words4*>(source)));
        }
      }
    }
  }

  // The initial state of a group; the final one of rows without a step.
  CTXFAST_DEVICE void start() {
    const T* h0 = static_cast<const T*>(direction_.h0);
    T* h = static_cast<T*>(direction_.h);
    for (int i = thread_index(); i < S::kRows * S::kFeatures; i += S::kThreads) {
      const int n = i / S::kFeatures, feature = i % S::kFeatures, row = read(shared_.rows.row + n);
      T value = from_float<T>(0.0f);
      if (row >= 0) {
        value = read_constant(h0 + int64_t(row) * S::kFeatures + feature);
        if (read(shared_.rows.length + n) == 0 && own_.cluster == 0 && own_.rank == 0) {
          write(h + int64_t(row) * S::kFeatures + feature, value);
        }
      }
      write(shared_.state + n * S::kStateStride + feature, value);
    }
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile) longest_[tile] = shared_.rows.longest(tile * 8, 8);
    each_cell([&](int tile, int rows, int j, int, int row, int) {
      cells_[tile][rows][j] =
          row < 0 ? 0.0f : read_constant(direction_.c0 + int64_t(row) * S::kHidden + unit(tile));
    });
  }

  // visit(tile of units, tile of rows, column in it: 0 or 1, row of the group, of the batch or -1,
  // length) for the cells of this lane.
  template <class Visit>
  CTXFAST_DEVICE void each_cell(Visit visit) {
#pragma unroll
    for (int rows = 0; rows < S::kTiles; ++rows) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = rows * 8 + lane_ % 4 * 2 + j;
        const int row = read(shared_.rows.row + n), length = read(shared_.rows.length + n);
#pragma unroll
        for (int tile = 0; tile < kUnitTiles; ++tile) visit(tile, rows, j, n, row, length);
      }
    }
  }

  // What the input contributes to the gates of a step, on its way while the step before is not yet
  // over.
  CTXFAST_DEVICE void load_inputs(int step) {
    const T* gates = static_cast<const T*>(direction_.gates);
    each_cell([&](int tile, int rows, int j, int, int row, int length) {
      const int64_t place = place_in_time(args_, direction_, row, length, step);
      const T* source = gates + place * (4 * S::kHidden) + unit(tile);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        T& x = inputs_[tile][rows][j][gate];
        x = step < length ? read_constant(source + gate * S::kHidden) : from_float<T>(0.0f);
      }
    });
  }

  CTXFAST_DEVICE void compute_gates(int step) {
    // Where a warp has one tile only, every other product goes to sums of its own: half as long a
    // chain to wait for.
    constexpr bool kSplit = kUnitTiles * S::kTiles == 1;
    float second[2][4] = {};
#pragma unroll
    for (int tile = 0; tile < kUnitTiles; ++tile) {
#pragma unroll
      for (int rows = 0; rows < S::kTiles; ++rows) {
#pragma unroll
        for (int i = 0; i < 4; ++i) gates_[tile][rows][0][i] = gates_[tile][rows][1][i] = 0.0f;
      }
    }
    const T* state = shared_.state + lane_ / 4 * S::kStateStride + lane_ % 4 * 8;
#pragma unroll
    for (int block = 0; block < Shared::kBlocks; ++block) {
#pragma unroll
      for (int tile = 0; tile < kUnitTiles; ++tile) {
        Words4 w[4];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          w[gate] =
              block < S::kRegisterBlocks
                  ? weights_[tile][block < S::kRegisterBlocks ? block : 0][gate]
                  : read(&shared_.gates[warp_][tile][block - S::kRegisterBlocks][gate][lane_]);
        }
#pragma unroll
        for (int rows = 0; rows < S::kTiles; ++rows) {
          if (step >= longest_[rows]) continue;
          const Words4 h = read(
              reinterpret_cast<const Words4*>(state + rows * 8 * S::kStateStride + block * 32));
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            const Words4 &a = w[pair * 2], &b = w[pair * 2 + 1];
            float (&sum)[4] = gates_[tile][rows][pair];
            float (&other)[4] = kSplit ? second[pair] : sum;
            mma<T>(sum, a.x, b.x, a.y, b.y, h.x, h.y);
            mma<T>(other, a.z, b.z, a.w, b.w, h.z, h.w);
          }
        }
      }
    }
    if constexpr (kSplit) {
#pragma unroll
      for (int i = 0; i < 8; ++i) gates_[0][0][i / 4][i % 4] += second[i / 4][i % 4];
    }
  }

  // Gates to cells to what the projection reads. A lane holds all four gates of its cells.
  CTXFAST_DEVICE void cell(int step) {
    T* saved = static_cast<T*>(direction_.saved_gates);
    each_cell([&](int tile, int rows, int j, int n, int row, int length) {
      float full = 0.0f;
      if (step < length) {
        float z[4];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          z[gate] = gates_[tile][rows][gate / 2][gate % 2 * 2 + j] +
                    to_float(inputs_[tile][rows][j][gate]);
        }
        const float i = sigmoid<true>(z[0]), f = sigmoid<true>(z[1]);
        const float g = tangent<true>(z[2]), o = sigmoid<true>(z[3]);
        const float sum = f * cells_[tile][rows][j] + i * g;
        const float c = clamp(sum, args_.cell_clip);
        cells_[tile][rows][j] = c;
        full = o * tangent<true>(c);
        if (saved) {
          const int64_t place = place_in_time(args_, direction_, row, length, step);
          T* kept = saved + place * (4 * S::kHidden) + unit(tile);
          write(kept, from_float<T>(i));
          write(kept + S::kHidden, from_float<T>(f));
          write(kept + 2 * S::kHidden, from_float<T>(g));
          write(kept + 3 * S::kHidden, from_float<T>(o));
          write(direction_.cells + place * S::kHidden + unit(tile), sum);
        }
      }
      write(shared_.full + n * Shared::kFullStride + unit(tile) - first_unit_, from_float<T>(full));
    });
  }

  // The own units' share of the projection, all features.
  CTXFAST_DEVICE void project() {
    float sums[Shared::kFeatureTiles][S::kTiles][4] = {};
    const T* full = shared_.full + lane_ / 4 * Shared::kFullStride + lane_ % 4 * 8;
#pragma unroll
    for (int block = 0; block < Shared::kUnitBlocks; ++block) {
      Words4 x[S::kTiles];
#pragma unroll
      for (int rows = 0; rows < S::kTiles; ++rows) {
        x[rows] = read(
            reinterpret_cast<const Words4*>(full + rows * 8 * Shared::kFullStride + block * 32));
      }
#pragma unroll
      for (int tile = 0; tile < Shared::kFeatureTiles; ++tile) {
        const Words4 a = read(&shared_.projection[warp_][tile][block][0][lane_]);
        const Words4 b = read(&shared_.projection[warp_][tile][block][1][lane_]);
#pragma unroll
        for (int rows = 0; rows < S::kTiles; ++rows) {
          mma<T>(sums[tile][rows], a.x, b.x, a.y, b.y, x[rows].x, x[rows].y);
          mma<T>(sums[tile][rows], a.z, b.z, a.w, b.w, x[rows].z, x[rows].w);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < Shared::kFeatureTiles; ++tile) {
      const int feature = (warp_ * Shared::kFeatureTiles + tile) * 16 + lane_ / 4;
#pragma unroll
      for (int rows = 0; rows < S::kTiles; ++rows) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = rows * 8 + lane_ % 4 * 2 + i % 2;
          write(shared_.sums + n * S::kSumStride + feature + i / 2 * 8, sums[tile][rows][i]);
        }
      }
    }
  }

  // Four features of a row's next state, from their sums over all units.
  CTXFAST_DEVICE void finish_state(int step, int n, int feature, Floats4 sum) {
    const int row = read(shared_.rows.row + n), length = read(shared_.rows.length + n);
    if (step >= length) return;
    float x[4] = {sum.x, sum.y, sum.z, sum.w};
    const int64_t place = place_in_time(args_, direction_, row, length, step);
    const bool writes = own_.cluster == n % S::kClusters;
    if (writes && direction_.projected) {
      write(reinterpret_cast<Floats4*>(direction_.projected + place * S::kFeatures + feature), sum);
    }
    const float* mask = direction_.mask + int64_t(row) * S::kFeatures + feature;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = clamp(x[i], args_.proj_clip);
      if (direction_.mask) x[i] *= read_constant(mask + i);
    }
    const Words2 packed = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3])};
    write_peers<S>(reinterpret_cast<Words2*>(shared_.state + n * S::kStateStride + feature),
                   packed);
    if (!writes) return;
    T* output = static_cast<T*>(direction_.output) + place * args_.output_stride + feature;
    write(reinterpret_cast<Words2*>(output), packed);
    if (step + 1 == length) {
      T* h = static_cast<T*>(direction_.h) + int64_t(row) * S::kFeatures + feature;
      write(reinterpret_cast<Words2*>(h), packed);
    }
  }

  CTXFAST_DEVICE void write_cells() {
    each_cell([&](int tile, int rows, int j, int, int row, int) {
      if (row >= 0) {
        write(direction_.c + int64_t(row) * S::kHidden + unit(tile), cells_[tile][rows][j]);
      }
    });
  }

  const Lstm& args_;
  const Rank own_;
  const LstmDirection& direction_;
  Shared& shared_;
  AllReduce<S> all_reduce_;
  const int warp_, lane_, first_unit_;
  Words4 weights_[kUnitTiles][S::kRegisterBlocks][4];
  float gates_[kUnitTiles][S::kTiles][2][4];
  float cells_[kUnitTiles][S::kTiles][2];
  T inputs_[kUnitTiles][S::kTiles][2][4];
  int longest_[S::kTiles];
};

}  // namespace cuda
}  // namespace ctxfast
