// The Python module: addresses as integers, so that one build serves every torch version. The GIL is released around
// launches; a status that is not ok becomes an exception here and nowhere else.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "gemm/heuristics.h"
#include "idlm/gemm.h"
#include "idlm/sampling.h"
#include "sampling/heuristics.h"

namespace py = pybind11;
using namespace idlm;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

void raise_unless_ok(const Status& s) {
  switch (s.code) {
    case Code::kOk: return;
    case Code::kCuda: throw std::runtime_error(s.message);
    default: throw py::value_error(s.message);
  }
}

// (data, row stride, dtype, rows, vocab, id_limit, mask_id, bias or 0, its stride, its dtype)
using LogitsTuple = std::tuple<Address, int64_t, int, int, int, int, int, Address, int64_t, int>;
// (temperature, top_k, top_p, min_p, seed)
using SamplingTuple = std::tuple<Address, Address, Address, Address, Address>;
// (stream, dependent launch, cluster size)
using OptionsTuple = std::tuple<Address, bool, int>;
// (logits, stride of requests, stride of drafts, dtype, cut, its stride, log_norm, its stride)
using LawsTuple = std::tuple<Address, int64_t, int64_t, int, Address, int64_t, Address, int64_t>;
// (number accepted, tokens, their stride, next drafts, their stride, their number)
using OutTuple = std::tuple<Address, Address, int64_t, Address, int64_t, Address>;

Logits make(const LogitsTuple& t) {
  Logits l;
  int dtype, bias_dtype;
  Address data, bias;
  std::tie(data, l.row_stride, dtype, l.num_rows, l.vocab_size, l.id_limit, l.mask_id, bias, l.bias_row_stride, bias_dtype) = t;
  l.data = pointer<const void>(data);
  l.bias = pointer<const void>(bias);
  l.dtype = static_cast<DType>(dtype);
  l.bias_dtype = static_cast<DType>(bias_dtype);
  return l;
}

SamplingParams make(const SamplingTuple& t) {
  return {pointer<const float>(std::get<0>(t)), pointer<const int32_t>(std::get<1>(t)), pointer<const float>(std::get<2>(t)),
          pointer<const float>(std::get<3>(t)), pointer<const int64_t>(std::get<4>(t))};
}

