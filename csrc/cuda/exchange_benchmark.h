// Loops that time the exchange between blocks alone.
#pragma once

#include "cuda/lstm.h"

namespace ctxfast {
namespace cuda {

// Null past the last one.
const char* exchange_loop_name(int index);

// Runs `count` exchanges in one launch. counters: at least 1024 words, zero; sums: at least 2^20
// floats.
int launch_exchange_loop(int index, const Exchange& exchange, int count, void* stream);

}  // namespace cuda
}  // namespace ctxfast
