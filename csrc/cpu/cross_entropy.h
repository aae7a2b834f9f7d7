// Arguments of the cross entropy of given logits; sizes in elements.
#pragma once

#include <cstdint>

#include "status.h"

namespace ctxfast {

// losses[r] = log(sum_j exp(logits[r][j])) - logits[r][labels[r]]
// With `gradient`, logits are replaced by (softmax(logits[r]) - one_hot(labels[r])) * scale.
struct CrossEntropyArgs {
  Dtype dtype;            // of logits
  void* logits;           // [rows, columns], contiguous
  const int64_t* labels;  // [rows], checked: each in [0, columns)
  void* losses;           // [rows]: float, double for double logits
  int64_t rows, columns;
  double scale;
  bool gradient;
  int threads;
};

}  // namespace ctxfast