LaunchOptions make(const OptionsTuple& t) {
  return {pointer<CUstream_st>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

void py_sample_rows(const LogitsTuple& logits, const SamplingTuple& sampling, Address positions, bool positions_are_int64,
                    int noise_stream, Address ids, Address status, const OptionsTuple& options) {
  SampleRowsParams p;
  p.logits = make(logits);
  p.sampling = make(sampling);
  p.positions = pointer<const void>(positions);
  p.positions_are_int64 = positions_are_int64;
  p.noise_stream = noise_stream;
  p.ids = pointer<int64_t>(ids);
  p.status = pointer<int32_t>(status);
  Status s;
  {
    py::gil_scoped_release release;
    s = sample_rows(p, make(options));
  }
  raise_unless_ok(s);
}

void py_verify_accept(const LogitsTuple& logits, const SamplingTuple& sampling, int batch, int num_k, Address query_start_loc,
                      Address num_drafts, Address drafts, int64_t drafts_stride, Address positions, bool branched,
                      bool rejection, const LawsTuple& laws, Address status, const OutTuple& out, Address workspace,
                      const OptionsTuple& options) {
  VerifyAcceptParams p;
  p.logits = make(logits);
  p.sampling = make(sampling);
  p.batch = batch;
  p.num_k = num_k;
  p.query_start_loc = pointer<const int32_t>(query_start_loc);
  p.num_drafts = pointer<const int32_t>(num_drafts);
  p.drafts = pointer<const int64_t>(drafts);
  p.drafts_stride = drafts_stride;
  p.positions = pointer<const int32_t>(positions);
  p.branched = branched;
  p.rejection = rejection;
  p.draft_laws.logits = pointer<void>(std::get<0>(laws));
  p.draft_laws.stride_request = std::get<1>(laws);
  p.draft_laws.stride_draft = std::get<2>(laws);
  p.draft_laws.dtype = static_cast<DType>(std::get<3>(laws));
  p.draft_laws.cut = pointer<float>(std::get<4>(laws));
  p.draft_laws.cut_stride = std::get<5>(laws);
  p.draft_laws.log_norm = pointer<float>(std::get<6>(laws));
  p.draft_laws.log_norm_stride = std::get<7>(laws);
  p.status = pointer<int32_t>(status);
  p.num_accepted = pointer<int32_t>(std::get<0>(out));
  p.tokens = pointer<int64_t>(std::get<1>(out));
  p.tokens_stride = std::get<2>(out);
  p.next_drafts = pointer<int64_t>(std::get<3>(out));
  p.next_drafts_stride = std::get<4>(out);
  p.next_num_drafts = pointer<int32_t>(std::get<5>(out));
  p.workspace = pointer<void>(workspace);
  Status s;
  {
    py::gil_scoped_release release;
    s = verify_accept(p, make(options));
  }
  raise_unless_ok(s);
}

// (number accepted, tokens, their stride, next drafts, their stride, their number)
using ResultsTuple = std::tuple<Address, Address, int64_t, Address, int64_t, Address>;
// (text, its stride, max_len, lengths, drafts, their stride, their number, finish)
using StateTuple = std::tuple<Address, int64_t, int, Address, Address, int64_t, Address, Address>;
// (length limits, stop ids, their stride, their number)
using LimitsTuple = std::tuple<Address, Address, int64_t, int>;

void py_advance(int batch, int num_k, const ResultsTuple& results, const StateTuple& state, const LimitsTuple& limits,
                Address num_emitted, const OptionsTuple& options) {
  AdvanceParams p;
  p.batch = batch;
  p.num_k = num_k;
  p.num_accepted = pointer<const int32_t>(std::get<0>(results));
  p.tokens = pointer<const int64_t>(std::get<1>(results));
  p.tokens_stride = std::get<2>(results);
  p.next_drafts = pointer<const int64_t>(std::get<3>(results));
  p.next_drafts_stride = std::get<4>(results);
  p.next_num_drafts = pointer<const int32_t>(std::get<5>(results));
  p.text = pointer<int64_t>(std::get<0>(state));
  p.text_stride = std::get<1>(state);
  p.max_len = std::get<2>(state);
  p.lengths = pointer<int32_t>(std::get<3>(state));
  p.drafts = pointer<int64_t>(std::get<4>(state));
  p.drafts_stride = std::get<5>(state);
  p.num_drafts = pointer<int32_t>(std::get<6>(state));
  p.finish = pointer<int32_t>(std::get<7>(state));
  p.length_limits = pointer<const int32_t>(std::get<0>(limits));
  p.stop_ids = pointer<const int64_t>(std::get<1>(limits));
  p.stop_ids_stride = std::get<2>(limits);
  p.num_stop_ids = std::get<3>(limits);
  p.num_emitted = pointer<int32_t>(num_emitted);
  Status s;
  {
    py::gil_scoped_release release;
    s = advance(p, make(options));
  }
  raise_unless_ok(s);
}

// (data, row stride)
using MatrixTuple = std::tuple<Address, int64_t>;
// (rows, n, k)
using SizesTuple = std::tuple<int, int, int>;
// (bias or 0, its dtype)
using BiasTuple = std::tuple<Address, int>;
// (A, B, gate, is the gate int32, scale, rank, ends of the slices, h, flags)
using AdapterTuple = std::tuple<MatrixTuple, MatrixTuple, Address, bool, float, int, std::vector<int32_t>, Address, Address>;

void py_linear(int dtype, const SizesTuple& sizes, const MatrixTuple& x, const MatrixTuple& weight, bool weight_is_constant,
               const BiasTuple& bias, const MatrixTuple& out, bool with_activation, const std::optional<AdapterTuple>& adapter, Address stream,
               bool dependent_launch) {
  LinearParams p;
  p.dtype = static_cast<DType>(dtype);
  std::tie(p.num_rows, p.n, p.k) = sizes;
  p.x = pointer<const void>(std::get<0>(x));
  p.x_stride = std::get<1>(x);
  p.weight = pointer<const void>(std::get<0>(weight));
  p.weight_stride = std::get<1>(weight);
  p.weight_is_constant = weight_is_constant;
  p.bias = pointer<const void>(std::get<0>(bias));
  p.bias_dtype = static_cast<DType>(std::get<1>(bias));
  p.out = pointer<void>(std::get<0>(out));
  p.out_stride = std::get<1>(out);
  p.silu_and_mul = with_activation;
  AdapterParams a;
  if (adapter) {
    const auto& [lora_a, lora_b, gate, gate_is_int32, scale, rank, slice_ends, h, flags] = *adapter;
    if (slice_ends.size() > kMaxSlices)
      throw py::value_error("linear: " + std::to_string(slice_ends.size()) + " slices, this kernel takes 1 to " +
                            std::to_string(kMaxSlices));
    a.lora_a = pointer<const void>(std::get<0>(lora_a));
    a.lora_a_stride = std::get<1>(lora_a);
    a.lora_b = pointer<const void>(std::get<0>(lora_b));
    a.lora_b_stride = std::get<1>(lora_b);
    a.gate = pointer<const void>(gate);
    a.gate_is_int32 = gate_is_int32;
    a.scale = scale;
    a.rank = rank;
    a.num_slices = static_cast<int32_t>(slice_ends.size());
    std::copy(slice_ends.begin(), slice_ends.end(), a.slice_ends);
    a.h = pointer<void>(h);
    a.flags = pointer<int32_t>(flags);
  }
  Status s;
  {
    py::gil_scoped_release release;
    s = linear(p, adapter ? &a : nullptr, pointer<CUstream_st>(stream), dependent_launch);
  }
  raise_unless_ok(s);
}

void py_silu_and_mul(int dtype, int num_rows, int width, const MatrixTuple& x, const MatrixTuple& out, Address stream,
                     bool dependent_launch) {
  SiluAndMulParams p;
  p.dtype = static_cast<DType>(dtype);
  p.num_rows = num_rows;
  p.width = width;
  p.x = pointer<const void>(std::get<0>(x));
  p.x_stride = std::get<1>(x);
  p.out = pointer<void>(std::get<0>(out));
  p.out_stride = std::get<1>(out);
  Status s;
  {
    py::gil_scoped_release release;
    s = silu_and_mul(p, pointer<CUstream_st>(stream), dependent_launch);
  }
  raise_unless_ok(s);
}

// Of the capture that a stream is in; 0: none, or a driver that cannot tell.
uint64_t capture_id(Address stream) {
  using Info = CUresult (*)(CUstream, CUstreamCaptureStatus*, cuuint64_t*, void*, void*, void*);
  static const Info info = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    (void)cudaGetDriverEntryPointByVersion("cuStreamGetCaptureInfo", &function, 12000, cudaEnableDefault, &result);
#else
    (void)cudaGetDriverEntryPoint("cuStreamGetCaptureInfo", &function, cudaEnableDefault, &result);
#endif
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Info>(function) : nullptr;
  }();
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  cuuint64_t id = 0;
  if (info == nullptr || info(pointer<CUstream_st>(stream), &status, &id, nullptr, nullptr, nullptr) != CUDA_SUCCESS) return 0;
  return status == CU_STREAM_CAPTURE_STATUS_ACTIVE ? id : 0;
}

// "NAME, compute capability X.Y", or why there is no device or none that the kernels run on.
std::string device() {
  int id = 0;
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, id);
  if (error != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(error);
  const bool suits = properties.major == 9 && properties.minor == 0;
  return std::string(properties.name) + ", compute capability " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor) + (suits ? "" : ", which is not the 9.0 that the kernels are for");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CUDA kernels of idlm_kernels; use them through idlm_kernels.ops.";
  m.attr("SOURCE_HASH") = IDLM_SOURCE_HASH;
  m.attr("VERSION") = IDLM_VERSION;
  m.attr("CUDART_VERSION") = CUDART_VERSION;
  m.attr("CUTLASS_VERSION") = IDLM_CUTLASS_VERSION;  // of the headers at the build; empty if there were none
  m.def("device", &device);
  m.def("choose_cluster_size", &choose_cluster_size, py::arg("num_rows"), py::arg("row_bytes"));
  m.def("bytes_per_cta", &bytes_per_cta, py::arg("row_bytes"), py::arg("cluster_size"));
  m.def("verify_accept_workspace_bytes", &verify_accept_workspace_bytes);
  m.def("sample_rows", &py_sample_rows);
  m.def("verify_accept", &py_verify_accept);
  m.def("advance", &py_advance);
  m.def("linear", &py_linear);
  m.def("silu_and_mul", &py_silu_and_mul);
  m.def("h_bytes", &h_bytes, py::arg("num_rows"), py::arg("num_slices"), py::arg("rank"));
  m.def("flag_words", &flag_words, py::arg("num_rows"));
  m.def("capture_id", &capture_id);
  m.attr("MAX_SLICES") = kMaxSlices;
  m.def("gemm_shape", [](int n, int k) { return std::pair{gemm::shape(n, k).splits, gemm::shape(n, k).h_splits}; });
  m.def("gemm_stages", &gemm::fit, py::arg("clusters"), py::arg("cluster"), py::arg("token_tiles"),
        py::arg("adapter"));
}
