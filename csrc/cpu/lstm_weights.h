// The weights as panels: columns in groups of vectors, all of the depth of one group
// contiguous, so that a product streams through memory and each weight is read once a step.
//
//   gates       [ceil(H / L)][depth][4][L]: i, f, g, o of L neighbouring units side by side, so
//               that they meet in registers
//   vectors     [ceil(N / L)][depth][L]: all other products; V of these vectors side by side,
//               [ceil(N / L / V)][depth][V][L], where the weights say so
//
// L is the number of lanes. Columns past the end are 0. A bfloat16 word holds two neighbours along
// the depth in 32 bits, so one load and one operation give the vector of either; an odd depth is
// padded with 0. int8 has a scale for each column behind its panel.
#pragma once

#include "cpu/lstm.h"
#include "cpu/matrix_tile.h"

CTXFAST_NAMESPACE_BEGIN

constexpr int kGates = 4;

// A policy of weights has
//   Element   what they are multiplied with is held in
//   Compute   the sums
//   Word      the panel; kPack elements of the depth, which is padded to kDepthStep of them
//   kVectors  vectors of a panel of vectors that lie side by side

// Rows of a tile with four vectors a row, as many as fit the registers.
#if defined(CTXFAST_AVX512)
constexpr int kPanelRows = 6;
#else
constexpr int kPanelRows = 3;
#endif

// Whether a tile asks for the next part of a panel while it multiplies this one. Several tiles of
// rows read a part: the first would wait for memory, the others would leave it idle. One or two
// rows follow memory anyway.
template <int kRows>
constexpr bool fetches_ahead = kRows > 2;

template <typename T>
struct PlainWeight {
  using Element = T;
  using Compute = T;
  using Word = T;
  static constexpr int kPack = 1, kDepthStep = 1, kVectors = 1;
  static constexpr bool kPlain = true, kScaled = false, kPacksInput = false;

  // sum[r][c] += sum_k a[r, k] b[k, c] over `words` words of the depth; a line of `ahead` a word.
  template <int kRows, int kColumns>
  static CTXFAST_INLINE void multiply(const T* a, int64_t lda, const Word* b, int64_t ldb,
                                      int64_t next_column, int64_t words,
                                      Vec<T> (&sum)[kRows][kColumns], const char* ahead) {
    multiply_tile<ScalarArithmetic<T>, kRows, kColumns, false, fetches_ahead<kRows>>(
        a, lda, b, ldb, next_column, words, sum, ahead);
  }
};

struct HalfWeight {
  using Element = float;
  using Compute = float;
  using Word = uint32_t;
  static constexpr int kPack = 2, kDepthStep = 2, kVectors = 1;
  static constexpr bool kPlain = false, kScaled = false, kPacksInput = true;

  template <int kRows, int kColumns>
  static CTXFAST_INLINE void multiply(const float* a, int64_t lda, const Word* b, int64_t ldb,
                                      int64_t next_column, int64_t words,
                                      Vec<float> (&sum)[kRows][kColumns], const char* ahead) {
    for (int64_t k = 0; k < words; ++k) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const Vec<float> pairs = load(reinterpret_cast<const float*>(b + c * next_column));
        const Vec<float> first = first_of_pairs(pairs), second = second_of_pairs(pairs);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sum[r][c] = a[r * lda] * first + sum[r][c];
          sum[r][c] = a[r * lda + 1] * second + sum[r][c];
        }
      }
      if constexpr (fetches_ahead<kRows>) __builtin_prefetch(ahead + k * kLineBytes, 0, 2);
      a += 2;
      b += ldb;
    }
  }
};

#if defined(CTXFAST_AVX512_BF16)
// The same panel, multiplied with bfloat16 by the instruction that takes pairs of them.
struct HalfPairWeight {
  using Element = bfloat16;
  using Compute = float;
  using Word = uint32_t;
  static constexpr int kPack = 2, kDepthStep = 2, kVectors = 1;
  static constexpr bool kPlain = false, kScaled = false, kPacksInput = true;

