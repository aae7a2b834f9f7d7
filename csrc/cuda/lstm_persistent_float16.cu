#include "cuda/lstm_persistent_table.cuh"

namespace ctxfast {
namespace cuda {

const PersistentKernel* persistent_kernels_float16(int* count) {
  return persistent_table<float16>(kLstmFloat16, count);
}

}  // namespace cuda
}  // namespace ctxfast
