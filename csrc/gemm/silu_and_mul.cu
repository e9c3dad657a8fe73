// out[t, f] = silu(x[t, f]) * x[t, F + f], one value per thread: for callers that have the projection already, with the
// bits of the activation that the projection itself computes.
#include <algorithm>

#include "common/device.cuh"
#include "common/host.h"
#include "common/scalar.cuh"
#include "gemm/activation.cuh"
#include "idlm/gemm.h"

namespace idlm {
namespace gemm {

constexpr int kActivationThreads = 256;

template <class Element>
__global__ void __launch_bounds__(kActivationThreads) silu_and_mul_kernel(const __grid_constant__ SiluAndMulParams p) {
  wait_for_previous_kernel();
  const int32_t f = static_cast<int32_t>(blockIdx.x) * kActivationThreads + static_cast<int32_t>(threadIdx.x);
  if (f >= p.width) return;
  for (int64_t t = blockIdx.y; t < p.num_rows; t += gridDim.y) {
    const auto* x = static_cast<const Element*>(p.x) + t * p.x_stride + f;
    const float y = silu_times(Scalar<Element>::up(x[0]), Scalar<Element>::up(x[p.width]));
    static_cast<Element*>(p.out)[t * p.out_stride + f] = Scalar<Element>::down(y);
  }
  let_next_kernel_start();
}

}  // namespace gemm

Status silu_and_mul(const SiluAndMulParams& p, cudaStream_t stream, bool dependent_launch) {
  if (p.num_rows == 0 || p.width == 0) return {};
  if (p.x == nullptr || p.out == nullptr || p.num_rows < 0 || p.width < 0)
    return failure(Code::kInvalidArgument, "silu_and_mul: x and out must not be null, sizes must not be negative");
  const auto kernel = p.dtype == DType::kBFloat16  ? gemm::silu_and_mul_kernel<__nv_bfloat16>
                      : p.dtype == DType::kFloat16 ? gemm::silu_and_mul_kernel<__half>
                                                   : gemm::silu_and_mul_kernel<float>;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((p.width + gemm::kActivationThreads - 1) / gemm::kActivationThreads),
                        static_cast<unsigned>(std::min(p.num_rows, 65535)));
  config.blockDim = dim3(gemm::kActivationThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent_launch ? 1 : 0;
  SiluAndMulParams copy = p;
  void* arguments[] = {&copy};
  return launch_status("silu_and_mul", cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments));
}

}  // namespace idlm
