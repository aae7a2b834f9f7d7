// LSTM for every size, backward in time: two kernels a step, the mirror image of lstm_stepwise.cuh.
#pragma once

#include "cuda/lstm_stepwise.cuh"

namespace ctxfast {
namespace cuda {

// Gradient of one projected feature of a step, from that of the state after it, kept for the next
// kernel and for the weights.
template <class T>
CTXFAST_DEVICE void start_step(const Stepwise& call, const LstmDirection& d, StepRow r, int step,
                               int feature, float gradient) {
  const Lstm& args = call.lstm;
  const int64_t place = place_in_time(args, d, r.row, r.length, step);
  if (step + 1 == r.length) {
    gradient = to_float(read_constant(row_of<T>(d.grad_h, r.row, args.features) + feature));
  }
  gradient +=
      to_float(read_constant(row_of<T>(d.grad_output, place, args.output_stride) + feature));
  if (d.mask) gradient *= read_constant(d.mask + int64_t(r.row) * args.features + feature);
  if (d.projected) {
    const float projected = read_constant(d.projected + place * args.features + feature);
    gradient = inside(gradient, projected, args.proj_clip);
  }
  const int64_t target = int64_t(block_index().z) * args.batch + r.row;
  if (!d.weight_hr) {
    write(row_of<float>(call.scratch, target, args.features) + feature, gradient);
    return;
  }
  const T rounded = from_float<T>(gradient);
  write(row_of<T>(d.grad_projected, place, args.features) + feature, rounded);
  write(row_of<T>(call.scratch, target, args.features) + feature, rounded);
}

// What enters at the last step of each row; of rows without a step the gradients pass through.
template <class T>
struct StartBackward {
  static constexpr int kThreads = 256;
  static constexpr size_t kSharedBytes = 0;
  CTXFAST_DEVICE static void run(const Stepwise& call, int) {
    const Lstm& args = call.lstm;
    const LstmDirection& d = args.directions[block_index().z];
    const StepRow r = step_row(args, block_index().y);
    const int64_t row = r.row;
    const int i = block_index().x * kThreads + thread_index();
    if (i < args.hidden) {
      write(d.grad_c0 + row * args.hidden + i, read_constant(d.grad_c + row * args.hidden + i));
    }
    if (i >= args.features) return;
    if (r.length > 0) {
      start_step<T>(call, d, r, r.length - 1, i, 0.0f);
    } else {
      write(d.grad_h0 + row * args.features + i,
            to_float(read_constant(row_of<T>(d.grad_h, row, args.features) + i)));
    }
  }
};

// Back through the projection and the cells of 32 units, for 8 * Tiles rows.
template <class T, int Tiles, bool Aligned>
struct CellBackwardStep {
  static constexpr int kWarps = 4;
  using Tile = LstmTile<T, Tiles, kWarps, Aligned>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr size_t kSharedBytes = Tile::kSharedBytes;

  CTXFAST_DEVICE static void run(const Stepwise& call, int step) {
    const Lstm& args = call.lstm;
    const LstmDirection& d = args.directions[block_index().z];
    const int first = block_index().y * 8 * Tiles, lane = thread_index() % kWarpSize;
    const int unit = block_index().x * 32 + lane / 4;
    if (!any_active(args, first, step)) return;
    Tile tile;
    if (d.weight_hr) {
      tile.multiply(
          args.features,
          [&](int slot) {
            if (unit + 8 * slot >= args.hidden) return static_cast<const T*>(nullptr);
            return static_cast<const T*>(row_of<T>(d.weight_hr, unit + 8 * slot, args.features));
          },
          [&](int n) {
            const StepRow r = step_row(args, first + n);
            if (step >= r.length) return static_cast<const T*>(nullptr);
            const int64_t source = int64_t(block_index().z) * args.batch + r.row;
            return static_cast<const T*>(row_of<T>(call.scratch, source, args.features));
          });
    }
    if (thread_index() >= kWarpSize) return;
#pragma unroll
    for (int rows = 0; rows < Tiles; ++rows) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const StepRow r = step_row(args, first + rows * 8 + lane % 4 * 2 + j);
        if (step >= r.length) continue;
#pragma unroll
        for (int slot = 0; slot < 4; ++slot) {
          const int own = unit + 8 * slot;
          if (own >= args.hidden) continue;
          float full = tile.sums[rows][slot][j];
          if (!d.weight_hr) {
            const int64_t source = int64_t(block_index().z) * args.batch + r.row;
            full = read(row_of<float>(call.scratch, source, args.features) + own);
          }
          cell(args, d, r, step, own, full);
        }
      }
    }
  }

