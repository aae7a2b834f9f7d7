// The product that every stepwise kernel is made of: 32 rows of a weight matrix with 8 or 32
// columns, sums in float.
#pragma once

#include "cuda/device.cuh"

namespace ctxfast {
namespace cuda {

// 16 bytes: columns first .. of a row, those from `count` on as zeros. Aligned: all rows begin at
// multiples of 16 bytes and `count` is a multiple of what 16 bytes hold.
template <class T, bool Aligned, bool Constant>
CTXFAST_DEVICE Words4 load_columns(const T* row, int first, int count) {
  constexpr int kElements = 16 / sizeof(T);
  union {
    Words4 words;
    T elements[kElements];
  } x;
  x.words = {0, 0, 0, 0};
  if (!row || first >= count) return x.words;
  if constexpr (Aligned) {
    const Words4* source = reinterpret_cast<const Words4*>(row + first);
    if constexpr (Constant) return read_constant(source);
    return read(source);
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (first + i >= count) continue;
    if constexpr (Constant) {
      x.elements[i] = read_constant(row + first + i);
    } else {
      x.elements[i] = read(row + first + i);
    }
  }
  return x.words;
}

CTXFAST_DEVICE float float_of(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } x = {bits};
  return x.value;
}

// Lane l ends up with rows 8 slot + l / 4 (slot 0 to 3) and columns 8 tile + l % 4 * 2 + {0, 1},
// sums[tile][slot][j]: where slots are the four gates, a lane holds all gates of its cells.
//
// The warps of a block take turns at the slices of 32 of what is summed over; the first warp adds
// up their parts in a fixed order. 16-bit types use the tensor cores, float its own
// multiplications.
template <class T, int Tiles, int Warps, bool Aligned>
struct LstmTile {
  static constexpr int kThreads = Warps * kWarpSize;
  static constexpr size_t kSharedBytes = sizeof(float) * Tiles * 8 * kThreads;

  float sums[Tiles][4][2] = {};

  // weight(row slot) and column(number) give the addresses of what is multiplied, each `count`
  // long; null counts as zeros. Ends with a barrier; then the first warp holds the result.
  template <class Weight, class Column>
  CTXFAST_DEVICE void multiply(int count, Weight weight, Column column) {
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    const T* w[4];
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) w[slot] = weight(slot);
    for (int first = warp * 32; first < count; first += Warps * 32) {
      if constexpr (sizeof(T) == 2) {
        tensor_slice(first + lane % 4 * 8, count, lane, w, column);
      } else {
        float_slice(first, count, lane, w, column);
      }
    }
    float* shared = reinterpret_cast<float*>(shared_memory());
    each([&](int tile, int slot, int j) {
      write(shared + ((tile * 4 + slot) * 2 + j) * kThreads + thread_index(), sums[tile][slot][j]);
    });
    block_barrier();
    if (warp != 0) return;
    each([&](int tile, int slot, int j) {
      float& sum = sums[tile][slot][j];
      for (int other = 1; other < Warps; ++other) {
        sum += read(shared + ((tile * 4 + slot) * 2 + j) * kThreads + other * kWarpSize + lane);
      }
    });
  }

 private:
  template <class Visit>
  CTXFAST_DEVICE void each(Visit visit) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) {
#pragma unroll
        for (int j = 0; j < 2; ++j) visit(tile, slot, j);
      }
    }
  }

  template <class Column>
  CTXFAST_DEVICE void tensor_slice(int first, int count, int lane, const T* (&w)[4],
                                   Column column) {
    Words4 a[4];
#pragma unroll
    for (int slot = 0; slot < 4; ++slot)
      a[slot] = load_columns<T, Aligned, true>(w[slot], first, count);
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const Words4 x = load_columns<T, Aligned, false>(column(tile * 8 + lane / 4), first, count);
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2) {
        float (&c)[4] = reinterpret_cast<float (&)[4]>(sums[tile][pair]);
        mma<T>(c, a[pair].x, a[pair + 1].x, a[pair].y, a[pair + 1].y, x.x, x.y);
        mma<T>(c, a[pair].z, a[pair + 1].z, a[pair].w, a[pair + 1].w, x.z, x.w);
      }
    }
  }

  template <class Column>
  CTXFAST_DEVICE void float_slice(int first, int count, int lane, const T* (&w)[4], Column column) {
#pragma unroll 1
    for (int k = first; k < first + 32; k += 4) {
      Words4 a[4];
#pragma unroll
      for (int slot = 0; slot < 4; ++slot)
        a[slot] = load_columns<T, Aligned, true>(w[slot], k, count);
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const T* source = column(tile * 8 + lane % 4 * 2 + j);
          const Words4 x = load_columns<T, Aligned, false>(source, k, count);
#pragma unroll
          for (int slot = 0; slot < 4; ++slot) {
            float& sum = sums[tile][slot][j];
            sum += float_of(a[slot].x) * float_of(x.x);
            sum += float_of(a[slot].y) * float_of(x.y);
            sum += float_of(a[slot].z) * float_of(x.z);
            sum += float_of(a[slot].w) * float_of(x.w);
          }
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace ctxfast
