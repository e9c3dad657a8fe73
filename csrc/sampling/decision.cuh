// The decision of a step: which drafts of a request stand, and what it commits. By one warp, a lane per token.
#pragma once

#include "common/device.cuh"
#include "sampling/params.h"

namespace idlm {

constexpr int32_t kAccepted = -1;  // in the workspace: the draft is accepted, there is no token of row i

struct Request {
  int32_t start, num_rows, num_drafts;  // rows of logits; drafts that exist
  bool present, bad_count;

  __device__ Request(const KernelParams& p, int32_t b) {
    start = load_uniform(p.query_start_loc + b);
    num_rows = load_uniform(p.query_start_loc + b + 1) - start;
    present = num_rows > 0;
    const int32_t given = load_uniform(p.num_drafts + b);
    num_drafts = min(max(given, 0), min(max(num_rows - 1, 0), p.num_spec_tokens));
    bad_count = present && num_drafts != given;
  }
};

__device__ __forceinline__ bool is_id(int64_t id, int32_t vocab_size) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(vocab_size);
}

// How many drafts stand. Whole warps call it; lane i looks at draft i.
__device__ inline int32_t count_accepted(const KernelParams& p, const Request& r, int32_t b, bool rejection) {
  const int32_t i = lane_id();
  bool is_accepted = false;
  if (i < r.num_drafts) {
    const int32_t y = p.row_tokens[b * (p.num_spec_tokens + 1) + i];
    is_accepted = rejection ? y == kAccepted : y == p.drafts[b * p.drafts_stride + i];
  }
  return __ffs(~__ballot_sync(~0u, is_accepted)) - 1;
}

// Writes what the step commits; one warp.
__device__ inline void write_outcome(const KernelParams& p, const Request& r, int32_t b, int32_t accepted, bool proposed,
                                     int32_t token) {
  const int32_t i = lane_id();
  bool bad = r.bad_count;
  if (i <= p.num_spec_tokens) {
    int64_t value = -1;
    if (r.present) {
      const int64_t draft = i < r.num_drafts ? p.drafts[b * p.drafts_stride + i] : 0;
      bad |= !is_id(draft, p.logits.vocab_size);
      if (i < accepted) value = draft;
      if (i == accepted) value = token;
    }
    p.tokens[b * p.tokens_stride + i] = value;
  }
  bad = __any_sync(~0u, bad);
  if (i == 0) {
    p.num_accepted[b] = accepted;
    p.next_num_drafts[b] = proposed ? p.num_spec_tokens : 0;
    if (bad && p.error_flags != nullptr) atomicOr(p.error_flags + b, kFlagBadDraft);
  }
}

}  // namespace idlm
