#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(CTXFAST_HAVE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#ifdef CTXFAST_HAVE_AVX512_VNNI
namespace avx512_vnni {
Status linear_int8(const LinearInt8Args&);
}
#endif
#ifdef CTXFAST_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const KernelTable kKernels;
}
#endif

#ifdef CTXFAST_HAVE_AMX
namespace amx {
extern const KernelTable kKernels;
}
#endif

namespace {

constexpr int kSets = 6;
const char* const kNames[kSets] = {"baseline",    "avx2",        "avx512",
                                   "avx512_vnni", "avx512_bf16", "amx"};

int rank_of(const char* name) {
  for (int rank = 0; rank < kSets; ++rank)
    if (std::strcmp(name, kNames[rank]) == 0) return rank;
  return -1;
}

#ifdef CTXFAST_HAVE_AMX
// Whether the processor has tiles, for bfloat16 and for bytes, and the system lets this process use
// them: a thread's tiles are 8 KiB more to save, which Linux does for those who ask.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kWanted = kBfloat16 | kTiles | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kWanted) == kWanted &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Available {
  InstructionSet sets[kSets];
  int count = 0;
#ifdef CTXFAST_HAVE_AVX512_VNNI
  KernelTable with_vnni = avx512::kKernels;  // but products of bytes
#endif

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
#ifdef CTXFAST_HAVE_AVX512_VNNI
    const bool bytes = v4 && __builtin_cpu_supports("avx512vnni");
    with_vnni.linear_int8 = avx512_vnni::linear_int8;
    if (bytes) add(kNames[3], &with_vnni);
#endif
#ifdef CTXFAST_HAVE_AVX512_BF16
    const bool products = bytes && __builtin_cpu_supports("avx512bf16");
    if (products) add(kNames[4], &avx512_bf16::kKernels);
#endif
#ifdef CTXFAST_HAVE_AMX
    if (products && may_use_tiles()) add(kNames[5], &amx::kKernels);
#endif
  }
};

const Available& available() {
  static const Available sets;
  return sets;
}

const InstructionSet* first_choice() {
  const char* wanted = std::getenv("CTXFAST_CPU_ISA");
  const int limit = wanted != nullptr ? rank_of(wanted) : kSets - 1;
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
