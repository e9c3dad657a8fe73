// The end of a step, one warp per request, lane i for the i-th token: which tokens are committed, and the state that the
// next step starts from. A few hundred bytes per request; all that counts is that the host stays out of it.
#include "common/device.cuh"
#include "common/host.h"
#include "idlm/sampling.h"

namespace idlm {
namespace {

constexpr int kWarpsPerCta = 4;
constexpr int32_t kMaxDrafts = 31;
enum Finish : int32_t { kRunning = 0, kStopped = 1, kLength = 2 };

}  // namespace

__global__ void __launch_bounds__(kWarpsPerCta * 32) advance_kernel(const __grid_constant__ AdvanceParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t b = blockIdx.x * kWarpsPerCta + warp_id();
  if (b >= p.batch) return;
  const int32_t i = lane_id();
  const bool is_token = i <= p.num_spec_tokens;
  const int64_t token = is_token ? p.tokens[b * p.tokens_stride + i] : -1;
  const int32_t committed = load_uniform(p.num_accepted + b) + 1;
  const int32_t length = load_uniform(p.lengths + b), limit = load_uniform(p.length_limits + b);
  const int32_t finish_reason = load_uniform(p.finish_reason + b);
  // A request without rows has no first token.
  const bool running = finish_reason == kRunning && __shfl_sync(~0u, token, 0) >= 0;

  bool is_stop = false;
  for (int32_t s = 0; s < p.num_stop_ids; ++s) is_stop |= token == p.stop_ids[b * p.stop_ids_stride + s];
  const uint32_t stops = __ballot_sync(~0u, is_stop && token >= 0 && i < committed);
  const int32_t until_stop = stops ? __ffs(stops) : p.num_spec_tokens + 2;
  const int32_t room = max(limit - length, 0);
  const int32_t emitted = running ? min(min(committed, until_stop), room) : 0;

  if (i < emitted && length + i < p.max_len) p.text[b * p.text_stride + length + i] = token;
  const bool stopped = running && until_stop <= emitted;
  const bool full = running && !stopped && length + emitted >= limit;
  const int32_t next_reason = stopped ? kStopped : full ? kLength : finish_reason;
  if (running && i < p.num_spec_tokens) p.drafts[b * p.drafts_stride + i] = p.next_drafts[b * p.next_drafts_stride + i];
  if (i == 0) {
    p.lengths[b] = length + emitted;
    p.finish_reason[b] = next_reason;
    if (running) p.num_drafts[b] = next_reason == kRunning ? p.next_num_drafts[b] : 0;
    p.num_emitted[b] = emitted;
  }
}

Status advance(const AdvanceParams& params, const LaunchOptions& options) {
  const char* op = "advance";
  const AdvanceParams& p = params;
  if (p.num_spec_tokens < 0 || p.num_spec_tokens > kMaxDrafts)
    return failure(Code::kUnsupported, "%s: %d drafts per request, this kernel takes 0 to %d", op, p.num_spec_tokens, kMaxDrafts);
  if (p.batch == 0) return {};
  const void* wanted[] = {p.num_accepted, p.tokens, p.next_num_drafts, p.length_limits, p.text,
                          p.lengths,      p.num_drafts, p.finish_reason,      p.num_emitted};
  for (const void* address : wanted)
    if (address == nullptr) return failure(Code::kInvalidArgument, "%s: state and results must not be null", op);
  if ((p.num_spec_tokens > 0 && (p.next_drafts == nullptr || p.drafts == nullptr)) || (p.num_stop_ids > 0 && p.stop_ids == nullptr))
    return failure(Code::kInvalidArgument, "%s: drafts and stop ids must not be null", op);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((p.batch + kWarpsPerCta - 1) / kWarpsPerCta));
  config.blockDim = dim3(kWarpsPerCta * 32);
  config.stream = options.stream;
  config.attrs = &attribute;
  config.numAttrs = options.dependent_launch ? 1 : 0;
  AdvanceParams copy = p;
  void* arguments[] = {&copy};
  return launch_status(op, cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(advance_kernel), arguments));
}

}  // namespace idlm
