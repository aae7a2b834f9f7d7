// Activations on vectors of float, for results that are float or narrower.
//
//   gelu(x): x * Phi(x) exactly, with erf (Hendrycks and Gimpel 2016). Absolute error below
//   1.1e-7 * max(1, |x|), relative error below 1e-6 down to x = -5; with AVX-512 of a negative x
//   below 2e-8 and, down to x = -5, 5e-7 of the result.
//
//   gelu_narrow(x): the same for results that are stored as bfloat16. Absolute error below 4e-6
//   and 2^-13 of the result; with AVX-512 below 6e-7 and 2^-23 of it.
//
//   gelu_tanh(x): x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3).
//
//   tanh(x): 1 - 2 / (exp(2x) + 1). Absolute error below 2e-7.
#pragma once

#include "cpu/activation.h"
#include "cpu/gelu_tail.h"
#include "cpu/simd_math.h"

CTXFAST_NAMESPACE_BEGIN

#if defined(CTXFAST_AVX512)
// Fused by name in these: nothing is left to the compiler, and every instruction set has the same
// bits.
CTXFAST_INLINE Vec<float> gelu(Vec<float> x) {
  constexpr int kSmallerMagnitude = 0b1010, kNanForMinusInfinity = 3 << 16;
  const Vec<float> end = splat((kTailIntervals - 1) * kFineTailStep);
  const Vec<float> t = _mm512_range_ps(x, end, kSmallerMagnitude);
  // The last bits of the sum are the nearest integer.
  const Vec<float> shifted = _mm512_fmadd_ps(t, splat(1.0f / kFineTailStep), splat(8388608.0f));
  const __m512i interval = (__m512i)shifted;
  const Vec<float> u = _mm512_fnmadd_ps(shifted - 8388608.0f, splat(kFineTailStep), t);
  Vec<float> tail = tail_coefficients(kFineTail[5], interval);
#pragma GCC unroll 5
  for (int k = 4; k >= 0; --k)
    tail = _mm512_fmadd_ps(tail, u, tail_coefficients(kFineTail[k], interval));
  const Vec<float> above = _mm512_max_ps(splat(0.0f), x);  // keeps a NaN
  return _mm512_fixupimm_ps(above - tail, x, _mm512_set1_epi32(kNanForMinusInfinity), 0);
}

// Cubics in t, interpolated at Chebyshev nodes, on intervals of kTailStep around its multiples; 0
// from the last one on.
constexpr float kTailStep = 0.17f;
alignas(64) constexpr float kTail[4][kTailIntervals] = {
    {0.0f,
     -4.02390724e-05f,
     -0.000695035444f,
     -0.0028393676f,
     -0.00596884778f,
     -0.00665132003f,
     0.00168320478f,
     0.0271084681f,
     0.0761957318f,
     0.150871664f,
     0.24653402f,
     0.352309674f,
     0.453441232f,
     0.534942925f,
     0.585242748f,
     0.598653078f,
     0.576057911f,
     0.523881376f,
     0.451927751f,
     0.370899349f,
     0.290297449f,
     0.217121094f,
     0.155440956f,
     0.106673546f,
     0.070260413f,
     0.0444621146f,
     0.0270581674f,
     0.0158485454f,
     0.00894078333f,
     0.00486109499f,
     0.00254866201f,
     0.0f},
    {0.500001252f,   0.501097441f,    0.508603513f,    0.523729265f,
     0.53970468f,    0.54274565f,     0.516451657f,    0.447851747f,
     0.332668483f,   0.177778751f,    4.18936179e-05f, -0.177923292f,
     -0.333403736f,  -0.448792905f,   -0.514852047f,   -0.531421125f,
     -0.505866587f,  -0.450155795f,   -0.377626181f,   -0.30031687f,
     -0.227331266f,  -0.164285958f,   -0.113607556f,   -0.0753140897f,
     -0.0479351394f, -0.0293274969f,  -0.0172658358f,  -0.00978977978f,
     -0.0053500575f, -0.00281986408f, -0.00143426831f, 0.0f},
    {-0.399212033f,  -0.409615338f,   -0.438818395f,   -0.474622428f,
     -0.501895785f,  -0.506357372f,   -0.478677034f,   -0.416922629f,
     -0.326764464f,  -0.219614387f,   -0.109487683f,   -0.00964262709f,
     0.0700611919f,  0.124530897f,    0.153455615f,    0.160279498f,
     0.150644451f,   0.13081336f,     0.106439993f,    0.0818500444f,
     0.0598179735f,  0.041710563f,    0.0278296508f,   0.0178058166f,
     0.0109432526f,  0.00646921108f,  0.00368262548f,  0.00202052295f,
     0.00106931338f, 0.000546218187f, 0.000269458658f, 0.0f},
    {0.00846700463f,   0.0441717431f,    0.0827529356f,    0.111191392f,
     0.126760945f,     0.128921524f,     0.119197495f,     0.100649193f,
     0.0771085843f,    0.0523861945f,    0.0296307057f,    0.0109514399f,
     -0.00267228903f,  -0.0112453476f,   -0.0154678896f,   -0.0164046641f,
     -0.0151935853f,   -0.0128401788f,   -0.010109609f,    -0.00750216516f,
     -0.00528499344f,  -0.00355126336f,  -0.00228381436f,  -0.00140911876f,
     -0.00083570648f,  -0.000477101043f, -0.000262494228f, -0.000139312338f,
     -7.13765767e-05f, -3.53263677e-05f, -1.68988336e-05f, 0.0f}};

