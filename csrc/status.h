// What every operator of csrc returns: an error code and the facts that a message needs.
#pragma once

#include <cstdint>

namespace ctxfast {

enum StatusCode : int32_t {
  kOk = 0,
  kOutOfMemory = 1,
  kUnsupportedDtype = 2,
  kIndexOutOfRange = 3,  // argument: which of the operator's index arguments; value: the bad index
  kNotMonotone =
      4,  // argument: which of the offset arguments; value: the position of the bad offset
};

struct Status {
  int32_t code = kOk;
  int32_t argument = 0;
  int64_t value = 0;
};

enum Dtype : int32_t { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2 };

}  // namespace ctxfast
