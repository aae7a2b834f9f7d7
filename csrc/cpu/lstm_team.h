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
constexpr int64_t kVectorsAtOnce = 4;  // of a product

// Both directions run at the same time, each on half of the threads, where their weights together
// stay in the last-level cache; larger ones would evict each other.
constexpr int64_t kTogetherBytes = int64_t{24} << 20;

constexpr int kMostSharers = 64;  // threads that take over each other's work

// Of a thread's share of the work between two barriers, how many items have been begun.
struct alignas(64) Begun {
  int64_t items = 0;
};

struct alignas(64) Barrier {
  int32_t arrived = 0;
  char apart[60];
  int32_t generation = 0;
  Begun begun[kMostSharers];
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
      for (int k = 0; k < size && k < kMostSharers; ++k)
        __atomic_store_n(&barrier->begun[k].items, 0, __ATOMIC_RELAXED);
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

  // Calls body(item, end) for this thread's share of [0, items), which ends at `end`, then for what
  // the others have not begun: a processor that something else slows down does not hold them up.
  // Once between two barriers.
  template <typename Body>
  CTXFAST_INLINE void share(int64_t items, const Body& body) const {
    const auto first = [&](int of) { return items * of / size; };
    if (size == 1 || size > kMostSharers) {
      for (int64_t item = first(rank); item < first(rank + 1); ++item) body(item, first(rank + 1));
      return;
    }
    for (int k = 0; k < size; ++k) {
      const int of = (rank + k) % size;
      const int64_t begin = first(of), end = first(of + 1);
      int64_t* begun = &barrier->begun[of].items;
      while (begin + __atomic_load_n(begun, __ATOMIC_RELAXED) < end) {
        const int64_t item = begin + __atomic_fetch_add(begun, 1, __ATOMIC_RELAXED);
        if (item < end) body(item, end);
      }
    }
  }

  // The same for [0, vectors) in groups: body(first, last). As many vectors as a product takes at a
  // time, where that leaves some for every thread.
  template <typename Body>
  CTXFAST_INLINE void share_vectors(int64_t vectors, const Body& body) const {
    const int64_t width = vectors >= kVectorsAtOnce * size ? kVectorsAtOnce : 1;
    share((vectors + width - 1) / width, [&](int64_t group, int64_t) {
      const int64_t first = group * width, left = vectors - first;
      body(first, first + (left < width ? left : width));
    });
  }
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
