#include "sampling/rows.h"

#include "sampling/kernel.cuh"

namespace idlm {

RowsKernel rows_kernel_fp32(bool rejection) { return rows_kernel_of<float, float>(rejection); }

}  // namespace idlm
