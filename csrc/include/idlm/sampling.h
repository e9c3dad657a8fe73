// Sampling of rows, and verify-and-accept. The contract is that of the Python ops of the same names: the transform of a
// row (forbidden ids, NaN, Inf, temperature, top-k, top-p, min-p), counter-based Gumbel noise, and the two exact rules.
// All pointers are device pointers; all strides count elements; arrays without a stride are dense.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "idlm/dtype.h"
#include "idlm/status.h"

namespace idlm {

enum ErrorFlag : int32_t { kFlagNan = 1, kFlagInf = 2, kFlagEmptyRow = 4, kFlagBadDraft = 8 };

enum Stream : int32_t { kStreamTarget = 0, kStreamDraft = 1, kStreamAccept = 2 };

struct Logits {
  const void* data = nullptr;  // [num_rows, vocab_size]
  int64_t row_stride = 0;
  DType dtype = DType::kBFloat16;
  int32_t num_rows = 0;
  int32_t vocab_size = 0;      // at most 262,144
  int32_t id_limit = 0;        // ids from here on are never sampled
  int32_t mask_id = -1;        // nor is this one; -1: none
  const void* bias = nullptr;  // [num_rows, vocab_size], added to the logits in fp32; nullptr: none
  int64_t bias_row_stride = 0;
  DType bias_dtype = DType::kFloat32;
};

// One entry per row in sample_rows, per request in verify_accept.
struct SamplingParams {
  const float* temperature = nullptr;  // below 1e-4: argmax
  const int32_t* top_k = nullptr;      // 0: off
  const float* top_p = nullptr;        // 1: off
  const float* min_p = nullptr;        // 0: off
  const int64_t* seed = nullptr;
};

struct LaunchOptions {
  cudaStream_t stream = nullptr;
  // Lets the kernel start while the previous kernel of the stream drains (programmatic dependent launch); it waits for
  // that kernel's end before it touches memory.
  bool dependent_launch = true;
  int32_t cluster_size = 0;  // 1, 2, 4 or 8 CTAs per row; 0: chosen by size. Results do not depend on it.
};

struct SampleRowsParams {
  Logits logits;
  SamplingParams sampling;
  const void* positions = nullptr;  // [num_rows], of the predicted tokens
  bool positions_are_int64 = false;
  int32_t noise_stream = kStreamTarget;
  int64_t* ids = nullptr;          // [num_rows], out
  int32_t* error_flags = nullptr;  // [num_rows], ErrorFlags are or-ed in; nullptr: dropped
};

// The distributions that the drafts were drawn from; read, then overwritten with those of the next drafts.
struct DraftDistributions {
  void* logits = nullptr;  // [batch, num_spec_tokens, vocab_size]; forbidden ids and NaN are stored as -inf
  int64_t stride_request = 0;
  int64_t stride_draft = 0;
  DType dtype = DType::kBFloat16;  // of the logits, or fp32; fp32 if there is a bias
  float* cut = nullptr;            // [batch, num_spec_tokens]: an id is kept iff logit / T >= cut
  int64_t cut_stride = 0;
  float* log_norm = nullptr;  // [batch, num_spec_tokens]
  int64_t log_norm_stride = 0;
};

struct VerifyAcceptParams {
  Logits logits;
  SamplingParams sampling;
  int32_t batch = 0;
  int32_t num_spec_tokens = 0;               // drafts per request, K; at most 31
  const int32_t* query_start_loc = nullptr;  // [batch + 1]
  const int32_t* num_drafts = nullptr;       // [batch]
  const int64_t* drafts = nullptr;           // [batch, num_spec_tokens]
  int64_t drafts_stride = 0;
  const int32_t* positions = nullptr;          // [batch], of pending
  bool quadratic = false;
  bool rejection = false;  // false: `match`
  DraftDistributions draft_dists;  // for `rejection`
  int32_t* error_flags = nullptr;   // [batch], or-ed; nullptr: dropped
  int32_t* num_accepted = nullptr;  // [batch], out
  int64_t* tokens = nullptr;        // [batch, num_spec_tokens + 1], out
  int64_t tokens_stride = 0;
  int64_t* next_drafts = nullptr;              // [batch, num_spec_tokens], out
  int64_t next_drafts_stride = 0;
  int32_t* next_num_drafts = nullptr;  // [batch], out
  void* workspace = nullptr;           // verify_accept_workspace_bytes(batch, num_spec_tokens) bytes, any content
};

size_t verify_accept_workspace_bytes(int32_t batch, int32_t num_spec_tokens);

// One token per row. One launch.
Status sample_rows(const SampleRowsParams& params, const LaunchOptions& options);

// Decides a step. Two launches: the clean rows, then the MASK rows of the branch that was taken (one launch if num_spec_tokens is 0).
Status verify_accept(const VerifyAcceptParams& params, const LaunchOptions& options);

// The end of a step: commits its tokens up to the first stop id and the length limit, and leaves the state that the next
// step starts from. One launch.
struct AdvanceParams {
  int32_t batch = 0;
  int32_t num_spec_tokens = 0;  // at most 31
  // Results of verify_accept.
  const int32_t* num_accepted = nullptr;  // [batch]
  const int64_t* tokens = nullptr;        // [batch, num_spec_tokens + 1]
  int64_t tokens_stride = 0;
  const int64_t* next_drafts = nullptr;      // [batch, num_spec_tokens]
  int64_t next_drafts_stride = 0;
  const int32_t* next_num_drafts = nullptr;  // [batch]
  const int32_t* length_limits = nullptr;    // [batch]
  const int64_t* stop_ids = nullptr;         // [batch, num_stop_ids], -1: none
  int64_t stop_ids_stride = 0;
  int32_t num_stop_ids = 0;
  // Updated.
  int64_t* text = nullptr;  // [batch, max_len]
  int64_t text_stride = 0;
  int32_t max_len = 0;
  int32_t* lengths = nullptr;  // [batch]
  int64_t* drafts = nullptr;   // [batch, num_spec_tokens]
  int64_t drafts_stride = 0;
  int32_t* num_drafts = nullptr;     // [batch]
  int32_t* finish_reason = nullptr;  // [batch]: 0 running, 1 stopped by an id, 2 length limit
  int32_t* num_emitted = nullptr;    // [batch], out
};

Status advance(const AdvanceParams& params, const LaunchOptions& options);

}  // namespace idlm
