// silu(gate) * up in fp32. Whoever computes it, it has these bits.
#pragma once

namespace idlm::gemm {

__device__ __forceinline__ float silu_times(float gate, float up) {
  return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, expf(-gate))), up);
}

}  // namespace idlm::gemm
