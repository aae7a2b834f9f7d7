// LSTM for every size: two kernels a step, forward. The always-correct path beside the persistent
// kernels.
//
// After Appleyard et al., "Optimizing performance of recurrent neural networks on GPUs" (2016): the
// four gates in one product, with the cell fused to it. Each kernel is a struct whose run() is the
// kernel, for one step of all directions.
#pragma once

#include "cuda/lstm_math.cuh"
#include "cuda/lstm_rows.cuh"
#include "cuda/lstm_tile.cuh"

namespace ctxfast {
namespace cuda {

// scratch, forward: what the projection reads, T [D, B, H], float without a projection
//          backward: gradients of the projected state, T [D, B, P], float without a projection
struct Stepwise {
  Lstm lstm;
  void* scratch;
};

struct StepRow {
  int row, length;  // -1 and 0 past the end of the batch
};

CTXFAST_DEVICE StepRow step_row(const Lstm& args, int place) {
  if (place >= args.batch) return {-1, 0};
  const int row = args.order ? int(read_constant(args.order + place)) : place;
  return {row, args.lengths ? int(read_constant(args.lengths + row)) : args.steps};
}

// Whether any of a tile's rows runs this step: rows stand in falling order of their lengths.
CTXFAST_DEVICE bool any_active(const Lstm& args, int first, int step) {
  return step < step_row(args, first).length;
}

template <class T>
CTXFAST_DEVICE T* row_of(const void* base, int64_t row, int64_t stride) {
  return static_cast<T*>(const_cast<void*>(base)) + row * stride;
}

// The projected state of one feature becomes state and output.
template <class T>
CTXFAST_DEVICE void finish_state(const Lstm& args, const LstmDirection& d, StepRow r, int step,
                                 int feature, float x) {
  const int64_t place = place_in_time(args, d, r.row, r.length, step);
  if (d.projected) write(d.projected + place * args.features + feature, x);
  x = clamp(x, args.proj_clip);
  if (d.mask) x *= read_constant(d.mask + int64_t(r.row) * args.features + feature);
  const T rounded = from_float<T>(x);
  write(row_of<T>(d.output, place, args.output_stride) + feature, rounded);
  write(row_of<T>(d.h, r.row, args.features) + feature, rounded);
}

// The initial states where the loop keeps them.
template <class T>
struct StartForward {
  static constexpr int kThreads = 256;
  static constexpr size_t kSharedBytes = 0;
  CTXFAST_DEVICE static void run(const Stepwise& call, int) {
    const Lstm& args = call.lstm;
    const LstmDirection& d = args.directions[block_index().z];
    const int64_t row = block_index().y;
    const int i = block_index().x * kThreads + thread_index();
    if (i < args.hidden)
      write(d.c + row * args.hidden + i, read_constant(d.c0 + row * args.hidden + i));
    if (i < args.features) {
      write(row_of<T>(d.h, row, args.features) + i,
            read_constant(row_of<T>(d.h0, row, args.features) + i));
    }
  }
};

// Gates of 8 units for 8 * Tiles rows, and their cells.
template <class T, int Tiles, bool Aligned>
struct GateStep {
  static constexpr int kWarps = 4;
  using Tile = LstmTile<T, Tiles, kWarps, Aligned>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr size_t kSharedBytes = Tile::kSharedBytes;

