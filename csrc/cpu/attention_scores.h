// What happens to a row of scores between the two products: bias, masks, window, softmax weights,
// dropout.
//
// Scores are kept in base 2: with f = scale * log2(e), the weight of key j is 2^(f s_j - max), so
// that the factor joins the exponent's subtraction in one fused multiply-add (Dao et al. 2022, with
// the online softmax of Milakov and Gimelshein 2018 across blocks of keys).
#pragma once

#include "attention_plan.h"
#include "cpu/attention_tiles.h"
#include "cpu/philox.h"
#include "cpu/simd_math.h"

CTXFAST_NAMESPACE_BEGIN

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

// What weights that dropout keeps are multiplied with.
template <typename T>
CTXFAST_INLINE T kept_factor(uint32_t threshold) {
  return threshold >= 65536 ? T(0) : T(65536) / T(65536 - threshold);
}

// Keys [begin, end) that row i may attend, but for holes of masks. Neither bound falls from row to
// row.
struct KeyRange {
  int64_t begin, end;
};
CTXFAST_INLINE KeyRange key_range(const AttentionArgs& args, const AttentionSequence& sequence,
                                  int64_t i) {
  KeyRange range = {sequence.key_begin, sequence.key_end};
  if (args.window_left >= 0)
    range.begin = smaller(greater(range.begin, i - args.window_left), range.end);
  if (args.window_right >= 0)
    range.end = greater(smaller(range.end, i + args.window_right + 1), range.begin);
  return range;
}

// Masks and bias of one (sequence, head), to be read at (row, key).
struct ScoreTerms {
  const uint8_t* attn_mask = nullptr;
  const uint8_t* key_mask = nullptr;
  const char* bias = nullptr;
  int64_t attn_mask_row, attn_mask_key, key_mask_key, bias_row, bias_key;
  Dtype bias_dtype;
  bool any;  // some of them, or a factor that does not keep the order of the scores

  ScoreTerms(const AttentionArgs& args, int64_t sequence, int64_t head, bool holes) {
    attn_mask_row = args.attn_mask_stride[2], attn_mask_key = args.attn_mask_stride[3];
    key_mask_key = args.key_padding_mask_stride[1];
    bias_row = args.bias_stride[2], bias_key = args.bias_stride[3];
    bias_dtype = args.bias_dtype;
    if (args.attn_mask != nullptr)
      attn_mask =
          args.attn_mask + sequence * args.attn_mask_stride[0] + head * args.attn_mask_stride[1];
    if (holes) key_mask = args.key_padding_mask + sequence * args.key_padding_mask_stride[0];
    const int64_t size = bias_dtype == kFloat64 ? 8 : bias_dtype == kFloat32 ? 4 : 2;
    if (args.bias != nullptr)
      bias = static_cast<const char*>(args.bias) +
             (sequence * args.bias_stride[0] + head * args.bias_stride[1]) * size;
    any = attn_mask != nullptr || key_mask != nullptr || bias != nullptr || !(args.scale > 0);
  }

  // Of the block of keys that starts at `origin`, those from `first` on that the key mask shows.
  RowFilter key_filter(int64_t origin, int64_t first) const {
    return {first - origin, key_mask == nullptr ? nullptr : key_mask + origin * key_mask_key,
            key_mask_key};
  }
};

// kLanes values from p on, or the one at p where the step is 0; at most n are read.
template <typename P>
CTXFAST_INLINE Vec<Compute<P>> load_terms(const P* p, int64_t step, int64_t n) {
  if (step == 0) return splat<Compute<P>>(to_compute(*p));
  return load_n(p, n);
}

template <typename T>
CTXFAST_INLINE Mask<T> load_flags(const uint8_t* p, int64_t step, int64_t n) {
  constexpr int kCount = kLanes<T>;
  typedef uint8_t Bytes __attribute__((vector_size(kCount)));
  Bytes bytes = {};
  if (step == 0) {
    bytes = bytes + *p;
  } else if (n >= kCount) {
    __builtin_memcpy(&bytes, p, kCount);
  } else {
    uint8_t few[kCount] = {};
    for (int64_t i = 0; i < n; ++i) few[i] = p[i];
    __builtin_memcpy(&bytes, few, kCount);
  }
  return __builtin_convertvector(bytes, typename VecOf<T>::mask) != 0;
}

