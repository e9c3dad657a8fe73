// Linear layers for few rows, with a LoRA adapter on chosen rows and, for the first half of a feed-forward block, the
// activation. The contract is that of the Python ops linear, gated_lora_linear, linear_silu_and_mul and silu_and_mul.
// All pointers are device pointers; all strides count elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "idlm/dtype.h"
#include "idlm/status.h"

namespace idlm {

constexpr int32_t kMaxSlices = 16;

// y = x W^T + b. TMA reads x and the weight: their addresses and row strides are multiples of 16 bytes.
struct LinearParams {
  DType dtype = DType::kBFloat16;  // of x, weight and out: bf16 or fp16
  const void* x = nullptr;         // [num_rows, k]
  int64_t x_stride = 0;
  const void* weight = nullptr;  // [n, k]
  int64_t weight_stride = 0;
  // No earlier work of the stream writes the weight: it may be read before the previous kernel has ended.
  bool weight_is_constant = false;
  const void* bias = nullptr;  // [n]; nullptr: none
  DType bias_dtype = DType::kFloat32;
  void* out = nullptr;  // [num_rows, n], or [num_rows, n / 2] with the activation
  int64_t out_stride = 0;
  int32_t num_rows = 0;
  int32_t n = 0;
  int32_t k = 0;
  bool silu_and_mul = false;  // out = silu(y[:, :n / 2]) * y[:, n / 2:] of the rounded y
};

// + scale (x A^T) B^T on rows whose lora_mask is not 0. A and B have the dtype of x, and addresses and strides like it.
struct AdapterParams {
  const void* lora_a = nullptr;  // [num_slices * rank, k]
  int64_t lora_a_stride = 0;
  const void* lora_b = nullptr;  // [n, rank]
  int64_t lora_b_stride = 0;
  const void* lora_mask = nullptr;  // [num_rows]
  bool lora_mask_is_int32 = false;  // or bytes
  float scale = 1.0f;
  int32_t rank = 0;
  int32_t num_slices = 1;
  int32_t slice_ends[kMaxSlices] = {};  // ascending; the last one is n
  void* h = nullptr;                    // scratch of h_bytes(), at a multiple of 16 bytes
  // flag_words() words, 0 before the first launch that uses them and again after every launch that ends. Launches that
  // may overlap (other streams, graphs replayed side by side) need words of their own.
  int32_t* flags = nullptr;
};

size_t h_bytes(int32_t num_rows, int32_t num_slices, int32_t rank);
size_t flag_words(int32_t num_rows);

// adapter may be null. dependent_launch: the kernel may start while the previous one of the stream drains; it reads the
// first constant weights then, and waits for that kernel's end before it touches anything that a kernel may have written.
Status linear(const LinearParams& params, const AdapterParams* adapter, cudaStream_t stream, bool dependent_launch);

// out [num_rows, width] = silu(x[:, :width]) * x[:, width:], with the bits of the activation above.
struct SiluAndMulParams {
  DType dtype = DType::kBFloat16;  // any
  const void* x = nullptr;         // [num_rows, 2 width]
  int64_t x_stride = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
  int32_t num_rows = 0;
  int32_t width = 0;
};
Status silu_and_mul(const SiluAndMulParams& params, cudaStream_t stream, bool dependent_launch);

}  // namespace idlm
