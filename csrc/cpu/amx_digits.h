// Float operands of matrix tiles as integers (Ozaki, Ogita, Oishi and Rump, "Error-free
// transformations of matrix multiplication", 2012; on tensor cores Ootomo, Ozaki and Yokota, "DGEMM
// on integer matrix multiplication unit", 2024). A row of the left operand and a column of the
// right one each count in a unit so small that their largest element takes 24 bits; others are
// rounded to whole units:
//
//   x = unit (2^16 d0 + 2^8 d1 + d2)    three signed digits of 8 bits
//
// Tiles multiply bytes twice as fast as bfloat16. Of the nine products of digits all but the
// smallest is summed, exactly, those of one weight together: eight at twice the rate, where parts
// (amx_pack.h) take six. What is lost is half a unit of each element, less than float sums of as
// many terms lose as long as no element is much larger than the rest. Those of a row that are
// (activations of transformers have such features: Dettmers et al., "LLM.int8()", 2022) are
// multiplied in float.
//
// A block is 16 rows or 16 columns; a step is 64 along the depth. The four bytes of a word are
// elements that lie 16 apart along the depth: packing needs no permutation then, and a sum does not
// mind.
#pragma once

#include "cpu/amx.h"
#include "cpu/simd.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

constexpr int64_t kDigitStep = 64;
constexpr int64_t kDigits = 3;
constexpr int64_t kDigitStepBytes = kDigits * kTileBytes;  // of a block

// The unit of a row or a column whose largest magnitude is `most`, and what to multiply by to count
// in it.
struct DigitUnit {
  float size, inverse;
};
constexpr float kMostUnits = 0x7f7f70;  // that three digits hold, whatever is rounded
constexpr float kLeastMost = 0x1p-54f, kMostMost = 0x1p54f;
CTXFAST_INLINE DigitUnit digit_unit(float most) {
  if (most == 0) return {0, 0};
  return {most / kMostUnits, kMostUnits / most};
}

// Digit d of lane i of x[t], which counts units, is byte t of word i at out + d * kTileBytes.
CTXFAST_INLINE void store_digits(const Vec<float> (&x)[4], char* out) {
  constexpr __mmask64 kOddBytes = 0xaaaaaaaaaaaaaaaa;
  constexpr __mmask32 kOddHalves = 0xaaaaaaaa;
  const __m512i middle = _mm512_set1_epi32(0x808080), sign = _mm512_set1_epi8(char(0x80));
  __m512i q[4];
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) q[t] = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)x[t]), middle);
  // Bytes 0 and 2, and byte 1, of two neighbours side by side.
  __m512i even[2], odd[2];
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    const __m512i low = q[2 * p], high = q[2 * p + 1];
    even[p] = _mm512_mask_blend_epi8(kOddBytes, low, _mm512_slli_epi32(high, 8));
    odd[p] = _mm512_mask_blend_epi8(kOddBytes, _mm512_srli_epi32(low, 8), high);
  }
  const __m512i digits[kDigits] = {
      _mm512_mask_blend_epi16(kOddHalves, _mm512_srli_epi32(even[0], 16), even[1]),
      _mm512_mask_blend_epi16(kOddHalves, odd[0], _mm512_slli_epi32(odd[1], 16)),
      _mm512_mask_blend_epi16(kOddHalves, even[0], _mm512_slli_epi32(even[1], 16))};
#pragma GCC unroll 3
  for (int d = 0; d < kDigits; ++d)
    _mm512_store_si512(out + d * kTileBytes, _mm512_xor_si512(digits[d], sign));
}

CTXFAST_INLINE bool fits_digits(float most) {
  return most == 0 || (most >= kLeastMost && most <= kMostMost);  // and is a number
}

// Elements of a row that are much larger than the rest: they would make its unit too large for the
// rest, and are multiplied in float. No more than 1 / kFarOut^2 of a row are so large.
constexpr float kFarOut = 6;  // times the root of the mean square
constexpr int64_t kMostDepth = 768, kMostApart = kMostDepth / int64_t(kFarOut * kFarOut);
struct DigitRow {
  float unit;
  int32_t apart;  // so many
  int32_t at[kMostApart];
  float value[kMostApart];
};

