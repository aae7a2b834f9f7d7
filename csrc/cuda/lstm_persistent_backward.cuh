// LSTM with projection, backward in time, in one launch: the mirror image of lstm_persistent.cuh.
//
// A step takes the gradient of the projected state, known to all blocks; gives the own units' share
// of the gradient of what the projection read (weights W_hr^T), through the cell the gradients of
// their gates, and from these the own units' share of the gradient of the state before (W_hh^T),
// which one sum over all blocks completes.
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/lstm_math.cuh"
#include "cuda/lstm_rows.cuh"

namespace ctxfast {
namespace cuda {

template <class S>
struct BackwardShared {
  static constexpr int kUnitTiles = S::kUnits / 8 / S::kWarps;         // of 8 units, of a warp
  static constexpr int kFeatureTiles = S::kFeatures / 16 / S::kWarps;  // of 16 features, of a warp
  static constexpr int kBlocks = S::kFeatures / 32;                    // of features
  static constexpr int kGateBlocks = 4 * S::kUnits / 32;               // of gate rows
  // As many weights in registers as the forward kernel keeps there.
  static constexpr int kRegisterBlocks = 2 * kUnitTiles * S::kRegisterBlocks / kFeatureTiles;
  static constexpr int kSharedBlocks = kGateBlocks - kRegisterBlocks;
  static constexpr int kGateStride = 4 * S::kUnits + 32;
  static_assert(kRegisterBlocks > 0 && kSharedBlocks >= 0, "register blocks");

  Words4 gates[S::kWarps][kFeatureTiles][kSharedBlocks ? kSharedBlocks : 1][2][kWarpSize];
  Words4 projection[S::kWarps][kUnitTiles][kBlocks][kWarpSize];
  alignas(16) typename S::T state[S::kRows * S::kStateStride];  // gradients of the projected state
  alignas(16) typename S::T gate_grads[S::kRows * kGateStride];
  alignas(16) float sums[S::kRows * S::kSumStride];
  RowGroup<S::kRows> rows;
  int late;
};

template <class S>
class PersistentBackward {
  using T = typename S::T;
  using Shared = BackwardShared<S>;
  static constexpr int kUnitTiles = Shared::kUnitTiles, kFeatureTiles = Shared::kFeatureTiles;
  static constexpr int kRowTiles = (S::kRows + 15) / 16;  // of 16 rows, the last maybe half empty
  static constexpr int kRowsOfLane = S::kRows >= 16 ? 2 : 1;  // in a tile of rows

 public:
  CTXFAST_DEVICE PersistentBackward(const Lstm& args, const Exchange& exchange)
      : args_(args),
        own_(own_rank<S>()),
        direction_(args.directions[own_.direction]),
        shared_(*reinterpret_cast<Shared*>(shared_memory())),
        all_reduce_(exchange, own_, shared_.sums, &shared_.late),
        warp_(thread_index() / kWarpSize),
        lane_(thread_index() % kWarpSize),
        first_unit_((own_.cluster * S::kCluster + own_.rank) * S::kUnits) {
    static_assert(S::kRows == 8 || S::kRows % 16 == 0, "tiles of rows");
  }

  CTXFAST_DEVICE void run() {
    load_weights();
    const int groups = (args_.batch + S::kRows - 1) / S::kRows;
    for (int group = own_.slot; group < groups; group += grid_size().z) {
      shared_.rows.load(args_, group, S::kThreads);
      block_barrier();
      const int steps = shared_.rows.longest(0, S::kRows);
      start(steps);
      block_barrier();
      if (steps > 0) load_saved(steps - 1);
      for (int step = steps - 1; step >= 0; --step) {
        through_projection();
        through_cell(step);
        if (step > 0) load_saved(step - 1);
        block_barrier();
        through_gates();
        // Rows that take up their last step next included.
        int active = 8;
        for (int first = 8; first < S::kRows; first += 8) {
          if (step <= shared_.rows.longest(first, 8)) active = first + 8;
        }
        all_reduce_(active,
                    [&](int n, int feature, Floats4 sum) { finish_state(step, n, feature, sum); });
      }
      each_pair([&](int tile, int rows, int half, int, int row, int) {
        if (row < 0) return;
        float* target = direction_.grad_c0 + int64_t(row) * S::kHidden + unit(tile);
        write(target, cells_[tile][rows][half][0]);
        write(target + 1, cells_[tile][rows][half][1]);
      });
      block_barrier();
    }
  }

