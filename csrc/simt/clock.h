// Vector clocks: what a thread knows of the progress of all others (Mattern, 1989).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace simt {

using Times = std::vector<uint32_t>;
using Shared = std::shared_ptr<const Times>;

// Threads that have just met at a barrier know the same, so they share one vector; each has its own
// time besides.
struct Clock {
  Shared known;
  uint32_t own = 1;

  // Whether what `thread` did at `time` happened before now, as the owner `self` of this clock sees
  // it.
  bool knows(int self, int thread, uint32_t time) const {
    return time <= (thread == self ? own : (*known)[thread]);
  }
  // What others learn from `self` when it releases now. Later actions carry a later time.
  Shared release(int self) {
    auto times = std::make_shared<Times>(*known);
    (*times)[self] = own++;
    return times;
  }
  void acquire(const Shared& other) {
    if (other == known) return;
    auto times = std::make_shared<Times>(*known);
    for (size_t i = 0; i < times->size(); ++i) (*times)[i] = std::max((*times)[i], (*other)[i]);
    known = times;
  }
};

// A barrier: all members learn what any of them knows. member(i) gives (index of the thread, its
// clock).
template <class Member>
void meet(int count, int threads, Member member) {
  auto times = std::make_shared<Times>(threads, 0u);
  const Times* last = nullptr;
  for (int i = 0; i < count; ++i) {
    const Times* known = member(i).second->known.get();
    if (known == last) continue;
    last = known;
    for (int j = 0; j < threads; ++j) (*times)[j] = std::max((*times)[j], (*known)[j]);
  }
  for (int i = 0; i < count; ++i) {
    auto [thread, clock] = member(i);
    (*times)[thread] = clock->own;
  }
  for (int i = 0; i < count; ++i) {
    Clock* clock = member(i).second;
    clock->known = times;
    ++clock->own;
  }
}

}  // namespace simt
