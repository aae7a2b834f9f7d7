// Rows of the input of linear_int8.cpp as unsigned bytes: their levels between the least and the
// largest value of the row (Dettmers et al. 2022).
#pragma once

#include "cpu/amx_panel.h"
#include "cpu/matrix_tile.h"

CTXFAST_NAMESPACE_BEGIN

constexpr float kLevels = 255.0f;  // steps of an unsigned byte
constexpr int kWidth = kLanes<float>;

// How the bytes of a task's rows lie: 64 of one row, then those of `gap` bytes further, and so on.
#if defined(CTXFAST_AMX)
constexpr int64_t kRowGroup = kBlockRows, kGap = 2 * kTileBytes;
constexpr int64_t kByteLimit = 1 << 20;  // of a task's rows: half of the second cache level
constexpr int64_t row_bytes(int64_t depth) {
  return (depth + kMatrixBytes - 1) / kMatrixBytes * kMatrixBytes;
}
constexpr int64_t row_offset(int64_t row, int64_t bytes) {
  return row / kBlockRows * kBlockRows * bytes + row % kBlockRows * kMatrixBytes;
}
constexpr int64_t sum_count(int64_t rows) { return (rows + 2 * kBlockRows) * kBlockColumns; }
#else
constexpr int64_t kRowGroup = kTileRows, kGap = 64;
constexpr int64_t kByteLimit = 1 << 19;  // of a task's rows: half of the second cache level
constexpr int64_t row_bytes(int64_t depth) { return (depth + 3) / 4 * 4; }
constexpr int64_t row_offset(int64_t row, int64_t bytes) { return row * bytes; }
constexpr int64_t sum_count(int64_t) { return 0; }
#endif
constexpr int64_t kPiece = 64;  // bytes of a row that lie together

// What a task multiplies: rows of bytes, and what brings their products back to scale.
struct Rows {
  uint8_t* bytes;
  int64_t row_bytes;
  float *low, *step;
  int32_t* sums;  // memory for `sum_count` of them
};

// To the nearest integer, ties to even. By instruction where there is one: a fused multiply-add in
// round_to_integer would break ties otherwise than the definition does.
CTXFAST_INLINE Mask<float> nearest(Vec<float> x) {
#if defined(CTXFAST_AVX512)
  return (Mask<float>)_mm512_cvtps_epi32(x);
#elif defined(CTXFAST_AVX2)
  return (Mask<float>)_mm256_cvtps_epi32(x);
#else
  return __builtin_convertvector(round_to_integer(x), Mask<float>);
#endif
}

// Least and largest value of a row, and 0, or NaN where the row holds a NaN or an infinity.
struct Range {
  float least, most, poison;
};

template <typename Input>
CTXFAST_INLINE Range range_of(const Input* input, int64_t depth) {
  Vec<float> least = splat(to_compute(input[0])), most = least, poison = {};
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    const Vec<float> x = load(input + k);
    least = vmin(x, least);
    most = vmax(x, most);
    poison =
        x * 0.0f + poison;  // a NaN may escape the two others, and no infinity may pass as a range
  }
  Range range = {-reduce_max(-least), reduce_max(most), reduce_add(poison)};
  for (; k < depth; ++k) {
    const float x = to_compute(input[k]);
    range.least = x < range.least ? x : range.least;
    range.most = larger(x, range.most);
    range.poison += x - x;
  }
  return range;
}

#if defined(CTXFAST_AVX512)
// bfloat16 as integers in the order of their values; NaNs lie beyond the infinities.
CTXFAST_INLINE __m512i in_order(__m512i bits) {
  const __m512i negative = _mm512_srai_epi16(bits, 15);
  return _mm512_xor_si512(bits, _mm512_and_si512(negative, _mm512_set1_epi16(0x7fff)));
}
CTXFAST_INLINE float value_in_order(int order) {
  return to_compute(bfloat16{uint16_t(order < 0 ? order ^ 0x7fff : order)});
}
CTXFAST_INLINE int reduce_min16(__m512i v) {
  const __m256i half = _mm256_min_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i quarter =
      _mm_min_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // The one horizontal minimum there is takes unsigned numbers.
  const __m128i flipped = _mm_xor_si128(quarter, _mm_set1_epi16(-0x8000));
  return int16_t(_mm_extract_epi16(_mm_minpos_epu16(flipped), 0) ^ 0x8000);
}

