// Types that kernels, their host side and csrc/simt share.
#pragma once

#include <cstdint>

namespace ctxfast {
namespace cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct Index3 {
  int x, y, z;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(16) Floats4 {
  float x, y, z, w;
};

// Who sees a fence or an atomic access.
enum class Scope { kBlock, kCluster, kDevice };

constexpr int kWarpSize = 32;

}  // namespace cuda
}  // namespace ctxfast