CTXFAST_INLINE Vec<float> gelu_narrow(Vec<float> x) {
  constexpr int kSmallerMagnitude = 0b1010;
  const Vec<float> end = splat((kTailIntervals - 1) * kTailStep);
  const Vec<float> t = _mm512_range_ps(x, end, kSmallerMagnitude);
  // The last bits of the sum are the nearest integer.
  const __m512i interval = (__m512i)_mm512_fmadd_ps(t, splat(1.0f / kTailStep), splat(8388608.0f));
  Vec<float> tail = tail_coefficients(kTail[3], interval);
#pragma GCC unroll 3
  for (int k = 2; k >= 0; --k)
    tail = _mm512_fmadd_ps(tail, t, tail_coefficients(kTail[k], interval));
  // max(0, x) as the sum of two halves: it keeps a NaN, and makes one of -inf as x * Phi(x) does.
  const Vec<float> size = _mm512_abs_ps(x);
  return _mm512_fmadd_ps(x, splat(0.5f), _mm512_fmsub_ps(size, splat(0.5f), tail));
}
#else
// erfc(z) * exp(z^2), a polynomial in t = 1 / (1 + 0.36 z) for 0 <= z <= 9.5, minimax for the
// relative error (7e-9).
constexpr float kScaledErfc[] = {-3.221496715e-05f, 0.2038545706f, 0.1955409857f,  0.2341033468f,
                                 -0.0001716266275f, 0.5282542234f, -0.5673848386f, 0.7162303034f,
                                 -0.3808043428f,    0.07040958622f};

CTXFAST_INLINE Vec<float> gelu(Vec<float> x) {
  const Vec<float> size = x < 0.0f ? -x : x;
  const Vec<float> t = 1.0f / (1.0f + size * (0.36f * 0.70710678118654752f));
  const Vec<float> upper =
      0.5f * polynomial<float>(kScaledErfc, t) * exp<float>(x * x * -0.5f);  // Phi(-|x|)
  const Vec<float> below = x < 0.0f ? upper : 1.0f - upper;
  return x * below;
}

// -log2(Phi(x) / Phi(-x)) / x, a polynomial in x^2, minimax for the absolute error of gelu.
constexpr float kLogOdds[] = {-2.3020454f, -0.105226693f, 0.000360274388f, 8.82381532e-05f,
                              -3.22898995e-06f};

CTXFAST_INLINE Vec<float> gelu_narrow(Vec<float> x) {
  // At +-8 the quotient is 0 or 1 to rounding, and no power of x overflows. A NaN passes through x.
  const Vec<float> near = vmax(splat(-8.0f), vmin(splat(8.0f), x));
  const Vec<float> odds = near * polynomial<float>(kLogOdds, near * near);
  return x / (1.0f + exp2_by<float>(kExp2Fast, odds));
}
#endif

CTXFAST_INLINE Vec<float> gelu_tanh(Vec<float> x) {
  const Vec<float> u = x * (1.5957691216057308f + 0.07135481627159788f * (x * x));  // 2 u
  return x / (1.0f + exp<float>(-u));
}

CTXFAST_INLINE Vec<float> tanh(Vec<float> x) { return 1.0f - 2.0f / (exp<float>(x + x) + 1.0f); }

// For a result of type Output.
template <typename Output, Activation kActivation>
CTXFAST_INLINE Vec<float> activate(Vec<float> x) {
  if constexpr (kActivation == kGelu && sizeof(Output) == 2) return gelu_narrow(x);
  if constexpr (kActivation == kGelu) return gelu(x);
  if constexpr (kActivation == kGeluTanh) return gelu_tanh(x);
  if constexpr (kActivation == kTanh) return tanh(x);
  return x;
}

CTXFAST_NAMESPACE_END
