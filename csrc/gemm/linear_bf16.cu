#include "gemm/kernel.cuh"

namespace idlm::gemm {

Kernel kernel_bf16(const Tile& tile) { return kernel_of<__nv_bfloat16>(tile); }

}  // namespace idlm::gemm