template <typename T>
CTXFAST_INLINE Vec<T> load_bias(const ScoreTerms& terms, int64_t i, int64_t j, int64_t n) {
  const int64_t offset = i * terms.bias_row + j * terms.bias_key;
  if constexpr (sizeof(T) == 8) {
    if (terms.bias_dtype == kFloat64)
      return load_terms(reinterpret_cast<const double*>(terms.bias) + offset, terms.bias_key, n);
    return Vec<T>{};
  } else {
    if (terms.bias_dtype == kFloat32)
      return load_terms(reinterpret_cast<const float*>(terms.bias) + offset, terms.bias_key, n);
    return load_terms(reinterpret_cast<const bfloat16*>(terms.bias) + offset, terms.bias_key, n);
  }
}

// A bias near the lowest finite number, with which masks are often written, must stay finite: a row
// of nothing else attends every key alike, as it does in natural units; only -inf shuts a key out.
template <typename T>
CTXFAST_INLINE Vec<T> in_base_2(Vec<T> bias) {
  const Vec<T> floor = splat<T>(sizeof(T) == 8 ? T(-__DBL_MAX__ / 2) : T(-__FLT_MAX__ / 2));
  const Vec<T> minus_infinity = splat<T>(-T(__builtin_huge_val()));
  return ((bias < floor) & (bias > minus_infinity) ? floor : bias) * T(kLog2E);
}

// scores[j - origin] for j in [begin, end): times factor, plus bias in base 2, -inf where masked.
// `begin` and `end` are whole vectors from the origin; keys from `limit` on do not exist.
template <typename T>
CTXFAST_NOINLINE void apply_terms(const ScoreTerms& terms, int64_t i, T factor, int64_t origin,
                                  int64_t begin, int64_t end, int64_t limit, T* scores) {
  const Vec<T> minus_infinity = splat<T>(-T(__builtin_huge_val()));
  for (int64_t j = begin; j < end; j += kLanes<T>) {
    const int64_t n = limit - j;
    Vec<T> s = load(scores + (j - origin)) * factor;
    if (terms.bias != nullptr) s = s + in_base_2<T>(load_bias<T>(terms, i, j, n));
    if (terms.attn_mask != nullptr) {
      const uint8_t* row = terms.attn_mask + i * terms.attn_mask_row;
      s = load_flags<T>(row + j * terms.attn_mask_key, terms.attn_mask_key, n) ? s : minus_infinity;
    }
    if (terms.key_mask != nullptr)
      s = load_flags<T>(terms.key_mask + j * terms.key_mask_key, terms.key_mask_key, n)
              ? s
              : minus_infinity;
    store(scores + (j - origin), s);
  }
}

// Writes `value` into scores[0, columns) outside [first, last); whole vectors, columns is a
// multiple of kLanes.
template <typename T>
CTXFAST_INLINE void fill_outside(T* scores, int64_t first, int64_t last, int64_t columns, T value) {
  const Vec<T> fill = splat<T>(value);
  if (first > columns) first = columns;
  for (int64_t j = 0; j < first; j += kLanes<T>) store_n(scores + j, fill, first - j);
  if (last < first) last = first;
  if (last < 0) last = 0;
  if (last >= columns) return;
  const int64_t whole = last / kLanes<T> * kLanes<T>;
  const Vec<T> edge = first_lanes<T>(last - whole) ? load(scores + whole) : fill;
  store(scores + whole, edge);
  for (int64_t j = whole + kLanes<T>; j < columns; j += kLanes<T>) store(scores + j, fill);
}

