// The batch rows that blocks work on together.
#pragma once

#include "cuda/device.cuh"
#include "cuda/lstm.h"

namespace ctxfast {
namespace cuda {

// In shared memory: the rows of a group. row is -1, with length 0, past the end of the batch.
template <int Rows>
struct RowGroup {
  int row[Rows], length[Rows];

  // By all threads of a block; a barrier must follow.
  CTXFAST_DEVICE void load(const Lstm& args, int group, int threads) {
    for (int i = thread_index(); i < Rows; i += threads) {
      const int place = group * Rows + i;
      int index = -1, steps = 0;
      if (place < args.batch) {
        index = args.order ? int(read_constant(args.order + place)) : place;
        steps = args.lengths ? int(read_constant(args.lengths + index)) : args.steps;
      }
      write(row + i, index);
      write(length + i, steps);
    }
  }

  // Steps of the longest row of rows first .. first + count - 1.
  CTXFAST_DEVICE int longest(int first, int count) const {
    int steps = 0;
    for (int i = 0; i < count; ++i) {
      const int own = read(length + first + i);
      steps = own > steps ? own : steps;
    }
    return steps;
  }
};

// Where row (b, step) lies in [B, T, ...]: the position in time of a row's step.
CTXFAST_DEVICE int64_t place_in_time(const Lstm& args, const LstmDirection& direction, int row,
                                     int length, int step) {
  return int64_t(row) * args.steps + (direction.reverse ? length - 1 - step : step);
}

}  // namespace cuda
}  // namespace ctxfast
