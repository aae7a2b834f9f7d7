// Runs the threads of a CUDA grid on one OS thread, in an order drawn from a seed, and watches what
// they do.
//
// A thread runs until it waits: at a barrier, in a collective of its warp, or after polling a flag.
// Ordering between threads comes from barriers and from release and acquire patterns alone, each
// within its scope, never from the order in which this machine happens to run them: a missing fence
// is found although every write is visible at once here.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda/device_types.h"
#include "simt/clock.h"
#include "simt/fiber.h"
#include "simt/memory.h"

namespace simt {

using ctxfast::cuda::Index3;
using ctxfast::cuda::Scope;

// A mistake planted in the primitives, to see that it is found.
enum FaultKind : int {
  kNoFault = 0,
  kDropFence = 1,       // fences do nothing
  kRelaxAcquire = 2,    // acquiring reads order nothing
  kSkipBarrier = 3,     // the barrier at one place in the source does nothing; value: its number
  kSkipGeneration = 4,  // polls see a counter ahead by value
  kLoseArrival = 5,     // block 0 does not add to counters any more after `value` times
  kNarrowFence = 6,     // fences reach no further than the own block
};
struct Fault {
  int kind = kNoFault;
  int value = 0;
};

struct Grid {
  Index3 blocks;
  int threads;
  int cluster;  // blocks of a cluster, along x
  size_t shared_bytes;
};

class Machine {
 public:
  Memory memory;
  Fault fault;
  uint64_t seed = 0;

  // Empty on success, otherwise what went wrong first.
  std::string launch(const Grid& grid, void (*kernel)(const void*), const void* argument);
  // Places of the barriers met in the last launch without a barrier left out, in order of file and
  // line.
  const std::set<std::pair<std::string, int>>& barriers() const { return barriers_; }

  // Called by threads of the grid.
  int thread_index() const { return current().index; }
  int cluster_size() const { return grid_.cluster; }
  Index3 block_index() const { return block().place; }
  Index3 grid_size() const { return grid_.blocks; }
  char* shared_memory() const { return block().shared; }
  void block_barrier(const char* file, int line);
  void cluster_barrier(const char* file, int line);
  void fence(Scope scope);
  void add_relaxed(uint32_t* counter, uint32_t value);
  uint32_t read_atomic(const uint32_t* counter, Scope scope, bool acquire);
  void write_relaxed(uint32_t* word, uint32_t value);
  uint64_t nanoseconds() const { return polls_ * 100; }
  void on_read(const void* address, size_t bytes, Access kind);
  void on_write(void* address, size_t bytes, Access kind);
  char* remote(const void* address, int rank);
  // All lanes of a warp meet; the last one to come runs act(what each of them brought).
  void collective(const char* name, void* mine, void (*act)(void* const*));
  [[noreturn]] void fail(const std::string& reason);

 private:
  enum class State { kRunnable, kWaiting, kDone };
  struct Thread {
    int index, block;
    State state = State::kRunnable;
    Clock clock;
    Shared fenced;  // what its relaxed writes publish, since its last fence
    Scope fenced_scope = Scope::kBlock;
  };
  struct Meeting {
    int arrived = 0, live = 0;
  };
  struct Warp {
    Meeting meeting;
    const char* name = nullptr;
    void* brought[32];
  };
  struct Block {
    Index3 place;
    char* shared;
    int cluster, rank;
    Meeting meeting;
  };
  struct Release {
    Shared times;
    Scope scope;
    int thread;
  };

  static void run(void* self, int thread);
  Thread& current() const { return const_cast<Thread&>(threads_[current_]); }
  Block& block() const { return const_cast<Block&>(blocks_[current().block]); }
  bool includes(Scope scope, int a, int b) const;
  bool planted(int kind) const { return fault.kind == kind; }
  bool skipped(const char* file, int line);
  void wait();
  void meet_at(Meeting& meeting, int first, int count);
  void finish_meeting(Meeting& meeting, int first, int count);
  void leave();
  int pick();
  std::string who(int thread) const;

  Grid grid_{};
  void (*kernel_)(const void*) = nullptr;
  const void* argument_ = nullptr;
  std::unique_ptr<Fibers> fibers_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<Meeting> clusters_;
  std::vector<double> haste_;
  std::vector<int> runnable_;
  std::map<const void*, std::vector<Release>> releases_;
  std::set<std::pair<std::string, int>> barriers_;
  std::mt19937_64 random_;
  std::string error_;
  int current_ = 0, live_ = 0, arrivals_ = 0;
  uint64_t polls_ = 0, idle_polls_ = 0;
};

Machine& machine();

}  // namespace simt
