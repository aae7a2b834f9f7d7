// The shipped sizes of the persistent LSTM, for one type.
#pragma once

#include "cuda/lstm_launch.h"
#include "cuda/lstm_persistent.cuh"
#include "cuda/lstm_persistent_backward.cuh"

namespace ctxfast {
namespace cuda {

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    persistent_forward(const __grid_constant__ Lstm lstm,
                       const __grid_constant__ Exchange exchange) {
  if constexpr (S::kCluster == 1 || kHasClusters) PersistentForward<S>(lstm, exchange).run();
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    persistent_backward(const __grid_constant__ Lstm lstm,
                        const __grid_constant__ Exchange exchange) {
  if constexpr (S::kCluster == 1 || kHasClusters) PersistentBackward<S>(lstm, exchange).run();
}

template <class S>
PersistentKernel persistent_kernel(LstmDtype dtype) {
  constexpr size_t kLimit = 227 << 10;  // of a block, sm_90 and later
  static_assert(sizeof(ForwardShared<S>) <= kLimit && sizeof(BackwardShared<S>) <= kLimit, "");
  return {dtype,
          S::kHidden,
          S::kFeatures,
          S::kCluster,
          S::kClusters,
          S::kThreads,
          S::kRows,
          reinterpret_cast<const void*>(&persistent_forward<S>),
          reinterpret_cast<const void*>(&persistent_backward<S>),
          sizeof(ForwardShared<S>),
          sizeof(BackwardShared<S>)};
}

// ELMo's published sizes. Large: 64 blocks a direction. Medium: 32. Small: one cluster, without any
// exchange through global memory; and for devices without clusters 16 blocks.
template <class T>
const PersistentKernel* persistent_table(LstmDtype dtype, int* count) {
  static const PersistentKernel table[] = {
      persistent_kernel<LstmShape<T, 4096, 512, 8, 8, 8, 8, 8>>(dtype),
      persistent_kernel<LstmShape<T, 2048, 256, 8, 4, 8, 8, 8>>(dtype),
      persistent_kernel<LstmShape<T, 2048, 256, 8, 4, 8, 16, 8>>(dtype),
      persistent_kernel<LstmShape<T, 1024, 128, 8, 1, 8, 8, 4>>(dtype),
      persistent_kernel<LstmShape<T, 1024, 128, 8, 1, 8, 16, 4>>(dtype),
      persistent_kernel<LstmShape<T, 1024, 128, 1, 16, 8, 8, 4>>(dtype),
  };
  *count = int(sizeof(table) / sizeof(table[0]));
  return table;
}

}  // namespace cuda
}  // namespace ctxfast