  template <int kRows, int kColumns>
  static CTXFAST_INLINE void multiply(const bfloat16* a, int64_t lda, const Word* b, int64_t ldb,
                                      int64_t next_column, int64_t words,
                                      Vec<float> (&sum)[kRows][kColumns], const char* ahead) {
    using Math = Arithmetic<bfloat16>;
    for (int64_t k = 0; k < words; ++k) {
      Vec<float> right[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) right[c] = Math::load_words(b + c * next_column);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        Word left;
        __builtin_memcpy(&left, a + r * lda, sizeof left);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c)
          sum[r][c] = Math::multiply_add(left, right[c], sum[r][c]);
      }
      if constexpr (fetches_ahead<kRows>) __builtin_prefetch(ahead + k * kLineBytes, 0, 2);
      a += kPack;
      b += ldb;
    }
  }
};
#endif

struct ByteWeight {
  using Element = float;
  using Compute = float;
  using Word = int8_t;
  static constexpr int kPack = 1, kDepthStep = 1, kVectors = 1;
  static constexpr bool kPlain = false, kScaled = true, kPacksInput = true;

  static CTXFAST_INLINE Vec<float> widen(const int8_t* p) {
#if defined(CTXFAST_AVX512)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(CTXFAST_AVX2)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(kLanes<float>), may_alias, aligned(1)));
    return __builtin_convertvector(*(const Bytes*)p, Vec<float>);
#endif
  }

  template <int kRows, int kColumns>
  static CTXFAST_INLINE void multiply(const float* a, int64_t lda, const Word* b, int64_t ldb,
                                      int64_t next_column, int64_t words,
                                      Vec<float> (&sum)[kRows][kColumns], const char* ahead) {
    for (int64_t k = 0; k < words; ++k) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const Vec<float> right = widen(b + c * next_column);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][c] = a[r * lda] * right + sum[r][c];
      }
      if constexpr (fetches_ahead<kRows>) __builtin_prefetch(ahead + k * kLineBytes, 0, 2);
      a += 1;
      b += ldb;
    }
  }
};

CTXFAST_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Numbers are lifted by this power of two before they are split into bfloat16 for matrix tiles.
constexpr float kLift = 0x1p24f;

// Ordinary numbers are smaller than this; sums of products of two of them are finite.
constexpr float kOrdinaryBound = 0x1p30f;

template <typename S>
CTXFAST_INLINE bool all_ordinary(const S* values, int64_t count) {
  using T = Compute<S>;
  Mask<T> all = ~Mask<T>{};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> value = load_n(values + i, count - i);
    all &= (value < T(kOrdinaryBound)) & (value > T(-kOrdinaryBound));
  }
  for (int lane = 0; lane < kLanes<T>; ++lane)
    if (all[lane] == 0) return false;
  return true;
}

enum Panel { kStatePanel, kProjectionPanel, kInputPanel, kPanels };

// A panel of vectors, `words` words of the depth.
template <typename W>
struct VectorsPanel {
  static constexpr int64_t kLanesOfWord = kLanes<typename W::Compute>;
  static constexpr int64_t kNextWord = W::kVectors * kLanesOfWord;

  const typename W::Word* first;
  int64_t words;

  const typename W::Word* at(int64_t vector, int64_t word = 0) const {
    const int64_t group = vector / W::kVectors, place = vector % W::kVectors;
    return first + (group * words + word) * kNextWord + place * kLanesOfWord;
  }
  int64_t next_vector() const { return W::kVectors == 1 ? words * kLanesOfWord : kLanesOfWord; }
};

// The units whose gates are differentiated together, on the way back: what a chunk leaves stays in
// the second cache level until it has been multiplied.
struct UnitChunks {
  int64_t size, count;

