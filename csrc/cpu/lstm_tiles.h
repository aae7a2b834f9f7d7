// Products of the LSTM on matrix tiles, where the processor has them.
//
//   C [rows, 16 .. 64] = A [rows, depth] B,  B from the panels of lstm_weights.h
//
// Tiles multiply bfloat16. A float is the exact sum of three of them (its 24 bits in turn, by
// truncation), so that a product of floats is a few products of parts, as exact as with floats
// (Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for
// higher-precision computations", 2019). int8 is a bfloat16 as it is.
//
// Tiles take numbers below the normal range for 0. Floats are therefore lifted by a power of two
// before they are split, and sums are lowered afterwards: no normal number then loses a bit.
// Numbers from kOrdinaryBound on, infinities among them, are left to the vector units.
//
// A row's sums are added up in the order of the depth, whatever the number of rows.
#pragma once

#include "cpu/amx.h"
#include "cpu/lstm_weights.h"

CTXFAST_NAMESPACE_BEGIN

constexpr float kLift = 0x1p24f;

// The rows of A: of each part [rows padded to whole tiles][row_stride], with zeros behind the depth
// up to a whole product.
struct PartRows {
  const bfloat16* first;
  int64_t row_stride, part_stride;
};

// Writes the parts of the first n lanes of a lifted vector; one part is the number itself.
template <int kParts>
CTXFAST_INLINE void store_parts(Vec<float> value, bfloat16* to, int64_t part_stride, int64_t n) {
  if constexpr (kParts == 1) {
    store_n(to, value, n);
  } else {
    using Bits = VecOf<float>::bits;
    value = value * kLift;
    for (int part = 0; part < kParts; ++part) {
      const Vec<float> top = (Vec<float>)((Bits)value & 0xffff0000u);
      store_n(to + part * part_stride, top, n);
      value = value - top;
    }
  }
}

// How A, in kParts parts, is multiplied with weights W on tiles; used: where this pays.
template <typename W, int kParts>
struct TileProduct {
  static constexpr bool kUsed = false;
};

#if defined(CTXFAST_AMX)

// Tiles of B: addresses in bytes.
struct PartTiles {
  const char* first;
  int64_t row, column, part, step;  // from row to row of a tile, and from tile to tile
};

template <int kParts, int kRowTiles>
struct TileRows {
  // Tiles 4 and 5.
  template <int kPart>
  static CTXFAST_INLINE void load(const char* a, int64_t row, int64_t part) {
    load_matrix<4>(a + kPart * part, row);
    if constexpr (kRowTiles == 2) load_matrix<5>(a + kPart * part + kMatrixRows * row, row);
  }
};

// Multiplies the loaded rows with a part of one column of tiles and those behind it. Two columns
// stay in tiles 6 and 7.
template <int kRowTiles, int kColumns, bool kLoaded, int kColumn = 0>
CTXFAST_INLINE void multiply_columns(const char* b, const PartTiles& tiles) {
  if constexpr (!kLoaded) load_matrix<6 + kColumn % 2>(b + kColumn * tiles.column, tiles.row);
  multiply_matrix<kColumn, 4, 6 + kColumn % 2>();
  if constexpr (kRowTiles == 2) multiply_matrix<kColumns + kColumn, 5, 6 + kColumn % 2>();
  if constexpr (kColumn + 1 < kColumns)
    multiply_columns<kRowTiles, kColumns, kLoaded, kColumn + 1>(b, tiles);
}

// The products of one step of the depth, small ones first.
template <int kA, int kB, int kRowTiles, int kColumns>
CTXFAST_INLINE void multiply_parts(const char* a, int64_t row, int64_t part, const char* b,
                                   const PartTiles& tiles) {
  using Rows = TileRows<kA, kRowTiles>;
  constexpr bool kStays = kColumns <= 2;
  const char *second = b + tiles.part, *third = second + tiles.part;
  if constexpr (kA == 1) {
    Rows::template load<0>(a, row, part);
    multiply_columns<kRowTiles, kColumns, false>(b, tiles);
  } else if constexpr (kB == 1) {
    Rows::template load<2>(a, row, part);
    multiply_columns<kRowTiles, kColumns, false>(b, tiles);
    Rows::template load<1>(a, row, part);
    multiply_columns<kRowTiles, kColumns, kStays>(b, tiles);
    Rows::template load<0>(a, row, part);
    multiply_columns<kRowTiles, kColumns, kStays>(b, tiles);
  } else {
    Rows::template load<2>(a, row, part);
    multiply_columns<kRowTiles, kColumns, false>(b, tiles);
    Rows::template load<1>(a, row, part);
    multiply_columns<kRowTiles, kColumns, kStays>(b, tiles);
    multiply_columns<kRowTiles, kColumns, false>(second, tiles);
    Rows::template load<0>(a, row, part);
    multiply_columns<kRowTiles, kColumns, kStays>(second, tiles);
    multiply_columns<kRowTiles, kColumns, false>(third, tiles);
    multiply_columns<kRowTiles, kColumns, false>(b, tiles);
  }
}

