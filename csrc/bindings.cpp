// The Python module: addresses as integers, so that one build serves every torch version. The GIL is released around
// launches; a status that is not ok becomes an exception here and nowhere else.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
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

// A struct of the headers as a Python class: made of keywords, a field by its own name, a pointer as an address.
template <class S>
class Struct {
 public:
  Struct(py::module_& m, const char* name) : class_(m, name) {
    class_.def(py::init([](const py::kwargs& fields) {
      S made;
      const py::object self = py::cast(&made, py::return_value_policy::reference);
      for (const auto& [field, value] : fields) py::setattr(self, field, value);  // AttributeError for one that is none
      return made;
    }));
  }

  template <class T>
  Struct& field(const char* name, T S::*member) {
    if constexpr (std::is_pointer_v<T>) {
      class_.def_property(
          name, [member](const S& s) { return reinterpret_cast<Address>(s.*member); },
          [member](S& s, Address a) { s.*member = pointer<std::remove_pointer_t<T>>(a); });
    } else if constexpr (std::is_enum_v<T>) {
      class_.def_property(
          name, [member](const S& s) { return static_cast<int>(s.*member); },
          [member](S& s, int value) { s.*member = static_cast<T>(value); });
    } else {
      class_.def_readwrite(name, member);
    }
    return *this;
  }

 private:
  py::class_<S> class_;
};

template <class P, Status (*kKernels)(const P&, const LaunchOptions&)>
void launch(const P& params, const LaunchOptions& options) {
  Status s;
  {
    py::gil_scoped_release release;
    s = kKernels(params, options);
  }
  raise_unless_ok(s);
}

void define_structs(py::module_& m) {
  Struct<Logits>(m, "Logits")
      .field("data", &Logits::data)
      .field("row_stride", &Logits::row_stride)
      .field("dtype", &Logits::dtype)
      .field("num_rows", &Logits::num_rows)
      .field("vocab_size", &Logits::vocab_size)
      .field("id_limit", &Logits::id_limit)
      .field("mask_id", &Logits::mask_id)
      .field("bias", &Logits::bias)
      .field("bias_row_stride", &Logits::bias_row_stride)
      .field("bias_dtype", &Logits::bias_dtype);
  Struct<SamplingParams>(m, "SamplingParams")
      .field("temperature", &SamplingParams::temperature)
      .field("top_k", &SamplingParams::top_k)
      .field("top_p", &SamplingParams::top_p)
      .field("min_p", &SamplingParams::min_p)
      .field("seed", &SamplingParams::seed);
  Struct<LaunchOptions>(m, "LaunchOptions")
      .field("stream", &LaunchOptions::stream)
      .field("dependent_launch", &LaunchOptions::dependent_launch)
      .field("cluster_size", &LaunchOptions::cluster_size);
  Struct<SampleRowsParams>(m, "SampleRowsParams")
      .field("logits", &SampleRowsParams::logits)
      .field("sampling", &SampleRowsParams::sampling)
      .field("positions", &SampleRowsParams::positions)
      .field("positions_are_int64", &SampleRowsParams::positions_are_int64)
      .field("noise_stream", &SampleRowsParams::noise_stream)
      .field("ids", &SampleRowsParams::ids)
      .field("status", &SampleRowsParams::status);
  Struct<DraftLaws>(m, "DraftLaws")
      .field("logits", &DraftLaws::logits)
      .field("stride_request", &DraftLaws::stride_request)
      .field("stride_draft", &DraftLaws::stride_draft)
      .field("dtype", &DraftLaws::dtype)
      .field("cut", &DraftLaws::cut)
      .field("cut_stride", &DraftLaws::cut_stride)
      .field("log_norm", &DraftLaws::log_norm)
      .field("log_norm_stride", &DraftLaws::log_norm_stride);
  Struct<VerifyAcceptParams>(m, "VerifyAcceptParams")
      .field("logits", &VerifyAcceptParams::logits)
      .field("sampling", &VerifyAcceptParams::sampling)
      .field("batch", &VerifyAcceptParams::batch)
      .field("num_k", &VerifyAcceptParams::num_k)
      .field("query_start_loc", &VerifyAcceptParams::query_start_loc)
      .field("num_drafts", &VerifyAcceptParams::num_drafts)
      .field("drafts", &VerifyAcceptParams::drafts)
      .field("drafts_stride", &VerifyAcceptParams::drafts_stride)
      .field("positions", &VerifyAcceptParams::positions)
      .field("branched", &VerifyAcceptParams::branched)
      .field("rejection", &VerifyAcceptParams::rejection)
      .field("draft_laws", &VerifyAcceptParams::draft_laws)
      .field("status", &VerifyAcceptParams::status)
      .field("num_accepted", &VerifyAcceptParams::num_accepted)
      .field("tokens", &VerifyAcceptParams::tokens)
      .field("tokens_stride", &VerifyAcceptParams::tokens_stride)
      .field("next_drafts", &VerifyAcceptParams::next_drafts)
      .field("next_drafts_stride", &VerifyAcceptParams::next_drafts_stride)
      .field("next_num_drafts", &VerifyAcceptParams::next_num_drafts)
      .field("workspace", &VerifyAcceptParams::workspace);
  Struct<AdvanceParams>(m, "AdvanceParams")
      .field("batch", &AdvanceParams::batch)
      .field("num_k", &AdvanceParams::num_k)
      .field("num_accepted", &AdvanceParams::num_accepted)
      .field("tokens", &AdvanceParams::tokens)
      .field("tokens_stride", &AdvanceParams::tokens_stride)
      .field("next_drafts", &AdvanceParams::next_drafts)
      .field("next_drafts_stride", &AdvanceParams::next_drafts_stride)
      .field("next_num_drafts", &AdvanceParams::next_num_drafts)
      .field("length_limits", &AdvanceParams::length_limits)
      .field("stop_ids", &AdvanceParams::stop_ids)
      .field("stop_ids_stride", &AdvanceParams::stop_ids_stride)
      .field("num_stop_ids", &AdvanceParams::num_stop_ids)
      .field("text", &AdvanceParams::text)
      .field("text_stride", &AdvanceParams::text_stride)
      .field("max_len", &AdvanceParams::max_len)
      .field("lengths", &AdvanceParams::lengths)
      .field("drafts", &AdvanceParams::drafts)
      .field("drafts_stride", &AdvanceParams::drafts_stride)
      .field("num_drafts", &AdvanceParams::num_drafts)
      .field("finish", &AdvanceParams::finish)
      .field("num_emitted", &AdvanceParams::num_emitted);
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
  define_structs(m);
  m.def("sample_rows", &launch<SampleRowsParams, &sample_rows>);
  m.def("verify_accept", &launch<VerifyAcceptParams, &verify_accept>);
  m.def("advance", &launch<AdvanceParams, &advance>);
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
