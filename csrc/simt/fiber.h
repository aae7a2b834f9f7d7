// Fibers: threads of execution that one OS thread switches between by hand.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <vector>

namespace simt {

class Fibers {
 public:
  // body(argument, index) runs on fiber `index` when it is first resumed, and must not return by an
  // exception.
  Fibers(int count, void (*body)(void*, int), void* argument);
  ~Fibers();
  Fibers(const Fibers&) = delete;

  // Runs a fiber until it suspends or ends; true once it has ended.
  bool resume(int index);
  // Back to the caller of resume; called on a fiber.
  void suspend();

 private:
  static void enter(unsigned high, unsigned low);

  struct State {
    jmp_buf place;
    bool started = false, ended = false;
  };
  static constexpr size_t kStackBytes = 64 << 10;  // committed by the system as they are touched

  std::vector<State> states_;
  void (*body_)(void*, int);
  void* argument_;
  char* stacks_;
  jmp_buf scheduler_;
  int current_ = -1;
};

}  // namespace simt
