// One row, from its logits to its token: the maximum, the cut, the noise, and in `rejection` the residual. A cluster works on
// it; what concerns several rows is in decision.cuh.
#pragma once

#include "sampling/noise.cuh"
#include "sampling/params.h"
#include "sampling/threshold.cuh"

namespace idlm {

constexpr float kGreedyBelow = 1e-4f;

__device__ __forceinline__ int64_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

__device__ __forceinline__ float load_uniform_as_float(const void* g, DType type, int64_t offset) {
  switch (type) {
    case DType::kBFloat16: return __bfloat162float(load_uniform(static_cast<const __nv_bfloat16*>(g) + offset));
    case DType::kFloat16: return __half2float(load_uniform(static_cast<const __half*>(g) + offset));
    default: return load_uniform(static_cast<const float*>(g) + offset);
  }
}

// What a cluster has to do, the same in all its threads.
struct Task {
  int32_t row;      // of logits
  int32_t entry;    // of the parameters: row or request
  int32_t index;    // i or j
  int32_t stream;
  uint32_t position;  // of the predicted token
};

// Best score and id in one integer: a higher score wins, then a lower id. 0: nothing yet.
__device__ __forceinline__ uint64_t ranked(float score, int32_t id) {
  return (static_cast<uint64_t>(ordered(score + 0.0f)) << 32) | static_cast<uint32_t>(~id);  // -0 + 0 = +0
}
__device__ __forceinline__ int32_t id_of(uint64_t best) { return static_cast<int32_t>(~static_cast<uint32_t>(best)); }
__device__ __forceinline__ float score_of(uint64_t best) { return best ? from_ordered(best >> 32) : -INFINITY; }

template <class L, class S, bool kRejection>
struct RowSampler {
  using Row = ClusterRow<L, S, kThreads>;
  using Reduce = ClusterReduce<kThreads / 32>;
  using Cut = Threshold<S, Row, Reduce>;

  const KernelParams& p;
  const Task task;
  Row row;
  Reduce reduce;
  Temperature temperature;
  NoiseSource noise;
  bool greedy;
  float row_max = -INFINITY;  // of the logits
  int32_t row_argmax = -1;    // the lowest id of it
  float cut = 0;              // the smallest logit that is kept
  float log_norm = 0;

