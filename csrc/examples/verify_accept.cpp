// One decode step of an engine, without Python: sample what autoregressive decoding would sample at the clean rows of a
// request, propose exactly that, and see every draft accepted.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "idlm/sampling.h"

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}
void check(const idlm::Status& status) {
  if (!status.ok()) {
    std::fprintf(stderr, "idlm: %s\n", status.message);
    std::exit(1);
  }
}

template <class T>
T* on_device(const std::vector<T>& host) {
  T* device = nullptr;
  check(cudaMalloc(reinterpret_cast<void**>(&device), host.size() * sizeof(T)));
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}
template <class T>
std::vector<T> on_host(const T* device, size_t count) {
  std::vector<T> host(count);
  check(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

}  // namespace

int main() {
  // One request, stride N = 4: pending and 3 drafts, then 3 MASK rows for each of the branches 0..3.
  constexpr int kVocab = 1000, kNumSpecTokens = 3, kClean = kNumSpecTokens + 1, kRows = kClean + kNumSpecTokens * (kNumSpecTokens + 1);
  constexpr int kPending = 41;  // position of the pending token
  std::vector<float> values(static_cast<size_t>(kRows) * kVocab);
  uint32_t state = 1;
  for (float& x : values) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(state >> 8) * 0x1p-20f;  // 0 to 16
  }
  idlm::Logits logits;
  logits.data = on_device(values);
  logits.dtype = idlm::DType::kFloat32;
  logits.row_stride = logits.vocab_size = logits.id_limit = kVocab;
  logits.num_rows = kClean;  // sample_rows looks at the clean rows alone

  // sample_rows takes parameters per row, verify_accept per request: the first of them.
  idlm::SamplingParams sampling;
  sampling.temperature = on_device(std::vector<float>(kClean, 0.8f));
  sampling.top_k = on_device(std::vector<int32_t>(kClean, 50));
  sampling.top_p = on_device(std::vector<float>(kClean, 0.95f));
  sampling.min_p = on_device(std::vector<float>(kClean, 0.0f));
  sampling.seed = on_device(std::vector<int64_t>(kClean, 7));

  idlm::SampleRowsParams rows;
  rows.logits = logits;
  rows.sampling = sampling;
  rows.positions = on_device(std::vector<int32_t>{kPending + 1, kPending + 2, kPending + 3, kPending + 4});
  rows.ids = on_device(std::vector<int64_t>(kClean, -1));
  const idlm::LaunchOptions options;
  check(idlm::sample_rows(rows, options));

  idlm::VerifyAcceptParams step;
  step.logits = logits;
  step.logits.num_rows = kRows;
  step.sampling = sampling;
  step.batch = 1;
  step.num_spec_tokens = kNumSpecTokens;
  step.query_start_loc = on_device(std::vector<int32_t>{0, kRows});
  step.num_drafts = on_device(std::vector<int32_t>{kNumSpecTokens});
  step.drafts = rows.ids;
  step.drafts_stride = kNumSpecTokens;
  step.positions = on_device(std::vector<int32_t>{kPending});
  step.quadratic = true;
  step.num_accepted = on_device(std::vector<int32_t>{-1});
  step.tokens = on_device(std::vector<int64_t>(kClean, -1));
  step.tokens_stride = kClean;
  step.next_drafts = on_device(std::vector<int64_t>(kNumSpecTokens, -1));
  step.next_drafts_stride = kNumSpecTokens;
  step.next_num_drafts = on_device(std::vector<int32_t>{-1});
  check(cudaMalloc(&step.workspace, idlm::verify_accept_workspace_bytes(step.batch, step.num_spec_tokens)));
  check(idlm::verify_accept(step, options));
  check(cudaDeviceSynchronize());

  const std::vector<int64_t> sampled = on_host(rows.ids, kClean), tokens = on_host(step.tokens, kClean);
  const int accepted = on_host(step.num_accepted, 1)[0], proposed = on_host(step.next_num_drafts, 1)[0];
  std::printf("accepted %d of %d drafts, committed", accepted, kNumSpecTokens);
  for (int64_t token : tokens) std::printf(" %lld", static_cast<long long>(token));
  std::printf(", proposed %d\n", proposed);
  return accepted == kNumSpecTokens && tokens == sampled && proposed == kNumSpecTokens ? 0 : 1;
}
