#include "simt/machine.h"

#include <cstring>

namespace simt {
namespace {

// Polls in a row, by all threads together, after which nothing will change any more.
constexpr uint64_t kHopeless = 300000;

}  // namespace

Machine& machine() {
  static Machine instance;
  return instance;
}

std::string Machine::launch(const Grid& grid, void (*kernel)(const void*), const void* argument) {
  grid_ = grid;
  kernel_ = kernel;
  argument_ = argument;
  const int count = grid.blocks.x * grid.blocks.y * grid.blocks.z;
  const int total = count * grid.threads;
  std::vector<char> shared(count * grid.shared_bytes + 16,
                           char(0xff));  // 0xff...: NaN in every format
  char* base = shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16;
  memory.forget_accesses();
  memory.add("shared memory", base, count * grid.shared_bytes, false, grid.shared_bytes);
  random_.seed(seed);
  const auto nothing = std::make_shared<Times>(total, 0u);
  threads_.assign(total, Thread{});
  warps_.assign(total / 32, Warp{});
  blocks_.assign(count, Block{});
  clusters_.assign(count / grid.cluster, Meeting{0, grid.cluster * grid.threads});
  haste_.resize(count);
  runnable_.resize(total);
  releases_.clear();
  error_.clear();
  if (!planted(kSkipBarrier)) barriers_.clear();
  polls_ = idle_polls_ = arrivals_ = 0;
  live_ = total;
  for (int b = 0; b < count; ++b) {
    const Index3 place = {b % grid.blocks.x, b / grid.blocks.x % grid.blocks.y,
                          b / (grid.blocks.x * grid.blocks.y)};
    blocks_[b] = Block{place, base + b * grid.shared_bytes, b / grid.cluster, b % grid.cluster,
                       Meeting{0, grid.threads}};
    haste_[b] = std::uniform_real_distribution<>(0, 1)(random_);
  }
  for (int t = 0; t < total; ++t) {
    threads_[t].index = t % grid.threads;
    threads_[t].block = t / grid.threads;
    threads_[t].clock.known = threads_[t].fenced = nothing;
    runnable_[t] = t;
  }
  for (Warp& warp : warps_) warp.meeting.live = 32;
  fibers_ = std::make_unique<Fibers>(total, &Machine::run, this);
  while (live_ > 0 && error_.empty()) {
    if (runnable_.empty()) {
      error_ = "deadlock: " + std::to_string(live_) + " threads wait";
      break;
    }
    if (idle_polls_ > kHopeless) {
      error_ = "deadlock: every running thread polls";
      break;
    }
    current_ = pick();
    const bool ended = fibers_->resume(current_);
    if (ended) {
      leave();
    } else if (threads_[current_].state == State::kRunnable) {
      runnable_.push_back(current_);
    }
  }
  fibers_.reset();
  memory.remove("shared memory");
  return error_;
}

void Machine::run(void* self, int) {
  auto* machine = static_cast<Machine*>(self);
  machine->kernel_(machine->argument_);
}

// A random thread; of two that belong to different blocks mostly that of the hastier one, so that
// blocks drift apart.
int Machine::pick() {
  const size_t n = runnable_.size();
  size_t a = random_() % n;
  const size_t b = random_() % n;
  const double haste_a = haste_[threads_[runnable_[a]].block];
  if (random_() % 8 && haste_[threads_[runnable_[b]].block] > haste_a) a = b;
  const int thread = runnable_[a];
  runnable_[a] = runnable_.back();
  runnable_.pop_back();
  return thread;
}

std::string Machine::who(int thread) const {
  const Index3 place = blocks_[threads_[thread].block].place;
  return "block (" + std::to_string(place.x) + ", " + std::to_string(place.y) + ", " +
         std::to_string(place.z) + ") thread " + std::to_string(threads_[thread].index);
}

void Machine::fail(const std::string& reason) {
  if (error_.empty()) error_ = who(current_) + ": " + reason;
  for (;;) fibers_->suspend();
}

void Machine::wait() {
  current().state = State::kWaiting;
  const int self = current_;
  fibers_->suspend();
  current_ = self;
}

// ---- barriers. A meeting of threads first .. first + count - 1; threads that have ended are not
// waited for.

void Machine::finish_meeting(Meeting& meeting, int first, int count) {
  meeting.arrived = 0;
  idle_polls_ = 0;
  std::vector<int> here;
  for (int t = first; t < first + count; ++t) {
    if (threads_[t].state != State::kDone) here.push_back(t);
  }
  meet(int(here.size()), int(threads_.size()),
       [&](int i) { return std::make_pair(here[i], &threads_[here[i]].clock); });
  for (int t : here) {
    if (threads_[t].state == State::kWaiting) runnable_.push_back(t);
    threads_[t].state = State::kRunnable;
  }
}

void Machine::meet_at(Meeting& meeting, int first, int count) {
  if (++meeting.arrived == meeting.live) {
    finish_meeting(meeting, first, count);
  } else {
    wait();
  }
}

bool Machine::skipped(const char* file, int line) {
  const char* name = std::strrchr(file, '/');
  const auto place = std::make_pair(std::string(name ? name + 1 : file), line);
  if (!planted(kSkipBarrier)) {
    barriers_.insert(place);
    return false;
  }
  return int(std::distance(barriers_.begin(), barriers_.find(place))) == fault.value;
}

void Machine::block_barrier(const char* file, int line) {
  if (skipped(file, line)) return;
  meet_at(block().meeting, current().block * grid_.threads, grid_.threads);
}

void Machine::cluster_barrier(const char* file, int line) {
  if (skipped(file, line)) return;
  const int cluster = block().cluster, count = grid_.cluster * grid_.threads;
  meet_at(clusters_[cluster], cluster * count, count);
}

void Machine::leave() {
  Thread& thread = threads_[current_];
  thread.state = State::kDone;
  --live_;
  Meeting& warp = warps_[current_ / 32].meeting;
  if (warp.arrived) error_ = who(current_) + ": ended while its warp waits for it";
  --warp.live;
  const int first = thread.block * grid_.threads, cluster = blocks_[thread.block].cluster;
  Meeting& own = blocks_[thread.block].meeting;
  if (--own.live == own.arrived && own.arrived) finish_meeting(own, first, grid_.threads);
  Meeting& all = clusters_[cluster];
  const int count = grid_.cluster * grid_.threads;
  if (--all.live == all.arrived && all.arrived) finish_meeting(all, cluster * count, count);
}

void Machine::collective(const char* name, void* mine, void (*act)(void* const*)) {
  Warp& warp = warps_[current_ / 32];
  if (warp.meeting.arrived && warp.name != name) {
    fail(std::string("lanes of one warp meet in ") + warp.name + " and " + name);
  }
  if (warp.meeting.live != 32) fail(std::string(name) + " in a warp of which lanes have ended");
  warp.name = name;
  warp.brought[current_ % 32] = mine;
  if (++warp.meeting.arrived < 32) {
    wait();
    return;
  }
  act(warp.brought);
  warp.meeting.arrived = 0;
  const int first = current_ / 32 * 32;
  for (int t = first; t < first + 32; ++t) {
    if (t == current_) continue;
    threads_[t].state = State::kRunnable;
    runnable_.push_back(t);
  }
}

// ---- release and acquire

bool Machine::includes(Scope scope, int a, int b) const {
  const Block &x = blocks_[threads_[a].block], &y = blocks_[threads_[b].block];
  if (scope == Scope::kBlock) return &x == &y;
  return scope == Scope::kDevice || x.cluster == y.cluster;
}

void Machine::fence(Scope scope) {
  if (planted(kDropFence)) return;
  current().fenced = current().clock.release(current_);
  current().fenced_scope = planted(kNarrowFence) ? Scope::kBlock : scope;
}

// A read-modify-write continues the release sequence of its word: earlier releases stay in force.
void Machine::add_relaxed(uint32_t* counter, uint32_t value) {
  const std::string wrong = memory.atomic(counter, current().block);
  if (!wrong.empty()) fail("atomic addition, " + wrong);
  if (planted(kLoseArrival) && current().block == 0 && arrivals_++ >= fault.value) return;
  idle_polls_ = 0;
  *counter += value;
  releases_[counter].push_back({current().fenced, current().fenced_scope, current_});
}

uint32_t Machine::read_atomic(const uint32_t* counter, Scope scope, bool acquire) {
  const std::string wrong = memory.atomic(counter, current().block);
  if (!wrong.empty()) fail("atomic read, " + wrong);
  ++polls_;
  ++idle_polls_;
  const int self = current_;
  fibers_->suspend();  // still runnable: others go on between two polls
  current_ = self;
  if (acquire && !planted(kRelaxAcquire)) {
    for (const Release& release : releases_[counter]) {
      if (includes(release.scope, release.thread, self) && includes(scope, self, release.thread)) {
        current().clock.acquire(release.times);
      }
    }
  }
  return *counter + (planted(kSkipGeneration) ? uint32_t(fault.value) : 0u);
}

void Machine::write_relaxed(uint32_t* word, uint32_t value) {
  const std::string wrong = memory.atomic(word, current().block);
  if (!wrong.empty()) fail("atomic write, " + wrong);
  idle_polls_ = 0;
  *word = value;
  releases_[word] = {{current().fenced, current().fenced_scope, current_}};
}

// ---- memory

void Machine::on_read(const void* address, size_t bytes, Access kind) {
  const std::string wrong =
      memory.read(address, bytes, kind, current().block, current_, current().clock);
  if (!wrong.empty()) fail("read, " + wrong);
}

void Machine::on_write(void* address, size_t bytes, Access kind) {
  const std::string wrong =
      memory.write(address, bytes, kind, current().block, current_, current().clock);
  if (!wrong.empty()) fail("write, " + wrong);
}

char* Machine::remote(const void* address, int rank) {
  const size_t offset = static_cast<const char*>(address) - block().shared;
  if (offset >= grid_.shared_bytes) fail("remote access, not an address of shared memory");
  if (rank < 0 || rank >= grid_.cluster) fail("remote access, no block " + std::to_string(rank));
  return blocks_[current().block - block().rank + rank].shared + offset;
}

}  // namespace simt
