// Launches of the CUDA LSTM, called by the bindings. All errors are cudaError_t; 0 is success.
#pragma once

#include "cuda/lstm.h"

namespace ctxfast {
namespace cuda {

// One compiled size of the persistent kernels. hidden, features: H and P; cluster, clusters: blocks
// of a cluster, clusters of a direction and group of rows; rows: batch rows taken together.
struct PersistentKernel {
  LstmDtype dtype;
  int hidden, features, cluster, clusters, threads, rows;
  const void *forward, *backward;
  size_t forward_shared, backward_shared;  // bytes of a block
};

// Those compiled for one type; `count` is set.
const PersistentKernel* persistent_kernels_bfloat16(int* count);
const PersistentKernel* persistent_kernels_float16(int* count);

// Whether the current device can run the kernel, and how many groups of blocks (cluster * clusters
// of them: one direction of one group of rows) it holds at a time; 0: not at all.
int persistent_groups(const PersistentKernel& kernel, bool backward, int* groups);

// slots: groups of rows that run at a time; slots * directions must not exceed `persistent_groups`.
int launch_persistent(const PersistentKernel& kernel, bool backward, const Lstm& lstm,
                      const Exchange& exchange, int slots, void* stream);

// scratch: as csrc/cuda/lstm_stepwise.cuh says.
int launch_stepwise_float32(const Lstm& lstm, void* scratch, bool backward, void* stream);
int launch_stepwise_bfloat16(const Lstm& lstm, void* scratch, bool backward, void* stream);
int launch_stepwise_float16(const Lstm& lstm, void* scratch, bool backward, void* stream);

}  // namespace cuda
}  // namespace ctxfast
