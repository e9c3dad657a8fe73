// Host side of sampling: checks, and the launches.
#include "common/host.h"
#include "sampling/heuristics.h"
#include "sampling/rows.h"

namespace idlm {
namespace {

constexpr int32_t kMaxVocab = 262144;
constexpr int32_t kMaxDrafts = 31;  // a warp decides a request, one lane per draft and one for the token after them

int64_t bytes_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

bool aligned(const void* base, int64_t stride, DType t) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * bytes_of(t) % 16 == 0;
}

DType storage_of(const Logits& l) { return l.bias == nullptr ? l.dtype : DType::kFloat32; }

Status check(const char* op, const Logits& l, const SamplingParams& s) {
  if (l.data == nullptr || s.temperature == nullptr || s.top_k == nullptr || s.top_p == nullptr || s.min_p == nullptr ||
      s.seed == nullptr)
    return failure(Code::kInvalidArgument, "%s: logits and sampling parameters must not be null", op);
  if (l.vocab_size < 1 || l.vocab_size > kMaxVocab)
    return failure(Code::kInvalidArgument, "%s: vocab_size is %d, wanted 1 to %d", op, l.vocab_size, kMaxVocab);
  if (l.id_limit < 1 || l.id_limit > l.vocab_size || l.mask_id < -1 || l.mask_id >= l.vocab_size)
    return failure(Code::kInvalidArgument, "%s: id_limit %d or mask_id %d does not fit vocab_size %d", op, l.id_limit,
                   l.mask_id, l.vocab_size);
  if (l.id_limit == 1 && l.mask_id == 0)
    return failure(Code::kInvalidArgument, "%s: id_limit 1 and mask_id 0 leave no id to sample", op);
  return {};
}

RowsKernel kernel_for(const Logits& l, bool rejection) {
  switch (l.dtype) {
    case DType::kBFloat16: return rows_kernel_bf16(storage_of(l), rejection);
    case DType::kFloat16: return rows_kernel_fp16(storage_of(l), rejection);
    default: return rows_kernel_fp32(rejection);
  }
}

// One cluster per task.
Status launch(const char* op, KernelParams p, int64_t num_tasks, int64_t num_rows, bool rejection,
              const LaunchOptions& options) {
  if (num_tasks == 0) return {};
  p.logits_aligned = aligned(p.logits.data, p.logits.row_stride, p.logits.dtype) &&
                     (p.logits.bias == nullptr || aligned(p.logits.bias, p.logits.bias_row_stride, p.logits.bias_dtype));
  const int64_t row_bytes = p.logits.id_limit * bytes_of(storage_of(p.logits));
  int32_t size = options.cluster_size ? options.cluster_size : choose_cluster_size(num_rows, row_bytes);
  if (size != 1 && size != 2 && size != 4 && size != 8)
    return failure(Code::kInvalidArgument, "%s: cluster_size is %d, wanted 0 (choose), 1, 2, 4 or 8", op, size);
  const int64_t shared_bytes = bytes_per_cta(row_bytes, size);
  if (shared_bytes + kReducedBytes > kSharedBytesPerCta)
    return failure(Code::kInvalidArgument, "%s: a row of %lld bytes does not fit the shared memory of %d CTAs", op,
                   static_cast<long long>(row_bytes), size);
  p.vectors_per_cta = static_cast<int32_t>(shared_bytes / 16);
  if (num_tasks * size > 0x7fffffff) return failure(Code::kInvalidArgument, "%s: too many rows for one launch", op);

  const RowsKernel kernel = kernel_for(p.logits, rejection);
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(kSharedBytesPerCta - kReducedBytes));
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(size);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(num_tasks * size));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = options.stream;
    config.attrs = attributes;
    config.numAttrs = options.dependent_launch ? 2 : 1;
    void* arguments[] = {&p};
    error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  }
  return launch_status(op, error);
}

}  // namespace