template <int kRowTiles, int kColumns, bool kStore, int kTile = 0>
CTXFAST_INLINE void move_sums(float* c, int64_t ldc) {
  float* tile = c + (kTile / kColumns * ldc + kTile % kColumns) * kMatrixRows;
  if constexpr (kStore) {
    store_matrix<kTile>(tile, ldc * int64_t(sizeof(float)));
  } else {
    load_matrix<kTile>(tile, ldc * int64_t(sizeof(float)));
  }
  if constexpr (kTile + 1 < kRowTiles * kColumns)
    move_sums<kRowTiles, kColumns, kStore, kTile + 1>(c, ldc);
}

// What is read next, for the second cache level: `lines` lines with every step.
struct Ahead {
  const char* first;
  int64_t lines;
};

template <int kA, int kB, int kRowTiles, int kColumns>
CTXFAST_NOINLINE void multiply_tiles(PartRows rows, PartTiles tiles, int64_t steps, float* c,
                                     int64_t ldc, bool begins, Ahead ahead) {
  const char *a = reinterpret_cast<const char*>(rows.first), *b = tiles.first;
  const int64_t row = rows.row_stride * int64_t(sizeof(bfloat16)),
                part = rows.part_stride * int64_t(sizeof(bfloat16));
  if (begins) {
    clear_matrix<0>();
    clear_matrix<1>();
    clear_matrix<2>();
    clear_matrix<3>();
  } else {
    move_sums<kRowTiles, kColumns, false>(c, ldc);
  }
  for (int64_t k = 0; k < steps; ++k) {
    multiply_parts<kA, kB, kRowTiles, kColumns>(a, row, part, b, tiles);
    for (int64_t line = 0; line < ahead.lines; ++line)
      __builtin_prefetch(ahead.first + line * kLineBytes, 0, 2);
    ahead.first += ahead.lines * kLineBytes;
    a += kMatrixBytes;
    b += tiles.step;
  }
  move_sums<kRowTiles, kColumns, true>(c, ldc);
}

constexpr int64_t kTileBytes = kMatrixRows * kMatrixBytes;
constexpr int kTileColumnsAtOnce = 4;  // of 16 columns
constexpr int64_t kMostTiles = kDepthPiece / kMatrixDepth * kTileColumnsAtOnce;

// Two neighbours along the depth as a word of a tile, each the upper half of a float.
CTXFAST_INLINE void store_pair(Vec<float> first, Vec<float> second, char* to) {
  using Bits = VecOf<float>::bits;
  const Bits pair = ((Bits)first >> 16) | ((Bits)second & 0xffff0000u);
  store(reinterpret_cast<float*>(to), (Vec<float>)pair);
}

// How words become tiles [steps][part][column] in the memory of a thread, a pair of words of the
// depth at a time.
template <int kParts>
struct ArrangedTiles {
  static PartTiles tiles(const char* space, int columns) {
    return {space, kMatrixBytes, kTileBytes, columns * kTileBytes, kParts * columns * kTileBytes};
  }
  static CTXFAST_INLINE void split(Vec<float> first, Vec<float> second, char* to, int64_t part) {
    using Bits = VecOf<float>::bits;
    for (int p = 0; p < kParts; ++p) {
      store_pair(first, second, to + p * part);
      first = first - (Vec<float>)((Bits)first & 0xffff0000u);
      second = second - (Vec<float>)((Bits)second & 0xffff0000u);
    }
  }
  // value(column, k): a vector of B, of zeros behind the depth.
  template <typename Value>
  static CTXFAST_INLINE PartTiles arrange(int64_t depth, int columns, char* space,
                                          const Value& value) {
    const PartTiles to = tiles(space, columns);
    for (int64_t k = 0; k < depth; k += kMatrixDepth) {
      char* step = space + k / kMatrixDepth * to.step;
      for (int64_t i = 0; i < kMatrixDepth; i += 2)
        for (int c = 0; c < columns; ++c) {
          const Vec<float> first = k + i < depth ? value(c, k + i) : Vec<float>{};
          const Vec<float> second = k + i + 1 < depth ? value(c, k + i + 1) : Vec<float>{};
          split(first, second, step + c * to.column + i / 2 * to.row, to.part);
        }
    }
    return to;
  }
};

