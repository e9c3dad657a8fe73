// The ends of a launch: the parts of a tile that several CTAs have computed are joined, and rows of no request become 0.
#pragma once

#include "attention/softmax.cuh"
#include "common/scalar.cuh"

namespace idlm::attention {

// Eight neighbouring numbers of a row of the output.
template <class Element>
__device__ __forceinline__ void store_piece(const Params& p, int64_t row, int32_t head, int32_t piece, uint4 x) {
  Element* to = static_cast<Element*>(p.out) + row * p.out_stride_row + head * p.out_stride_head + piece * 8;
  if (p.out_aligned) {
    *reinterpret_cast<uint4*>(to) = x;
  } else {
    const auto* values = reinterpret_cast<const Element*>(&x);
#pragma unroll
    for (int32_t i = 0; i < 8; ++i) to[i] = values[i];
  }
}

// What a range of slots gave four columns of a row.
struct Node {
  float m = kNothing, t = 0.0f;
  float4 o = {};

  // The two in their order.
  static __device__ Node joined(const Node& a, const Node& b) {
    const Join join(a.m, b.m);
    Node c;
    c.m = join.m;
    c.t = join(a.t, b.t);
    c.o = {join(a.o.x, b.o.x), join(a.o.y, b.o.y), join(a.o.z, b.o.z), join(a.o.w, b.o.w)};
    return c;
  }
};

// The multiplying warps of the CTA that came last: the tree of the leaves, which no part is larger than.
template <class Element, int kDim>
__device__ __forceinline__ void join_parts(const Params& p, const Request& r, const Unit& u, int32_t level) {
  constexpr int32_t kLanes = kDim / 4;  // of a row
  constexpr int32_t kLevels = tree_levels(kDim), kSuperLeaves = 1 << kLevels;
  const float v_scale = scale_of(p.v_scale, p.v_scale_stride, u.kv_head);
  const int32_t thread = static_cast<int32_t>(threadIdx.x), column = thread % kLanes * 4;
  if (column >= p.head_dim) return;
  const int32_t first = r.first_part(level), end = first + u.parts, shift = kLevels - level;
  for (int32_t row = thread / kLanes; row < kTileRows; row += kGroupThreads / kLanes) {
    const Row which(p, r, u, row);
    if (!which.exists) break;
    const int64_t at = (which.row * p.num_heads + which.head) * p.max_parts;
    Node all;
    for (int32_t super = first >> shift; super <= (end - 1) >> shift; ++super) {
      Node nodes[kSuperLeaves];
#pragma unroll
      for (int32_t i = 0; i < kSuperLeaves; ++i) {  // the part that begins with leaf i, if there is one
        const int32_t part = (super << shift) + (i >> level);
        if ((i & ((1 << level) - 1)) != 0 || part < first || part >= end) continue;
        const float2 mt = __ldcg(p.gMT + at + part - first);  // other SMs wrote it
        nodes[i].m = mt.x, nodes[i].t = mt.y;
        nodes[i].o = __ldcg(reinterpret_cast<const float4*>(p.gO + (at + part - first) * p.head_dim + column));
      }
#pragma unroll
      for (int32_t step = 1; step < kSuperLeaves; step *= 2) {
#pragma unroll
        for (int32_t i = 0; i < kSuperLeaves; i += 2 * step) nodes[i] = Node::joined(nodes[i], nodes[i + step]);
      }
      all = Node::joined(all, nodes[0]);
    }
    const Result result(all.m, all.t, v_scale);
    const uint2 pack{packed<Element>(result(all.o.x), result(all.o.y)), packed<Element>(result(all.o.z), result(all.o.w))};
    Element* to = static_cast<Element*>(p.out) + which.row * p.out_stride_row + which.head * p.out_stride_head + column;
    if (p.out_aligned) {
      *reinterpret_cast<uint2*>(to) = pack;
    } else {
      const auto* values = reinterpret_cast<const Element*>(&pack);
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) to[i] = values[i];
    }
    if (p.lse != nullptr && column == 0) p.lse[which.row * p.lse_stride + which.head] = result.lse;
  }
}

// The copying warps of all CTAs: rows behind the last request, and those of a request from max_query_len on.
template <class Element, int kDim>
__device__ __forceinline__ void zero_padding(const Params& p) {
  const auto zero = [&](int64_t first, int64_t end) {
    constexpr int32_t kPieces = kDim / 8;
    const int64_t pieces = (end - first) * p.num_heads * kPieces;
    const int64_t step = int64_t{gridDim.x} * kGroupThreads;
    for (int64_t i = int64_t{blockIdx.x} * kGroupThreads + threadIdx.x % kGroupThreads; i < pieces; i += step) {
      const int64_t row = first + i / (p.num_heads * kPieces);
      const int32_t head = static_cast<int32_t>(i / kPieces % p.num_heads), piece = static_cast<int32_t>(i % kPieces);
      if (piece * 8 < p.head_dim) store_piece<Element>(p, row, head, piece, uint4{});
      if (p.lse != nullptr && piece == 0) p.lse[row * p.lse_stride + head] = kNothing;
    }
  };
  zero(p.query_start_loc[p.batch], p.num_rows);
  for (int32_t first = 0; first < p.batch; first += 32) {
    const int32_t b = first + static_cast<int32_t>(lane_id());
    const int32_t end = b < p.batch ? p.query_start_loc[b + 1] : 0, start = b < p.batch ? p.query_start_loc[b] : 0;
    uint32_t longer = __ballot_sync(~0u, end - start > p.max_query_len);
    for (; longer != 0; longer &= longer - 1) {
      const int32_t lane = __ffs(static_cast<int>(longer)) - 1;
      zero(int64_t{__shfl_sync(~0u, start, lane)} + p.max_query_len, __shfl_sync(~0u, end, lane));
    }
  }
}

}  // namespace idlm::attention