 private:
  // The first of the two neighbouring units of this lane.
  CTXFAST_DEVICE int unit(int tile) const {
    return first_unit_ + (warp_ * kUnitTiles + tile) * 8 + lane_ % 4 * 2;
  }

  // visit(tile of units, tile of rows, its half, row of the group, of the batch or -1, length)
  template <class Visit>
  CTXFAST_DEVICE void each_pair(Visit visit) {
#pragma unroll
    for (int rows = 0; rows < kRowTiles; ++rows) {
#pragma unroll
      for (int half = 0; half < kRowsOfLane; ++half) {
        const int n = rows * 16 + half * 8 + lane_ / 4;
        const int row = read(shared_.rows.row + n), length = read(shared_.rows.length + n);
#pragma unroll
        for (int tile = 0; tile < kUnitTiles; ++tile) visit(tile, rows, half, n, row, length);
      }
    }
  }

  CTXFAST_DEVICE void load_weights() {
    const T* hh = static_cast<const T*>(direction_.weight_hh);
    const int column = lane_ % 4 * 8;
#pragma unroll
    for (int tile = 0; tile < kFeatureTiles; ++tile) {
#pragma unroll
      for (int block = 0; block < Shared::kGateBlocks; ++block) {
        constexpr int kUnitBlocks = S::kUnits / 32;
        const int gate = block / kUnitBlocks;
        const int place = gate * S::kHidden + first_unit_ + block % kUnitBlocks * 32 + column;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = (warp_ * kFeatureTiles + tile) * 16 + half * 8 + lane_ / 4;
          const T* source = hh + row * (4 * S::kHidden) + place;
          const Words4 w = read_constant(reinterpret_cast<const Words4*>(source));
          if (block < Shared::kRegisterBlocks) {
            weights_[tile][block][half] = w;
          } else {
            write(&shared_.gates[warp_][tile][block - Shared::kRegisterBlocks][half][lane_], w);
          }
        }
      }
    }
    const T* hr = static_cast<const T*>(direction_.weight_hr);
    for (int tile = 0; tile < kUnitTiles; ++tile) {
      const int64_t row = first_unit_ + (warp_ * kUnitTiles + tile) * 8 + lane_ / 4;
      for (int block = 0; block < Shared::kBlocks; ++block) {
        const T* source = hr + row * S::kFeatures + block * 32 + column;
        write(&shared_.projection[warp_][tile][block][lane_],
              read_constant(reinterpret_cast<const Words4*>(source)));
      }
    }
  }

  // Gradients that enter at the last step of the longest rows, and the cells there.
  CTXFAST_DEVICE void start(int steps) {
    constexpr int kVectors = S::kFeatures / 4;
    for (int i = thread_index(); i < S::kRows * kVectors; i += S::kThreads) {
      const int n = i / kVectors, feature = i % kVectors * 4;
      const bool writes = own_.cluster == 0 && feature / S::kSlice == own_.rank;
      const Words2 packed = state_gradient(steps - 1, n, feature, Floats4{}, writes);
      write(reinterpret_cast<Words2*>(shared_.state + n * S::kStateStride + feature), packed);
      const int row = read(shared_.rows.row + n);
      if (writes && row >= 0 && read(shared_.rows.length + n) == 0) {
        write(grad_h0(row, feature), final_gradient(row, feature));
      }
    }
    each_pair([&](int tile, int rows, int half, int, int row, int) {
      const float* source = direction_.grad_c + int64_t(row) * S::kHidden + unit(tile);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        cells_[tile][rows][half][j] = row < 0 ? 0.0f : read_constant(source + j);
      }
    });
  }

