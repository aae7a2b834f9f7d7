// The launches of the stepwise LSTM, in order. On the device they go to a stream, in the tests to
// csrc/simt.
#pragma once

#include "cuda/lstm_stepwise_backward.cuh"

namespace ctxfast {
namespace cuda {

inline int blocks_of(int count, int size) { return (count + size - 1) / size; }

// launch.template operator()<Kernel>(call, step, x, y): a grid of (x, y, directions) blocks; an
// error code, 0 for success.
template <class T, int Tiles, bool Aligned, class Launch>
int stepwise_loop(const Stepwise& call, bool backward, Launch&& launch) {
  const Lstm& args = call.lstm;
  const int rows = blocks_of(args.batch, 8 * Tiles);
  const int units = blocks_of(args.hidden, 8), unit_blocks = blocks_of(args.hidden, 32);
  const int features = blocks_of(args.features, 32);
  const int longest = args.hidden > args.features ? args.hidden : args.features;
  int error = 0;
  if (!backward) {
    using Start = StartForward<T>;
    error = launch.template operator()<Start>(call, 0, blocks_of(longest, 256), args.batch);
    for (int step = 0; step < args.steps && !error; ++step) {
      error = launch.template operator()<GateStep<T, Tiles, Aligned>>(call, step, units, rows);
      if (error) break;
      if (args.directions[0].weight_hr) {
        using Project = ProjectionStep<T, Tiles, Aligned>;
        error = launch.template operator()<Project>(call, step, features, rows);
      } else {
        const int blocks = blocks_of(args.features, 256);
        error = launch.template operator()<StateStep<T>>(call, step, blocks, args.batch);
      }
    }
    return error;
  }
  using Start = StartBackward<T>;
  error = launch.template operator()<Start>(call, 0, blocks_of(longest, 256), args.batch);
  for (int step = args.steps - 1; step >= 0 && !error; --step) {
    using Cell = CellBackwardStep<T, Tiles, Aligned>;
    using Gate = GateBackwardStep<T, Tiles, Aligned>;
    error = launch.template operator()<Cell>(call, step, unit_blocks, rows);
    if (!error) error = launch.template operator()<Gate>(call, step, features, rows);
  }
  return error;
}

// Chooses the kernels: wide tiles for many rows; vector loads where all rows of all matrices allow
// them.
template <class T, class Launch>
int run_stepwise(const Stepwise& call, bool backward, Launch&& launch) {
  const Lstm& args = call.lstm;
  const int elements = 16 / int(sizeof(T));
  const bool aligned = args.features % elements == 0 && args.hidden % elements == 0;
  if (args.batch > 16) {
    return aligned ? stepwise_loop<T, 4, true>(call, backward, launch)
                   : stepwise_loop<T, 4, false>(call, backward, launch);
  }
  return aligned ? stepwise_loop<T, 1, true>(call, backward, launch)
                 : stepwise_loop<T, 1, false>(call, backward, launch);
}

}  // namespace cuda
}  // namespace ctxfast