  CTXFAST_DEVICE static void run(const Stepwise& call, int step) {
    const Lstm& args = call.lstm;
    const LstmDirection& d = args.directions[block_index().z];
    const int first = block_index().y * 8 * Tiles, lane = thread_index() % kWarpSize;
    const int hidden = args.hidden, unit = block_index().x * 8 + lane / 4;
    if (!any_active(args, first, step)) return;
    Tile tile;
    tile.multiply(
        args.features,
        [&](int gate) {
          if (unit >= hidden) return static_cast<const T*>(nullptr);
          const int64_t row = int64_t(gate) * hidden + unit;
          return static_cast<const T*>(row_of<T>(d.weight_hh, row, args.features));
        },
        [&](int n) {
          const StepRow r = step_row(args, first + n);
          if (step >= r.length) return static_cast<const T*>(nullptr);
          return static_cast<const T*>(row_of<T>(d.h, r.row, args.features));
        });
    if (thread_index() >= kWarpSize || unit >= hidden) return;
#pragma unroll
    for (int rows = 0; rows < Tiles; ++rows) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const StepRow r = step_row(args, first + rows * 8 + lane % 4 * 2 + j);
        if (step >= r.length) continue;
        float z[4];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) z[gate] = tile.sums[rows][gate][j];
        cell(call, d, r, step, unit, z);
      }
    }
  }

  CTXFAST_DEVICE static void cell(const Stepwise& call, const LstmDirection& d, StepRow r, int step,
                                  int unit, float (&z)[4]) {
    const Lstm& args = call.lstm;
    const int hidden = args.hidden;
    const int64_t place = place_in_time(args, d, r.row, r.length, step);
    const T* inputs = row_of<T>(d.gates, place, 4 * hidden) + unit;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) z[gate] += to_float(read_constant(inputs + gate * hidden));
    const float i = sigmoid<false>(z[0]), f = sigmoid<false>(z[1]);
    const float g = tangent<false>(z[2]), o = sigmoid<false>(z[3]);
    float* kept = d.c + int64_t(r.row) * hidden + unit;
    const float sum = f * read(kept) + i * g;
    const float c = clamp(sum, args.cell_clip);
    write(kept, c);
    if (d.saved_gates) {
      T* saved = row_of<T>(d.saved_gates, place, 4 * hidden) + unit;
      write(saved, from_float<T>(i));
      write(saved + hidden, from_float<T>(f));
      write(saved + 2 * hidden, from_float<T>(g));
      write(saved + 3 * hidden, from_float<T>(o));
      write(d.cells + place * hidden + unit, sum);
    }
    const float full = o * tangent<false>(c);
    const int64_t target = int64_t(block_index().z) * args.batch + r.row;
    if (d.weight_hr) {
      write(row_of<T>(call.scratch, target, hidden) + unit, from_float<T>(full));
    } else {
      write(row_of<float>(call.scratch, target, hidden) + unit, full);
    }
  }
};

// The projection of 8 * Tiles rows to 32 features, and their next states.
template <class T, int Tiles, bool Aligned>
struct ProjectionStep {
  static constexpr int kWarps = 8;
  using Tile = LstmTile<T, Tiles, kWarps, Aligned>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr size_t kSharedBytes = Tile::kSharedBytes;

  CTXFAST_DEVICE static void run(const Stepwise& call, int step) {
    const Lstm& args = call.lstm;
    const LstmDirection& d = args.directions[block_index().z];
    const int first = block_index().y * 8 * Tiles, lane = thread_index() % kWarpSize;
    const int feature = block_index().x * 32 + lane / 4;
    if (!any_active(args, first, step)) return;
    Tile tile;
    tile.multiply(
        args.hidden,
        [&](int slot) {
          if (feature + 8 * slot >= args.features) return static_cast<const T*>(nullptr);
          return static_cast<const T*>(row_of<T>(d.weight_hr, feature + 8 * slot, args.hidden));
        },
        [&](int n) {
          const StepRow r = step_row(args, first + n);
          if (step >= r.length) return static_cast<const T*>(nullptr);
          const int64_t source = int64_t(block_index().z) * args.batch + r.row;
          return static_cast<const T*>(row_of<T>(call.scratch, source, args.hidden));
        });
    if (thread_index() >= kWarpSize) return;
#pragma unroll
    for (int rows = 0; rows < Tiles; ++rows) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const StepRow r = step_row(args, first + rows * 8 + lane % 4 * 2 + j);
        if (step >= r.length) continue;
#pragma unroll
        for (int slot = 0; slot < 4; ++slot) {
          const int own = feature + 8 * slot;
          if (own < args.features) finish_state<T>(args, d, r, step, own, tile.sums[rows][slot][j]);
        }
      }
    }
  }
};

// Without a projection: the next states from the cells' outputs.
template <class T>
struct StateStep {
  static constexpr int kThreads = 256;
  static constexpr size_t kSharedBytes = 0;
  CTXFAST_DEVICE static void run(const Stepwise& call, int step) {
    const Lstm& args = call.lstm;
    const StepRow r = step_row(args, block_index().y);
    const int i = block_index().x * kThreads + thread_index();
    if (step >= r.length || i >= args.features) return;
    const int64_t source = int64_t(block_index().z) * args.batch + r.row;
    const float x = read(row_of<float>(call.scratch, source, args.hidden) + i);
    finish_state<T>(args, args.directions[block_index().z], r, step, i, x);
  }
};

}  // namespace cuda
}  // namespace ctxfast
