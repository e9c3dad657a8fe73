#include "sampling/rows.h"

namespace idlm {

RowsKernel rows_kernel_fp32(bool rejection) { return rows_kernel_of<float, float>(rejection); }

}  // namespace idlm
