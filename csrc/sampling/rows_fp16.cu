#include "sampling/rows.h"

#include "sampling/kernel.cuh"

namespace idlm {

RowsKernel rows_kernel_fp16(DType storage, bool rejection) {
  using L = __half;
  return storage == DType::kFloat32 ? rows_kernel_of<L, float>(rejection) : rows_kernel_of<L, L>(rejection);
}

}  // namespace idlm
