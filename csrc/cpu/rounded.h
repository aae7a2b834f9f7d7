// Results on their way to memory: the first n lanes of a vector, to nearest even where they become
// bfloat16. Where there is an instruction for that, it also takes numbers below the normal range
// for 0.
#pragma once

#include "cpu/simd.h"

CTXFAST_NAMESPACE_BEGIN

template <typename T>
CTXFAST_INLINE void store_rounded(T* p, Vec<T> v, int64_t n) {
  store_n(p, v, n);
}
CTXFAST_INLINE void store_rounded(bfloat16* p, Vec<float> v, int64_t n) {
#if defined(CTXFAST_AVX512_BF16)
  _mm256_mask_storeu_epi16(p, lane_bits16(n), (__m256i)_mm512_cvtneps_pbh(v));
#else
  store_n(p, v, n);
#endif
}

#if defined(CTXFAST_AVX512_BF16)
// Two whole vectors, one behind the other.
CTXFAST_INLINE void store_pair(float* p, Vec<float> first, Vec<float> second) {
  store(p, first);
  store(p + kLanes<float>, second);
}
CTXFAST_INLINE void store_pair(bfloat16* p, Vec<float> first, Vec<float> second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
#endif

CTXFAST_NAMESPACE_END
