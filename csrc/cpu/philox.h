// The dropout mask: Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw 2011) at logical
// coordinates. Column j of row i uses counter ((j / 64) * 8 + j % 8, i, head, sequence) and the
// 16-bit field (j % 64) / 8 of the result, so eight counters, computed in 64-bit lanes, serve 64
// neighbouring columns.
#pragma once

#include "cpu/simd.h"

CTXFAST_NAMESPACE_BEGIN

constexpr int kWideLanes = CTXFAST_VECTOR_BYTES / 8;
typedef uint64_t Wide __attribute__((vector_size(CTXFAST_VECTOR_BYTES), may_alias));

// Product of the lower 32 bits of each lane.
CTXFAST_INLINE Wide multiply_low(Wide a, uint32_t b) {
#if defined(CTXFAST_AVX512)
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(CTXFAST_AVX2)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffull) * uint64_t(b);
#endif
}

// Bit of every lane: whether the field `shift` bits up in the word is at least the threshold.
CTXFAST_INLINE uint32_t fields_at_least(Wide word, int shift, uint32_t threshold) {
  const Wide field = (word >> shift) & 0xffffull;
#if defined(CTXFAST_AVX512)
  return _mm512_cmpge_epu64_mask((__m512i)field, _mm512_set1_epi64(threshold));
#elif defined(CTXFAST_AVX2)
  const __m256i below = _mm256_cmpgt_epi64(_mm256_set1_epi64x(threshold), (__m256i)field);
  return uint32_t(~_mm256_movemask_pd((__m256d)below)) & 0xfu;
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kWideLanes; ++lane) bits |= uint32_t(field[lane] >= threshold) << lane;
  return bits;
#endif
}

// Bit c is set where column 64 * block + c of row i is kept.
CTXFAST_INLINE uint64_t kept_columns(uint64_t seed, uint32_t threshold, int64_t block, int64_t i,
                                     int64_t head, int64_t sequence) {
  uint64_t kept = 0;
  for (int group = 0; group < 8; group += kWideLanes) {
    Wide c0;
    for (int lane = 0; lane < kWideLanes; ++lane) c0[lane] = lane;
    c0 += uint64_t(block) * 8 + group;
    Wide c1 = Wide{} + uint64_t(uint32_t(i));
    Wide c2 = Wide{} + uint64_t(uint32_t(head));
    Wide c3 = Wide{} + uint64_t(uint32_t(sequence));
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
      // Only the lower half of a lane is ever read by the next round, so products need no masking.
      const Wide first = multiply_low(c0, 0xD2511F53u), second = multiply_low(c2, 0xCD9E8D57u);
      c0 = (second >> 32) ^ c1 ^ uint64_t(key0);
      c1 = second;
      c2 = (first >> 32) ^ c3 ^ uint64_t(key1);
      c3 = first;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    const Wide words[4] = {c0, c1, c2, c3};
#pragma GCC unroll 8
    for (int field = 0; field < 8; ++field)
      kept |= uint64_t(fields_at_least(words[field / 2], 16 * (field % 2), threshold))
              << (8 * field + group);
  }
  return kept;
}

// v where the lowest kLanes bits are set, else 0.
#if defined(CTXFAST_AVX512)
CTXFAST_INLINE Vec<float> keep_lanes(Vec<float> v, uint64_t bits) {
  return _mm512_maskz_mov_ps(__mmask16(bits), v);
}
CTXFAST_INLINE Vec<double> keep_lanes(Vec<double> v, uint64_t bits) {
  return _mm512_maskz_mov_pd(__mmask8(bits), v);
}
#else
template <typename V, typename T = decltype(V{}[0] + 0)>
CTXFAST_INLINE V keep_lanes(V v, uint64_t bits) {
  typename VecOf<T>::mask lane_bit;
  for (int i = 0; i < kLanes<T>; ++i) lane_bit[i] = 1 << i;
  using Integer = typename VecOf<T>::integer;
  const typename VecOf<T>::mask wanted = typename VecOf<T>::mask{} + Integer(bits & 0xffff);
  return (wanted & lane_bit) != 0 ? v : V{};
}
#endif

CTXFAST_NAMESPACE_END
