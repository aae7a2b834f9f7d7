// Products of the LSTM on matrix tiles, where the processor has them.
//
//   C [rows, 16 .. 64] = A [rows, depth] B,  B from the panels of lstm_weights.h
//
// Tiles multiply bfloat16. A float is the exact sum of three of them (its 24 bits in turn, by
// truncation), so that its product with a bfloat16 is three products of parts, as exact as with
// floats (Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for
// higher-precision computations", 2019). int8 is a bfloat16 as it is. Of the nine products of two
// floats' parts the six largest are summed; the others are below the rounding of a float product.
//
// Tiles take numbers below the normal range for 0. Floats are therefore lifted by a power of two
// before they are split, and sums are lowered afterwards: no normal number then loses a bit.
// Numbers from kOrdinaryBound on, infinities among them, are left to the vector units.
//
// A row's sums are added up in the order of the depth, whatever the number of rows.
#pragma once

#include "cpu/amx.h"
#include "cpu/lstm_split.h"
#include "cpu/rounded.h"

CTXFAST_NAMESPACE_BEGIN

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
      store_rounded(to + part * part_stride, top, n);
      value = value - top;
    }
  }
}

// How A, in kParts parts, is multiplied with weights W on tiles; used: where this pays. Sums are to
// be multiplied by kLower.
template <typename W, int kParts>
struct TileProduct {
  static constexpr bool kUsed = false;
};

#if defined(CTXFAST_AMX)

// Tiles of B: addresses in bytes.
struct PartTiles {
  const char* first;
  int64_t row, column, step;  // from row to row of a tile, and from tile to tile
};

// Loads a part of the rows into tile kFirst and, of two rows of tiles, the one after it.
template <int kRowTiles, int kFirst>
CTXFAST_INLINE void load_rows(const char* a, int64_t row) {
  load_matrix<kFirst>(a, row);
  if constexpr (kRowTiles == 2) load_matrix<kFirst + 1>(a + kMatrixRows * row, row);
}

// Multiplies the rows in tiles 4 and 5 with columns of tiles from kColumn on; where kLoaded, tiles
// 6 and 7 have them already.
template <int kRowTiles, int kColumns, bool kLoaded, int kColumn = 0>
CTXFAST_INLINE void multiply_columns(const char* b, const PartTiles& tiles) {
  if constexpr (!kLoaded) load_matrix<6 + kColumn % 2>(b + kColumn * tiles.column, tiles.row);
  multiply_matrix<kColumn, 4, 6 + kColumn % 2>();
  if constexpr (kRowTiles == 2) multiply_matrix<kColumns + kColumn, 5, 6 + kColumn % 2>();
  if constexpr (kColumn + 1 < kColumns)
    multiply_columns<kRowTiles, kColumns, kLoaded, kColumn + 1>(b, tiles);
}

// The same with one row of tiles, whose three parts are in tiles 4 to 6.
template <int kColumns, int kColumn = 0>
CTXFAST_INLINE void multiply_three_parts(const char* b, const PartTiles& tiles) {
  load_matrix<7>(b + kColumn * tiles.column, tiles.row);
  multiply_matrix<kColumn, 6, 7>();
  multiply_matrix<kColumn, 5, 7>();
  multiply_matrix<kColumn, 4, 7>();
  if constexpr (kColumn + 1 < kColumns) multiply_three_parts<kColumns, kColumn + 1>(b, tiles);
}

// The products of one step of the depth of rows and columns that both have three parts, small ones
// first. Parts of a tile of columns are a row of it apart.
template <int kRowTiles, int kColumns>
CTXFAST_INLINE void multiply_split(const char* a, int64_t row, int64_t part, const char* b,
                                   const PartTiles& tiles) {
  constexpr bool kStay = kColumns <= 2;  // a part of all columns fits the tiles
  const char *second = b + kMatrixBytes, *third = second + kMatrixBytes;
  load_rows<kRowTiles, 4>(a + 2 * part, row);
  multiply_columns<kRowTiles, kColumns, false>(b, tiles);
  load_rows<kRowTiles, 4>(a + part, row);
  multiply_columns<kRowTiles, kColumns, kStay>(b, tiles);
  multiply_columns<kRowTiles, kColumns, false>(second, tiles);
  load_rows<kRowTiles, 4>(a, row);
  multiply_columns<kRowTiles, kColumns, kStay>(second, tiles);
  multiply_columns<kRowTiles, kColumns, false>(third, tiles);
  multiply_columns<kRowTiles, kColumns, false>(b, tiles);
}

