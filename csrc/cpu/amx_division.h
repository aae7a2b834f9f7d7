// How a product on matrix tiles is divided among threads.
#pragma once

#include "cpu/isa.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// Chunks of blocks of rows by groups of blocks of columns.
struct Division {
  int64_t chunks, groups;
};

// What a step of the depth takes: to multiply a block of rows by one of columns, to pack one of
// rows, and to pack one of columns or bring it from the last cache level.
struct StepCosts {
  int64_t multiply, rows, columns;
};

// The division with the least work for the busiest thread, with at least `fewest` chunks.
inline Division divide(int64_t row_blocks, int64_t column_blocks, int64_t fewest, int64_t threads,
                       const StepCosts& cost) {
  const auto ceiling = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t most_groups = column_blocks < 2 * threads ? column_blocks : 2 * threads;
  Division best = {fewest, 1};
  int64_t least = INT64_MAX;
  for (int64_t chunks = fewest; chunks <= fewest + threads; ++chunks)
    for (int64_t groups = 1; groups <= most_groups; ++groups) {
      const int64_t height = ceiling(row_blocks, chunks), width = ceiling(column_blocks, groups);
      const int64_t turns = ceiling(chunks * groups, threads);
      const int64_t work =
          turns * (height * (cost.rows + width * cost.multiply) + width * cost.columns);
      if (work >= least) continue;
      least = work;
      best = {chunks, groups};
    }
  if (best.chunks > row_blocks) best.chunks = row_blocks;
  return best;
}

CTXFAST_NAMESPACE_END

#endif
