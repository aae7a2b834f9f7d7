// Vectors of float or double, as wide as the instruction set, on the compiler's vector extensions:
// one kernel source serves every instruction set. a * b + c on Vec contracts to a fused
// multiply-add where the CPU has it.
//
//   Vec<T>             CTXFAST_VECTOR_BYTES / sizeof(T) lanes
//   load, store        any alignment; load_n / store_n touch only the first n elements (rest 0)
//   bfloat16           storage only: loads widen to float, stores round to nearest even
//   reduce_add, reduce_max, vmax, vmin, select
#pragma once

#include "cpu/isa.h"

CTXFAST_NAMESPACE_BEGIN

struct bfloat16 {
  uint16_t bits;
};

template <typename T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias));
  typedef float unaligned __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias, aligned(1)));
  typedef int32_t mask __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias));
  typedef uint32_t bits __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias));
  typedef int32_t integer;
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias));
  typedef double unaligned
      __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias, aligned(1)));
  typedef int64_t mask __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias));
  typedef uint64_t bits __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias));
  typedef int64_t integer;
};

template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
using Mask = typename VecOf<T>::mask;  // lanes are 0 or -1

template <typename T>
constexpr int kLanes = CTXFAST_VECTOR_BYTES / int(sizeof(T));

// The type that a storage type is computed in.
template <typename T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<bfloat16> {
  using type = float;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

template <typename T>
CTXFAST_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // x - 0, unlike x + 0, keeps the sign of zero
}

template <typename T>
CTXFAST_INLINE Vec<T> lane_numbers() {
  Vec<T> lanes;
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = T(i);
  return lanes;
}

// Lanes 0 .. n-1 are -1, the others 0.
template <typename T>
CTXFAST_INLINE Mask<T> first_lanes(int64_t n) {
  Mask<T> lanes;
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i;
  using Integer = typename VecOf<T>::integer;
  return lanes < (Mask<T>{} + Integer(n < kLanes<T> ? (n < 0 ? 0 : n) : kLanes<T>));
}

// ---- maximum and minimum: the second operand where either is NaN, as the x86 instructions do ----
#if defined(CTXFAST_AVX512)
CTXFAST_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a, b); }
CTXFAST_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return _mm512_max_pd(a, b); }
CTXFAST_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a, b); }
CTXFAST_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return _mm512_min_pd(a, b); }
#elif defined(CTXFAST_AVX2)
CTXFAST_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
CTXFAST_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
CTXFAST_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
CTXFAST_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a, b); }
#else
CTXFAST_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
CTXFAST_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
CTXFAST_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
CTXFAST_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return a < b ? a : b; }
#endif

// ---- whole vectors ----
CTXFAST_INLINE Vec<float> load(const float* p) { return *(const VecOf<float>::unaligned*)p; }
CTXFAST_INLINE Vec<double> load(const double* p) { return *(const VecOf<double>::unaligned*)p; }
CTXFAST_INLINE void store(float* p, Vec<float> v) { *(VecOf<float>::unaligned*)p = v; }
CTXFAST_INLINE void store(double* p, Vec<double> v) { *(VecOf<double>::unaligned*)p = v; }

typedef uint16_t HalfBits __attribute__((vector_size(CTXFAST_VECTOR_BYTES / 2), may_alias));
typedef uint16_t UnalignedHalfBits
    __attribute__((vector_size(CTXFAST_VECTOR_BYTES / 2), may_alias, aligned(1)));

CTXFAST_INLINE Vec<float> widen(HalfBits bits) {
#if defined(CTXFAST_AVX512)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(CTXFAST_AVX2)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
  return (Vec<float>)(__builtin_convertvector(bits, VecOf<float>::bits) << 16);
#endif
}

// The lower and the upper bfloat16 of each lane.
CTXFAST_INLINE Vec<float> first_of_pairs(Vec<float> pairs) {
  return (Vec<float>)((VecOf<float>::bits)pairs << 16);
}
CTXFAST_INLINE Vec<float> second_of_pairs(Vec<float> pairs) {
  return (Vec<float>)((VecOf<float>::bits)pairs & 0xffff0000u);
}

// Round to nearest even; a NaN stays a NaN.
CTXFAST_INLINE HalfBits narrow(Vec<float> v) {
  VecOf<float>::bits bits = (VecOf<float>::bits)v;
  VecOf<float>::bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = v == v ? rounded : (bits >> 16) | 0x40u;
#if defined(CTXFAST_AVX512)
  return (HalfBits)_mm512_cvtepi32_epi16((__m512i)rounded);
#else
  return __builtin_convertvector(rounded, HalfBits);
#endif
}