  // What the forward pass kept of a step and of the cells before it, on its way while the step
  // after is not yet over.
  CTXFAST_DEVICE void load_saved(int step) {
    const T* saved = static_cast<const T*>(direction_.saved_gates);
    each_pair([&](int tile, int rows, int half, int, int row, int length) {
      if (step >= length) return;
      const int64_t place = place_in_time(args_, direction_, row, length, step);
      const T* gates = saved + place * (4 * S::kHidden) + unit(tile);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        saved_[tile][rows][half][gate] =
            read_constant(reinterpret_cast<const uint32_t*>(gates + gate * S::kHidden));
      }
      const float* before = direction_.c0 + int64_t(row) * S::kHidden + unit(tile);
      if (step > 0) {
        const int64_t earlier = place_in_time(args_, direction_, row, length, step - 1);
        before = direction_.cells + earlier * S::kHidden + unit(tile);
      }
      const float* now = direction_.cells + place * S::kHidden + unit(tile);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        now_[tile][rows][half][j] = read_constant(now + j);
        before_[tile][rows][half][j] = read_constant(before + j);
      }
    });
  }

  // Gradients of what the projection read: here the batch rows are the first operand, 16 at a time.
  CTXFAST_DEVICE void through_projection() {
#pragma unroll
    for (int tile = 0; tile < kUnitTiles; ++tile) {
#pragma unroll
      for (int rows = 0; rows < kRowTiles; ++rows) {
        float sums[2][4] = {};
#pragma unroll
        for (int block = 0; block < Shared::kBlocks; ++block) {
          const T* source = shared_.state + (rows * 16 + lane_ / 4) * S::kStateStride + block * 32 +
                            lane_ % 4 * 8;
          const Words4 a = read(reinterpret_cast<const Words4*>(source));
          Words4 b = {};
          if constexpr (kRowsOfLane == 2) {
            b = read(reinterpret_cast<const Words4*>(source + 8 * S::kStateStride));
          }
          const Words4 w = read(&shared_.projection[warp_][tile][block][lane_]);
          mma<T>(sums[0], a.x, b.x, a.y, b.y, w.x, w.y);
          mma<T>(sums[1], a.z, b.z, a.w, b.w, w.z, w.w);
        }
#pragma unroll
        for (int i = 0; i < 2 * kRowsOfLane; ++i) {
          full_[tile][rows][i / 2][i % 2] = sums[0][i] + sums[1][i];
        }
      }
    }
  }

  CTXFAST_DEVICE void through_cell(int step) {
    T* grad_gates = static_cast<T*>(direction_.grad_gates);
    each_pair([&](int tile, int rows, int half, int n, int row, int length) {
      uint32_t packed[4] = {};
      if (step < length) {
        float z[4][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float gates[4];
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) {
            const uint32_t word = saved_[tile][rows][half][gate];
            gates[gate] = to_float(T{uint16_t(word >> (16 * j))});
          }
          const float i = gates[0], f = gates[1], g = gates[2], o = gates[3];
          const float cell = now_[tile][rows][half][j];
          float before = before_[tile][rows][half][j];
          if (step > 0) before = clamp(before, args_.cell_clip);
          const float tanh_c = tangent<true>(clamp(cell, args_.cell_clip));
          const float full = full_[tile][rows][half][j];
          float& grad_c = cells_[tile][rows][half][j];
          const float grad_cell =
              inside(grad_c + full * o * (1.0f - tanh_c * tanh_c), cell, args_.cell_clip);
          z[0][j] = grad_cell * g * i * (1.0f - i);
          z[1][j] = grad_cell * before * f * (1.0f - f);
          z[2][j] = grad_cell * i * (1.0f - g * g);
          z[3][j] = full * tanh_c * o * (1.0f - o);
          grad_c = grad_cell * f;
        }
        const int64_t place = place_in_time(args_, direction_, row, length, step);
        T* target = grad_gates + place * (4 * S::kHidden) + unit(tile);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          packed[gate] = pack<T>(z[gate][0], z[gate][1]);
          write(reinterpret_cast<uint32_t*>(target + gate * S::kHidden), packed[gate]);
        }
      }
      T* local = shared_.gate_grads + n * Shared::kGateStride + unit(tile) - first_unit_;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        write(reinterpret_cast<uint32_t*>(local + gate * S::kUnits), packed[gate]);
      }
    });
  }

  // The own gates' share of the gradient of the state before, all features.
  CTXFAST_DEVICE void through_gates() {
    float sums[kFeatureTiles][S::kTiles][4] = {};
    const T* grads = shared_.gate_grads + lane_ / 4 * Shared::kGateStride + lane_ % 4 * 8;
#pragma unroll
    for (int block = 0; block < Shared::kGateBlocks; ++block) {
      Words4 x[S::kTiles];
#pragma unroll
      for (int rows = 0; rows < S::kTiles; ++rows) {
        x[rows] = read(
            reinterpret_cast<const Words4*>(grads + rows * 8 * Shared::kGateStride + block * 32));
      }
#pragma unroll
      for (int tile = 0; tile < kFeatureTiles; ++tile) {
        Words4 w[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          w[half] =
              block < Shared::kRegisterBlocks
                  ? weights_[tile][block < Shared::kRegisterBlocks ? block : 0][half]
                  : read(&shared_.gates[warp_][tile][block - Shared::kRegisterBlocks][half][lane_]);
        }
#pragma unroll
        for (int rows = 0; rows < S::kTiles; ++rows) {
          mma<T>(sums[tile][rows], w[0].x, w[1].x, w[0].y, w[1].y, x[rows].x, x[rows].y);
          mma<T>(sums[tile][rows], w[0].z, w[1].z, w[0].w, w[1].w, x[rows].z, x[rows].w);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kFeatureTiles; ++tile) {
      const int feature = (warp_ * kFeatureTiles + tile) * 16 + lane_ / 4;
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

  CTXFAST_DEVICE Floats4* grad_h0(int row, int feature) const {
    return reinterpret_cast<Floats4*>(direction_.grad_h0 + int64_t(row) * S::kFeatures + feature);
  }

  CTXFAST_DEVICE Floats4 load4(const T* source) const {
    const Words2 x = read_constant(reinterpret_cast<const Words2*>(source));
    return {to_float(T{uint16_t(x.x)}), to_float(T{uint16_t(x.x >> 16)}),
            to_float(T{uint16_t(x.y)}), to_float(T{uint16_t(x.y >> 16)})};
  }

  CTXFAST_DEVICE Floats4 final_gradient(int row, int feature) const {
    return load4(static_cast<const T*>(direction_.grad_h) + int64_t(row) * S::kFeatures + feature);
  }

  // Gradients of four projected features of a step, packed, from that of the state after it; 0 past
  // a row's end.
  CTXFAST_DEVICE Words2 state_gradient(int step, int n, int feature, Floats4 sum,
                                       bool writes) const {
    const int row = read(shared_.rows.row + n), length = read(shared_.rows.length + n);
    if (step < 0 || step >= length) return {0, 0};
    if (step + 1 == length) sum = final_gradient(row, feature);
    const int64_t place = place_in_time(args_, direction_, row, length, step);
    const T* outputs = static_cast<const T*>(direction_.grad_output);
    add(sum, load4(outputs + place * args_.output_stride + feature));
    float x[4] = {sum.x, sum.y, sum.z, sum.w};
    const float* mask = direction_.mask + int64_t(row) * S::kFeatures + feature;
    const float* projected = direction_.projected + place * S::kFeatures + feature;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (direction_.mask) x[i] *= read_constant(mask + i);
      if (direction_.projected) x[i] = inside(x[i], read_constant(projected + i), args_.proj_clip);
    }
    const Words2 packed = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3])};
    if (writes) {
      T* target = static_cast<T*>(direction_.grad_projected) + place * S::kFeatures + feature;
      write(reinterpret_cast<Words2*>(target), packed);
    }
    return packed;
  }

  // sum: gradient of four features of the state before `step`.
  CTXFAST_DEVICE void finish_state(int step, int n, int feature, Floats4 sum) {
    const bool writes = own_.cluster == n % S::kClusters;
    if (step == 0) {
      const int row = read(shared_.rows.row + n);
      if (writes && row >= 0 && read(shared_.rows.length + n) > 0)
        write(grad_h0(row, feature), sum);
      return;
    }
    const Words2 packed = state_gradient(step - 1, n, feature, sum, writes);
    write_peers<S>(reinterpret_cast<Words2*>(shared_.state + n * S::kStateStride + feature),
                   packed);
  }

  const Lstm& args_;
  const Rank own_;
  const LstmDirection& direction_;
  Shared& shared_;
  AllReduce<S> all_reduce_;
  const int warp_, lane_, first_unit_;
  Words4 weights_[kFeatureTiles][Shared::kRegisterBlocks][2];
  uint32_t saved_[kUnitTiles][kRowTiles][kRowsOfLane][4];
  float now_[kUnitTiles][kRowTiles][kRowsOfLane][2], before_[kUnitTiles][kRowTiles][kRowsOfLane][2];
  float full_[kUnitTiles][kRowTiles][kRowsOfLane][2];
  float cells_[kUnitTiles][kRowTiles][kRowsOfLane][2];  // gradients of the cells
};

}  // namespace cuda
}  // namespace ctxfast
