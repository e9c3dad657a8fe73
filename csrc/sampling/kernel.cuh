// One token per logits row: argmax over the kept ids of logit / T + Gumbel noise; and, around it, the decision of a step.
//
// A cluster of 1-8 CTAs holds one row in shared memory: one read of the row from device memory serves the maximum, the
// truncation (threshold.cuh), the argmax and, in `rejection`, the residual.
//   bytes   one row: 2 V (bf16), 304 KB at V = 151,936, 0.09 us of an H100's 3.35 TB/s; all else is noise beside it
//   work    Philox: about 13 instructions per id. Logarithms only for ids that can still win: E >= v, so g <= -log v, and
//           an id whose logit / T - log v lies below the best score so far needs none. Ids below the cut cost 1/8 compare.
// Three roles share the code: a row of sample_rows; clean row i of a request; MASK row j of the branch that was taken.
// The last one runs in a second launch, which reads the results of the first: no flags between CTAs, nothing spins.
#pragma once

#include "idlm/sampling.h"
#include "sampling/noise.cuh"
#include "sampling/threshold.cuh"

namespace idlm {

constexpr int kThreads = 320;  // two CTAs per SM at up to 96 registers
constexpr float kGreedyBelow = 1e-4f;
constexpr int32_t kAccepted = -1;  // in the workspace: the draft stands, there is no token of row i

enum class Role : int32_t { kSampleRow, kCleanRow, kMaskRow };

struct KernelParams {
  Role role;
  Logits logits;
  bool logits_aligned;
  SamplingParams sampling;
  // kSampleRow
  const void* positions_of_rows;
  bool positions_are_int64;
  int32_t noise_stream;
  int64_t* ids;
  // kCleanRow, kMaskRow
  int32_t num_k;
  const int32_t* query_start_loc;
  const int32_t* num_drafts;
  const int64_t* drafts;
  int64_t drafts_stride;
  const int32_t* positions;
  bool branched;
  DraftLaws laws;
  bool laws_aligned;
  int32_t* status;
  int32_t* row_tokens;  // workspace [batch, num_k + 1]: y_i, or kAccepted
  int32_t* num_accepted;
  int64_t* tokens;
  int64_t tokens_stride;
  int64_t* next_drafts;
  int64_t next_drafts_stride;
  int32_t* next_num_drafts;
};

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
        row(vectors, params.logits.id_limit, cluster_rank(), cluster_size()),
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

  // Reads the row; returns its status bits. Afterwards row_max and row_argmax are known in all threads.
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
    const uint32_t bits = (row.has_nan ? kStatusNan : 0) | (row.has_inf ? kStatusInf : 0);
    uint64_t found[Reduce::kWidth] = {warp_max(best), __reduce_or_sync(~0u, bits) & kStatusNan,
                                      __reduce_or_sync(~0u, bits) & kStatusInf};
    const uint64_t all = reduce.template all<Max>(found);  // its barriers also publish the row within the CTA
    const uint64_t largest = __shfl_sync(~0u, all, 0);
    const int32_t status = static_cast<int32_t>(__shfl_sync(~0u, all, 1) | __shfl_sync(~0u, all, 2));
    if (largest == 0) return status | kStatusEmptyRow;
    row_max = status & kStatusInf ? INFINITY : score_of(largest);
    row_argmax = id_of(largest);
    return status;
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

