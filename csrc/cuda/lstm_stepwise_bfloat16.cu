#include "cuda/lstm_stepwise_launch.cuh"

namespace ctxfast {
namespace cuda {

int launch_stepwise_bfloat16(const Lstm& lstm, void* scratch, bool backward, void* stream) {
  return launch_stepwise<bfloat16>(lstm, scratch, backward, stream);
}

}  // namespace cuda
}  // namespace ctxfast
