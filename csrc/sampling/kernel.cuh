// One token per logits row: argmax over the kept ids of logit / T + Gumbel noise; and, around it, the decision of a step.
//
// A cluster of 1-8 CTAs holds one row in shared memory: one read of the row from device memory serves the maximum, the
// truncation (threshold.cuh), the argmax and, in `rejection`, the residual.
//   bytes   one row: 2 V (bf16), 304 KB at V = 151,936, 0.09 us of an H100's 3.35 TB/s; all else is noise beside it
//   work    Philox, ten rounds of two wide multiplications for four ids, where one of them is kept. Logarithms only for ids
//           that can still win: E >= v, so g <= -log v, and an id whose logit / T - log v lies below the best score so far
//           needs none. Instructions per id, by case: bench/native_counters.py.
// Three roles share the code: a row of sample_rows; clean row i of a request; MASK row j of the branch that was taken.
// The last one runs in a second launch, which reads the results of the first: no flags between CTAs, nothing spins.
#pragma once

#include "sampling/decision.cuh"
#include "sampling/rows.h"
#include "sampling/sampler.cuh"

namespace idlm {

__device__ __forceinline__ bool is_first_thread_of_cluster() { return cluster_rank() == 0 && threadIdx.x == 0; }

template <class L, class S, bool kRejection>
__device__ __forceinline__ int32_t token_of(RowSampler<L, S, kRejection>& sampler, int32_t error_flags) {
  return error_flags & kFlagEmptyRow ? sampler.lowest_allowed() : sampler.sample();
}

template <class L, class S, bool kRejection>
__device__ void sample_row(const KernelParams& p, RowSampler<L, S, kRejection>& sampler) {
  const int32_t error_flags = sampler.load();
  let_next_kernel_start();
  if (!(error_flags & kFlagEmptyRow)) sampler.truncate(false);
  const int32_t id = token_of(sampler, error_flags);
  if (is_first_thread_of_cluster()) {
    p.ids[sampler.task.row] = id;
    if (error_flags && p.error_flags != nullptr) p.error_flags[sampler.task.row] |= error_flags;
  }
}

// y_i of clean row i, and in `rejection` whether draft i + 1 is accepted.
template <class L, class S, bool kRejection>
__device__ void clean_row(const KernelParams& p, const Request& r, RowSampler<L, S, kRejection>& sampler) {
  const int32_t b = sampler.task.entry, i = sampler.task.index;
  const int32_t error_flags = sampler.load();
  let_next_kernel_start();
  const bool judge = kRejection && i < r.num_drafts && !sampler.greedy;
  if (!(error_flags & kFlagEmptyRow)) sampler.truncate(judge);

  int32_t token = -1;
  bool accepted = false;
  if constexpr (kRejection) {
    const int64_t draft = i < r.num_drafts ? load_uniform(p.drafts + b * p.drafts_stride + i) : -1;
    if (judge && is_id(draft, p.logits.vocab_size)) {
      const int32_t x = static_cast<int32_t>(draft);
      const DraftDistributions& dists = p.draft_dists;
      const int64_t row = b * dists.stride_request + i * dists.stride_draft;
      const float q_cut = load_uniform(dists.cut + b * dists.cut_stride + i);
      const float q_norm = load_uniform(dists.log_norm + b * dists.log_norm_stride + i);
      const bool allowed = x < p.logits.id_limit && x != p.logits.mask_id;
      float p_x = 0.0f, q_x = 0.0f;
      if (allowed) {
        float logit =
            Scalar<L>::up(load_uniform(static_cast<const L*>(p.logits.data) + sampler.task.row * p.logits.row_stride + x));
        if (p.logits.bias != nullptr) logit += load_uniform_as_float(sampler.bias_of_row(), p.logits.bias_dtype, x);
        if (error_flags & kFlagEmptyRow) {
          p_x = x == sampler.lowest_allowed() ? 1.0f : 0.0f;
        } else {
          p_x = logit >= sampler.cut ? sampler.probability(logit, sampler.log_norm) : 0.0f;
        }
        const float q_logit = load_uniform_as_float(dists.logits, dists.dtype, row + x);
        q_x = sampler.probability_if_kept(q_logit, q_cut, q_norm);
      }
      const float u = word_to_uniform(sampler.noise.quad(0, kStreamAccept).w[0]);
      accepted = u * q_x < p_x;
      if (!accepted && !(error_flags & kFlagEmptyRow)) {
        const void* q_logits = static_cast<const char*>(dists.logits) + row * size_of(dists.dtype);
        token = sampler.sample_residual(q_logits, q_cut, q_norm);
      }
    }
    if (!accepted && token < 0) token = token_of(sampler, error_flags);
    // A greedy distribution is a point mass: its draft is accepted iff it is that point, whatever q was.
    if (sampler.greedy && i < r.num_drafts) accepted = draft == token;
  } else {
    token = token_of(sampler, error_flags);
  }

  if (is_first_thread_of_cluster()) {
    p.row_tokens[b * (p.num_spec_tokens + 1) + i] = accepted ? kAccepted : token;
    if (error_flags && p.error_flags != nullptr) atomicOr(p.error_flags + b, error_flags);
  }
  if (p.num_spec_tokens == 0 && cluster_rank() == 0 && warp_id() == 0) write_outcome(p, r, b, 0, false, token);
}

// The j-th draft of the next step and, in `rejection`, its distribution.
template <class L, class S, bool kRejection>
__device__ void mask_row(const KernelParams& p, RowSampler<L, S, kRejection>& sampler) {
  const int32_t b = sampler.task.entry, j = sampler.task.index;
  const int32_t error_flags = sampler.load();
  let_next_kernel_start();
  if (!(error_flags & kFlagEmptyRow)) sampler.truncate(kRejection);
  const int32_t token = token_of(sampler, error_flags);
  if (is_first_thread_of_cluster()) {
    p.next_drafts[b * p.next_drafts_stride + j] = token;
    if (error_flags && p.error_flags != nullptr) atomicOr(p.error_flags + b, error_flags);
  }
  if constexpr (kRejection) {
    const DraftDistributions& dists = p.draft_dists;
    const bool empty = error_flags & kFlagEmptyRow;  // stored as the point mass that it was sampled from
    if (is_first_thread_of_cluster()) {
      dists.cut[b * dists.cut_stride + j] = empty ? 0.0f : sampler.temperature.z(sampler.cut);
      dists.log_norm[b * dists.log_norm_stride + j] = empty ? 0.0f : sampler.log_norm;
    }
    const int64_t row = b * dists.stride_request + j * dists.stride_draft;
    const auto write = [&](auto* gDistribution) {
      using Q = std::remove_pointer_t<decltype(gDistribution)>;
      const auto& row = sampler.row;
      for (int32_t q = threadIdx.x; q < row.num_quads(); q += kThreads) {
        const int32_t id = row.first_id + 4 * q;
        float x[4];
        row.quad(q, x);
        Pack<Q, 4> pack;
#pragma unroll
        for (int e = 0; e < 4; ++e)
          pack.v[e] = Scalar<Q>::down(empty && id + e == sampler.lowest_allowed() ? 0.0f : x[e]);
        if (p.draft_dists_aligned && id + 4 <= p.logits.id_limit) {
          *reinterpret_cast<Pack<Q, 4>*>(gDistribution + id) = pack;
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (id + e < p.logits.id_limit) gDistribution[id + e] = pack.v[e];
        }
      }
      if (cluster_rank() == 0) {
        for (int32_t id = p.logits.id_limit + threadIdx.x; id < p.logits.vocab_size; id += kThreads)
          gDistribution[id] = Scalar<Q>::down(-INFINITY);
      }
    };
    if (dists.dtype == DType::kFloat32) {
      write(static_cast<float*>(dists.logits) + row);
    } else {
      write(static_cast<L*>(dists.logits) + row);
    }
  }
}

template <class L, class S, bool kRejection>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(16) uint8_t sVectors[];
  using Sampler = RowSampler<L, S, kRejection>;
  __shared__ typename Sampler::Reduce::Shared sReduce;
  __shared__ int32_t sAccepted;

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
    const int32_t b = cluster / (p.num_spec_tokens + 1), i = cluster % (p.num_spec_tokens + 1);
    const Request r(p, b);
    if (!r.present || i > r.num_drafts) {
      if (p.num_spec_tokens == 0 && cluster_rank() == 0 && warp_id() == 0) write_outcome(p, r, b, 0, false, -1);
      return;
    }
    const Task task{r.start + i, b, i, kStreamTarget, static_cast<uint32_t>(load_uniform(p.positions + b) + 1 + i)};
    cluster_arrive();
    Sampler sampler(p, task, sReduce, sVectors);
    cluster_wait();
    clean_row(p, r, sampler);
  } else {
    const int32_t b = cluster / p.num_spec_tokens, j = cluster % p.num_spec_tokens;
    const Request r(p, b);
    if (warp_id() == 0) {
      const int32_t count = count_accepted(p, r, b, kRejection);
      if (lane_id() == 0) sAccepted = count;
    }
    __syncthreads();
    const int32_t accepted = sAccepted;
    const int32_t first_mask = 1 + r.num_drafts + (p.quadratic ? accepted * p.num_spec_tokens : 0);
    const bool proposed =
        r.present && first_mask + p.num_spec_tokens <= r.num_rows && (p.quadratic || accepted == r.num_drafts);
    if (j == 0 && cluster_rank() == 0 && warp_id() == 0) {
      const int32_t token = r.present ? load_uniform(p.row_tokens + b * (p.num_spec_tokens + 1) + accepted) : -1;
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

template <class L, class S>
RowsKernel rows_kernel_of(bool rejection) {
  return rejection ? rows_kernel<L, S, true> : rows_kernel<L, S, false>;
}

}  // namespace idlm
