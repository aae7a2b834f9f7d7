// Facts about the CUDA devices, and a self-test of the path from Python to a kernel.
#pragma once

#include <cstddef>

namespace ctxfast {
namespace cuda {

struct DeviceInfo {
  int major, minor, multiprocessors;
  char name[256];
};

// All return a cudaError_t; 0 is success.
int device_count(int* count);
int driver_version(int* driver, int* runtime);
int device_info(int device, DeviceInfo* info);

// Writes `value` into the n floats at `data` on `stream`.
int fill(float* data, float value, size_t n, void* stream);

const char* error_text(int error);

}  // namespace cuda
}  // namespace ctxfast
