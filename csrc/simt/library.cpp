// What the tests call, through ctypes: the shipped kernel templates, at shipped and at small sizes,
// on the host.
#include <sstream>

#include "cuda/lstm_arguments.h"
#include "cuda/lstm_persistent.cuh"
#include "cuda/lstm_persistent_backward.cuh"
#include "cuda/lstm_stepwise_loop.h"
#include "simt/machine.h"

namespace {

using namespace ctxfast::cuda;

struct Call {
  Lstm lstm;
  Exchange exchange;
};

struct Kernel {
  const char* name;
  int dtype, cluster, clusters, warps, rows, depth;
  size_t shared;
  void (*run)(const void*);
};

template <class S>
void forward(const void* argument) {
  const auto& call = *static_cast<const Call*>(argument);
  PersistentForward<S>(call.lstm, call.exchange).run();
}

template <class S>
void backward(const void* argument) {
  const auto& call = *static_cast<const Call*>(argument);
  PersistentBackward<S>(call.lstm, call.exchange).run();
}

template <class S, template <class> class Shared>
Kernel kernel(const char* name, void (*run)(const void*)) {
  const int dtype = std::is_same_v<typename S::T, bfloat16> ? kLstmBfloat16 : kLstmFloat16;
  return {name,     dtype,     S::kCluster,       S::kClusters, S::kWarps,
          S::kRows, S::kDepth, sizeof(Shared<S>), run};
}

// Two clusters of four, one block a cluster, two clusters of eight with 16 rows, a single buffer,
// and the shipped size that fits one cluster.
using Small = LstmShape<bfloat16, 256, 64, 4, 2, 4, 8, 1>;
using SmallHalf = LstmShape<float16, 256, 64, 4, 2, 4, 8, 2>;
using Flat = LstmShape<bfloat16, 128, 64, 1, 4, 4, 8, 2>;
using Wide = LstmShape<bfloat16, 512, 64, 8, 2, 4, 16, 1>;
using SingleBuffer = LstmShape<bfloat16, 256, 64, 4, 2, 4, 8, 1, 1>;

using Shipped = LstmShape<bfloat16, 1024, 128, 8, 1, 8, 8, 4>;

#define CTXFAST_BOTH(name, S)                            \
  kernel<S, ForwardShared>("forward " name, forward<S>), \
      kernel<S, BackwardShared>("backward " name, backward<S>)
const Kernel kKernels[] = {CTXFAST_BOTH("small", Small),
                           CTXFAST_BOTH("small half", SmallHalf),
                           CTXFAST_BOTH("flat", Flat),
                           CTXFAST_BOTH("wide", Wide),
                           CTXFAST_BOTH("single buffer", SingleBuffer),
                           CTXFAST_BOTH("shipped", Shipped)};
#undef CTXFAST_BOTH

const Kernel* find(const char* name) {
  for (const Kernel& k : kKernels) {
    if (std::string(k.name) == name) return &k;
  }
  return nullptr;
}

std::string text;  // of the last answer

// The launches of the stepwise loop, one grid after another; stops at the first that fails.
struct HostLaunch {
  std::string* error;

  struct Step {
    const Stepwise* call;
    int step;
  };
  template <class K>
  static void run(const void* argument) {
    const auto& own = *static_cast<const Step*>(argument);
    K::run(*own.call, own.step);
  }
  template <class K>
  int operator()(const Stepwise& call, int step, int x, int y) const {
    const Step own = {&call, step};
    const simt::Grid grid = {{x, y, call.lstm.count}, K::kThreads, 1, K::kSharedBytes};
    *error = simt::machine().launch(grid, run<K>, &own);
    return error->empty() ? 0 : 1;
  }
};

}  // namespace

extern "C" {

void simt_clear() { simt::machine().memory.clear(); }
void simt_add(const char* name, void* begin, size_t bytes, int constant) {
  simt::machine().memory.add(name, begin, bytes, constant != 0);
}
void simt_plan(uint64_t seed, int fault, int value) {
  simt::machine().seed = seed;
  simt::machine().fault = {fault, value};
}

// "file:line" of every barrier met in the last launch, one a line.
const char* simt_barriers() {
  std::ostringstream list;
  for (const auto& [file, line] : simt::machine().barriers()) list << file << ':' << line << '\n';
  text = list.str();
  return text.c_str();
}

// cluster, clusters, warps, rows, depth; false if there is no such kernel.
int simt_describe(const char* name, int* facts) {
  const Kernel* k = find(name);
  if (!k) return 0;
  const int values[] = {k->cluster, k->clusters, k->warps, k->rows, k->depth};
  std::copy(std::begin(values), std::end(values), facts);
  return 1;
}

// Empty on success.
const char* simt_persistent(const char* name, const int64_t* values, double cell_clip,
                            double proj_clip, int slots, float* sums, uint32_t* counters,
                            uint32_t* abandoned, uint32_t* error, uint64_t timeout) {
  const Kernel* k = find(name);
  const Call call = {lstm_arguments(values, cell_clip, proj_clip),
                     {sums, counters, abandoned, error, timeout}};
  const simt::Grid grid = {
      {k->cluster * k->clusters, call.lstm.count, slots}, k->warps * 32, k->cluster, k->shared};
  text = simt::machine().launch(grid, k->run, &call);
  return text.c_str();
}

const char* simt_stepwise(int dtype, int backward, const int64_t* values, double cell_clip,
                          double proj_clip, void* scratch) {
  const Stepwise call = {lstm_arguments(values, cell_clip, proj_clip), scratch};
  const HostLaunch launch = {&text};
  text.clear();
  if (dtype == kLstmFloat32) run_stepwise<float>(call, backward != 0, launch);
  if (dtype == kLstmBfloat16) run_stepwise<bfloat16>(call, backward != 0, launch);
  if (dtype == kLstmFloat16) run_stepwise<float16>(call, backward != 0, launch);
  return text.c_str();
}

}  // extern "C"
