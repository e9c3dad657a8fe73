// What the kernel of rows_*.cu is launched with.
#pragma once

#include "idlm/sampling.h"

namespace idlm {

constexpr int kThreads = 320;  // two CTAs per SM at up to 96 registers

enum class Role : int32_t { kSampleRow, kCleanRow, kMaskRow };

struct KernelParams {
  Role role;
  Logits logits;
  bool logits_aligned;
  int32_t vectors_per_cta;  // of 16 bytes, of a row in shared memory
  SamplingParams sampling;
  // kSampleRow
  const void* positions_of_rows;
  bool positions_are_int64;
  int32_t noise_stream;
  int64_t* ids;
  // kCleanRow, kMaskRow
  int32_t num_spec_tokens;
  const int32_t* query_start_loc;
  const int32_t* num_drafts;
  const int64_t* drafts;
  int64_t drafts_stride;
  const int32_t* positions;
  bool quadratic;
  DraftDistributions draft_dists;
  bool draft_dists_aligned;
  int32_t* error_flags;
  int32_t* row_tokens;  // workspace [batch, num_spec_tokens + 1]: y_i, or kAccepted
  int32_t* num_accepted;
  int64_t* tokens;
  int64_t tokens_stride;
  int64_t* next_drafts;
  int64_t next_drafts_stride;
  int32_t* next_num_drafts;
};

}  // namespace idlm
