// Conversions of the 16-bit formats, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace simt {

inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_from_bfloat16(uint16_t x) { return float_from_bits(uint32_t(x) << 16); }

inline uint16_t bfloat16_from_float(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = bits_from_float(x);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_from_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = std::ldexp(float(fraction), -24);
  return sign ? -small : small;
}

inline uint16_t float16_from_float(float x) {
  const uint16_t sign = uint16_t(bits_from_float(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (size != size) return 0x7fff;
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
  if (size < 6.103515625e-5f)
    return uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(size, 24))));
  const uint32_t bits = bits_from_float(size) - (112u << 23);
  return uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1)) >> 13));
}

}  // namespace simt
