// Vector sigmoid and tanh, at most 4 ulp each over all inputs (5 in double; tests measure it), and
// what forward and backward share of a step.
#pragma once

#include "cpu/lstm.h"
#include "cpu/simd_math.h"

CTXFAST_NAMESPACE_BEGIN

template <typename T>
CTXFAST_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

// tanh(x) = (e^2x - 1) / (e^2x + 1), with e^y - 1 = 2^n (2^f - 1) + (2^n - 1): near 0, where n = 0,
// nothing cancels.
template <typename T>
CTXFAST_INLINE Vec<T> tanh(Vec<T> x) {
  using C = MathConstants<T>;
  constexpr T kLog2E = T(1.44269504088896340736);
  constexpr T kFlat = sizeof(T) == 4 ? T(10) : T(20);  // from here on the result is 1
  const Vec<T> sign = x < T(0) ? splat<T>(T(-1)) : splat<T>(T(1));
  const Vec<T> bounded = vmin(splat<T>(kFlat), x * sign);  // keeps a NaN
  const Vec<T> y = bounded + bounded;
  const Vec<T> n = round_to_integer(y * kLog2E);
  const Vec<T> f = ((y - n * C::kLn2High) - n * C::kLn2Low) * kLog2E;
  Vec<T> p;  // (2^f - 1) / f
  if constexpr (sizeof(T) == 4) {
    p = polynomial<T>(reinterpret_cast<const T(&)[6]>(kExp2Float[1]), f);
  } else {
    p = polynomial<T>(reinterpret_cast<const T(&)[11]>(kExp2Double[1]), f);
  }
  const Vec<T> power = scale_by_power(splat<T>(T(1)), n);
  const Vec<T> m = power * (p * f) + (power - T(1));
  return sign * (m / (m + T(2)));
}

// Keeps a NaN; bound infinity does nothing.
template <typename T>
CTXFAST_INLINE Vec<T> clip(Vec<T> x, T bound) {
  return vmin(splat<T>(bound), vmax(splat<T>(-bound), x));
}

// The gradient of clip: passes at the bounds themselves, stops outside and at a NaN.
template <typename T>
CTXFAST_INLINE Vec<T> inside(Vec<T> grad, Vec<T> x, T bound) {
  const Vec<T> kept = x >= -bound ? grad : Vec<T>{};
  return x <= bound ? kept : Vec<T>{};
}

// v as it is after being stored.
CTXFAST_INLINE Vec<float> rounded(const float*, Vec<float> v) { return v; }
CTXFAST_INLINE Vec<double> rounded(const double*, Vec<double> v) { return v; }
CTXFAST_INLINE Vec<float> rounded(const bfloat16*, Vec<float> v) { return widen(narrow(v)); }

template <typename From, typename To>
CTXFAST_INLINE void copy(const From* from, To* to, int64_t n) {
  constexpr int lanes = kLanes<Compute<From> >;
  for (int64_t i = 0; i < n; i += lanes) store_n(to + i, load_n(from + i, n - i), n - i);
}

template <typename Storage>
CTXFAST_INLINE void clear(Storage* to, int64_t n) {
  constexpr int lanes = kLanes<Compute<Storage> >;
  for (int64_t i = 0; i < n; i += lanes) store_n(to + i, Vec<Compute<Storage> >{}, n - i);
}

// The rows in falling order of their lengths, ties in their own order, so that the rows which are
// still running are the first `active[step]` ones.
struct RowOrder {
  int64_t* row;     // [B]
  int64_t* length;  // [B], of row[i]
  int64_t* active;  // [T]

  static int64_t bytes(const LstmSizes& sizes) {
    return int64_t(sizeof(int64_t)) * (2 * sizes.batch + 2 * sizes.steps + 2);
  }

  RowOrder(const LstmSizes& sizes, void* memory) {
    const int64_t batch = sizes.batch, steps = sizes.steps;
    row = static_cast<int64_t*>(memory);
    length = row + batch;
    active = length + batch;
    int64_t* start = active + steps;  // [T + 2]: where rows of length T, T - 1, ... begin
    const auto of = [&](int64_t b) { return sizes.lengths == nullptr ? steps : sizes.lengths[b]; };
    for (int64_t t = 0; t < steps + 2; ++t) start[t] = 0;
    for (int64_t b = 0; b < batch; ++b) ++start[steps - of(b) + 1];
    for (int64_t t = 1; t < steps + 2; ++t) start[t] += start[t - 1];
    for (int64_t t = 0; t < steps; ++t) active[t] = start[steps - t];
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t place = start[steps - of(b)]++;
      row[place] = b;
      length[place] = of(b);
    }
  }

  // Position in time of the i-th row at a step.
  CTXFAST_INLINE int64_t position(int64_t i, int64_t step, bool reverse) const {
    return reverse ? length[i] - 1 - step : step;
  }
};

CTXFAST_NAMESPACE_END
