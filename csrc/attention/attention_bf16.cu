#include "attention/kernel.cuh"

namespace idlm::attention {

Kernel kernel_bf16(int32_t head_dim) { return kernel_of<__nv_bfloat16>(head_dim); }
int32_t shared_bytes(int32_t head_dim) { return bytes_of(head_dim); }

}  // namespace idlm::attention
