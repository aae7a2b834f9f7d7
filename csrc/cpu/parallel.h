// One OpenMP region per operator: work items are taken in order by whichever thread is free.
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

CTXFAST_NAMESPACE_END
