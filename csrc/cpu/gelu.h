// Activations on vectors of float, for results that are float or narrower.
//
//   gelu(x): x * Phi(x) exactly, with erf (Hendrycks and Gimpel 2016). Absolute error below
//   1.1e-7 * max(1, |x|), relative error below 1e-6 down to x = -5.
//
//   gelu_narrow(x): the same for results that are stored as bfloat16. Absolute error below 4e-6
//   and 2^-13 of the result.
//
//   gelu_tanh(x): x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3).
//
//   tanh(x): 1 - 2 / (exp(2x) + 1). Absolute error below 2e-7.
#pragma once

#include "cpu/activation.h"
#include "cpu/simd_math.h"

CTXFAST_NAMESPACE_BEGIN

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
#if defined(CTXFAST_AVX512)
  const Vec<float> n = round_to_integer(odds);
  const Vec<float> power = scale_by_power(polynomial<float>(kExp2Fast, odds - n), n);
  return x * (Vec<float>)_mm512_rcp14_ps(1.0f + power);
#else
  return x / (1.0f + exp2_by<float>(kExp2Fast, odds));
#endif
}

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
