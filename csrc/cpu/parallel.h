// One OpenMP region per operator: work items are taken by whichever thread is free.
#pragma once

#include "cpu/isa.h"
#include "scratch.h"

CTXFAST_NAMESPACE_BEGIN

// Calls body(first, last) for consecutive pieces of at most `grain` of the items [0, items), each
// exactly once, from at most `threads` threads and with as many as the runtime gives. body must not
// throw. Which thread runs a piece is not determined, so a piece's result must not depend on it.
template <typename Body>
CTXFAST_INLINE void parallel_for(int threads, int64_t items, int64_t grain, const Body& body) {
  if (grain < 1) grain = 1;
  const int64_t pieces = (items + grain - 1) / grain;
  if (threads > pieces) threads = int(pieces);
  if (threads <= 1 || must_run_serially()) {
    for (int64_t first = 0; first < items; first += grain)
      body(first, first + grain < items ? first + grain : items);
    return;
  }
  note_parallel_region();
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  for (;;) {
    const int64_t first = __atomic_fetch_add(&next, grain, __ATOMIC_RELAXED);
    if (first >= items) break;
    body(first, first + grain < items ? first + grain : items);
  }
}

// Calls body(item) for each of the items [0, items) once. Each thread takes the items of a
// contiguous range in order, then those that others have not begun: what it reads stays sequential.
template <typename Body>
CTXFAST_INLINE void parallel_ranges(int threads, int64_t items, const Body& body) {
  constexpr int kMostRanges = 64, kLine = 8;  // a cache line for each counter
  if (threads > items) threads = int(items);
  if (threads <= 1 || must_run_serially()) {
    for (int64_t item = 0; item < items; ++item) body(item);
    return;
  }
  note_parallel_region();
  const int ranges = threads < kMostRanges ? threads : kMostRanges;
  int64_t taken[kMostRanges * kLine] = {}, workers = 0;
#pragma omp parallel num_threads(threads)
  {
    const int own = int(__atomic_fetch_add(&workers, 1, __ATOMIC_RELAXED) % ranges);
    for (int k = 0; k < ranges; ++k) {
      const int range = (own + k) % ranges;
      const int64_t first = items * range / ranges, last = items * (range + 1) / ranges;
      for (;;) {
        const int64_t item = first + __atomic_fetch_add(&taken[range * kLine], 1, __ATOMIC_RELAXED);
        if (item >= last) break;
        body(item);
      }
    }
  }
}

CTXFAST_NAMESPACE_END
