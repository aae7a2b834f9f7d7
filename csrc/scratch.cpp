#include "scratch.h"

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace ctxfast {
namespace {

// Blocks up to this size are kept for the next call; a larger one lives until the next request.
constexpr size_t kKeptBytes = size_t{64} << 20;

constexpr size_t kLargePage = size_t{2} << 20;

std::atomic<bool> poison{false};
std::atomic<bool> used_threads{false};
std::atomic<bool> serial{false};

struct Block {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Block() { release(); }
  void release() {
    std::free(memory);
    memory = nullptr;
    bytes = 0;
  }
};

thread_local Block blocks[kScratchKinds];

void after_fork_in_child() {
  if (used_threads.load(std::memory_order_relaxed)) serial.store(true, std::memory_order_relaxed);
}

const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);

}  // namespace

void advise_large_pages(void* memory, size_t bytes) noexcept {
#ifdef MADV_HUGEPAGE
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (address + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (address + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

void* thread_scratch(size_t bytes, ScratchKind kind) noexcept {
  Block& block = blocks[kind];
  const size_t wanted = (bytes + 4095) / 4096 * 4096;
  if (wanted > block.bytes || block.bytes > kKeptBytes) {
    block.release();
    block.memory = std::aligned_alloc(4096, wanted);
    if (block.memory == nullptr) return nullptr;
    block.bytes = wanted;
    advise_large_pages(block.memory, wanted);
  }
  if (poison.load(std::memory_order_relaxed)) std::memset(block.memory, 0xff, block.bytes);
  return block.memory;
}

void release_scratch() noexcept {
  for (Block& block : blocks) block.release();
}

void set_poison_scratch(bool enabled) noexcept { poison.store(enabled, std::memory_order_relaxed); }

bool must_run_serially() noexcept {
  static_cast<void>(registered);
  return serial.load(std::memory_order_relaxed);
}

void note_parallel_region() noexcept { used_threads.store(true, std::memory_order_relaxed); }

}  // namespace ctxfast