  CTXFAST_DEVICE static void cell(const Lstm& args, const LstmDirection& d, StepRow r, int step,
                                  int unit, float full) {
    const int hidden = args.hidden;
    const int64_t place = place_in_time(args, d, r.row, r.length, step);
    const T* saved = row_of<T>(d.saved_gates, place, 4 * hidden) + unit;
    const float i = to_float(read_constant(saved)), f = to_float(read_constant(saved + hidden));
    const float g = to_float(read_constant(saved + 2 * hidden));
    const float o = to_float(read_constant(saved + 3 * hidden));
    const float sum = read_constant(d.cells + place * hidden + unit);
    float before;
    if (step > 0) {
      const int64_t earlier = place_in_time(args, d, r.row, r.length, step - 1);
      before = clamp(read_constant(d.cells + earlier * hidden + unit), args.cell_clip);
    } else {
      before = read_constant(d.c0 + int64_t(r.row) * hidden + unit);
    }
    const float tanh_c = tangent<false>(clamp(sum, args.cell_clip));
    float* grad_c = d.grad_c0 + int64_t(r.row) * hidden + unit;
    const float grad_cell =
        inside(read(grad_c) + full * o * (1.0f - tanh_c * tanh_c), sum, args.cell_clip);
    T* target = row_of<T>(d.grad_gates, place, 4 * hidden) + unit;
    write(target, from_float<T>(grad_cell * g * i * (1.0f - i)));
    write(target + hidden, from_float<T>(grad_cell * before * f * (1.0f - f)));
    write(target + 2 * hidden, from_float<T>(grad_cell * i * (1.0f - g * g)));
    write(target + 3 * hidden, from_float<T>(full * tanh_c * o * (1.0f - o)));
    write(grad_c, grad_cell * f);
  }
};

// Back through the gates to 32 features of the state before the step.
template <class T, int Tiles, bool Aligned>
struct GateBackwardStep {
  static constexpr int kWarps = 16;
  using Tile = LstmTile<T, Tiles, kWarps, Aligned>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr size_t kSharedBytes = Tile::kSharedBytes;

  CTXFAST_DEVICE static void run(const Stepwise& call, int step) {
    const Lstm& args = call.lstm;
    const LstmDirection& d = args.directions[block_index().z];
    const int first = block_index().y * 8 * Tiles, lane = thread_index() % kWarpSize;
    const int feature = block_index().x * 32 + lane / 4, rows_of_gates = 4 * args.hidden;
    if (!any_active(args, first, step)) return;
    Tile tile;
    tile.multiply(
        rows_of_gates,
        [&](int slot) {
          if (feature + 8 * slot >= args.features) return static_cast<const T*>(nullptr);
          return static_cast<const T*>(row_of<T>(d.weight_hh, feature + 8 * slot, rows_of_gates));
        },
        [&](int n) {
          const StepRow r = step_row(args, first + n);
          if (step >= r.length) return static_cast<const T*>(nullptr);
          const int64_t place = place_in_time(args, d, r.row, r.length, step);
          return static_cast<const T*>(row_of<T>(d.grad_gates, place, rows_of_gates));
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
          if (own >= args.features) continue;
          const float gradient = tile.sums[rows][slot][j];
          if (step > 0) {
            start_step<T>(call, d, r, step - 1, own, gradient);
          } else {
            write(d.grad_h0 + int64_t(r.row) * args.features + own, gradient);
          }
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace ctxfast
