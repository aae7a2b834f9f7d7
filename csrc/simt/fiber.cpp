#include "simt/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <new>

namespace simt {

Fibers::Fibers(int count, void (*body)(void*, int), void* argument)
    : states_(count), body_(body), argument_(argument) {
  void* memory = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks_ = static_cast<char*>(memory);
}

Fibers::~Fibers() { munmap(stacks_, states_.size() * kStackBytes); }

// makecontext passes integers only, so the address comes in two halves.
void Fibers::enter(unsigned high, unsigned low) {
  auto* fibers = reinterpret_cast<Fibers*>(uintptr_t(high) << 32 | low);
  const int index = fibers->current_;
  fibers->body_(fibers->argument_, index);
  fibers->states_[index].ended = true;
  _longjmp(fibers->scheduler_, 1);
}

// The first switch to a fiber makes its context; all later ones are jumps, which cost no system
// call.
bool Fibers::resume(int index) {
  current_ = index;
  State& state = states_[index];
  if (_setjmp(scheduler_) == 0) {
    if (state.started) _longjmp(state.place, 1);
    state.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_ + index * kStackBytes;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(this);
    makecontext(&context, reinterpret_cast<void (*)()>(&Fibers::enter), 2, unsigned(address >> 32),
                unsigned(address));
    setcontext(&context);
  }
  return states_[current_].ended;
}

void Fibers::suspend() {
  if (_setjmp(states_[current_].place) == 0) _longjmp(scheduler_, 1);
}

}  // namespace simt