// Words [words][..], next_column apart, of up to kDepthPiece of the depth, as tiles.
CTXFAST_INLINE PartTiles tiles_of(PlainWeight<float>, const float* b, int64_t ldb,
                                  int64_t next_column, int64_t words, int columns, char* space) {
  return ArrangedTiles<3>::arrange(words, columns, space, [&](int c, int64_t k) {
    return load(b + k * ldb + c * next_column) * kLift;
  });
}
CTXFAST_INLINE PartTiles tiles_of(ByteWeight, const int8_t* b, int64_t ldb, int64_t next_column,
                                  int64_t words, int columns, char* space) {
  return ArrangedTiles<1>::arrange(words, columns, space, [&](int c, int64_t k) {
    return ByteWeight::widen(b + k * ldb + c * next_column);
  });
}
// These are tiles already, but for a last one that is not whole.
template <typename W>
CTXFAST_INLINE PartTiles tiles_of(W, const uint32_t* b, int64_t ldb, int64_t next_column,
                                  int64_t words, int columns, char* space) {
  if (words % kMatrixRows == 0)
    return {reinterpret_cast<const char*>(b), ldb * 4, next_column * 4, 0, kMatrixRows * ldb * 4};
  const PartTiles to = ArrangedTiles<1>::tiles(space, columns);
  for (int64_t k = 0; k < round_up(words, kMatrixRows); ++k)
    for (int c = 0; c < columns; ++c) {
      float* row = reinterpret_cast<float*>(space + k / kMatrixRows * to.step + c * to.column +
                                            k % kMatrixRows * to.row);
      const uint32_t* word = b + k * ldb + c * next_column;
      store(row, k < words ? load(reinterpret_cast<const float*>(word)) : Vec<float>{});
    }
  return to;
}

template <typename W, int kA, int kB, bool kIsLifted, int kFewest>
struct TileProductOf {
  static constexpr bool kUsed = true;
  static constexpr int64_t kFewestRows = kFewest;
  static constexpr int64_t kSpace = kB * kMostTiles * kTileBytes;  // bytes of a thread
  static constexpr float kLower = (kA == 3 ? 1 / kLift : 1) * (kIsLifted ? 1 / kLift : 1);

  // C [rows, columns vectors] = A B, or += unless it begins, without kLower; rows are padded to
  // whole tiles, and the depth is at most kDepthPiece.
  static CTXFAST_INLINE void multiply(PartRows a, const typename W::Word* b, int64_t ldb,
                                      int64_t next_column, int64_t words, const void* ahead,
                                      float* c, int64_t ldc, int64_t rows, int columns, bool begins,
                                      char* space) {
    const PartTiles tiles = tiles_of(W(), b, ldb, next_column, words, columns, space);
    const int64_t steps = (words * W::kPack + kMatrixDepth - 1) / kMatrixDepth;
    // One row of tiles takes four columns at a time, two take two.
    const int64_t bytes =
        columns * kLanes<float> * kMatrixDepth / W::kPack * int64_t(sizeof(typename W::Word));
    const int64_t turns =
        rows > kMatrixRows ? (rows + 2 * kMatrixRows - 1) / (2 * kMatrixRows) * 2 : 1;
    Ahead next = {static_cast<const char*>(ahead), (bytes / kLineBytes + turns - 1) / turns};
    for (int64_t row = 0; row < rows; row += 2 * kMatrixRows) {
      const PartRows from = {a.first + row * a.row_stride, a.row_stride, a.part_stride};
      float* to = c + row * ldc;
      const bool two = rows - row > kMatrixRows;
      for (int column = 0; column < columns;) {
        PartTiles part = tiles;
        part.first += column * tiles.column;
        float* out = to + column * kMatrixRows;
        const int left = columns - column;
        if (!two && left == 4) {
          multiply_tiles<kA, kB, 1, 4>(from, part, steps, out, ldc, begins, next);
          column += 4;
        } else if (two && left >= 2) {
          multiply_tiles<kA, kB, 2, 2>(from, part, steps, out, ldc, begins, next);
          column += 2;
        } else if (two) {
          multiply_tiles<kA, kB, 2, 1>(from, part, steps, out, ldc, begins, next);
          column += 1;
        } else {
          multiply_tiles<kA, kB, 1, 1>(from, part, steps, out, ldc, begins, next);
          column += 1;
        }
        next.first += next.lines * steps * kLineBytes;
      }
    }
  }
};

template <>
struct TileProduct<PlainWeight<float>, 3> : TileProductOf<PlainWeight<float>, 3, 3, true, 16> {};
template <int kParts>
struct TileProduct<HalfWeight, kParts> : TileProductOf<HalfWeight, kParts, 1, false, 1> {};
template <>
struct TileProduct<HalfPairWeight, 1> : TileProductOf<HalfPairWeight, 1, 1, false, 1> {};
template <int kParts>
struct TileProduct<ByteWeight, kParts> : TileProductOf<ByteWeight, kParts, 1, false, 1> {};

#endif

CTXFAST_NAMESPACE_END
