// What the kernel of kernel.cuh is launched with.
#pragma once

#include <cuda.h>

#include "gemm/heuristics.h"
#include "idlm/gemm.h"

namespace idlm::gemm {

struct Params {
  // Tensors [planes, rows, columns] as TMA sees them.
  CUtensorMap x;       // [1, num_rows, k]
  CUtensorMap weight;  // [1, n, k]
  CUtensorMap lora_a;  // [slices, rank, k]
  CUtensorMap lora_b;  // [1, n, rank]
  CUtensorMap h;       // [slices, num_rows, rank]

  int32_t num_rows, n;
  int32_t blocks;        // of K
  int32_t tiles;         // of weight rows, as CTAs take them
  int32_t groups;        // of tokens
  int32_t splits;        // parts of K of a tile of the weight
  int32_t stages;
  int32_t rows_per_tile;  // first rows of neighbouring tiles are this far apart: 64, or 32 with the activation
  int32_t second_half;    // the second 32 rows of a tile lie this far behind the first
  int32_t width;          // of out
  bool weight_is_constant;
  bool shares_tokens;

  const void* bias;
  DType bias_dtype;
  void* out;
  int64_t out_stride;
  bool silu_and_mul;
  bool out_aligned;  // to four elements

  // The adapter.
  int32_t rank, rank_blocks, num_slices;
  int32_t h_tiles;  // of the rank, as CTAs take them
  int32_t slice_ends[kMaxSlices];
  const void* lora_mask;
  bool lora_mask_is_int32;
  float scale;
  void* gH;
  int64_t h_stride, h_slice_stride;
  int32_t* flags;  // [groups][2]: arrivals of h, departures of its readers
};

using Kernel = void (*)(Params);
Kernel kernel_bf16(const Tile& tile);
Kernel kernel_fp16(const Tile& tile);

}  // namespace idlm::gemm