// `depth` elements of a row, at most kMostDepth, each times what its feature is multiplied by, as
// digits into a row of a block of `steps` steps; what is apart is as it was in the row. False where
// a number does not fit.
CTXFAST_NOINLINE inline bool pack_digit_row(const float* row, const float* features, int64_t depth,
                                            int64_t steps, char* out, DigitRow* found) {
  const int64_t whole = depth / kDigitStep;
  alignas(64) float rest[kDigitStep] = {};  // the last step where it is incomplete
  if (whole < steps)
    __builtin_memcpy(rest, row + whole * kDigitStep,
                     size_t(depth - whole * kDigitStep) * sizeof(float));
  const auto at = [&](int64_t step, int t) {
    const float* from = step < whole ? row + step * kDigitStep : rest;
    return load(from + 16 * t) * load(features + step * kDigitStep + 16 * t);
  };
  // Magnitudes compare as their bits do, and a NaN is the largest.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most[4] = {};
  Vec<float> squares[4] = {};
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const Vec<float> x = at(step, t);
      most[t] = _mm512_max_epu32(most[t], _mm512_and_si512((__m512i)x, magnitude));
      squares[t] += x * x;
    }
  const uint32_t bits = _mm512_reduce_max_epu32(
      _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3])));
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof(largest));
  found->apart = 0;
  if (!fits_digits(largest)) return false;
  // Without what is far out the mean is smaller, and more may be far out.
  float sum = reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (;;) {
    const float far = kFarOut * __builtin_sqrtf(sum / float(depth > 0 ? depth : 1));
    if (largest <= far) break;
    int64_t count = 0;
    Vec<float> near_most = {}, near_squares = {};
    for (int64_t step = 0; step < steps; ++step)
      for (int t = 0; t < 4; ++t) {
        const __m512 size = _mm512_abs_ps((__m512)at(step, t));
        const __mmask16 near = _mm512_cmp_ps_mask(size, _mm512_set1_ps(far), _CMP_LE_OQ);
        const Vec<float> x = (Vec<float>)_mm512_maskz_mov_ps(near, size);
        near_most = vmax(near_most, x);
        near_squares += x * x;
        count += 16 - __builtin_popcount(near);
      }
    if (count > kMostApart) break;
    largest = reduce_max(near_most);
    sum = reduce_add(near_squares);
  }
  const DigitUnit unit = digit_unit(largest);
  found->unit = unit.size;
  for (int64_t step = 0; step < steps; ++step, out += kDigitStepBytes) {
    Vec<float> x[4];
    uint64_t far = 0;
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const __m512 y = (__m512)at(step, t);
      const __mmask16 near =
          _mm512_cmp_ps_mask(_mm512_abs_ps(y), _mm512_set1_ps(largest), _CMP_LE_OQ);
      x[t] = (Vec<float>)_mm512_maskz_mul_ps(near, y, _mm512_set1_ps(unit.inverse));
      far |= uint64_t(uint16_t(~near)) << 16 * t;
    }
    store_digits(x, out);
    for (; far != 0; far &= far - 1) {
      const int64_t k = step * kDigitStep + __builtin_ctzll(far);
      found->at[found->apart] = int32_t(k);
      found->value[found->apart++] = row[k];
    }
  }
  return true;
}

// A block of columns, half of a panel of 32, that becomes digits a little at a time: a unit of work
// is a row of words of a step.
class DigitColumns {
 public:
  static constexpr int64_t kRowFloats = 32;  // of a panel
  static constexpr int64_t kStepWork = kMatrixRows;

  // `depth` rows of a panel from `from` on, in `steps` steps. inverse_features: what the rows are
  // multiplied by; inverse_units: the columns. As it proceeds it asks the second cache level for
  // what lies at `ahead` as they do at `from`.
  void begin(const float* from, const float* ahead, const float* inverse_features,
             Vec<float> inverse_units, int64_t depth, int64_t steps, char* out) {
    from_ = from;
    ahead_ = ahead - from;
    features_ = inverse_features;
    units_ = inverse_units;
    depth_ = depth;
    out_ = out;
    row_ = 0;
    left_ = steps * kStepWork;
  }
  int64_t left() const { return left_; }
  void finish() {
    while (left_ > 0) pack_row();
  }

  CTXFAST_NOINLINE void pack_row() {
    const float* lines = from_ + row_ * kRowFloats;
    const float* features = features_ + row_;
    Vec<float> x[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const float* line = lines + 16 * t * kRowFloats;
      __builtin_prefetch(line + ahead_, 0, 2);
      const bool there = depth_ >= kDigitStep || row_ + 16 * t < depth_;
      x[t] = there ? load(line) * (features[16 * t] * units_) : Vec<float>{};
    }
    store_digits(x, out_ + row_ * kMatrixBytes);
    --left_;
    if (++row_ < kStepWork) return;
    row_ = 0;
    from_ += kDigitStep * kRowFloats;
    features_ += kDigitStep;
    depth_ -= kDigitStep;
    out_ += kDigitStepBytes;
  }

 private:
  const float *from_ = nullptr, *features_ = nullptr;
  int64_t ahead_ = 0, depth_ = 0, row_ = 0, left_ = 0;
  Vec<float> units_ = {};
  char* out_ = nullptr;
};

// Sums of products of digits, one tile for each weight: 2^32, 2^24, 2^16 and 2^8 units of the row
// by those of the column.
constexpr int64_t kDigitSums = 4;

// sums[kDigitSums][16][16] = a block of rows times a block of columns. `beside` is called in each
// of kDigitPauses pauses of a step: the vector units are idle while tiles multiply.
constexpr int64_t kDigitPauses = 3;
template <typename Beside>
CTXFAST_INLINE void multiply_digits(const char* rows, const char* columns, int64_t steps,
                                    int32_t* sums, const Beside& beside) {
  clear_sums();
  for (int64_t step = 0; step < steps; ++step) {
    // Tiles 5 to 7 hold the digits of the columns, which stay in the first cache level; those of
    // the rows pass through tile 4.
    load_matrix<5>(columns, 64);
    stream_matrix<4>(rows, 64);
    multiply_signed_matrix8<0, 4, 5>();
    load_matrix<6>(columns + kTileBytes, 64);
    multiply_signed_matrix8<1, 4, 6>();
    load_matrix<7>(columns + 2 * kTileBytes, 64);
    multiply_signed_matrix8<2, 4, 7>();
    stream_matrix<4>(rows + kTileBytes, 64);
    beside();
    multiply_signed_matrix8<1, 4, 5>();
    multiply_signed_matrix8<2, 4, 6>();
    multiply_signed_matrix8<3, 4, 7>();
    stream_matrix<4>(rows + 2 * kTileBytes, 64);
    beside();
    multiply_signed_matrix8<2, 4, 5>();
    multiply_signed_matrix8<3, 4, 6>();
    beside();
    rows += kDigitStepBytes;
    columns += kDigitStepBytes;
  }
  constexpr int64_t kSize = kMatrixRows * kMatrixRows;
  store_matrix<0>(sums, 64);
  store_matrix<1>(sums + kSize, 64);
  store_matrix<2>(sums + 2 * kSize, 64);
  store_matrix<3>(sums + 3 * kSize, 64);
}

CTXFAST_NAMESPACE_END

#endif
