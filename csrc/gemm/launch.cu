// Host side of the linear layers: checks, tensor maps, and the launch.
#include <algorithm>

#include "common/host.h"
#include "gemm/heuristics.h"
#include "gemm/params.h"

namespace idlm {
namespace gemm {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function that writes tensor maps, by way of the runtime: nothing is linked with the driver.
Encode encode_function() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

struct Tensor {  // [planes, rows, columns] of 16-bit numbers; strides in elements
  const char* name;
  const void* data;
  int64_t planes, rows, columns;
  int64_t plane_stride, row_stride;
};

bool tma_takes(const void* data, int64_t row_stride) {
  return data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % 8 == 0;
}

// Boxes of box_rows rows of 64 columns.
Status encode(CUtensorMap* map, const Tensor& t, DType dtype, uint32_t box_rows) {
  const cuuint64_t sizes[3] = {cuuint64_t(t.columns), cuuint64_t(t.rows), cuuint64_t(t.planes)};
  const cuuint64_t strides[2] = {cuuint64_t(t.row_stride) * 2, cuuint64_t(t.plane_stride) * 2};
  const cuuint32_t box[3] = {kBlockK, box_rows, 1}, steps[3] = {1, 1, 1};
  const CUtensorMapDataType type =
      dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult error = encode_function()(
      map, type, 3, const_cast<void*>(t.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error == CUDA_SUCCESS) return {};
  return failure(Code::kCuda, "linear: no tensor map for %s [%lld, %lld], row stride %lld: driver error %d", t.name,
                 static_cast<long long>(t.rows), static_cast<long long>(t.columns), static_cast<long long>(t.row_stride),
                 static_cast<int>(error));
}

int64_t padded_rank(int32_t rank) { return (rank + 7) / 8 * 8; }

Status check(const LinearParams& p, const AdapterParams* adapter) {
  const auto invalid = [](const char* what) { return failure(Code::kInvalidArgument, "linear: %s", what); };
  if (p.dtype == DType::kFloat32)
    return failure(Code::kUnsupported, "linear: fp32 is not computed here, bf16 and fp16 are");
  if (p.n < 1 || p.k < 1 || p.num_rows < 0) return invalid("n and k must be positive, num_rows must not be negative");
  if (p.silu_and_mul && p.n % 2) return invalid("n must be even with silu_and_mul");
  if (!tma_takes(p.x, p.x_stride) || !tma_takes(p.weight, p.weight_stride))
    return invalid("address and row stride of x and weight must be multiples of 16 bytes");
  if (p.out == nullptr) return invalid("out must not be null");
  if (adapter == nullptr) return {};
  const AdapterParams& a = *adapter;
  if (a.rank < 1) return invalid("rank must be positive");
  if (a.num_slices < 1 || a.num_slices > kMaxSlices)
    return failure(Code::kUnsupported, "linear: %d slices, this kernel takes 1 to %d", a.num_slices, kMaxSlices);
  for (int32_t s = 0; s < a.num_slices; ++s)
    if (a.slice_ends[s] <= (s == 0 ? 0 : a.slice_ends[s - 1])) return invalid("slice_ends must ascend");
  if (a.slice_ends[a.num_slices - 1] != p.n) return invalid("the last of slice_ends must be n");
  if (!tma_takes(a.lora_a, a.lora_a_stride) || !tma_takes(a.lora_b, a.lora_b_stride) || !tma_takes(a.h, 0))
    return invalid("addresses of lora_a, lora_b and h, and the row strides, must be multiples of 16 bytes");
  if (a.lora_mask == nullptr || a.flags == nullptr) return invalid("lora_mask and flags must not be null");
  return {};
}

}  // namespace
}  // namespace gemm

size_t h_bytes(int32_t num_rows, int32_t num_slices, int32_t rank) {
  return size_t(2) * size_t(num_rows) * size_t(num_slices) * size_t(gemm::padded_rank(rank));
}
size_t flag_words(int32_t num_rows) { return 2 * size_t(gemm::ceil_div(num_rows, gemm::kTileTokens)); }

Status linear(const LinearParams& l, const AdapterParams* adapter, cudaStream_t stream, bool dependent_launch) {
  using namespace gemm;
  Status status = check(l, adapter);
  if (!status.ok() || l.num_rows == 0) return status;
  if (encode_function() == nullptr) return failure(Code::kCuda, "linear: the driver has no cuTensorMapEncodeTiled");

  const Shape cut = shape(l.n, l.k);
  const Tile tile = tile_for(l.num_rows, adapter != nullptr);
  Params p = {};
  p.num_rows = l.num_rows;
  p.n = l.n;
  p.blocks = ceil_div(l.k, kBlockK);
  p.width = l.silu_and_mul ? l.n / 2 : l.n;
  p.rows_per_tile = l.silu_and_mul ? kHalfRows : kTileRows;
  p.second_half = l.silu_and_mul ? p.width : kHalfRows;
  p.tiles = ceil_div(p.width, p.rows_per_tile * tile.rows);
  p.groups = ceil_div(l.num_rows, tile.tokens * kTileTokens);
  p.splits = cut.splits;
  p.weight_is_constant = l.weight_is_constant;
  p.shares_tokens = shares_tokens(l.num_rows, cut);
  p.bias = l.bias;
  p.bias_dtype = l.bias_dtype;
  p.out = l.out;
  p.out_stride = l.out_stride;
  p.out_aligned = reinterpret_cast<uintptr_t>(l.out) % 8 == 0 && l.out_stride % 4 == 0;
  p.silu_and_mul = l.silu_and_mul;
  const auto map = [&](CUtensorMap* to, const gemm::Tensor& t, uint32_t box_rows) {
    if (status.ok()) status = encode(to, t, l.dtype, box_rows);
  };
  const uint32_t tokens = static_cast<uint32_t>(tile.tokens * kTileTokens);
  map(&p.x, {"x", l.x, 1, l.num_rows, l.k, l.x_stride * l.num_rows, l.x_stride}, tokens / 2);
  map(&p.weight, {"weight", l.weight, 1, l.n, l.k, l.weight_stride * l.n, l.weight_stride}, kHalfRows);

  const int32_t cluster = adapter != nullptr || p.shares_tokens ? cut.h_splits : cut.splits;
  int64_t clusters = int64_t{ceil_div(p.tiles, cluster / cut.splits)} * p.groups;
  if (adapter != nullptr) {
    const AdapterParams& a = *adapter;
    p.rank = a.rank;
    p.rank_blocks = ceil_div(a.rank, kTileRows);
    p.h_tiles = ceil_div(p.rank_blocks, tile.rows);
    p.num_slices = a.num_slices;
    std::copy(a.slice_ends, a.slice_ends + a.num_slices, p.slice_ends);
    p.lora_mask = a.lora_mask;
    p.lora_mask_is_int32 = a.lora_mask_is_int32;
    p.scale = a.scale;
    p.gH = a.h;
    p.h_stride = padded_rank(a.rank);
    p.h_slice_stride = p.h_stride * l.num_rows;
    p.flags = a.flags;
    map(&p.lora_a, {"lora_a", a.lora_a, a.num_slices, a.rank, l.k, a.lora_a_stride * a.rank, a.lora_a_stride}, kHalfRows);
    map(&p.lora_b, {"lora_b", a.lora_b, 1, l.n, a.rank, a.lora_b_stride * l.n, a.lora_b_stride}, kHalfRows);
    map(&p.h, {"h", a.h, a.num_slices, l.num_rows, a.rank, p.h_slice_stride, p.h_stride}, tokens);
    clusters += int64_t{p.num_slices} * p.h_tiles * p.groups;
  }
  if (!status.ok()) return status;
  if (clusters * cluster > 0x7fffffff) return failure(Code::kInvalidArgument, "linear: too many rows for one launch");
  p.stages = fit(clusters, cluster, tile);
  const int64_t bytes = tile.shared_bytes(p.stages);

  const Kernel kernel = l.dtype == DType::kBFloat16 ? kernel_bf16(tile) : kernel_fp16(tile);
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytesPerCta));
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
    config.blockDim = dim3(static_cast<unsigned>(tile.threads()));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = dependent_launch ? 2 : 1;
    void* arguments[] = {&p};
    error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  }
  return launch_status("linear", error);
}

}  // namespace idlm
