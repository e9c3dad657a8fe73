#include "gemm/kernel.cuh"

namespace idlm::gemm {

Kernel kernel_fp16(int32_t token_tiles, bool adapter) { return kernel_of<__half>(token_tiles, adapter); }

}  // namespace idlm::gemm
