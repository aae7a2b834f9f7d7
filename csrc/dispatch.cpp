#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace ctxfast {

namespace baseline {
extern const KernelTable kKernels;
}
#ifdef CTXFAST_HAVE_AVX2
namespace avx2 {
extern const KernelTable kKernels;
}
#endif
#ifdef CTXFAST_HAVE_AVX512
namespace avx512 {
extern const KernelTable kKernels;
}
#endif
#ifdef CTXFAST_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const KernelTable kKernels;
}
#endif

namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

int rank_of(const char* name) {
  for (int rank = 0; rank < 4; ++rank)
    if (std::strcmp(name, kNames[rank]) == 0) return rank;
  return -1;
}

struct Available {
  InstructionSet sets[4];
  int count = 0;

  void add(const char* name, const KernelTable* kernels) { sets[count++] = {name, kernels}; }

  Available() {
    add(kNames[0], &baseline::kKernels);
#ifdef CTXFAST_HAVE_AVX2
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
    if (v3) add(kNames[1], &avx2::kKernels);
#endif
#ifdef CTXFAST_HAVE_AVX512
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) add(kNames[2], &avx512::kKernels);
#endif
#ifdef CTXFAST_HAVE_AVX512_BF16
    if (v4 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
      add(kNames[3], &avx512_bf16::kKernels);
#endif
  }
};

const Available& available() {
  static const Available sets;
  return sets;
}

const InstructionSet* first_choice() {
  const char* wanted = std::getenv("CTXFAST_CPU_ISA");
  const int limit = wanted != nullptr ? rank_of(wanted) : 3;
  const InstructionSet* chosen = &available().sets[0];
  for (int i = 0; i < available().count; ++i)
    if (limit < 0 || rank_of(available().sets[i].name) <= limit) chosen = &available().sets[i];
  return chosen;
}

std::atomic<const InstructionSet*> current{nullptr};

}  // namespace

const InstructionSet* available_instruction_sets(int* count) noexcept {
  *count = available().count;
  return available().sets;
}

const InstructionSet& instruction_set() noexcept {
  const InstructionSet* chosen = current.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    chosen = first_choice();
    current.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

bool set_instruction_set(const char* name) noexcept {
  for (int i = 0; i < available().count; ++i)
    if (std::strcmp(available().sets[i].name, name) == 0) {
      current.store(&available().sets[i], std::memory_order_release);
      return true;
    }
  return false;
}

}  // namespace ctxfast