// The same of rows in kParts parts.
template <int kParts, int kRowTiles, int kColumns>
CTXFAST_INLINE void multiply_parts(const char* a, int64_t row, int64_t part, const char* b,
                                   const PartTiles& tiles) {
  if constexpr (kParts == 1) {
    load_rows<kRowTiles, 4>(a, row);
    multiply_columns<kRowTiles, kColumns, false>(b, tiles);
  } else if constexpr (kRowTiles == 1) {
    load_rows<1, 6>(a + 2 * part, row);
    load_rows<1, 5>(a + part, row);
    load_rows<1, 4>(a, row);
    multiply_three_parts<kColumns>(b, tiles);
  } else {
    load_rows<2, 4>(a + 2 * part, row);
    multiply_columns<2, kColumns, false>(b, tiles);
    load_rows<2, 4>(a + part, row);
    multiply_columns<2, kColumns, true>(b, tiles);
    load_rows<2, 4>(a, row);
    multiply_columns<2, kColumns, true>(b, tiles);
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

template <int kParts, bool kSplit, int kRowTiles, int kColumns>
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
    if constexpr (kSplit) {
      multiply_split<kRowTiles, kColumns>(a, row, part, b, tiles);
    } else {
      multiply_parts<kParts, kRowTiles, kColumns>(a, row, part, b, tiles);
    }
    for (int64_t line = 0; line < ahead.lines; ++line)
      __builtin_prefetch(ahead.first + line * kLineBytes, 0, 2);
    ahead.first += ahead.lines * kLineBytes;
    a += kMatrixBytes;
    b += tiles.step;
  }
  move_sums<kRowTiles, kColumns, true>(c, ldc);
}

constexpr int kTileColumnsAtOnce = 4;  // of 16 columns
constexpr int64_t kMostTiles = kDepthPiece / kMatrixDepth * kTileColumnsAtOnce;

// Tiles [steps][column] in the memory of a thread.
CTXFAST_INLINE PartTiles tiles_in(const char* space, int columns) {
  return {space, kMatrixBytes, kTileBytes, columns * kTileBytes};
}

// Words [words][..], columns next_column apart, of up to kDepthPiece of the depth, as tiles.
CTXFAST_INLINE PartTiles tiles_of(ByteWeight, const int8_t* b, int64_t ldb, int64_t next_column,
                                  int64_t words, int columns, char* space) {
  using Bits = VecOf<float>::bits;
  const PartTiles to = tiles_in(space, columns);
  for (int64_t k = 0; k < round_up(words, kMatrixDepth); k += 2)
    for (int c = 0; c < columns; ++c) {
      const int8_t* word = b + k * ldb + c * next_column;
      const Vec<float> first = k < words ? ByteWeight::widen(word) : Vec<float>{};
      const Vec<float> second = k + 1 < words ? ByteWeight::widen(word + ldb) : Vec<float>{};
      const Bits pair = ((Bits)first >> 16) | (Bits)second;
      char* step = space + k / kMatrixDepth * to.step + c * to.column;
      store(reinterpret_cast<float*>(step + k % kMatrixDepth / 2 * to.row), (Vec<float>)pair);
    }
  return to;
}
CTXFAST_INLINE PartTiles tiles_of(SplitWeight, const SplitWeight::Word* b, int64_t ldb,
                                  int64_t next_column, int64_t, int, char*) {
  constexpr int64_t bytes = sizeof(SplitWeight::Word);
  return {reinterpret_cast<const char*>(b), ldb * bytes, next_column * bytes,
          kMatrixRows * ldb * bytes};
}
// These are tiles already, but for a last one that is not whole.
template <typename W>
CTXFAST_INLINE PartTiles tiles_of(W, const uint32_t* b, int64_t ldb, int64_t next_column,
                                  int64_t words, int columns, char* space) {
  if (words % kMatrixRows == 0)
    return {reinterpret_cast<const char*>(b), ldb * 4, next_column * 4, kMatrixRows * ldb * 4};
  const PartTiles to = tiles_in(space, columns);
  for (int64_t k = 0; k < round_up(words, kMatrixRows); ++k)
    for (int c = 0; c < columns; ++c) {
      float* row = reinterpret_cast<float*>(space + k / kMatrixRows * to.step + c * to.column +
                                            k % kMatrixRows * to.row);
      const uint32_t* word = b + k * ldb + c * next_column;
      store(row, k < words ? load(reinterpret_cast<const float*>(word)) : Vec<float>{});
    }
  return to;
}