  __device__ RowSampler(const KernelParams& params, const Task& t, typename Reduce::Shared& shared, void* vectors)
      : p(params),
        task(t),
        row(vectors, params.logits.id_limit, params.vectors_per_cta, cluster_rank()),
        reduce(shared),
        temperature(1.0f) {
    const float value = load_uniform(p.sampling.temperature + t.entry);
    greedy = !(value >= kGreedyBelow);
    temperature = Temperature(greedy ? 1.0f : value);
    const uint64_t seed = static_cast<uint64_t>(load_uniform(p.sampling.seed + t.entry));
    noise = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), t.position};
  }

  __device__ const void* bias_of_row() const {
    if (p.logits.bias == nullptr) return nullptr;
    return static_cast<const char*>(p.logits.bias) + task.row * p.logits.bias_row_stride * size_of(p.logits.bias_dtype);
  }

  __device__ int32_t lowest_allowed() const { return p.logits.mask_id == 0 ? 1 : 0; }

  // Reads the row; returns its error flags. Afterwards row_max and row_argmax are known in all threads.
  __device__ int32_t load() {
    RowSource<L> source;
    source.logits = static_cast<const L*>(p.logits.data) + task.row * p.logits.row_stride;
    source.bias = bias_of_row();
    source.bias_dtype = p.logits.bias_dtype;
    source.aligned = p.logits_aligned;
    source.num_ids = p.logits.id_limit;
    source.mask_id = p.logits.mask_id;
    row.load(source);
    const uint64_t best = row.thread_max > -INFINITY ? ranked(row.thread_max, row.id_of_max()) : 0;
    const uint32_t bits = (row.has_nan ? kFlagNan : 0) | (row.has_inf ? kFlagInf : 0);
    uint64_t found[Reduce::kWidth] = {warp_max(best), __reduce_or_sync(~0u, bits) & kFlagNan,
                                      __reduce_or_sync(~0u, bits) & kFlagInf};
    const uint64_t all = reduce.template all<Max>(found);  // its barriers also publish the row within the CTA
    const uint64_t largest = __shfl_sync(~0u, all, 0);
    const int32_t error_flags = static_cast<int32_t>(__shfl_sync(~0u, all, 1) | __shfl_sync(~0u, all, 2));
    if (largest == 0) return error_flags | kFlagEmptyRow;
    row_max = error_flags & kFlagInf ? INFINITY : score_of(largest);
    row_argmax = id_of(largest);
    return error_flags;
  }

  // Sets cut and, if `with_norm`, log_norm. row_max > -inf.
  __device__ void truncate(bool with_norm) {
    if (greedy && !with_norm) return;
    Cut threshold{row, reduce, temperature, row_max, temperature.z(row_max)};
    const SamplingParams& s = p.sampling;
    cut = threshold.cut(load_uniform(s.top_k + task.entry), load_uniform(s.top_p + task.entry),
                        load_uniform(s.min_p + task.entry));
    if (with_norm) log_norm = threshold.z_max + logf(static_cast<float>(threshold.mass_from(cut)) / kMassUnit);
  }

  // argmax of z + g over logits >= cut, or of the logits if greedy.
  __device__ int32_t sample() {
    if (greedy) return row_argmax;
    // Every thread starts from the score of the largest logit, and leaves out what cannot beat it.
    uint64_t best = ranked(__fadd_rn(temperature.z(row_max), gumbel_of(row_argmax)), row_argmax);
    constexpr float kLog2E = 1.44269504f;
    const float scale = temperature.reciprocal * kLog2E;
    float bias = 0.0f;
    const auto set_bound = [&] { bias = (1e-3f - score_of(best)) * kLog2E; };
    set_bound();
    for_each_quad([&](int32_t q, const float(&x)[4]) {
      const int32_t id = row.first_id + 4 * q;
      const Words words = noise.quad(id >> 2, task.stream);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float v = word_to_uniform(words.w[e]);
        // E >= v, so z + g can reach the best score only if v <= exp(z - best). z comes from a product here: a margin
        // covers its rounding, that of z + g and of the logarithms. Where Inf - Inf leaves a NaN, nothing is left out.
        const float y = x[e] * scale;
        const bool hopeless = v > exp2_approx(fmaf(fabsf(y), 0x1p-20f, y + bias));
        if (!hopeless && x[e] >= cut) best = max(best, ranked(__fadd_rn(temperature.z(x[e]), uniform_to_gumbel(v)), id + e));
      }
    }, [&] { best = warp_max(best); set_bound(); });
    return argmax_of_cluster(best);
  }

  // The token after a rejected draft: a sample of max(0, p - q), or -1 if that is empty. q: the distribution of the draft.
  __device__ int32_t sample_residual(const void* q_logits, float q_cut, float q_log_norm) {
    uint64_t best = 0;
    float scale = INFINITY;  // E >= v, so a residual r can win only if v <= r / exp(best)
    for_each_quad([&](int32_t q, const float(&x)[4]) {
      float residual[4];
      float largest = 0.0f;
      float q_logit[4];
      load_draft_logits(q_logits, row.first_id + 4 * q, q_logit);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        residual[e] = x[e] >= cut ? probability(x[e], log_norm) - probability_if_kept(q_logit[e], q_cut, q_log_norm) : 0.0f;
        largest = fmaxf(largest, residual[e]);
      }
      if (largest > 0.0f) {
        const Words words = noise.quad((row.first_id >> 2) + q, task.stream);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float v = word_to_uniform(words.w[e]);
          if (residual[e] > 0.0f && v <= residual[e] * scale) {
            const float score = __fadd_rn(logf(residual[e]), uniform_to_gumbel(v));
            best = max(best, ranked(score, row.first_id + 4 * q + e));
          }
        }
      }
    }, [&] { best = warp_max(best); scale = expf(-score_of(best)) * 1.001f; });
    return argmax_of_cluster(best);
  }

  __device__ __forceinline__ float probability(float x, float norm) const { return expf(temperature.z(x) - norm); }

  __device__ __forceinline__ float probability_if_kept(float x, float z_cut, float norm) const {
    if (!(x > -INFINITY)) return 0.0f;
    const float z = temperature.z(x);
    return z >= z_cut ? expf(z - norm) : 0.0f;
  }

 private:
  // Calls f(quad, its four values) for the quads of this thread that hold a kept id, and after each round `join`, in all
  // lanes at once.
  template <class F, class J>
  __device__ __forceinline__ void for_each_quad(F&& f, J&& join) {
    const int32_t num_quads = row.num_quads();
    for (int32_t base = 0; base < num_quads; base += kThreads) {
      const int32_t q = base + threadIdx.x;
      bool any = false;
      if (q < num_quads) {
        float x[4];
        row.quad(q, x);
        any = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) >= cut;
        if (any) f(q, x);
      }
      if (__any_sync(~0u, any)) join();
    }
  }

  __device__ float gumbel_of(int32_t id) const {
    const Words words = noise.quad(id >> 2, task.stream);
    uint32_t word = words.w[0];
#pragma unroll
    for (int e = 1; e < 4; ++e) word = (id & 3) == e ? words.w[e] : word;
    return uniform_to_gumbel(word_to_uniform(word));
  }

  // -1 if no thread found anything. best: equal in all lanes of a warp.
  __device__ int32_t argmax_of_cluster(uint64_t best) {
    uint64_t bests[Reduce::kWidth] = {best};
    const uint64_t all = __shfl_sync(~0u, reduce.template all<Max>(bests), 0);
    return all == 0 ? -1 : id_of(all);
  }

  // Four logits of a draft distribution, from id on, without NaN, Inf kept.
  __device__ __forceinline__ void load_draft_logits(const void* q_logits, int32_t id, float (&x)[4]) const {
    load_quad(q_logits, p.draft_dists.dtype, id, p.draft_dists_aligned, p.logits.id_limit - id, x);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (id + e == p.logits.mask_id) x[e] = -INFINITY;
  }
};

}  // namespace idlm
