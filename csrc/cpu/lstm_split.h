// Weights of an LSTM in float for matrix tiles, which multiply bfloat16: each number is the exact
// sum of three of them (see lstm_tiles.h), split once for all steps of a call.
#pragma once

#include "cpu/lstm_team.h"
#include "cpu/lstm_weights.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

struct SplitWeight {
  using Element = float;
  using Compute = float;
  // A part is a pair of neighbours along the depth. Those of a vector are [part][lane].
  struct Word {
    uint32_t parts[3];
  };
  static constexpr int kPack = 2, kDepthStep = 32, kVectors = 4;
  static constexpr bool kPlain = false, kScaled = false, kPacksInput = false;

  // Writes a vector of words.
  static CTXFAST_INLINE void store_words(Vec<float> first, Vec<float> second, Word* to) {
    using Bits = VecOf<float>::bits;
    const Bits upper = Bits{} + 0xffff0000u;
    first = first * kLift;
    second = second * kLift;
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      const Bits low = (Bits)first & upper, high = (Bits)second & upper;
      store(part_of(to, part), (Vec<float>)(low >> 16 | high));
      first -= (Vec<float>)low;
      second -= (Vec<float>)high;
    }
  }

  // For numbers that tiles do not take.
  template <int kRows, int kColumns>
  static CTXFAST_INLINE void multiply(const float* a, int64_t lda, const Word* b, int64_t ldb,
                                      int64_t next_column, int64_t words,
                                      Vec<float> (&sum)[kRows][kColumns], const char*) {
    for (int64_t k = 0; k < words; ++k, a += kPack, b += ldb)
      for (int c = 0; c < kColumns; ++c) {
        Vec<float> first, second;
        load_words(b + c * next_column, first, second);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sum[r][c] = a[r * lda] * first + sum[r][c];
          sum[r][c] = a[r * lda + 1] * second + sum[r][c];
        }
      }
  }

 private:
  static CTXFAST_INLINE float* part_of(Word* words, int part) {
    return reinterpret_cast<float*>(words) + part * kLanes<float>;
  }
  static CTXFAST_INLINE void load_words(const Word* from, Vec<float>& first, Vec<float>& second) {
    first = second = Vec<float>{};
    for (int part = 2; part >= 0; --part) {
      const Vec<float> pairs = load(reinterpret_cast<const float*>(from) + part * kLanes<float>);
      first += first_of_pairs(pairs);
      second += second_of_pairs(pairs);
    }
    first = first * (1 / kLift);
    second = second * (1 / kLift);
  }
};

// Whether a call splits its weights: where a step multiplies many rows with weights that do not
// stay in the caches. With smaller ones tiles were measured to be no faster than the vector units,
// which need no parts.
CTXFAST_INLINE bool splits_weights(const LstmSizes& sizes, int count) {
  constexpr int64_t fewest_rows = 16;
  const PackedLayout<PlainWeight<float>> layout(sizes.inputs, sizes.hidden, sizes.features,
                                                sizes.projected, false);
  return sizes.dtype == kFloat32 && sizes.batch >= fewest_rows &&
         count * layout.recurrent_bytes() > kTogetherBytes;
}

CTXFAST_NAMESPACE_END

#endif
