// Products of bytes on matrix tiles, in blocks of four tiles of C:
//
//   kTall   32 rows by 32 columns: each tile of A and of B is used twice
//   !kTall  16 rows by 64 columns: all of a panel, for the rows that make no pair of tiles
//
// Rows lie as tiles load them, [row tile][step][16][64 bytes], a step being 64 of the depth, and a
// panel of 64 columns as [step][16][64][4 bytes]. A depth that is no multiple of 64 is padded with
// zeros on both sides.
//
// Rows are read from the first cache level again and again; a panel streams past them from the
// second, whose bandwidth limits it all. A block's sums are two strips of 16 rows by 32 columns,
// one below the other (kTall) or side by side. While the tiles multiply, the vector units are free:
// after each step the caller gets to do its share of something else, such as finishing the block
// before.
#pragma once

#include "cpu/amx.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

constexpr int64_t kStripColumns = 32;
constexpr int64_t kStripSize = kMatrixRows * kStripColumns;
constexpr int64_t kTileBytes = kMatrixRows * kMatrixBytes;         // of a tile of A
constexpr int64_t kPanelRowBytes = 4 * kMatrixBytes;               // four tiles of B side by side
constexpr int64_t kStepBytes = kMatrixRows * kPanelRowBytes;       // of a panel
constexpr int64_t kSumRowBytes = kStripColumns * sizeof(int32_t);  // of a strip

// A panel whose last step may lie elsewhere.
struct BytePanel {
  const uint8_t *whole, *last;
  int64_t steps;
  CTXFAST_INLINE const uint8_t* step(int64_t k) const {
    return k + 1 < steps ? whole + k * kStepBytes : last;
  }
};

// `words` of a panel's depth, the last incomplete step copied to `tail` and padded.
inline BytePanel byte_panel(const uint8_t* panel, int64_t words, uint8_t (&tail)[kStepBytes]) {
  const int64_t steps = (words + kMatrixRows - 1) / kMatrixRows;
  const uint8_t* last = panel + (steps - 1) * kStepBytes;
  const int64_t left = words - (steps - 1) * kMatrixRows;
  if (left == kMatrixRows) return {panel, last, steps};
  __builtin_memset(tail, 0, sizeof tail);
  __builtin_memcpy(tail, last, size_t(left * kPanelRowBytes));
  return {panel, tail, steps};
}

// sums = rows x columns from `column` (0 or 32) of the panel on; meanwhile(k) follows step k.
template <bool kTall, typename Meanwhile>
CTXFAST_INLINE void multiply_bytes(const uint8_t* rows, const BytePanel& panel, int64_t column,
                                   int32_t* sums, const Meanwhile& meanwhile) {
  clear_matrix<0>();
  clear_matrix<1>();
  clear_matrix<2>();
  clear_matrix<3>();
  for (int64_t k = 0; k < panel.steps; ++k) {
    const uint8_t* a = rows + k * kTileBytes;
    const uint8_t* b = panel.step(k) + column * 4;
    load_matrix<4>(a, kMatrixBytes);
    stream_matrix<6>(b, kPanelRowBytes);
    multiply_matrix8<0, 4, 6>();
    stream_matrix<7>(b + kMatrixBytes, kPanelRowBytes);
    multiply_matrix8<1, 4, 7>();
    if constexpr (kTall) {
      load_matrix<5>(a + panel.steps * kTileBytes, kMatrixBytes);
      multiply_matrix8<2, 5, 6>();
      multiply_matrix8<3, 5, 7>();
    } else {
      stream_matrix<5>(b + 2 * kMatrixBytes, kPanelRowBytes);
      multiply_matrix8<2, 4, 5>();
      stream_matrix<6>(b + 3 * kMatrixBytes, kPanelRowBytes);
      multiply_matrix8<3, 4, 6>();
    }
    meanwhile(k);
  }
  store_matrix<0>(sums, kSumRowBytes);
  store_matrix<1>(sums + kStripColumns / 2, kSumRowBytes);
  store_matrix<2>(sums + kStripSize, kSumRowBytes);
  store_matrix<3>(sums + kStripSize + kStripColumns / 2, kSumRowBytes);
}

CTXFAST_NAMESPACE_END

#endif
