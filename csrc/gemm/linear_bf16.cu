#include "gemm/kernel.cuh"

namespace idlm::gemm {

Kernel kernel_bf16(int32_t token_tiles, bool adapter) { return kernel_of<__nv_bfloat16>(token_tiles, adapter); }

}  // namespace idlm::gemm
