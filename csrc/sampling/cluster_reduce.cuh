// All-reduce of up to eight integers over a cluster, in one block barrier and one cluster barrier. Integers, because
// their sums and maxima do not depend on order: a result has the same bits for every cluster size and schedule.
#pragma once

#include "common/device.cuh"

namespace idlm {

constexpr int kMaxCluster = 8;  // the largest that every Hopper part launches

struct Sum {
  static __device__ __forceinline__ uint64_t apply(uint64_t a, uint64_t b) { return a + b; }
};
struct Max {
  static __device__ __forceinline__ uint64_t apply(uint64_t a, uint64_t b) { return a > b ? a : b; }
};

template <int kWarps>
struct ClusterReduce {
  static constexpr int kWidth = 8;

  struct Shared {
    uint64_t warps[kWarps][kWidth];
    // One mailbox per sender, in two generations: a sender can be one reduction ahead of a reader, never two.
    uint64_t mail[2][kMaxCluster][kWidth];
  };

  Shared& s;
  uint32_t rank, size;
  uint32_t generation = 0;

  __device__ ClusterReduce(Shared& shared) : s(shared), rank(cluster_rank()), size(cluster_size()) {}

  // x: kWidth values, equal in all lanes of a warp. Returns, in lane i, the reduction of x[i % 8] over all warps of all
  // CTAs. 0 must be neutral. All threads of the cluster call it.
  template <class Op>
  __device__ uint64_t all(const uint64_t (&x)[kWidth]) {
    const uint32_t lane = lane_id(), column = lane % kWidth, group = lane / kWidth;
    uint64_t own = x[0];
#pragma unroll
    for (int i = 1; i < kWidth; ++i) own = lane == i ? x[i] : own;
    if (lane < kWidth) s.warps[warp_id()][lane] = own;
    __syncthreads();
    if (warp_id() == 0) {
      uint64_t block = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w += 4)
        if (w + group < kWarps) block = Op::apply(block, s.warps[w + group][column]);
      block = over_groups<Op>(block);
      for (uint32_t to = group; to < size; to += 4) store_to_cta(&s.mail[generation][rank][column], to, block);
    }
    __syncwarp();  // the cluster barrier wants whole warps
    cluster_arrive();
    cluster_wait();  // after this s.warps may be written again, and all mail of this generation is here
    uint64_t total = 0;
    for (uint32_t from = group; from < size; from += 4) total = Op::apply(total, s.mail[generation][from][column]);
    generation ^= 1;
    return over_groups<Op>(total);
  }

 private:
  template <class Op>
  static __device__ __forceinline__ uint64_t over_groups(uint64_t x) {
    x = Op::apply(x, __shfl_xor_sync(~0u, x, 8));
    return Op::apply(x, __shfl_xor_sync(~0u, x, 16));
  }
};

}  // namespace idlm
