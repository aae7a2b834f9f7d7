// Launches of the stepwise LSTM on a stream; they can be captured in a graph.
#pragma once

#include <cuda_runtime.h>

#include "cuda/lstm_launch.h"
#include "cuda/lstm_stepwise_loop.h"

namespace ctxfast {
namespace cuda {

template <class K>
__global__ void __launch_bounds__(K::kThreads, 1)
    stepwise_kernel(const __grid_constant__ Stepwise call, int step) {
  K::run(call, step);
}

struct StreamLaunch {
  cudaStream_t stream;

  template <class K>
  int operator()(const Stepwise& call, int step, int x, int y) const {
    static_assert(K::kSharedBytes <= 48 << 10 || K::kThreads == 512, "shared memory");
    if (K::kSharedBytes > 48 << 10) {
      const cudaError_t error = cudaFuncSetAttribute(
          stepwise_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(K::kSharedBytes));
      if (error != cudaSuccess) return error;
    }
    const dim3 grid(x, y, call.lstm.count);
    stepwise_kernel<K><<<grid, K::kThreads, K::kSharedBytes, stream>>>(call, step);
    return cudaGetLastError();
  }
};

template <class T>
int launch_stepwise(const Lstm& lstm, void* scratch, bool backward, void* stream) {
  return run_stepwise<T>(Stepwise{lstm, scratch}, backward, StreamLaunch{cudaStream_t(stream)});
}

}  // namespace cuda
}  // namespace ctxfast
