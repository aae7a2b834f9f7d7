// What a linear layer may apply to its result.
#pragma once

#include <cstdint>

namespace ctxfast {

enum Activation : int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2, kTanh = 3 };

}  // namespace ctxfast