// A row of weights, in the words that multiply_tile broadcasts, written over the scores it comes
// from.
template <typename Storage>
CTXFAST_INLINE void store_weights(Compute<Storage>* row, int64_t j, Vec<Compute<Storage>> weights) {
  if constexpr (Arithmetic<Storage>::kPack == 1) {
    store(row + j, weights);
  } else {
#if defined(CTXFAST_AVX512_BF16)
    const HalfBits bits = (HalfBits)_mm512_cvtneps_pbh(weights);
    *(UnalignedHalfBits*)(reinterpret_cast<uint16_t*>(row) + j) = bits;
#endif
  }
}

// Zeros from the end of a row of weights, whole vectors, to the end of a step of their depth.
template <typename Storage>
CTXFAST_INLINE void end_weights(Compute<Storage>* row, int64_t columns) {
  constexpr int kCount = kLanes<Compute<Storage>>;
  if constexpr (kMatrix<Storage>)
    if (columns % kDepthStep<Storage>)
      __builtin_memset(reinterpret_cast<Storage*>(row) + columns, 0, kCount * sizeof(Storage));
}

template <typename T>
CTXFAST_INLINE T row_maximum(const T* scores, int64_t columns) {
  constexpr int kCount = kLanes<T>;
  const Vec<T> lowest = splat<T>(-T(__builtin_huge_val()));
  Vec<T> m0 = lowest, m1 = lowest;
  int64_t j = 0;
  for (; j + 2 * kCount <= columns; j += 2 * kCount) {
    m0 = vmax(m0, load(scores + j));
    m1 = vmax(m1, load(scores + j + kCount));
  }
  if (j < columns) m0 = vmax(m0, load(scores + j));
  return reduce_max(vmax(m0, m1));
}

struct DropoutRow {
  uint64_t seed;
  uint32_t threshold;  // 0: none
  int64_t head, sequence;
};

#if defined(CTXFAST_AMX)
// 2^x for x <= 0 (or NaN) by a polynomial that is 2^r on [0, 1]. The scaling instruction takes the
// integer below x by itself.
template <int kCount>
CTXFAST_INLINE Vec<float> exp2_by_scaling(const float (&coefficients)[kCount], Vec<float> x) {
  const Vec<float> r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial<float>(coefficients, r), x);
}
#endif

// 2^x for x <= 0 (or NaN), to be stored as Storage.
template <typename Storage, typename V = Vec<Compute<Storage>>>
CTXFAST_INLINE V weight_of(V x) {
#if defined(CTXFAST_AMX)
  if constexpr (kMatrix<Storage>) {
    // Minimax for the relative error with p(0) = 1 (Remez exchange).
    constexpr float kCoefficients[] = {1.0f, 0.6930448413f, 0.2412801981f, 0.05224247277f,
                                       0.01342668384f};
    return exp2_by_scaling(kCoefficients, x);
  }
#endif
  return exp2_nonpositive<sizeof(Storage) == 2>(x);
}

// Turns scores[0, columns) of row i, keys from `origin` on, into weights 2^(factor s - maximum) and
// returns their sum; dropped weights are 0 but count in the sum.
template <typename Storage, typename T = Compute<Storage>>
CTXFAST_INLINE T weigh(T* scores, int64_t columns, T factor, T maximum, const DropoutRow& dropout,
                       int64_t i, int64_t origin) {
  Vec<T> sum = {};
  if (dropout.threshold == 0) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const Vec<T> weight = weight_of<Storage>(load(scores + j) * factor - maximum);
      sum += weight;
      store_weights<Storage>(scores, j, weight);
    }
    return reduce_add(sum);
  }
  uint64_t kept = 0;
  int64_t block = -1;
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const Vec<T> weight = weight_of<Storage>(load(scores + j) * factor - maximum);
    sum += weight;
    const int64_t key = origin + j;
    if (key / 64 != block) {
      block = key / 64;
      kept =
          kept_columns(dropout.seed, dropout.threshold, block, i, dropout.head, dropout.sequence);
    }
    store_weights<Storage>(scores, j, keep_lanes(weight, kept >> (key % 64)));
  }
  return reduce_add(sum);
}

CTXFAST_NAMESPACE_END
