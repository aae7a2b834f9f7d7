// Threads that walk through the steps of a sequence together.
#pragma once

#include <sched.h>
#include <time.h>

#include "cpu/isa.h"
#include "scratch.h"
#ifdef _OPENMP
#include <omp.h>
#endif

CTXFAST_NAMESPACE_BEGIN

constexpr int64_t kSpinNanoseconds = 20000;

// Both directions run at the same time, each on half of the threads, where their weights together
// stay in the last-level cache; larger ones would evict each other.
constexpr int64_t kTogetherBytes = int64_t{24} << 20;

struct alignas(64) Barrier {
  int32_t arrived = 0;
  char apart[60];
  int32_t generation = 0;
};

CTXFAST_INLINE int64_t now_nanoseconds() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

CTXFAST_INLINE void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Rank `rank` of `size` threads; the barrier is shared by them.
struct Team {
  Barrier* barrier;
  int rank, size;

  // Returns when all have arrived. Spins briefly, then gives the processor to whoever waits for it.
  CTXFAST_NOINLINE void wait() const {
    if (size == 1) return;
    const int32_t generation = __atomic_load_n(&barrier->generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&barrier->generation, generation + 1, __ATOMIC_RELEASE);
      return;
    }
    int64_t started = 0;
    for (int spins = 1; __atomic_load_n(&barrier->generation, __ATOMIC_ACQUIRE) == generation;
         ++spins) {
      pause_briefly();
      if (spins % 64 != 0) continue;
      const int64_t now = now_nanoseconds();
      if (started == 0) started = now;
      if (now - started > kSpinNanoseconds) sched_yield();
    }
  }

  // This thread's share of [0, items).
  CTXFAST_INLINE int64_t begin(int64_t items) const { return items * rank / size; }
  CTXFAST_INLINE int64_t end(int64_t items) const { return items * (rank + 1) / size; }
};

// Calls body(direction, team) for each of `count` directions from every thread of its team.
// `together`: the threads are divided among the directions, which then run at the same time. Else
// all of them take one direction after the other. Works with the number of threads that the runtime
// gives.
template <typename Body>
CTXFAST_INLINE void for_each_direction(int threads, int count, bool together, const Body& body) {
  if (threads <= 1 || must_run_serially()) {
    for (int direction = 0; direction < count; ++direction) body(direction, Team{nullptr, 0, 1});
    return;
  }
  note_parallel_region();
  Barrier barriers[2];
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    const int size = omp_get_num_threads(), rank = omp_get_thread_num();
#else
  {
    const int size = 1, rank = 0;
#endif
    if (together && count == 2 && size >= 2) {
      const int direction = rank % 2;
      body(direction, Team{&barriers[direction], rank / 2, (size + 1 - direction) / 2});
    } else {
      for (int direction = 0; direction < count; ++direction)
        body(direction, Team{&barriers[direction], rank, size});
    }
  }
}

CTXFAST_NAMESPACE_END