  UnitChunks(int64_t hidden, int64_t multiple) {
    const int64_t most = hidden > 512 ? 128 : 64;
    count = (hidden + most - 1) / most;
    size = round_up((hidden + count - 1) / count, multiple);
    count = (hidden + size - 1) / size;
  }
  int64_t depth() const { return kGates * size; }  // of the product with a chunk's gates
};

// Panels behind a header. Forward: gates panel of weight_hh, vectors of weight_hr^T, gates panel of
// weight_ih, which is left out of plain weights: a call reads it so few times that it arranges a
// block at a time. Backward: vectors of weight_hh (P columns; the depth is that of chunks of units
// one after the other, the gates i, f, g, o of each), vectors of weight_hr (depth P, H columns),
// nothing of weight_ih.
template <typename W>
struct PackedLayout {
  using T = typename W::Compute;
  static constexpr int64_t kChunkMultiple = 16 * W::kVectors;
  int64_t words[kPanels], columns[kPanels];  // of the depth; columns padded to whole vectors
  int64_t panel[kPanels], scales[kPanels];   // byte offsets
  int64_t bytes;
  UnitChunks chunks;

  PackedLayout(int64_t inputs, int64_t hidden, int64_t features, bool projected, bool backward)
      : chunks(hidden, kChunkMultiple) {
    const int64_t lanes = kLanes<T>, side = W::kVectors * lanes;
    const int64_t depth[kPanels] = {backward ? chunks.count * chunks.depth() : features,
                                    backward ? features : hidden, inputs};
    columns[kStatePanel] = backward ? round_up(features, side) : kGates * round_up(hidden, lanes);
    columns[kProjectionPanel] = projected ? round_up(backward ? hidden : features, side) : 0;
    columns[kInputPanel] = backward || !W::kPacksInput ? 0 : kGates * round_up(hidden, lanes);
    int64_t offset = 64;
    for (int k = 0; k < kPanels; ++k) {
      words[k] = round_up(depth[k], W::kDepthStep) / W::kPack;
      panel[k] = offset;
      offset = round_up(offset + words[k] * columns[k] * int64_t(sizeof(typename W::Word)), 64);
      scales[k] = offset;
      if (W::kScaled) offset = round_up(offset + columns[k] * int64_t(sizeof(T)), 64);
    }
    bytes = offset;
  }

  // Read again at every step of the loop.
  int64_t recurrent_bytes() const { return panel[kInputPanel]; }

  const typename W::Word* words_of(const void* packed, int k) const {
    return reinterpret_cast<const typename W::Word*>(static_cast<const char*>(packed) + panel[k]);
  }
  // From a column on, or nullptr without scales.
  const T* scales_of(const void* packed, int k, int64_t column = 0) const {
    if (!W::kScaled) return nullptr;
    return reinterpret_cast<const T*>(static_cast<const char*>(packed) + scales[k]) + column;
  }
  VectorsPanel<W> vectors_of(const void* packed, int k) const {
    return {words_of(packed, k), words[k]};
  }
};

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Calls body(Count<rows>, first, tile) for tiles of at most kPanelRows rows that cover `rows` rows
// and are as equal as possible.
template <typename Body>
CTXFAST_INLINE void for_row_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + kPanelRows - 1) / kPanelRows;
  int64_t first = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int step = int((rows - first + tiles - tile - 1) / (tiles - tile));
    switch (step) {
      case 1:
        body(Count<1>(), first, tile);
        break;
      case 2:
        body(Count<2>(), first, tile);
        break;
      case 3:
        body(Count<3>(), first, tile);
        break;
#if defined(CTXFAST_AVX512)
      case 4:
        body(Count<4>(), first, tile);
        break;
      case 5:
        body(Count<5>(), first, tile);
        break;
      case 6:
        body(Count<6>(), first, tile);
        break;
#endif
    }
    first += step;
  }
}