CTXFAST_INLINE Vec<float> load(const bfloat16* p) { return widen(*(const UnalignedHalfBits*)p); }
CTXFAST_INLINE void store(bfloat16* p, Vec<float> v) { *(UnalignedHalfBits*)p = narrow(v); }

// ---- one element ----
CTXFAST_INLINE float to_compute(float x) { return x; }
CTXFAST_INLINE double to_compute(double x) { return x; }
CTXFAST_INLINE float to_compute(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
CTXFAST_INLINE void store_one(float* p, float x) { *p = x; }
CTXFAST_INLINE void store_one(double* p, double x) { *p = x; }
CTXFAST_INLINE void store_one(bfloat16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  p->bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)
                   : uint16_t((bits >> 16) | 0x40u);
}

// ---- the first n elements (n may exceed the lanes); the other lanes are 0 and their memory is not
// touched ----
#if defined(CTXFAST_AVX512)
CTXFAST_INLINE __mmask16 lane_bits16(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1u);
}
CTXFAST_INLINE __mmask8 lane_bits8(int64_t n) { return __mmask8(lane_bits16(n)); }
CTXFAST_INLINE Vec<float> load_n(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(lane_bits16(n), p);
}
CTXFAST_INLINE Vec<double> load_n(const double* p, int64_t n) {
  return _mm512_maskz_loadu_pd(lane_bits8(n), p);
}
CTXFAST_INLINE void store_n(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, lane_bits16(n), v);
}
CTXFAST_INLINE void store_n(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, lane_bits8(n), v);
}
CTXFAST_INLINE Vec<float> load_n(const bfloat16* p, int64_t n) {
  return widen((HalfBits)_mm256_maskz_loadu_epi16(lane_bits16(n), p));
}
CTXFAST_INLINE void store_n(bfloat16* p, Vec<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(p, lane_bits16(n), (__m256i)narrow(v));
}
#else
template <typename P, typename T = Compute<P> >
CTXFAST_INLINE Vec<T> load_n(const P* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
  P lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <typename P, typename T = Compute<P> >
CTXFAST_INLINE void store_n(P* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return store(p, v);
  P lanes[kLanes<T>];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#endif

// ---- across the lanes, in a fixed order: halves are folded until one lane is left ----
typedef float Float4 __attribute__((vector_size(16), may_alias));
typedef double Double2 __attribute__((vector_size(16), may_alias));
CTXFAST_INLINE float larger(float a, float b) { return a > b ? a : b; }
CTXFAST_INLINE double larger(double a, double b) { return a > b ? a : b; }

#if defined(CTXFAST_AVX512)
#define CTXFAST_FOLD(operation, v)                                                                \
  __m256 half = _mm256_##operation##_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); \
  Float4 four = _mm_##operation##_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1))
#define CTXFAST_FOLD_DOUBLE(operation, v)                                                          \
  __m256d half = _mm256_##operation##_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1)); \
  Double2 two = _mm_##operation##_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1))
#elif defined(CTXFAST_AVX2)
#define CTXFAST_FOLD(operation, v) \
  Float4 four = _mm_##operation##_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))
#define CTXFAST_FOLD_DOUBLE(operation, v) \
  Double2 two = _mm_##operation##_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1))
#else
#define CTXFAST_FOLD(operation, v) Float4 four = v
#define CTXFAST_FOLD_DOUBLE(operation, v) Double2 two = v
#endif

CTXFAST_INLINE float reduce_add(Vec<float> v) {
  CTXFAST_FOLD(add, v);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
CTXFAST_INLINE double reduce_add(Vec<double> v) {
  CTXFAST_FOLD_DOUBLE(add, v);
  return two[0] + two[1];
}
CTXFAST_INLINE float reduce_max(Vec<float> v) {
  CTXFAST_FOLD(max, v);
  return larger(larger(four[0], four[2]), larger(four[1], four[3]));
}
CTXFAST_INLINE double reduce_max(Vec<double> v) {
  CTXFAST_FOLD_DOUBLE(max, v);
  return larger(two[0], two[1]);
}
#undef CTXFAST_FOLD
#undef CTXFAST_FOLD_DOUBLE

CTXFAST_NAMESPACE_END