  // The token after a refused draft: a sample of max(0, p - q), or -1 if that is empty. q: the law of the draft.
  __device__ int32_t sample_residual(const void* q_logits, float q_cut, float q_log_norm) {
    uint64_t best = 0;
    float scale = INFINITY;  // E >= v, so a residual r can win only if v <= r / exp(best)
    for_each_quad([&](int32_t q, const float(&x)[4]) {
      float residual[4];
      float largest = 0.0f;
      float q_logit[4];
      load_law(q_logits, row.first_id + 4 * q, q_logit);
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

  // Four logits of a draft law, from id on, without NaN, Inf kept.
  __device__ __forceinline__ void load_law(const void* q_logits, int32_t id, float (&x)[4]) const {
    load_quad(q_logits, p.laws.dtype, id, p.laws_aligned, p.logits.id_limit - id, x);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (id + e == p.logits.mask_id) x[e] = -INFINITY;
  }
};

// ---- the decision of a step

struct Request {
  int32_t start, num_rows, num_drafts;  // rows of logits; drafts that exist
  bool present, bad_count;

  __device__ Request(const KernelParams& p, int32_t b) {
    start = load_uniform(p.query_start_loc + b);
    num_rows = load_uniform(p.query_start_loc + b + 1) - start;
    present = num_rows > 0;
    const int32_t given = load_uniform(p.num_drafts + b);
    num_drafts = min(max(given, 0), min(max(num_rows - 1, 0), p.num_k));
    bad_count = present && num_drafts != given;
  }
};

__device__ __forceinline__ bool is_id(int64_t id, int32_t vocab_size) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(vocab_size);
}

// How many drafts stand. Whole warps call it; lane i looks at draft i.
__device__ inline int32_t count_accepted(const KernelParams& p, const Request& r, int32_t b, bool rejection) {
  const int32_t i = lane_id();
  bool stands = false;
  if (i < r.num_drafts) {
    const int32_t y = p.row_tokens[b * (p.num_k + 1) + i];
    stands = rejection ? y == kAccepted : y == p.drafts[b * p.drafts_stride + i];
  }
  return __ffs(~__ballot_sync(~0u, stands)) - 1;
}

// Writes what the step commits; one warp.
__device__ inline void write_outcome(const KernelParams& p, const Request& r, int32_t b, int32_t accepted, bool proposed,
                                     int32_t token) {
  const int32_t i = lane_id();
  bool bad = r.bad_count;
  if (i <= p.num_k) {
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
    p.next_num_drafts[b] = proposed ? p.num_k : 0;
    if (bad && p.status != nullptr) atomicOr(p.status + b, kStatusBadDraft);
  }
}

__device__ __forceinline__ bool is_first_thread_of_cluster() { return cluster_rank() == 0 && threadIdx.x == 0; }

template <class L, class S, bool kRejection>
__device__ __forceinline__ int32_t token_of(RowSampler<L, S, kRejection>& sampler, int32_t status) {
  return status & kStatusEmptyRow ? sampler.lowest_allowed() : sampler.sample();
}

template <class L, class S, bool kRejection>
__device__ void sample_row(const KernelParams& p, RowSampler<L, S, kRejection>& sampler) {
  const int32_t status = sampler.load();
  let_next_kernel_start();
  if (!(status & kStatusEmptyRow)) sampler.truncate(false);
  const int32_t id = token_of(sampler, status);
  if (is_first_thread_of_cluster()) {
    p.ids[sampler.task.row] = id;
    if (status && p.status != nullptr) p.status[sampler.task.row] |= status;
  }
}

// y_i of clean row i, and in `rejection` whether draft i + 1 stands.
template <class L, class S, bool kRejection>
__device__ void clean_row(const KernelParams& p, const Request& r, RowSampler<L, S, kRejection>& sampler) {
  const int32_t b = sampler.task.entry, i = sampler.task.index;
  const int32_t status = sampler.load();
  let_next_kernel_start();
  const bool judge = kRejection && i < r.num_drafts && !sampler.greedy;
  if (!(status & kStatusEmptyRow)) sampler.truncate(judge);

  int32_t token = -1;
  bool accepted = false;
  if constexpr (kRejection) {
    const int64_t draft = i < r.num_drafts ? load_uniform(p.drafts + b * p.drafts_stride + i) : -1;
    if (judge && is_id(draft, p.logits.vocab_size)) {
      const int32_t x = static_cast<int32_t>(draft);
      const DraftLaws& laws = p.laws;
      const int64_t law = b * laws.stride_request + i * laws.stride_draft;
      const float q_cut = load_uniform(laws.cut + b * laws.cut_stride + i);
      const float q_norm = load_uniform(laws.log_norm + b * laws.log_norm_stride + i);
      const bool allowed = x < p.logits.id_limit && x != p.logits.mask_id;
      float p_x = 0.0f, q_x = 0.0f;
      if (allowed) {
        float logit =
            Scalar<L>::up(load_uniform(static_cast<const L*>(p.logits.data) + sampler.task.row * p.logits.row_stride + x));
        if (p.logits.bias != nullptr) logit += load_uniform_as_float(sampler.bias_of_row(), p.logits.bias_dtype, x);
        if (status & kStatusEmptyRow) {
          p_x = x == sampler.lowest_allowed() ? 1.0f : 0.0f;
        } else {
          p_x = logit >= sampler.cut ? sampler.probability(logit, sampler.log_norm) : 0.0f;
        }
        const float q_logit = load_uniform_as_float(laws.logits, laws.dtype, law + x);
        q_x = sampler.probability_if_kept(q_logit, q_cut, q_norm);
      }
      const float u = word_to_uniform(sampler.noise.quad(0, kStreamAccept).w[0]);
      accepted = u * q_x < p_x;
      if (!accepted && !(status & kStatusEmptyRow)) {
        const void* q_logits = static_cast<const char*>(laws.logits) + law * size_of(laws.dtype);
        token = sampler.sample_residual(q_logits, q_cut, q_norm);
      }
    }
    if (!accepted && token < 0) token = token_of(sampler, status);
    // A greedy law is a point mass: its draft stands iff it is that point, whatever q was.
    if (sampler.greedy && i < r.num_drafts) accepted = draft == token;
  } else {
    token = token_of(sampler, status);
  }

  if (is_first_thread_of_cluster()) {
    p.row_tokens[b * (p.num_k + 1) + i] = accepted ? kAccepted : token;
    if (status && p.status != nullptr) atomicOr(p.status + b, status);
  }
  if (p.num_k == 0 && cluster_rank() == 0 && warp_id() == 0) write_outcome(p, r, b, 0, false, token);
}

// The j-th draft of the next step and, in `rejection`, its law.
template <class L, class S, bool kRejection>
__device__ void mask_row(const KernelParams& p, RowSampler<L, S, kRejection>& sampler) {
  const int32_t b = sampler.task.entry, j = sampler.task.index;
  const int32_t status = sampler.load();
  let_next_kernel_start();
  if (!(status & kStatusEmptyRow)) sampler.truncate(kRejection);
  const int32_t token = token_of(sampler, status);
  if (is_first_thread_of_cluster()) {
    p.next_drafts[b * p.next_drafts_stride + j] = token;
    if (status && p.status != nullptr) atomicOr(p.status + b, status);
  }
  if constexpr (kRejection) {
    const DraftLaws& laws = p.laws;
    const bool empty = status & kStatusEmptyRow;  // stored as the point mass that it was sampled from
    if (is_first_thread_of_cluster()) {
      laws.cut[b * laws.cut_stride + j] = empty ? 0.0f : sampler.temperature.z(sampler.cut);
      laws.log_norm[b * laws.log_norm_stride + j] = empty ? 0.0f : sampler.log_norm;
    }
    const int64_t law = b * laws.stride_request + j * laws.stride_draft;
    const auto write = [&](auto* gLaw) {
      using Q = std::remove_pointer_t<decltype(gLaw)>;
      const auto& row = sampler.row;
      for (int32_t q = threadIdx.x; q < row.num_quads(); q += kThreads) {
        const int32_t id = row.first_id + 4 * q;
        float x[4];
        row.quad(q, x);
        Pack<Q, 4> pack;
#pragma unroll
        for (int e = 0; e < 4; ++e)
          pack.v[e] = Scalar<Q>::down(empty && id + e == sampler.lowest_allowed() ? 0.0f : x[e]);
        if (p.laws_aligned && id + 4 <= p.logits.id_limit) {
          *reinterpret_cast<Pack<Q, 4>*>(gLaw + id) = pack;
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (id + e < p.logits.id_limit) gLaw[id + e] = pack.v[e];
        }
      }
      if (cluster_rank() == 0) {
        for (int32_t id = p.logits.id_limit + threadIdx.x; id < p.logits.vocab_size; id += kThreads)
          gLaw[id] = Scalar<Q>::down(-INFINITY);
      }
    };
    if (laws.dtype == DType::kFloat32) {
      write(static_cast<float*>(laws.logits) + law);
    } else {
      write(static_cast<L*>(laws.logits) + law);
    }
  }
}

template <class L, class S, bool kRejection>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(16) uint8_t sVectors[];
  using Sampler = RowSampler<L, S, kRejection>;
  __shared__ typename Sampler::Reduce::Shared sReduce;

  wait_for_previous_kernel();
  const int32_t cluster = blockIdx.x / cluster_size();
  // Only leaves the kernel for whole clusters: nobody waits for a CTA that has left.
  if (p.role == Role::kSampleRow) {
    const auto position = p.positions_are_int64 ? load_uniform(static_cast<const int64_t*>(p.positions_of_rows) + cluster)
                                                : load_uniform(static_cast<const int32_t*>(p.positions_of_rows) + cluster);
    const Task task{cluster, cluster, 0, p.noise_stream, static_cast<uint32_t>(position)};
    cluster_arrive();  // partner: cluster_wait() before the first store to another CTA
    Sampler sampler(p, task, sReduce, sVectors);
    cluster_wait();
    sample_row(p, sampler);
  } else if (p.role == Role::kCleanRow) {
    const int32_t b = cluster / (p.num_k + 1), i = cluster % (p.num_k + 1);
    const Request r(p, b);
    if (!r.present || i > r.num_drafts) {
      if (p.num_k == 0 && cluster_rank() == 0 && warp_id() == 0) write_outcome(p, r, b, 0, false, -1);
      return;
    }
    const Task task{r.start + i, b, i, kStreamTarget, static_cast<uint32_t>(load_uniform(p.positions + b) + 1 + i)};
    cluster_arrive();
    Sampler sampler(p, task, sReduce, sVectors);
    cluster_wait();
    clean_row(p, r, sampler);
  } else {
    const int32_t b = cluster / p.num_k, j = cluster % p.num_k;
    const Request r(p, b);
    const int32_t accepted = count_accepted(p, r, b, kRejection);
    const int32_t first_mask = 1 + r.num_drafts + (p.branched ? accepted * p.num_k : 0);
    const bool proposed =
        r.present && first_mask + p.num_k <= r.num_rows && (p.branched || accepted == r.num_drafts);
    if (j == 0 && cluster_rank() == 0 && warp_id() == 0) {
      const int32_t token = r.present ? load_uniform(p.row_tokens + b * (p.num_k + 1) + accepted) : -1;
      write_outcome(p, r, b, accepted, proposed, token);
    }
    if (!proposed) {
      if (is_first_thread_of_cluster()) p.next_drafts[b * p.next_drafts_stride + j] = -1;
      return;
    }
    const Task task{r.start + first_mask + j, b, j, kRejection ? kStreamDraft : kStreamTarget,
                    static_cast<uint32_t>(load_uniform(p.positions + b) + 1 + accepted + 1 + j)};
    cluster_arrive();
    Sampler sampler(p, task, sReduce, sVectors);
    cluster_wait();
    mask_row(p, sampler);
  }
}

}  // namespace idlm
