// What an exchange between blocks costs by itself: the sum of exchange.cuh and two barriers of a
// whole grid, in a loop.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "cuda/exchange_benchmark.h"
#include "cuda/lstm_persistent.cuh"

namespace ctxfast {
namespace cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    sum_loop(const __grid_constant__ Exchange exchange, int count) {
  if constexpr (S::kCluster == 1 || kHasClusters) {
    auto& shared = *reinterpret_cast<ForwardShared<S>*>(shared_memory());
    AllReduce<S> all_reduce(exchange, own_rank<S>(), shared.sums, &shared.late);
    for (int i = 0; i < count; ++i) {
      all_reduce(S::kRows, [&](int row, int feature, Floats4 sum) {
        const Words2 packed = {pack<bfloat16>(sum.x, sum.y), pack<bfloat16>(sum.z, sum.w)};
        auto* target = shared.state + row * S::kStateStride + feature;
        write_peers<S>(reinterpret_cast<Words2*>(target), packed);
      });
    }
  }
}

__global__ void library_barrier_loop(const __grid_constant__ Exchange, int count) {
  const auto grid = cooperative_groups::this_grid();
  for (int i = 0; i < count; ++i) grid.sync();
}

// One addition and one polling thread a block.
__global__ void counter_barrier_loop(const __grid_constant__ Exchange exchange, int count) {
  for (uint32_t i = 1; i <= uint32_t(count); ++i) {
    block_barrier();
    if (thread_index() == 0) {
      fence<Scope::kDevice>();
      add_relaxed(exchange.counters, 1);
      while (int32_t(read_acquire<Scope::kDevice>(exchange.counters) - i * grid_size().x) < 0) {
      }
    }
    block_barrier();
  }
}

struct Loop {
  const char* name;
  const void* kernel;
  int blocks, directions, cluster, threads;
  size_t shared;
};

template <class S>
Loop sums(const char* name) {
  return {name,
          reinterpret_cast<const void*>(&sum_loop<S>),
          S::kCluster * S::kClusters,
          2,
          S::kCluster,
          S::kThreads,
          sizeof(ForwardShared<S>)};
}

Loop barrier(const char* name, void (*kernel)(const Exchange, int), int blocks) {
  return {name, reinterpret_cast<const void*>(kernel), blocks, 1, 1, 256, 0};
}

const Loop kLoops[] = {
    sums<LstmShape<bfloat16, 4096, 512, 8, 8, 8, 8, 8>>("sum 4096/512, 8 clusters of 8"),
    sums<LstmShape<bfloat16, 2048, 256, 8, 4, 8, 8, 8>>("sum 2048/256, 4 clusters of 8"),
    sums<LstmShape<bfloat16, 1024, 128, 8, 1, 8, 8, 4>>("sum 1024/128, 1 cluster of 8"),
    sums<LstmShape<bfloat16, 1024, 128, 1, 16, 8, 8, 4>>("sum 1024/128, 16 blocks"),
    barrier("grid.sync, 64 blocks", &library_barrier_loop, 64),
    barrier("grid.sync, 128 blocks", &library_barrier_loop, 128),
    barrier("counter, 64 blocks", &counter_barrier_loop, 64),
    barrier("counter, 128 blocks", &counter_barrier_loop, 128),
};

}  // namespace

const char* exchange_loop_name(int index) {
  return index < int(sizeof(kLoops) / sizeof(kLoops[0])) ? kLoops[index].name : nullptr;
}

int launch_exchange_loop(int index, const Exchange& exchange, int count, void* stream) {
  const Loop& loop = kLoops[index];
  cudaError_t error = cudaFuncSetAttribute(loop.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(loop.shared));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = loop.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(loop.blocks, loop.directions, 1);
  launch.blockDim = dim3(loop.threads);
  launch.dynamicSmemBytes = loop.shared;
  launch.stream = cudaStream_t(stream);
  launch.attrs = attributes;
  launch.numAttrs = loop.cluster > 1 ? 2 : 1;
  void* arguments[] = {const_cast<Exchange*>(&exchange), &count};
  return cudaLaunchKernelExC(&launch, loop.kernel, arguments);
}

}  // namespace cuda
}  // namespace ctxfast
