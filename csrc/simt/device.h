// The host version of csrc/cuda/device.cuh, which includes this file where no CUDA compiler reads
// it.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simt/machine.h"
#include "simt/numbers.h"

#define CTXFAST_DEVICE inline

namespace ctxfast {
namespace cuda {

constexpr bool kHasClusters = true;

inline int thread_index() { return simt::machine().thread_index(); }
inline Index3 block_index() { return simt::machine().block_index(); }
inline Index3 grid_size() { return simt::machine().grid_size(); }
inline char* shared_memory() { return simt::machine().shared_memory(); }

inline void block_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::machine().block_barrier(file, line);
}
inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::machine().cluster_barrier(file, line);
}
template <Scope S>
void fence() {
  simt::machine().fence(S);
}
inline void add_relaxed(uint32_t* counter, uint32_t value) {
  simt::machine().add_relaxed(counter, value);
}
inline uint32_t read_relaxed(const uint32_t* counter) {
  return simt::machine().read_atomic(counter, Scope::kDevice, false);
}
template <Scope S>
uint32_t read_acquire(const uint32_t* counter) {
  return simt::machine().read_atomic(counter, S, true);
}
inline void write_relaxed(uint32_t* word, uint32_t value) {
  simt::machine().write_relaxed(word, value);
}
inline uint64_t nanoseconds() { return simt::machine().nanoseconds(); }
inline void pause() {}

template <class T>
T read(const T* address) {
  simt::machine().on_read(address, sizeof(T), simt::Access::kPlain);
  return *address;
}
template <class T>
void write(T* address, T value) {
  simt::machine().on_write(address, sizeof(T), simt::Access::kPlain);
  *address = value;
}
template <class T>
T read_constant(const T* address) {
  simt::machine().on_read(address, sizeof(T), simt::Access::kConstant);
  return *address;
}
inline Floats4 read_exchanged(const Floats4* address) { return read(address); }
inline Floats4 read_remote(const Floats4* address, int rank) {
  const auto* there = reinterpret_cast<const Floats4*>(simt::machine().remote(address, rank));
  simt::machine().on_read(there, sizeof(Floats4), simt::Access::kRemote);
  return *there;
}
inline void write_remote(Words2* address, int rank, Words2 value) {
  auto* there = reinterpret_cast<Words2*>(simt::machine().remote(address, rank));
  simt::machine().on_write(there, sizeof(Words2), simt::Access::kRemote);
  *there = value;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return simt::float_from_bfloat16(x.bits); }
inline float to_float(float16 x) { return simt::float_from_float16(x.bits); }
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, bfloat16>) return {simt::bfloat16_from_float(x)};
  if constexpr (std::is_same_v<T, float16>) return {simt::float16_from_float(x)};
}

inline float exponential(float x) { return std::exp(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

struct MmaLane {
  float* c;
  uint32_t a[4], b[2];
};

// The fragments of all lanes as matrices, multiplied, and the result back to its lanes.
template <class T>
void mma_warp(void* const* lanes) {
  float a[16][16], b[16][8];
  const auto half = [](uint32_t word, int which) {
    return to_float(T{uint16_t(word >> (16 * which))});
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<MmaLane*>(lanes[lane]);
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int j = 0; j < 2; ++j) {
      for (int quarter = 0; quarter < 4; ++quarter) {
        a[row + quarter % 2 * 8][pair + quarter / 2 * 8 + j] = half(own.a[quarter], j);
      }
      b[pair + j][row] = half(own.b[0], j);
      b[pair + 8 + j][row] = half(own.b[1], j);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& own = *static_cast<MmaLane*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = own.c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      own.c[i] = sum;
    }
  }
}

template <class T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
         uint32_t b1) {
  MmaLane lane = {c, {a0, a1, a2, a3}, {b0, b1}};
  simt::machine().collective("mma", &lane, &mma_warp<T>);
}

}  // namespace cuda
}  // namespace ctxfast
