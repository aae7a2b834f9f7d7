// Launches of the persistent LSTM: all blocks of a group must be on the device at once, which a
// cooperative launch guarantees and the occupancy query foresees.
#include <cuda_runtime.h>

#include "cuda/lstm_launch.h"

namespace ctxfast {
namespace cuda {
namespace {

const void* function(const PersistentKernel& kernel, bool backward) {
  return backward ? kernel.backward : kernel.forward;
}

struct Configuration {
  cudaLaunchConfig_t launch = {};
  cudaLaunchAttribute attributes[2] = {};

  Configuration(const PersistentKernel& kernel, bool backward, int directions, int slots,
                void* stream) {
    launch.gridDim = dim3(kernel.cluster * kernel.clusters, directions, slots);
    launch.blockDim = dim3(kernel.threads);
    launch.dynamicSmemBytes = backward ? kernel.backward_shared : kernel.forward_shared;
    launch.stream = cudaStream_t(stream);
    launch.attrs = attributes;
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    launch.numAttrs = 1;
    if (kernel.cluster > 1) {
      attributes[1].id = cudaLaunchAttributeClusterDimension;
      attributes[1].val.clusterDim.x = kernel.cluster;
      attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
      launch.numAttrs = 2;
    }
  }
};

cudaError_t allow_shared_memory(const PersistentKernel& kernel, bool backward) {
  return cudaFuncSetAttribute(function(kernel, backward),
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              int(backward ? kernel.backward_shared : kernel.forward_shared));
}

}  // namespace

int persistent_groups(const PersistentKernel& kernel, bool backward, int* groups) {
  *groups = 0;
  int device = 0, major = 0, limit = 0, cooperative = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  }
  if (error != cudaSuccess) return error;
  const size_t shared = backward ? kernel.backward_shared : kernel.forward_shared;
  if (!cooperative || shared > size_t(limit) || (kernel.cluster > 1 && major < 9)) return 0;
  error = allow_shared_memory(kernel, backward);
  if (error != cudaSuccess) return error;
  int count = 0;
  if (kernel.cluster > 1) {
    Configuration configuration(kernel, backward, 1, 1, nullptr);
    configuration.launch.attrs = configuration.attributes + 1;  // the size of the cluster alone
    configuration.launch.numAttrs = 1;
    error =
        cudaOccupancyMaxActiveClusters(&count, function(kernel, backward), &configuration.launch);
  } else {
    int multiprocessors = 0;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function(kernel, backward),
                                                            kernel.threads, shared);
    }
    count *= multiprocessors;
  }
  if (error == cudaSuccess) *groups = count / kernel.clusters;
  return error;
}

int launch_persistent(const PersistentKernel& kernel, bool backward, const Lstm& lstm,
                      const Exchange& exchange, int slots, void* stream) {
  const cudaError_t error = allow_shared_memory(kernel, backward);
  if (error != cudaSuccess) return error;
  const Configuration configuration(kernel, backward, lstm.count, slots, stream);
  void* arguments[] = {const_cast<Lstm*>(&lstm), const_cast<Exchange*>(&exchange)};
  return cudaLaunchKernelExC(&configuration.launch, function(kernel, backward), arguments);
}

}  // namespace cuda
}  // namespace ctxfast