CTXFAST_INLINE __mmask32 lane_bits32(int64_t n) {
  return n >= 32 ? ~__mmask32(0) : n <= 0 ? __mmask32(0) : __mmask32((1u << n) - 1u);
}

CTXFAST_INLINE Range range_of(const bfloat16* input, int64_t depth) {
  constexpr int kInfinity = 0x7f80;
  const __m512i start = _mm512_set1_epi16(int16_t(input[0].bits));
  __m512i least[2] = {in_order(start), in_order(start)}, most[2] = {least[0], least[0]};
  for (int64_t k = 0; k < depth; k += kPiece) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int64_t at = k + i * 32;
      const __m512i x =
          in_order(_mm512_mask_loadu_epi16(start, lane_bits32(depth - at), input + at));
      least[i] = _mm512_min_epi16(least[i], x);
      most[i] = _mm512_max_epi16(most[i], x);
    }
  }
  const int first = reduce_min16(_mm512_min_epi16(least[0], least[1]));
  const int last =
      ~reduce_min16(_mm512_xor_si512(_mm512_max_epi16(most[0], most[1]), _mm512_set1_epi16(-1)));
  const bool finite = last < kInfinity && first > ~kInfinity;
  return {value_in_order(first), value_in_order(last), finite ? 0.0f : __builtin_nanf("")};
}
#endif

typedef uint8_t Bytes __attribute__((vector_size(kWidth), aligned(1), may_alias));

// bytes = the levels of a row's values: (value - least) * scale, rounded
template <typename Input>
CTXFAST_INLINE void put_levels(const Input* input, int64_t depth, float least, float scale,
                               uint8_t* bytes) {
  for (int64_t k = 0; k < depth; k += kWidth) {
    const Vec<float> level = (load_n(input + k, depth - k) - least) * scale;
    const Bytes byte = __builtin_convertvector(nearest(level), Bytes);
    const int64_t count = depth - k < kWidth ? depth - k : kWidth;
    uint8_t* to = bytes + k / kPiece * kGap + k % kPiece;
    if (count == kWidth) {
      *(Bytes*)to = byte;
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = byte[i];
    }
  }
}

#if defined(CTXFAST_AVX512)
// Of 32 bfloat16, as words in order: those at even places lie in the lower halves of floats, those
// at odd places are floats with something below their mantissa.
CTXFAST_INLINE __m512i word_levels(__m512i values, float least, float scale) {
  const Vec<float> even = (Vec<float>)_mm512_slli_epi32(values, 16);
  const Vec<float> odd = (Vec<float>)_mm512_and_si512(values, _mm512_set1_epi32(-0x10000));
  const __m512i low = (__m512i)nearest((even - least) * scale);
  return _mm512_or_si512(low, _mm512_slli_epi32((__m512i)nearest((odd - least) * scale), 16));
}

CTXFAST_INLINE __m512i byte_levels(__m512i first, __m512i second, float least, float scale) {
  const __m512i packed =
      _mm512_packus_epi16(word_levels(first, least, scale), word_levels(second, least, scale));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed);
}

CTXFAST_INLINE void put_levels(const bfloat16* input, int64_t depth, float least, float scale,
                               uint8_t* bytes) {
  for (; depth >= kPiece; depth -= kPiece, input += kPiece, bytes += kGap)
    _mm512_storeu_si512(bytes, byte_levels(_mm512_loadu_si512(input),
                                           _mm512_loadu_si512(input + 32), least, scale));
  if (depth == 0) return;
  const __m512i first = _mm512_maskz_loadu_epi16(lane_bits32(depth), input);
  const __m512i second = _mm512_maskz_loadu_epi16(lane_bits32(depth - 32), input + 32);
  _mm512_mask_storeu_epi8(bytes, ~__mmask64(0) >> (kPiece - depth),
                          byte_levels(first, second, least, scale));
}
#endif

template <typename Input>
CTXFAST_INLINE void quantize_row(const Input* input, int64_t depth, uint8_t* bytes, float* low,
                                 float* step) {
  const Range found = range_of(input, depth);
  const float range = found.most - found.least;
  const float scale = range > 1e-30f ? kLevels / range : 0.0f;
  *low = found.least;
  *step = (range > 1e-30f ? range / kLevels : 0.0f) + found.poison;
  put_levels(input, depth, found.least, scale, bytes);
  for (const int64_t end = row_bytes(depth); depth < end; ++depth)
    bytes[depth / kPiece * kGap + depth % kPiece] = 0;
}

CTXFAST_NAMESPACE_END
