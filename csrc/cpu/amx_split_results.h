// What becomes of the sums of a float product on matrix tiles (amx_matrix_product.h).
#pragma once

#include "cpu/amx_pack.h"
#include "cpu/linear_finish.h"
#include "cpu/matrix_product.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// Two blocks of sums: one that is being summed, and one that becomes results a row at a time.
class SplitResults {
 public:
  // Where it is a linear layer, `finish` makes its results of complete sums. Sums are complete with
  // the last one of `pieces` of the depth.
  SplitResults(const MatrixProductArgs& args, const LinearArgs* linear, LinearFinish finish,
               int64_t pieces)
      : args_(args), linear_(linear), finish_(finish), pieces_(pieces) {}

  // Where the next block's sums go; what earlier pieces left of it is asked for from now on.
  float* next(int64_t row_block, int64_t column_block) {
    next_ = static_cast<const float*>(args_.c) + row_block * kSplitBlock * args_.columns +
            column_block * kSplitBlock;
    return sums_[current_ ^ 1];
  }
  // The sums at `next` are there, those of a piece of the depth of a block.
  void begin(int64_t row_block, int64_t column_block, int64_t piece) {
    current_ ^= 1;
    row_ = row_block * kSplitBlock;
    column_ = column_block * kSplitBlock;
    height_ = left_ = args_.rows - row_ < kSplitBlock ? args_.rows - row_ : kSplitBlock;
    width_ = args_.columns - column_ < kSplitBlock ? args_.columns - column_ : kSplitBlock;
    begins_ = piece == 0;
    ends_ = piece + 1 == pieces_;
  }
  int64_t height() const { return height_; }
  void finish() {
    while (left_ > 0) finish_row();
  }

  CTXFAST_NOINLINE void finish_row() {
    const int64_t row = height_ - left_--;
    float* c = static_cast<float*>(args_.c) + (row_ + row) * args_.columns + column_;
    float* sum = sums_[current_] + row * kSplitBlock;
    __builtin_prefetch(next_ + row * args_.columns, 1);
    __builtin_prefetch(next_ + row * args_.columns + 16, 1);
    if (!begins_) add(c, sum);
    if (begins_ && args_.bias != nullptr) add(static_cast<const float*>(args_.bias) + column_, sum);
    if (ends_ && linear_ != nullptr)
      return finish_(*linear_, sum, kSplitBlock, row_ + row, 1, column_, width_);
    store_n(c, load(sum), width_);
    store_n(c + 16, load(sum + 16), width_ - 16);
  }

 private:
  CTXFAST_INLINE void add(const float* x, float* sum) const {
    store(sum, load(sum) + load_n(x, width_));
    store(sum + 16, load(sum + 16) + load_n(x + 16, width_ - 16));
  }

  const MatrixProductArgs& args_;
  const LinearArgs* const linear_;
  const LinearFinish finish_;
  const int64_t pieces_;
  const float* next_ = nullptr;
  alignas(64) float sums_[2][kSplitBlock * kSplitBlock];
  int64_t current_ = 0, row_ = 0, column_ = 0, height_ = 0, width_ = 0, left_ = 0;
  bool begins_ = false, ends_ = false;  // with this piece of the depth
};

CTXFAST_NAMESPACE_END

#endif
