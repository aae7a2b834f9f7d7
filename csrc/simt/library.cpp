// What the tests call, through ctypes: the shipped kernel templates, at shipped and at small sizes, on the host.
#include <sstream>

#include "cuda/lstm_arguments.h"
#include "cuda/lstm_persistent.cuh"
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

template <class S, template <class> class Shared>
Kernel kernel(const char* name, void (*run)(const void*)) {
  const int dtype = std::is_same_v<typename S::T, bfloat16> ? kLstmBfloat16 : kLstmFloat16;
  return {name,     dtype,     S::kCluster,       S::kClusters, S::kWarps, S::kRows,
          S::kDepth, sizeof(Shared<S>), run};
}

// Two clusters of four, one block a cluster, two clusters of eight with 16 rows, a single buffer, and the shipped size that
// fits one cluster.
using Small = LstmShape<bfloat16, 256, 64, 4, 2, 4, 8, 1>;
using SmallHalf = LstmShape<float16, 256, 64, 4, 2, 4, 8, 2>;
using Flat = LstmShape<bfloat16, 128, 64, 1, 4, 4, 8, 2>;
using Wide = LstmShape<bfloat16, 512, 64, 8, 2, 4, 16, 1>;
using SingleBuffer = LstmShape<bfloat16, 256, 64, 4, 2, 4, 8, 1, 1>;

const Kernel kKernels[] = {
    kernel<Small, ForwardShared>("forward small", forward<Small>),
    kernel<SmallHalf, ForwardShared>("forward small half", forward<SmallHalf>),
    kernel<Flat, ForwardShared>("forward flat", forward<Flat>),
    kernel<Wide, ForwardShared>("forward wide", forward<Wide>),
    kernel<SingleBuffer, ForwardShared>("forward single buffer", forward<SingleBuffer>),
};

const Kernel* find(const char* name) {
  for (const Kernel& k : kKernels) {
    if (std::string(k.name) == name) return &k;
  }
  return nullptr;
}

std::string text;  // of the last answer

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

// "file:line" of every barrier met so far, one a line.
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

}  // extern "C"
