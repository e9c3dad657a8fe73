// Host side of attention: checks and the launch.
#include <algorithm>

#include "attention/heuristics.h"
#include "attention/params.h"
#include "common/host.h"

namespace idlm {
namespace attention {
namespace {

constexpr int32_t kMaxSlots = 0x7fffffff - 2 * (kLeafSlots << kMaxTreeLevels);  // ends of ranges are 32-bit numbers

int32_t max_slots(const AttentionParams& p) {
  return static_cast<int32_t>(std::min<int64_t>(int64_t{p.max_pages} * p.page_size, kMaxSlots));
}
int64_t packed_rows(const AttentionParams& p) { return int64_t{p.num_rows} * p.num_heads; }
int32_t group(const AttentionParams& p) { return p.num_heads / p.num_kv_heads; }
int64_t row_tiles(const AttentionParams& p) {
  return ceil_div(int64_t{std::min(p.max_query_len, p.num_rows)} * group(p), kTileRows);
}
int64_t max_leaves(const AttentionParams& p) { return std::max<int64_t>(ceil_div(max_slots(p), kLeafSlots), 1); }
int32_t level(const AttentionParams& p) { return min_level(packed_rows(p), max_leaves(p), p.head_dim); }
int64_t in_scratch(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

Status check(const AttentionParams& p) {
  const auto invalid = [](const char* what) { return failure(Code::kInvalidArgument, "strided_attention: %s", what); };
  if (p.dtype == DType::kFloat32)
    return failure(Code::kUnsupported, "strided_attention: fp32 is not computed here, bf16 and fp16 are");
  const int32_t vector = p.cache_is_fp8 ? 16 : 8;  // numbers of a cache in 16 bytes
  if (tile_columns(p.head_dim) == 0 || p.head_dim % vector)
    return failure(Code::kUnsupported, "strided_attention: head_dim %d, this kernel takes multiples of %d up to 256",
                   p.head_dim, vector);
  if (p.num_kv_heads < 1 || p.num_heads < 1 || p.num_heads % p.num_kv_heads)
    return invalid("num_heads must be a positive multiple of num_kv_heads");
  if (p.num_rows < 0 || p.batch < 0 || p.max_pages < 0 || p.num_pages < 1 || p.page_size < 1 || p.max_query_len < 1)
    return invalid("num_pages, page_size and max_query_len must be positive, other sizes must not be negative");
  if (p.tree_mask != nullptr && (p.window >= 0 || p.max_query_len > 64))
    return invalid("a tree_mask takes no window, and at most 64 rows of a request");
  const auto aligned = [](const void* data, int64_t vector, std::initializer_list<int64_t> strides) {
    return data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
           std::all_of(strides.begin(), strides.end(), [vector](int64_t s) { return s % vector == 0; });
  };
  if (!aligned(p.q, 8, {p.q_stride_row, p.q_stride_head}) ||
      !aligned(p.k_cache, vector, {p.k_stride_page, p.k_stride_slot, p.k_stride_head}) ||
      !aligned(p.v_cache, vector, {p.v_stride_page, p.v_stride_slot, p.v_stride_head}))
    return invalid("addresses and strides of q, k_cache and v_cache must be multiples of 16 bytes");
  if (p.query_start_loc == nullptr || p.out == nullptr || p.flags == nullptr ||
      (p.batch > 0 && (p.seq_lens == nullptr || (p.max_pages > 0 && p.page_table == nullptr))))
    return invalid("page_table, seq_lens, query_start_loc, out and flags must not be null");
  if (attention_scratch_bytes(p) > 0 && (p.scratch == nullptr || reinterpret_cast<uintptr_t>(p.scratch) % 16))
    return invalid("scratch must be at a multiple of 16 bytes");
  if (row_tiles(p) * p.batch > 0x7fffffff / p.num_kv_heads) return invalid("too many rows and requests for one launch");
  return {};
}

int32_t num_sms() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

}  // namespace
}  // namespace attention

size_t attention_scratch_bytes(const AttentionParams& p) {
  using namespace attention;
  return static_cast<size_t>(in_scratch(scratch_bytes(packed_rows(p), max_leaves(p), level(p), p.head_dim)));
}
size_t attention_flag_words(const AttentionParams& p) {
  return static_cast<size_t>(attention::row_tiles(p) * p.batch * p.num_kv_heads);
}

Status strided_attention(const AttentionParams& a, cudaStream_t stream, bool dependent_launch) {
  using namespace attention;
  if (a.num_rows == 0) return {};
  const Status status = check(a);
  if (!status.ok()) return status;
  Params p = {};
  static_cast<AttentionParams&>(p) = a;
  p.group = group(a);
  p.row_tiles = static_cast<int32_t>(row_tiles(a));
  p.max_slots = max_slots(a);
  p.min_level = level(a);
  p.max_parts = p.min_level >= kWhole ? 1 : ceil_div(max_leaves(a), int64_t{1} << p.min_level);
  p.gO = static_cast<float*>(a.scratch);
  if (p.gO != nullptr) p.gMT = reinterpret_cast<float2*>(p.gO + packed_rows(a) * p.max_parts * a.head_dim);
  p.out_aligned = reinterpret_cast<uintptr_t>(a.out) % 16 == 0 && a.out_stride_row % 8 == 0 && a.out_stride_head % 8 == 0;

  const int64_t most = int64_t{a.batch} * p.row_tiles * a.num_kv_heads * p.max_parts;
  const int32_t ctas = a.max_ctas > 0 ? a.max_ctas : num_sms();
  const Kernel kernel = (a.dtype == DType::kBFloat16 ? kernel_bf16 : kernel_fp16)(a.head_dim);
  const int32_t bytes = shared_bytes(a.head_dim);
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(std::max<int64_t>(std::min<int64_t>(most, ctas), 1)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = dependent_launch ? 1 : 0;
    void* arguments[] = {&p};
    error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  }
  return launch_status("strided_attention", error);
}

}  // namespace idlm