template <typename W, int kParts, int kFewest>
struct TileProductOf {
  static constexpr bool kUsed = true;
  static constexpr bool kSplit = sizeof(typename W::Word) == sizeof(SplitWeight::Word);
  static constexpr int64_t kFewestRows = kFewest;
  static constexpr int64_t kSpace = kSplit ? 0 : kMostTiles * kTileBytes;  // bytes of a thread
  static constexpr float kLower = kParts == 1 ? 1 : kSplit ? 1 / (kLift * kLift) : 1 / kLift;

  // C [rows, columns vectors] = A B, `words` words of the depth; rows are padded to whole tiles.
  // What lies at `ahead`, if anything, is asked for meanwhile.
  static CTXFAST_INLINE void multiply(PartRows a, const typename W::Word* b, int64_t ldb,
                                      int64_t next_column, int64_t words, const void* ahead,
                                      float* c, int64_t ldc, int64_t rows, int columns,
                                      char* space) {
    constexpr int64_t piece = kDepthPiece / W::kPack, word = sizeof(typename W::Word);
    for (int64_t k = 0; k < words; k += piece) {
      const PartRows from = {a.first + k * W::kPack, a.row_stride, a.part_stride};
      multiply_piece(from, b + k * ldb, ldb, next_column, words - k < piece ? words - k : piece,
                     ahead == nullptr ? nullptr : static_cast<const char*>(ahead) + k * ldb * word,
                     c, ldc, rows, columns, k == 0, space);
    }
  }

 private:
  // Of at most kDepthPiece of the depth; added to what lies there unless it begins.
  static CTXFAST_INLINE void multiply_piece(PartRows a, const typename W::Word* b, int64_t ldb,
                                            int64_t next_column, int64_t words, const void* ahead,
                                            float* c, int64_t ldc, int64_t rows, int columns,
                                            bool begins, char* space) {
    const PartTiles tiles = tiles_of(W(), b, ldb, next_column, words, columns, space);
    const int64_t steps = (words * W::kPack + kMatrixDepth - 1) / kMatrixDepth;
    // One row of tiles takes four columns at a time, two take two.
    const int64_t bytes =
        columns * kLanes<float> * kMatrixDepth / W::kPack * int64_t(sizeof(typename W::Word));
    const int64_t turns =
        rows > kMatrixRows ? (rows + 2 * kMatrixRows - 1) / (2 * kMatrixRows) * 2 : 1;
    Ahead next = {static_cast<const char*>(ahead),
                  ahead == nullptr ? 0 : (bytes / kLineBytes + turns - 1) / turns};
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
          multiply_tiles<kParts, kSplit, 1, 4>(from, part, steps, out, ldc, begins, next);
          column += 4;
        } else if (two && left >= 2) {
          multiply_tiles<kParts, kSplit, 2, 2>(from, part, steps, out, ldc, begins, next);
          column += 2;
        } else if (two) {
          multiply_tiles<kParts, kSplit, 2, 1>(from, part, steps, out, ldc, begins, next);
          column += 1;
        } else {
          multiply_tiles<kParts, kSplit, 1, 1>(from, part, steps, out, ldc, begins, next);
          column += 1;
        }
        next.first += next.lines * steps * kLineBytes;
      }
    }
  }
};

template <int kParts>
struct TileProduct<HalfWeight, kParts> : TileProductOf<HalfWeight, kParts, 16> {};
template <>
struct TileProduct<HalfPairWeight, 1> : TileProductOf<HalfPairWeight, 1, 1> {};
template <int kParts>
struct TileProduct<ByteWeight, kParts> : TileProductOf<ByteWeight, kParts, 16> {};
template <>
struct TileProduct<SplitWeight, 3> : TileProductOf<SplitWeight, 3, 1> {};

#endif

CTXFAST_NAMESPACE_END
