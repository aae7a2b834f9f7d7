// Exponential and logarithm on vectors.
//
// - exp2(x): at most 2 ulp for results in the normal range; 0 below it, +inf from 128 (1024) on,
//   NaN for NaN
// - exp2_nonpositive<kFast>(x): the same for x <= 0; with kFast a float has relative error up to
//   4e-6
// - exp(x): at most 2 ulp, ranges as exp2
// - log(x): at most 3 ulp for positive normal x; -inf at 0, +inf at +inf, NaN below 0 and for NaN
//
// The polynomials are minimax for the relative error of 2^f on [-1/2, 1/2] with p(0) = 1 (Remez
// exchange).
#pragma once

#include "cpu/simd.h"

CTXFAST_NAMESPACE_BEGIN

template <typename T>
struct MathConstants;
template <>
struct MathConstants<float> {
  static constexpr int kMantissaBits = 23, kExponentBias = 127, kLogTerms = 5;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLow = -126.0f, kHigh = 128.0f;
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
};
template <>
struct MathConstants<double> {
  static constexpr int kMantissaBits = 52, kExponentBias = 1023, kLogTerms = 12;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLow = -1022.0, kHigh = 1024.0;
  static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
};

constexpr float kExp2Fast[] = {1.0f, 0.6931136044f, 0.2402071108f, 0.05597688356f, 0.00978291258f};
constexpr float kExp2Float[] = {1.0f,
                                0.693147215f,
                                0.2402265278f,
                                0.05550310551f,
                                0.009617692974f,
                                0.001340664393f,
                                0.0001559467802f};
constexpr double kExp2Double[] = {1.0,
                                  0.6931471805599456968,
                                  0.2402265069591009801,
                                  0.0555041086647903938,
                                  0.009618129107607002254,
                                  0.00133335581534401334,
                                  0.000154035304415723593,
                                  0.0000152527273850382371,
                                  1.321544267518275784e-6,
                                  1.018064772211885205e-7,
                                  7.072570442467681345e-9,
                                  4.078062699466224894e-10};

template <typename T, int kCount>
CTXFAST_INLINE Vec<T> polynomial(const T (&coefficients)[kCount], Vec<T> x) {
  Vec<T> value = splat<T>(coefficients[kCount - 1]);
  for (int k = kCount - 2; k >= 0; --k) value = value * x + coefficients[k];
  return value;
}

