// What the kernel of kernel.cuh is launched with.
#pragma once

#include "idlm/attention.h"

namespace idlm::attention {

constexpr int kGroupThreads = 128;            // a warpgroup multiplies, four warps copy
constexpr int kThreads = 2 * kGroupThreads;

struct Params : AttentionParams {
  int32_t group;      // query heads of a KV head
  int32_t row_tiles;  // of a request, at most
  int32_t max_slots;  // of a request
  int32_t min_level;  // of units
  int64_t max_parts;  // of a tile, at this level
  float* gO;   // [num_rows][num_heads][max_parts][head_dim]: what units found
  float2* gMT;  // [num_rows][num_heads][max_parts]
  bool out_aligned;  // to 16 bytes
};

using Kernel = void (*)(Params);
Kernel kernel_bf16(int32_t head_dim);
Kernel kernel_fp16(int32_t head_dim);
int32_t shared_bytes(int32_t head_dim);

}  // namespace idlm::attention
