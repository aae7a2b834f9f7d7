// Everything that the CUDA kernels ask of the machine: indices, memory accesses, synchronisation,
// tensor cores, numbers. All PTX is here. Read by a plain C++ compiler, the same names come from
// csrc/simt, which runs the kernels on the host.
#pragma once

#include "cuda/device_types.h"

#ifndef __CUDACC__
#include "simt/device.h"
#else

#include <type_traits>

#define CTXFAST_DEVICE __device__ __forceinline__

namespace ctxfast {
namespace cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

CTXFAST_DEVICE int thread_index() { return int(threadIdx.x); }
CTXFAST_DEVICE Index3 block_index() { return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)}; }
CTXFAST_DEVICE Index3 grid_size() { return {int(gridDim.x), int(gridDim.y), int(gridDim.z)}; }

CTXFAST_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// ---- synchronisation

CTXFAST_DEVICE void block_barrier() { __syncthreads(); }

// Release and acquire among all threads of the cluster, its shared memory included.
CTXFAST_DEVICE void cluster_barrier() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
#endif
}

template <Scope S>
CTXFAST_DEVICE void fence() {
  if constexpr (S == Scope::kBlock) asm volatile("fence.acq_rel.cta;\n" ::: "memory");
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (S == Scope::kCluster) asm volatile("fence.acq_rel.cluster;\n" ::: "memory");
#endif
  if constexpr (S == Scope::kDevice) asm volatile("fence.acq_rel.gpu;\n" ::: "memory");
}

// Adds to a counter without ordering anything else.
CTXFAST_DEVICE void add_relaxed(uint32_t* counter, uint32_t value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;\n" ::"l"(counter), "r"(value) : "memory");
}

CTXFAST_DEVICE uint32_t read_relaxed(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

template <Scope S>
CTXFAST_DEVICE uint32_t read_acquire(const uint32_t* counter) {
  static_assert(S == Scope::kDevice, "kernels acquire at device scope");
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// A word that other blocks or the host read without synchronising.
CTXFAST_DEVICE void write_relaxed(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;\n" ::"l"(word), "r"(value) : "memory");
}

CTXFAST_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;\n" : "=l"(now));
  return now;
}

CTXFAST_DEVICE void pause() { __nanosleep(20); }

// ---- memory

template <class T>
CTXFAST_DEVICE T read(const T* address) {
  return *address;
}

template <class T>
CTXFAST_DEVICE void write(T* address, T value) {
  *address = value;
}

// Global memory that nobody writes while the kernel runs. Volatile, so that the value stays where
// it was put and is not read again instead of being kept.
CTXFAST_DEVICE Words4 read_constant(const Words4* address) {
  Words4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

template <class T>
CTXFAST_DEVICE T read_constant(const T* address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "2, 4, 8 or 16 bytes");
  if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.global.nc.u16 %0, [%1];\n" : "=h"(v) : "l"(address));
    return reinterpret_cast<const T&>(v);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.global.nc.u32 %0, [%1];\n" : "=r"(v) : "l"(address));
    return reinterpret_cast<const T&>(v);
  } else {
    Words2 v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return reinterpret_cast<const T&>(v);
  }
}

// Global memory that another block wrote in this kernel: past the first-level cache.
CTXFAST_DEVICE Floats4 read_exchanged(const Floats4* address) {
  Floats4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// Shared memory of block `rank` of the cluster, at the place that `address` has in this block's.
template <class T>
CTXFAST_DEVICE uint32_t remote_address(const T* address, int rank) {
  uint32_t remote = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const uint32_t local = uint32_t(__cvta_generic_to_shared(address));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(local), "r"(rank));
#endif
  return remote;
}

CTXFAST_DEVICE Floats4 read_remote(const Floats4* address, int rank) {
  Floats4 v = {};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(remote_address(address, rank))
               : "memory");
#endif
  return v;
}

CTXFAST_DEVICE void write_remote(Words2* address, int rank, Words2 v) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};\n" ::"r"(remote_address(address, rank)),
               "r"(v.x), "r"(v.y)
               : "memory");
#endif
}

// ---- numbers

CTXFAST_DEVICE float to_float(float x) { return x; }
CTXFAST_DEVICE float to_float(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
CTXFAST_DEVICE float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounded to nearest even.
template <class T>
CTXFAST_DEVICE T from_float(float x) {
  T y;
  if constexpr (std::is_same_v<T, float>) y = x;
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  if constexpr (std::is_same_v<T, float16>) asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}

CTXFAST_DEVICE float exponential(float x) { return expf(x); }
CTXFAST_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
CTXFAST_DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// 2^x and 1 / x with an error of a few units in the last place.
CTXFAST_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
CTXFAST_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// ---- tensor cores: c [16, 8] += a [16, 16] b [16, 8] by a warp. With row = lane / 4 and pair =
// lane % 4 * 2:
//   a0 = a[row, pair..], a1 = a[row + 8, pair..], a2 = a[row, pair + 8..], a3 = a[row + 8, pair
//   + 8..] b0 = b[pair.., row], b1 = b[pair + 8.., row];  c = c[row, pair..], c[row + 8, pair..]
template <class T>
CTXFAST_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                        uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

}  // namespace cuda
}  // namespace ctxfast

#endif
