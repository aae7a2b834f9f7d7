// Matrix tiles of the processor (Intel AMX): eight registers of 16 rows of 64 bytes, and products
//
//   C [16, 16] += A [16, 32] B [32, 16]   bfloat16, sums in float; numbers below the normal range
//                                         count as 0, and roundings are to nearest even
//   C [16, 16] += A [16, 64] B [64, 16]   unsigned or signed by signed bytes, sums in int32, exact
//
// A lies by rows. A row of B holds, for each of its 16 columns, the 2 (4) elements that are
// neighbours along the depth, side by side.
//
// Intrinsics do not say what memory they read and write; these functions do.
#pragma once

#include "cpu/isa.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

constexpr int kMatrixRows = 16;       // of a tile, at most
constexpr int64_t kMatrixBytes = 64;  // of a row of a tile, at most
constexpr int64_t kTileBytes = kMatrixRows * kMatrixBytes;
constexpr int64_t kMatrixDepth = 32;  // of a product of bfloat16

// Shapes of the calling thread's tiles, from construction to the end of the scope. Between scopes a
// thread has no tiles: the system then saves none, and other libraries find what they expect.
class MatrixTiles {
 public:
  // Every tile is 16 rows of 64 bytes.
  MatrixTiles() {
    for (int tile = 0; tile < 8; ++tile) shape(tile, kMatrixRows);
    load();
  }
  ~MatrixTiles() { asm volatile("tilerelease" ::: "memory"); }
  MatrixTiles(const MatrixTiles&) = delete;
  MatrixTiles& operator=(const MatrixTiles&) = delete;

  // Takes effect with `load`, which leaves zeros in all tiles.
  CTXFAST_INLINE void shape(int tile, int rows, int64_t row_bytes = kMatrixBytes) {
    config_.rows[tile] = uint8_t(rows);
    config_.row_bytes[tile] = uint16_t(row_bytes);
  }
  CTXFAST_INLINE void load() const { asm volatile("ldtilecfg %0" ::"m"(config_)); }

 private:
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config_;
};

template <int kTile>
CTXFAST_INLINE void clear_matrix() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// stride: bytes from row to row
template <int kTile>
CTXFAST_INLINE void load_matrix(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
// The same for what is read once: it does not displace the first cache level's contents.
template <int kTile>
CTXFAST_INLINE void stream_matrix(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
CTXFAST_INLINE void store_matrix(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// Two by two tiles of sums, tiles 0 to 3, as [32, 32]; stride: bytes from row to row
CTXFAST_INLINE void clear_sums() {
  clear_matrix<0>();
  clear_matrix<1>();
  clear_matrix<2>();
  clear_matrix<3>();
}
CTXFAST_INLINE void load_sums(const void* from, int64_t stride) {
  const char* upper = static_cast<const char*>(from);
  const char* lower = upper + kMatrixRows * stride;
  load_matrix<0>(upper, stride);
  load_matrix<1>(upper + kMatrixBytes, stride);
  load_matrix<2>(lower, stride);
  load_matrix<3>(lower + kMatrixBytes, stride);
}
CTXFAST_INLINE void store_sums(void* to, int64_t stride) {
  char* upper = static_cast<char*>(to);
  char* lower = upper + kMatrixRows * stride;
  store_matrix<0>(upper, stride);
  store_matrix<1>(upper + kMatrixBytes, stride);
  store_matrix<2>(lower, stride);
  store_matrix<3>(lower + kMatrixBytes, stride);
}
// kC += kA kB
template <int kC, int kA, int kB>
CTXFAST_INLINE void multiply_matrix() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
CTXFAST_INLINE void multiply_matrix8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
CTXFAST_INLINE void multiply_signed_matrix8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

CTXFAST_NAMESPACE_END

#endif