// sum[r][c] += sum_k a[r, k] b[k, c]. The order of the additions depends on the depth alone.
template <typename W, int kRows, int kColumns>
CTXFAST_INLINE void multiply_in_pieces(const typename W::Element* a, int64_t lda,
                                       const typename W::Word* b, int64_t ldb, int64_t next_column,
                                       int64_t words,
                                       Vec<typename W::Compute> (&sum)[kRows][kColumns],
                                       const void* ahead) {
  constexpr int64_t piece = kSumPiece / W::kPack;
  for (int64_t k = 0; k < words; k += piece) {
    Vec<typename W::Compute> part[kRows][kColumns];
    clear_tile<typename W::Compute>(part);
    W::template multiply<kRows, kColumns>(a + k * W::kPack, lda, b + k * ldb, ldb, next_column,
                                          words - k < piece ? words - k : piece, part,
                                          static_cast<const char*>(ahead) + k * kLineBytes);
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kColumns; ++c) sum[r][c] += part[r][c];
  }
}

// Elements along the depth of a vectors panel that are multiplied before the next rows: what stays
// in the first two cache levels.
constexpr int64_t kDepthPiece = 512;

// C [rows, `columns` vectors] = A [rows, depth] B, or += unless it begins; columns 4 or 1. Words of
// the depth of B are ldb apart, its vectors next_column. A tile of rows asks for a vector of what
// is read next, those being next_ahead apart.
template <typename W>
CTXFAST_INLINE void multiply_depth(const typename W::Element* a, int64_t lda,
                                   const typename W::Word* b, int64_t ldb, int64_t next_column,
                                   int64_t words, const typename W::Word* ahead, int64_t next_ahead,
                                   typename W::Compute* c, int64_t ldc, int64_t rows, int columns,
                                   bool begins) {
  using T = typename W::Compute;
  const int64_t lanes = kLanes<T>;
  for_row_tiles(rows, [&](auto count, int64_t row, int64_t tile) {
    constexpr int kRows = decltype(count)::value;
    const auto run = [&](auto width) {
      constexpr int kColumns = decltype(width)::value;
      Vec<T> sum[kRows][kColumns];
      T* out = c + row * ldc;
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kColumns; ++v)
          sum[r][v] = begins ? Vec<T>{} : load(out + r * ldc + v * lanes);
      multiply_in_pieces<W, kRows, kColumns>(a + row * lda, lda, b, ldb, next_column, words, sum,
                                             ahead + (tile < columns ? tile : 0) * next_ahead);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kColumns; ++v) store(out + r * ldc + v * lanes, sum[r][v]);
    };
    if (columns == 4) {
      run(Count<4>());
    } else {
      run(Count<1>());
    }
  });
}

// C [rows, vectors first .. last) = A [rows, `words` words] B, which begins at a word of the depth
// of a panel of vectors. C has row stride ldc and starts at vector `first`. The order of the
// additions of one element is that of the depth, whatever the rows and the split of the columns.
template <typename W>
CTXFAST_INLINE void multiply_vectors(const typename W::Element* a, int64_t lda,
                                     const VectorsPanel<W>& panel, int64_t word, int64_t words,
                                     typename W::Compute* c, int64_t ldc, int64_t rows,
                                     int64_t first, int64_t last) {
  const int64_t lanes = kLanes<typename W::Compute>, piece = kDepthPiece / W::kPack;
  for (int64_t vector = first; vector < last;) {
    const int columns = last - vector >= 4 ? 4 : 1;
    for (int64_t k = 0; k < words; k += piece) {
      const int64_t part = words - k < piece ? words - k : piece;
      const typename W::Word* next =
          k + piece < words ? panel.at(vector, word + k + piece) : panel.at(vector + columns, word);
      multiply_depth<W>(a + k * W::kPack, lda, panel.at(vector, word + k),
                        VectorsPanel<W>::kNextWord, panel.next_vector(), part, next,
                        panel.next_vector(), c + (vector - first) * lanes, ldc, rows, columns,
                        k == 0);
    }
    vector += columns;
  }
}

CTXFAST_NAMESPACE_END
