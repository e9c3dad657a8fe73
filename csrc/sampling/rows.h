// The instances of the kernel, one translation unit per logits type.
#pragma once

#include "sampling/params.h"

namespace idlm {

using RowsKernel = void (*)(KernelParams);

// storage: type of a row in shared memory, the logits' own, or fp32 with a bias.
RowsKernel rows_kernel_bf16(DType storage, bool rejection);
RowsKernel rows_kernel_fp16(DType storage, bool rejection);
RowsKernel rows_kernel_fp32(bool rejection);

}  // namespace idlm
