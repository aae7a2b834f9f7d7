// Products of bytes on matrix tiles (Intel AMX), for linear_int8.cpp. A panel of the weight is 64
// columns of words of four bytes along the depth: 16 words of it are four tiles as they lie in
// memory, of 16 columns each. Rows are quantised into tiles.
#pragma once

#include "cpu/amx.h"
#include "cpu/simd.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

constexpr int64_t kByteTile = kMatrixRows * kMatrixBytes;
constexpr int64_t kByteBlockRows = 2 * kMatrixRows;
constexpr int64_t kBytePanelRow = 256;  // bytes of a word of each of the 64 columns
constexpr int64_t kByteStep = kMatrixRows * kBytePanelRow;

// A panel: `whole` steps as they lie in memory, and perhaps a last one, elsewhere, whose depth ends
// within it.
struct BytePanel {
  const char *steps, *last;
  int64_t whole;

  // space: kByteStep bytes
  CTXFAST_INLINE BytePanel(const void* panel, int64_t words, char* space)
      : steps(static_cast<const char*>(panel)), last(nullptr), whole(words / kMatrixRows) {
    const int64_t rest = words % kMatrixRows * kBytePanelRow;
    if (rest == 0) return;
    __builtin_memcpy(space, steps + whole * kByteStep, size_t(rest));
    __builtin_memset(space + rest, 0, size_t(kByteStep - rest));
    last = space;
  }
  CTXFAST_INLINE int64_t count() const { return whole + (last != nullptr); }
};

// Tiles 0 to 3 are the sums of 2 by 2 tiles, 4 and 5 of the rows, 6 and 7 of the columns.
CTXFAST_INLINE void multiply_byte_block(const char* rows, const char* columns, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    load_matrix<4>(rows, kMatrixBytes);
    load_matrix<6>(columns, kBytePanelRow);
    multiply_matrix8<0, 4, 6>();
    load_matrix<7>(columns + kMatrixBytes, kBytePanelRow);
    multiply_matrix8<1, 4, 7>();
    load_matrix<5>(rows + kByteTile, kMatrixBytes);
    multiply_matrix8<2, 5, 6>();
    multiply_matrix8<3, 5, 7>();
    rows += 2 * kByteTile;
    columns += kByteStep;
  }
}

// The sums [32, 32] of two tiles of rows and half a panel over the steps [first, last); those of
// the steps before are in `sums`.
CTXFAST_INLINE void multiply_byte_piece(const char* rows, const BytePanel& panel, int64_t half,
                                        int64_t first, int64_t last, int32_t* sums) {
  constexpr int64_t kStride = kByteBlockRows * int64_t(sizeof(int32_t));
  int32_t* below = sums + kMatrixRows * kByteBlockRows;
  if (first == 0) {
    clear_matrix<0>();
    clear_matrix<1>();
    clear_matrix<2>();
    clear_matrix<3>();
  } else {
    load_matrix<0>(sums, kStride);
    load_matrix<1>(sums + 16, kStride);
    load_matrix<2>(below, kStride);
    load_matrix<3>(below + 16, kStride);
  }
  const int64_t columns = half * 2 * kMatrixBytes;
  const int64_t whole = (last < panel.whole ? last : panel.whole) - first;
  multiply_byte_block(rows + first * 2 * kByteTile, panel.steps + first * kByteStep + columns,
                      whole);
  if (last > panel.whole)
    multiply_byte_block(rows + panel.whole * 2 * kByteTile, panel.last + columns, 1);
  store_matrix<0>(sums, kStride);
  store_matrix<1>(sums + 16, kStride);
  store_matrix<2>(below, kStride);
  store_matrix<3>(below + 16, kStride);
}

CTXFAST_INLINE void multiply_byte_row_step(const char* rows, const char* columns) {
  load_matrix<4>(rows, kMatrixBytes);
  load_matrix<5>(columns, kBytePanelRow);
  load_matrix<6>(columns + kMatrixBytes, kBytePanelRow);
  multiply_matrix8<0, 4, 5>();
  load_matrix<7>(columns + 2 * kMatrixBytes, kBytePanelRow);
  multiply_matrix8<1, 4, 6>();
  load_matrix<5>(columns + 3 * kMatrixBytes, kBytePanelRow);
  multiply_matrix8<2, 4, 7>();
  multiply_matrix8<3, 4, 5>();
}

// The sums [16, 64] of one tile of rows and a panel, which comes from memory: it is asked for
// `kAhead` steps before it is read.
CTXFAST_INLINE void multiply_byte_row(const char* rows, const BytePanel& panel, int32_t* sums) {
  constexpr int64_t kAhead = 4, kLine = 64, kStride = 64 * int64_t(sizeof(int32_t));
  clear_matrix<0>();
  clear_matrix<1>();
  clear_matrix<2>();
  clear_matrix<3>();
  for (int64_t step = 0; step < panel.whole; ++step) {
    const char* columns = panel.steps + step * kByteStep;
    for (int64_t byte = 0; byte < kByteStep; byte += kLine)
      __builtin_prefetch(columns + kAhead * kByteStep + byte, 0, 2);
    multiply_byte_row_step(rows + step * kByteTile, columns);
  }
  if (panel.last != nullptr) multiply_byte_row_step(rows + panel.whole * kByteTile, panel.last);
  store_matrix<0>(sums, kStride);
  store_matrix<1>(sums + 16, kStride);
  store_matrix<2>(sums + 32, kStride);
  store_matrix<3>(sums + 48, kStride);
}

CTXFAST_NAMESPACE_END

#endif
