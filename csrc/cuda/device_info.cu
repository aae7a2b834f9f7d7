#include <cuda_runtime.h>

#include <cstring>

#include "cuda/device_info.h"

namespace ctxfast {
namespace cuda {
namespace {

__global__ void fill_kernel(float* data, float value, size_t n) {
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) data[i] = value;
}

}  // namespace

int device_count(int* count) { return cudaGetDeviceCount(count); }

int driver_version(int* driver, int* runtime) {
  const cudaError_t error = cudaDriverGetVersion(driver);
  return error != cudaSuccess ? error : cudaRuntimeGetVersion(runtime);
}

int device_info(int device, DeviceInfo* info) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return error;
  info->major = properties.major;
  info->minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  std::strncpy(info->name, properties.name, sizeof(info->name) - 1);
  info->name[sizeof(info->name) - 1] = '\0';
  return cudaSuccess;
}

int fill(float* data, float value, size_t n, void* stream) {
  if (n == 0) return cudaSuccess;
  const size_t blocks = (n + 255) / 256;
  const unsigned grid = blocks < 4096 ? unsigned(blocks) : 4096u;
  fill_kernel<<<grid, 256, 0, cudaStream_t(stream)>>>(data, value, n);
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace cuda
}  // namespace ctxfast