Status sample_rows(const SampleRowsParams& params, const LaunchOptions& options) {
  const char* op = "sample_rows";
  Status status = check(op, params.logits, params.sampling);
  if (!status.ok()) return status;
  if (params.positions == nullptr || params.ids == nullptr)
    return failure(Code::kInvalidArgument, "%s: positions and ids must not be null", op);
  KernelParams p = {};
  p.role = Role::kSampleRow;
  p.logits = params.logits;
  p.sampling = params.sampling;
  p.positions_of_rows = params.positions;
  p.positions_are_int64 = params.positions_are_int64;
  p.noise_stream = params.noise_stream;
  p.ids = params.ids;
  p.error_flags = params.error_flags;
  return launch(op, p, params.logits.num_rows, params.logits.num_rows, false, options);
}

size_t verify_accept_workspace_bytes(int32_t batch, int32_t num_spec_tokens) {
  return sizeof(int32_t) * static_cast<size_t>(batch) * static_cast<size_t>(num_spec_tokens + 1);
}

Status verify_accept(const VerifyAcceptParams& params, const LaunchOptions& options) {
  const char* op = "verify_accept";
  Status status = check(op, params.logits, params.sampling);
  if (!status.ok()) return status;
  if (params.num_spec_tokens < 0 || params.num_spec_tokens > kMaxDrafts)
    return failure(Code::kUnsupported, "%s: %d drafts per request, this kernel takes 0 to %d", op, params.num_spec_tokens, kMaxDrafts);
  if (params.query_start_loc == nullptr || params.num_drafts == nullptr || params.positions == nullptr ||
      params.num_accepted == nullptr || params.tokens == nullptr || params.next_num_drafts == nullptr ||
      params.workspace == nullptr || (params.num_spec_tokens > 0 && (params.drafts == nullptr || params.next_drafts == nullptr)))
    return failure(Code::kInvalidArgument, "%s: request arrays, results and workspace must not be null", op);
  const DraftDistributions& dists = params.draft_dists;
  const bool needs_dists = params.rejection && params.num_spec_tokens > 0;
  if (needs_dists) {
    if (dists.logits == nullptr || dists.cut == nullptr || dists.log_norm == nullptr)
      return failure(Code::kInvalidArgument, "%s: rejection needs the distributions of the drafts", op);
    if (dists.dtype != DType::kFloat32 && (dists.dtype != params.logits.dtype || storage_of(params.logits) == DType::kFloat32))
      return failure(Code::kUnsupported, "%s: draft distributions must have the dtype of the logits or be fp32, with a bias fp32", op);
  }
  KernelParams p = {};
  p.role = Role::kCleanRow;
  p.logits = params.logits;
  p.sampling = params.sampling;
  p.num_spec_tokens = params.num_spec_tokens;
  p.query_start_loc = params.query_start_loc;
  p.num_drafts = params.num_drafts;
  p.drafts = params.drafts;
  p.drafts_stride = params.drafts_stride;
  p.positions = params.positions;
  p.quadratic = params.quadratic;
  p.draft_dists = dists;
  p.draft_dists_aligned = needs_dists && aligned(dists.logits, dists.stride_request, dists.dtype) &&
                   aligned(dists.logits, dists.stride_draft, dists.dtype);
  p.error_flags = params.error_flags;
  p.row_tokens = static_cast<int32_t*>(params.workspace);
  p.num_accepted = params.num_accepted;
  p.tokens = params.tokens;
  p.tokens_stride = params.tokens_stride;
  p.next_drafts = params.next_drafts;
  p.next_drafts_stride = params.next_drafts_stride;
  p.next_num_drafts = params.next_num_drafts;
  const int64_t batch = params.batch, num_spec_tokens = params.num_spec_tokens;
  status = launch(op, p, batch * (num_spec_tokens + 1), batch * (num_spec_tokens + 1), params.rejection, options);
  if (!status.ok() || num_spec_tokens == 0) return status;
  p.role = Role::kMaskRow;
  return launch(op, p, batch * num_spec_tokens, batch * num_spec_tokens, params.rejection, options);
}

}  // namespace idlm
