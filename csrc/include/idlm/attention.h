// Attention of the rows of a step over a paged KV cache. The contract is that of the Python op strided_attention.
// All pointers are device pointers; all strides count elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "idlm/dtype.h"
#include "idlm/status.h"

namespace idlm {

// Rows of request b are query_start_loc[b] .. [b + 1] - 1; their keys and values are the last of seq_lens[b] slots. K and V
// are read in pieces of 16 bytes: their addresses, strides and rows are multiples of that, and so are those of q.
struct AttentionParams {
  DType dtype = DType::kBFloat16;  // of q, K, V and out: bf16 or fp16
  bool cache_is_fp8 = false;       // K and V are e4m3 instead
  const void* q = nullptr;         // [num_rows, num_heads, head_dim]
  int64_t q_stride_row = 0;
  int64_t q_stride_head = 0;
  const void* k_cache = nullptr;  // [num_pages, page_size, num_kv_heads, head_dim]
  int64_t k_stride_page = 0;
  int64_t k_stride_slot = 0;
  int64_t k_stride_head = 0;
  const void* v_cache = nullptr;
  int64_t v_stride_page = 0;
  int64_t v_stride_slot = 0;
  int64_t v_stride_head = 0;
  const int32_t* page_table = nullptr;  // [batch, max_pages]
  int64_t page_table_stride = 0;
  const int32_t* seq_lens = nullptr;         // [batch], the step's rows included; 0: no request
  const int32_t* query_start_loc = nullptr;  // [batch + 1]
  const int64_t* tree_mask = nullptr;        // [num_rows], 64 bits each; nullptr: a chain
  const float* k_scale = nullptr;            // of K; nullptr: 1
  int64_t k_scale_stride = 0;                // between KV heads; 0: one value for all of them
  const float* v_scale = nullptr;
  int64_t v_scale_stride = 0;
  void* out = nullptr;  // [num_rows, num_heads, head_dim]; rows of no request become 0
  int64_t out_stride_row = 0;
  int64_t out_stride_head = 0;
  float* lse = nullptr;  // [num_rows, num_heads]; nullptr: not wanted
  int64_t lse_stride = 0;

  int32_t num_rows = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // at most 256
  int32_t batch = 0;
  int32_t num_pages = 0;
  int32_t page_size = 0;
  int32_t max_pages = 0;      // columns of page_table
  int32_t max_query_len = 0;  // further rows of a request are rows of none
  int32_t window = -1;        // with w >= 0 a row sees w slots before its own, and no tree_mask is given
  float sm_scale = 1.0f;

  void* scratch = nullptr;  // attention_scratch_bytes(), at a multiple of 16 bytes
  // attention_flag_words() words, 0 before the first launch that uses them and again after every launch that ends.
  // Launches that may overlap need words of their own.
  int32_t* flags = nullptr;
  int32_t max_ctas = 0;  // of the launch; 0: one on every SM. No bit of the result depends on it.
};

// Both read shapes alone.
size_t attention_scratch_bytes(const AttentionParams& params);
size_t attention_flag_words(const AttentionParams& params);

Status strided_attention(const AttentionParams& params, cudaStream_t stream, bool dependent_launch);

}  // namespace idlm
