// The Python module: addresses as integers, so that one build serves every torch version. The GIL is released around
// launches; a status that is not ok becomes an exception here and nowhere else.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "gemm/heuristics.h"
#include "idlm/attention.h"
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
  // Local to the module, which may be loaded more than once: tests load it with a fault planted.
  Struct(py::module_& m, const char* name) : class_(m, name, py::module_local()) {
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
    } else if constexpr (std::is_array_v<T>) {
      class_.def_property(
          name, [member](const S& s) { return std::vector(std::begin(s.*member), std::end(s.*member)); },
          [member, name](S& s, const std::vector<std::remove_extent_t<T>>& values) {
            if (values.size() > std::extent_v<T>) throw py::value_error(std::string(name) + " holds " + std::to_string(std::extent_v<T>) + " values");
            std::copy(values.begin(), values.end(), s.*member);
          });
    } else {
      class_.def_readwrite(name, member);
    }
    return *this;
  }

 private:
  py::class_<S> class_;
};

template <class T>
struct SameType {
  using type = T;
};
template <class T>
using Same = typename SameType<T>::type;  // takes no part in the choice of T

template <class P, class... Rest>
void launch(Status (*kernels)(const P&, Rest...), const P& params, Same<Rest>... rest) {
  Status s;
  {
    py::gil_scoped_release release;
    s = kernels(params, rest...);
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
      .field("error_flags", &SampleRowsParams::error_flags);
  Struct<DraftDistributions>(m, "DraftDistributions")
      .field("logits", &DraftDistributions::logits)
      .field("stride_request", &DraftDistributions::stride_request)
      .field("stride_draft", &DraftDistributions::stride_draft)
      .field("dtype", &DraftDistributions::dtype)
      .field("cut", &DraftDistributions::cut)
      .field("cut_stride", &DraftDistributions::cut_stride)
      .field("log_norm", &DraftDistributions::log_norm)
      .field("log_norm_stride", &DraftDistributions::log_norm_stride);
  Struct<VerifyAcceptParams>(m, "VerifyAcceptParams")
      .field("logits", &VerifyAcceptParams::logits)
      .field("sampling", &VerifyAcceptParams::sampling)
      .field("batch", &VerifyAcceptParams::batch)
      .field("num_spec_tokens", &VerifyAcceptParams::num_spec_tokens)
      .field("query_start_loc", &VerifyAcceptParams::query_start_loc)
      .field("num_drafts", &VerifyAcceptParams::num_drafts)
      .field("drafts", &VerifyAcceptParams::drafts)
      .field("drafts_stride", &VerifyAcceptParams::drafts_stride)
      .field("positions", &VerifyAcceptParams::positions)
      .field("quadratic", &VerifyAcceptParams::quadratic)
      .field("rejection", &VerifyAcceptParams::rejection)
      .field("draft_dists", &VerifyAcceptParams::draft_dists)
      .field("error_flags", &VerifyAcceptParams::error_flags)
      .field("num_accepted", &VerifyAcceptParams::num_accepted)
      .field("tokens", &VerifyAcceptParams::tokens)
      .field("tokens_stride", &VerifyAcceptParams::tokens_stride)
      .field("next_drafts", &VerifyAcceptParams::next_drafts)
      .field("next_drafts_stride", &VerifyAcceptParams::next_drafts_stride)
      .field("next_num_drafts", &VerifyAcceptParams::next_num_drafts)
      .field("workspace", &VerifyAcceptParams::workspace);
  Struct<AdvanceParams>(m, "AdvanceParams")
      .field("batch", &AdvanceParams::batch)
      .field("num_spec_tokens", &AdvanceParams::num_spec_tokens)
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
      .field("finish_reason", &AdvanceParams::finish_reason)
      .field("num_emitted", &AdvanceParams::num_emitted);
  Struct<LinearParams>(m, "LinearParams")
      .field("dtype", &LinearParams::dtype)
      .field("x", &LinearParams::x)
      .field("x_stride", &LinearParams::x_stride)
      .field("weight", &LinearParams::weight)
      .field("weight_stride", &LinearParams::weight_stride)
      .field("weight_is_constant", &LinearParams::weight_is_constant)
      .field("bias", &LinearParams::bias)
      .field("bias_dtype", &LinearParams::bias_dtype)
      .field("out", &LinearParams::out)
      .field("out_stride", &LinearParams::out_stride)
      .field("num_rows", &LinearParams::num_rows)
      .field("n", &LinearParams::n)
      .field("k", &LinearParams::k)
      .field("silu_and_mul", &LinearParams::silu_and_mul);
  Struct<AdapterParams>(m, "AdapterParams")
      .field("lora_a", &AdapterParams::lora_a)
      .field("lora_a_stride", &AdapterParams::lora_a_stride)
      .field("lora_b", &AdapterParams::lora_b)
      .field("lora_b_stride", &AdapterParams::lora_b_stride)
      .field("lora_mask", &AdapterParams::lora_mask)
      .field("lora_mask_is_int32", &AdapterParams::lora_mask_is_int32)
      .field("scale", &AdapterParams::scale)
      .field("rank", &AdapterParams::rank)
      .field("num_slices", &AdapterParams::num_slices)
      .field("slice_ends", &AdapterParams::slice_ends)
      .field("h", &AdapterParams::h)
      .field("flags", &AdapterParams::flags);
  Struct<SiluAndMulParams>(m, "SiluAndMulParams")
      .field("dtype", &SiluAndMulParams::dtype)
      .field("x", &SiluAndMulParams::x)
      .field("x_stride", &SiluAndMulParams::x_stride)
      .field("out", &SiluAndMulParams::out)
      .field("out_stride", &SiluAndMulParams::out_stride)
      .field("num_rows", &SiluAndMulParams::num_rows)
      .field("width", &SiluAndMulParams::width);
}

void define_attention(py::module_& m) {
  Struct<AttentionParams>(m, "AttentionParams")
      .field("dtype", &AttentionParams::dtype)
      .field("cache_is_fp8", &AttentionParams::cache_is_fp8)
      .field("q", &AttentionParams::q)
      .field("q_stride_row", &AttentionParams::q_stride_row)
      .field("q_stride_head", &AttentionParams::q_stride_head)
      .field("k_cache", &AttentionParams::k_cache)
      .field("k_stride_page", &AttentionParams::k_stride_page)
      .field("k_stride_slot", &AttentionParams::k_stride_slot)
      .field("k_stride_head", &AttentionParams::k_stride_head)
      .field("v_cache", &AttentionParams::v_cache)
      .field("v_stride_page", &AttentionParams::v_stride_page)
      .field("v_stride_slot", &AttentionParams::v_stride_slot)
      .field("v_stride_head", &AttentionParams::v_stride_head)
      .field("page_table", &AttentionParams::page_table)
      .field("page_table_stride", &AttentionParams::page_table_stride)
      .field("seq_lens", &AttentionParams::seq_lens)
      .field("query_start_loc", &AttentionParams::query_start_loc)
      .field("tree_mask", &AttentionParams::tree_mask)
      .field("k_scale", &AttentionParams::k_scale)
      .field("k_scale_stride", &AttentionParams::k_scale_stride)
      .field("v_scale", &AttentionParams::v_scale)
      .field("v_scale_stride", &AttentionParams::v_scale_stride)
      .field("out", &AttentionParams::out)
      .field("out_stride_row", &AttentionParams::out_stride_row)
      .field("out_stride_head", &AttentionParams::out_stride_head)
      .field("lse", &AttentionParams::lse)
      .field("lse_stride", &AttentionParams::lse_stride)
      .field("num_rows", &AttentionParams::num_rows)
      .field("num_heads", &AttentionParams::num_heads)
      .field("num_kv_heads", &AttentionParams::num_kv_heads)
      .field("head_dim", &AttentionParams::head_dim)
      .field("batch", &AttentionParams::batch)
      .field("num_pages", &AttentionParams::num_pages)
      .field("page_size", &AttentionParams::page_size)
      .field("max_pages", &AttentionParams::max_pages)
      .field("max_query_len", &AttentionParams::max_query_len)
      .field("window", &AttentionParams::window)
      .field("sm_scale", &AttentionParams::sm_scale)
      .field("scratch", &AttentionParams::scratch)
      .field("flags", &AttentionParams::flags)
      .field("max_ctas", &AttentionParams::max_ctas);
  m.def("strided_attention", [](const AttentionParams& p, Address stream, bool dependent_launch) {
    launch(&strided_attention, p, pointer<CUstream_st>(stream), dependent_launch);
  });
  m.def("attention_scratch_bytes", &attention_scratch_bytes);
  m.def("attention_flag_words", &attention_flag_words);
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
  define_attention(m);
  m.def("sample_rows", [](const SampleRowsParams& p, const LaunchOptions& o) { launch(&sample_rows, p, o); });
  m.def("verify_accept", [](const VerifyAcceptParams& p, const LaunchOptions& o) { launch(&verify_accept, p, o); });
  m.def("advance", [](const AdvanceParams& p, const LaunchOptions& o) { launch(&advance, p, o); });
  m.def("linear", [](const LinearParams& p, const AdapterParams* adapter, Address stream, bool dependent_launch) {
    launch(&linear, p, adapter, pointer<CUstream_st>(stream), dependent_launch);
  });
  m.def("silu_and_mul", [](const SiluAndMulParams& p, Address stream, bool dependent_launch) {
    launch(&silu_and_mul, p, pointer<CUstream_st>(stream), dependent_launch);
  });
  m.def("h_bytes", &h_bytes, py::arg("num_rows"), py::arg("num_slices"), py::arg("rank"));
  m.def("flag_words", &flag_words, py::arg("num_rows"));
  m.attr("MAX_SLICES") = kMaxSlices;
  m.def("gemm_shape", [](int n, int k) { return std::pair{gemm::shape(n, k).splits, gemm::shape(n, k).h_splits}; });
  m.def("gemm_tile", [](int num_rows, bool adapter) {
    const gemm::Tile tile = gemm::tile_for(num_rows, adapter);
    return std::tuple{tile.rows, tile.tokens, tile.max_ctas_per_sm()};
  });
  m.def(
      "gemm_stages",
      [](int64_t clusters, int cluster, int token_tiles, bool adapter) {
        return gemm::fit(clusters, cluster, gemm::tile_of(token_tiles, adapter));
      },
      py::arg("clusters"), py::arg("cluster"), py::arg("token_tiles"), py::arg("adapter"));
}
