#include "sampling/rows.h"

#include "sampling/kernel.cuh"

namespace idlm {

RowsKernel rows_kernel_bf16(DType storage, bool rejection) {
  using L = __nv_bfloat16;
  return storage == DType::kFloat32 ? rows_kernel_of<L, float>(rejection) : rows_kernel_of<L, L>(rejection);
}

}  // namespace idlm
