// Backward pass of layer normalisation for one row, and the sum of the parameter gradients over
// rows.
//
// With n = (x - mean) * rstd and g = weight * grad:  dx = (g - mean(g) - n * mean(g * n)) * rstd.
// Mean and rstd are computed again: the row itself must be read anyway, and it stays in the first
// cache level.
#pragma once

#include "cpu/layer_norm.h"
#include "cpu/layer_norm_row.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

// values: the summed row, replaced by its gradient; dweight, dbias: sums that the row is added to.
template <typename Storage, typename Parameter>
CTXFAST_INLINE void row_gradient(Compute<Storage>* values, const Storage* grad,
                                 const Parameter* weight, double eps, Compute<Storage>* dweight,
                                 Compute<Storage>* dbias, int64_t n) {
  using T = Compute<Storage>;
  constexpr int lanes = kLanes<T>;
  const RowStatistics<T> row = row_statistics(values, eps, n);
  const Vec<T> mean = splat<T>(row.mean), rstd = splat<T>(row.rstd);
  Vec<T> sum = {}, projection = {};
  const auto accumulate = [&](int64_t i, int64_t left) {
    const Vec<T> y = load_n(grad + i, left);
    // Past the end grad is 0, and so is what it multiplies, unless the row holds a NaN.
    Vec<T> normal = (load_n(values + i, left) - mean) * rstd;
    const Vec<T> g = weight == nullptr ? y : y * load_n(weight + i, left);
    store_n(dweight + i, load_n(dweight + i, left) + y * normal, left);
    store_n(dbias + i, load_n(dbias + i, left) + y, left);
    sum += g;
    projection += g * normal;
  };
  for (int64_t i = 0; i < n; i += lanes) accumulate(i, n - i);
  const Vec<T> mean_g = splat<T>(reduce_add(sum) / T(n));
  const Vec<T> mean_gn = splat<T>(reduce_add(projection) / T(n));
  for (int64_t i = 0; i < n; i += lanes) {
    const Vec<T> y = load_n(grad + i, n - i);
    const Vec<T> normal = (load_n(values + i, n - i) - mean) * rstd;
    const Vec<T> g = weight == nullptr ? y : y * load_n(weight + i, n - i);
    store_n(values + i, (g - mean_g - normal * mean_gn) * rstd, n - i);
  }
}

// Calls body(row, sum of weight gradients, sum of bias gradients) for every row. Rows of one of
// kRowBlocks blocks go to one thread in order; then the blocks' sums are added in order.
template <typename T, typename Body>
CTXFAST_INLINE void rows_with_parameter_sums(int threads, int64_t rows, int64_t n, void* partials,
                                             void* dweight, void* dbias, const Body& body) {
  T* sums = static_cast<T*>(partials);
  if (rows * n < 2 * kElementsPerPiece) threads = 1;
  const int64_t block_rows = (rows + kRowBlocks - 1) / kRowBlocks;
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  parallel_for(threads, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      T* own = sums + block * 2 * n;
      for (int64_t i = 0; i < 2 * n; ++i) own[i] = T(0);
      const int64_t begin = block * block_rows;
      const int64_t end = begin + block_rows < rows ? begin + block_rows : rows;
      for (int64_t row = begin; row < end; ++row) body(row, own, own + n);
    }
  });
  T* totals[2] = {static_cast<T*>(dweight), static_cast<T*>(dbias)};
  for (int64_t which = 0; which < 2; ++which)
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      Vec<T> total = load_n(sums + which * n + i, n - i);
      for (int64_t block = 1; block < blocks; ++block)
        total += load_n(sums + (2 * block + which) * n + i, n - i);
      store_n(totals[which] + i, total, n - i);
    }
}

CTXFAST_NAMESPACE_END
