#include "cuda/lstm_persistent_table.cuh"

namespace ctxfast {
namespace cuda {

const PersistentKernel* persistent_kernels_bfloat16(int* count) {
  return persistent_table<bfloat16>(kLstmBfloat16, count);
}

}  // namespace cuda
}  // namespace ctxfast
