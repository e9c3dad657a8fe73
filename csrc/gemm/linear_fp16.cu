#include "gemm/kernel.cuh"

namespace idlm::gemm {

Kernel kernel_fp16(const Tile& tile) { return kernel_of<__half>(tile); }

}  // namespace idlm::gemm