// p * 2^n for integral n in [kLow - 1, kHigh], p near 1.
#if defined(CTXFAST_AVX512)
CTXFAST_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> n) {
  return _mm512_scalef_ps(p, n);
}
CTXFAST_INLINE Vec<double> scale_by_power(Vec<double> p, Vec<double> n) {
  return _mm512_scalef_pd(p, n);
}
CTXFAST_INLINE Vec<float> round_to_integer(Vec<float> x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
CTXFAST_INLINE Vec<double> round_to_integer(Vec<double> x) {
  return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
template <typename V, typename T = decltype(V{}[0] + 0)>
CTXFAST_INLINE V scale_by_power(V p, V n) {
  using Bits = typename VecOf<T>::mask;
  using C = MathConstants<T>;
  // Half of n at a time, so that the exponent field overflows neither way while p is scaled.
  const V magic = splat<T>(C::kMagic);
  const Bits whole = (Bits)(n + magic) - (Bits)magic;
  const Bits half = whole >> 1;
  const V first = (V)((half + C::kExponentBias) << C::kMantissaBits);
  const V second = (V)((whole - half + C::kExponentBias) << C::kMantissaBits);
  return p * first * second;
}
template <typename V, typename T = decltype(V{}[0] + 0)>
CTXFAST_INLINE V round_to_integer(V x) {
  const V magic = splat<T>(MathConstants<T>::kMagic);
  return (x + magic) - magic;
}
#endif

template <typename T, int kCount>
CTXFAST_INLINE Vec<T> exp2_by(const T (&coefficients)[kCount], Vec<T> x) {
  using C = MathConstants<T>;
  // vmax and vmin give their second operand for NaN.
  const Vec<T> bounded = vmin(splat<T>(C::kHigh), vmax(splat<T>(C::kLow - 1), x));
  const Vec<T> n = round_to_integer(bounded);
  const Vec<T> value = scale_by_power(polynomial<T>(coefficients, bounded - n), n);
  return x < C::kLow ? Vec<T>{} : value;
}

CTXFAST_INLINE Vec<float> exp2(Vec<float> x) { return exp2_by<float>(kExp2Float, x); }
CTXFAST_INLINE Vec<double> exp2(Vec<double> x) { return exp2_by<double>(kExp2Double, x); }

template <typename T, int kCount>
CTXFAST_INLINE Vec<T> exp2_nonpositive_by(const T (&coefficients)[kCount], Vec<T> x) {
#if defined(CTXFAST_AVX512)
  const Vec<T> bounded =
      vmax(splat<T>(T(-10000)), x);  // the scaling instruction underflows to 0 by itself
#else
  const Vec<T> bounded = vmax(splat<T>(MathConstants<T>::kLow - 1), x);
#endif
  const Vec<T> n = round_to_integer(bounded);
  const Vec<T> value = scale_by_power(polynomial<T>(coefficients, bounded - n), n);
#if defined(CTXFAST_AVX512)
  return value;
#else
  return x < MathConstants<T>::kLow ? Vec<T>{} : value;
#endif
}

// Exponential of x <= 0 (or NaN), `kFast` for results that are stored as bfloat16.
template <bool kFast>
CTXFAST_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
  if constexpr (kFast) return exp2_nonpositive_by<float>(kExp2Fast, x);
  return exp2_nonpositive_by<float>(kExp2Float, x);
}
template <bool kFast>
CTXFAST_INLINE Vec<double> exp2_nonpositive(Vec<double> x) {
  return exp2_nonpositive_by<double>(kExp2Double, x);
}

// e^x = 2^n * 2^(r log2 e), with r = x - n ln 2 exact to more than the precision of T.
template <typename T>
CTXFAST_INLINE Vec<T> exp(Vec<T> x) {
  using C = MathConstants<T>;
  constexpr T kLog2E = T(1.44269504088896340736);
  constexpr T kLn2 = T(0.69314718055994530942);
  const Vec<T> bounded =
      vmin(splat<T>((C::kHigh + T(0.25)) * kLn2), vmax(splat<T>((C::kLow - 1) * kLn2), x));
  const Vec<T> n = round_to_integer(bounded * kLog2E);
  const Vec<T> r = (bounded - n * C::kLn2High) - n * C::kLn2Low;
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {
    p = polynomial<T>(kExp2Float, r * kLog2E);
  } else {
    p = polynomial<T>(kExp2Double, r * kLog2E);
  }
  const Vec<T> value = scale_by_power(p, n);
  return x * kLog2E < C::kLow ? Vec<T>{} : value;
}

// log(2^e m) = e ln 2 + 2 artanh((m - 1) / (m + 1)), with m in [sqrt(1/2), sqrt(2)).
template <typename T>
CTXFAST_INLINE Vec<T> log(Vec<T> x) {
  using C = MathConstants<T>;
  using Bits = typename VecOf<T>::mask;
  constexpr T kSqrtHalf = T(0.70710678118654752440);
  const Bits offset = (Bits)splat<T>(kSqrtHalf);
  const Bits shifted = (Bits)x - offset;
  const Bits exponent = shifted >> C::kMantissaBits;
  const Vec<T> m = (Vec<T>)((Bits)x - (exponent << C::kMantissaBits));
  const Vec<T> e = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> s = (m - T(1)) / (m + T(1));
  const Vec<T> square = s * s;
  Vec<T> series = splat<T>(T(1) / T(2 * C::kLogTerms - 1));
  for (int k = C::kLogTerms - 2; k >= 0; --k) series = series * square + T(1) / T(2 * k + 1);
  const Vec<T> value = e * C::kLn2High + (s * (series + series) + e * C::kLn2Low);
  const T infinity = __builtin_huge_val();
  const Vec<T> limits = x == T(0)       ? splat<T>(-infinity)
                        : x == infinity ? x
                                        : splat<T>(__builtin_nan(""));
  return x > T(0) && x < infinity ? value : limits;
}

CTXFAST_NAMESPACE_END
