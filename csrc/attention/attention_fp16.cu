#include "attention/kernel.cuh"

namespace idlm::attention {

Kernel kernel_fp16(int32_t head_dim) { return kernel_of<__half>(head_dim); }

}  // namespace idlm::attention
