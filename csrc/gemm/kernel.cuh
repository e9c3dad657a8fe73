// The kernel of linear, gated_lora_linear and linear_silu_and_mul.
//
// y[t, n] = sum_k x[t, k] W[n, k]  (+ bias)  (+ scale sum_r h[t, r] B[n, r] where gate[t], h = x A^T)  (-> silu and mul)
//
// Swapped operands: 64 rows of W fill the 64-row side of wgmma, 64 tokens its other side, so that a step of 7 or 16 rows
// reads every weight once. A producer warp moves 64 columns of W and of x at a time by TMA into a ring of stages; four
// consumer warps multiply. The CTAs of a cluster may share a tile and take a part of K each; the parts are added in their
// order out of distributed shared memory. Where K is cut depends on (n, k) alone, and every row count runs the same
// instruction over the same blocks of K in the same order: a row has the same bits in any company.
//
// The adapter is part of the launch. Its first clusters compute h of the gated rows (A is but another weight) and announce
// it by a counter in L2. A main CTA runs its share of (B, h) through the ring as further blocks, into accumulators of their
// own, and adds them to its sums where a row is gated: selected, never multiplied by 0. Only then it waits for h, whose
// CTAs have the lowest indices, so that all of them have started. No gated row among the tokens: none of this.
//
//   bytes   W, A and B once per 64 or 128 tokens; x once per tile of W, out of L2
//   bound   qkv of Qwen3-8B: 50.3 MB, 15.0 us at 3.35 TB/s; 64 padded tokens cost a fifth of the tensor cores at that rate
#pragma once

#include "common/device.cuh"
#include "common/hopper.cuh"
#include "common/scalar.cuh"
#include "gemm/activation.cuh"
#include "gemm/heuristics.h"
#include "gemm/params.h"

namespace idlm::gemm {

constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kPartStride = kTileRows + 4;  // floats between tokens of a part: no bank conflicts, 16-byte alignment
constexpr int kBlockBytes = kTileRows * kBlockK * 2;
static_assert(stage_bytes(2) == 3 * kBlockBytes);
static_assert(kTileTokens * kPartStride * 4 <= 3 * kBlockBytes, "a part takes the place of the stages");

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

// ---- the ring

struct Ring {
  uint32_t tiles, barriers;  // addresses
  int32_t stages;
  uint32_t bytes;  // of a stage: the rows, behind them the tokens

  __device__ uint32_t rows(int32_t stage) const { return tiles + stage * bytes; }
  __device__ uint32_t tokens(int32_t stage) const { return rows(stage) + kBlockBytes; }
  __device__ uint32_t full(int32_t stage) const { return barriers + 16 * stage; }
  __device__ uint32_t empty(int32_t stage) const { return barriers + 16 * stage + 8; }
};

struct Cursor {
  int32_t stage = 0;
  uint32_t parity = 0;

  __device__ void next(const Ring& ring) {
    if (++stage == ring.stages) stage = 0, parity ^= 1;
  }
};

// Loads `count` blocks. The rows of the first ones are asked for before ready() returns, the tokens of all after it.
template <class Rows, class Ready, class Tokens>
__device__ __forceinline__ void fill(const Ring& ring, Cursor& at, int32_t count, const Rows& rows, const Ready& ready,
                                     const Tokens& tokens) {
  const auto take = [&](int32_t block) {
    barrier_wait(ring.empty(at.stage), at.parity ^ 1);
    barrier_arrive_expecting(ring.full(at.stage), ring.bytes);
    rows(block, at.stage);
  };
  const int32_t early = min(count, ring.stages);
  Cursor behind = at;
  for (int32_t block = 0; block < early; ++block, at.next(ring)) take(block);
  ready();
  for (int32_t block = 0; block < early; ++block, behind.next(ring)) tokens(block, behind.stage);
  for (int32_t block = early; block < count; ++block, at.next(ring)) {
    take(block);
    tokens(block, at.stage);
  }
}

// d += rows tokens^T over one stage.
template <class Element, int kTokenTiles>
__device__ __forceinline__ void multiply(const Ring& ring, int32_t stage, float (&d)[kTokenTiles][32]) {
  const uint64_t a = tile_descriptor(ring.rows(stage));
  products_begin();
#pragma unroll
  for (int k = 0; k < kSwizzleBytes; k += 32) {
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile)
      product<Element>(d[tile], advanced(a, k), advanced(tile_descriptor(ring.tokens(stage) + tile * kBlockBytes), k), 1);
  }
  products_commit();
}

// ---- what a CTA has to do

struct Work {
  bool is_h;
  int32_t group;        // of tokens
  int32_t first_row;    // of the weight, or of h: its rank index
  int32_t slice;        // of h
  int32_t part, parts;  // which part of K, of how many; a cluster holds the parts of a tile side by side
  int32_t first_block, num_blocks;

  __device__ Work(const Params& p, bool adapter) {
    const int32_t size = static_cast<int32_t>(cluster_size()), rank = static_cast<int32_t>(cluster_rank());
    const int32_t cluster = static_cast<int32_t>(blockIdx.x) / size;
    // Groups of one tile follow each other, so that they find its rows in L2.
    const int32_t h_clusters = adapter ? p.num_slices * p.rank_blocks * p.groups : 0;
    is_h = cluster < h_clusters;
    group = (is_h ? cluster : cluster - h_clusters) % p.groups;
    const int32_t index = (is_h ? cluster : cluster - h_clusters) / p.groups;
    parts = is_h ? size : p.splits;
    part = rank % parts;
    slice = is_h ? index / p.rank_blocks : 0;
    const int32_t tile = index * (size / p.splits) + rank / p.splits;
    first_row = is_h ? index % p.rank_blocks * kTileRows : tile * p.rows_per_tile;
    const bool idle = !is_h && tile >= p.tiles;  // fills the last cluster
    first_block = p.blocks * part / parts;
    num_blocks = idle ? 0 : p.blocks * (part + 1) / parts - first_block;
  }
  __device__ int32_t first_token(int32_t tokens_per_group) const { return group * tokens_per_group; }
};

// A bit per token of a group: is there one, and is it gated? Whole warps call it.
template <int kTokenTiles>
struct Gated {
  uint64_t tile[kTokenTiles];

  __device__ Gated(const Params& p, int32_t first_token) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      uint32_t half[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int32_t t = first_token + (2 * i + j) * 32 + static_cast<int32_t>(lane_id());
        bool gated = false;
        if (t < p.num_rows)
          gated = p.gate_is_int32 ? static_cast<const int32_t*>(p.gate)[t] != 0 : static_cast<const uint8_t*>(p.gate)[t] != 0;
        half[j] = __ballot_sync(~0u, gated);
      }
      tile[i] = uint64_t{half[1]} << 32 | half[0];
    }
  }
  __device__ bool any() const {
    uint64_t all = 0;
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) all |= tile[i];
    return all != 0;
  }
  __device__ bool operator()(int32_t token) const {
    static_assert(kTokenTiles <= 2);
    return (token < kTileTokens ? tile[0] : tile[kTokenTiles - 1]) >> (token % kTileTokens) & 1;
  }
};

// ---- the adapter's blocks (B, h) of a main CTA

// Slices that the tile touches, one after the other; of each the blocks of the rank that are this part's.
struct Updates {
  uint32_t slices = 0;  // bits
  int32_t per_slice;
  int32_t first_block, stride;

  __device__ Updates(const Params& p, const Work& w) : first_block(w.part), stride(w.parts) {
    per_slice = (p.rank_blocks - w.part + w.parts - 1) / w.parts;
    for (int32_t s = 0; s < p.num_slices; ++s)
      if (touches(p, w.first_row, s, p.silu_and_mul ? p.width : p.n) || touches(p, w.first_row + p.second_half, s, p.n))
        slices |= 1u << s;
  }
  // Are rows first .. first + 31 that lie before `end` in slice s?
  static __device__ bool touches(const Params& p, int32_t first, int32_t s, int32_t end) {
    const int32_t begin = s == 0 ? 0 : p.slice_ends[s - 1];
    return first < p.slice_ends[s] && min(first + kHalfRows, end) > begin;
  }
  __device__ int32_t count() const { return __popc(slices) * per_slice; }
  __device__ int32_t slice_of(int32_t i) const {
    uint32_t rest = slices;
    for (int32_t before = i / per_slice; before > 0; --before) rest &= rest - 1;
    return __ffs(static_cast<int>(rest)) - 1;
  }
  __device__ int32_t block_of(int32_t i) const { return first_block + i % per_slice * stride; }
};

// Returns once all CTAs have stored their share of h of this group. The last CTA to pass sets the words back: by then all
// h has arrived and nobody looks any more. The next launch reads the words after its griddepcontrol.wait.
__device__ __forceinline__ void wait_for_h(const Params& p, int32_t group, bool reads_h) {
  int32_t* arrived = p.flags + 2 * group;
  if (reads_h) {
    const int32_t wanted = p.num_slices * p.rank_blocks * static_cast<int32_t>(cluster_size());
    while (load_acquire(arrived) != wanted) __nanosleep(64);
    fence_async_global();  // TMA reads what was acquired
  }
  if (add_acquire_release(arrived + 1, 1) == p.tiles * p.splits - 1) arrived[0] = arrived[1] = 0;
}

// ---- roles

template <int kTokenTiles, bool kAdapter>
__device__ __forceinline__ void produce(const Params& p, const Ring& ring, const Work& w) {
  const int32_t first_token = w.first_token(kTokenTiles * kTileTokens);
  const bool leader = lane_id() == 0;
  Cursor at;
  // A weight that another kernel may have written waits for that kernel like everything else.
  if (!p.weight_is_constant) wait_for_previous_kernel();
  if (leader) {
    const CUtensorMap* weight = w.is_h ? &p.lora_a : &p.weight;
    const int32_t second_row = w.first_row + (w.is_h ? kHalfRows : p.second_half);
    fill(
        ring, at, w.num_blocks,
        [&](int32_t block, int32_t stage) {
          const int32_t k = (w.first_block + block) * kBlockK;
          load_box(ring.rows(stage), weight, ring.full(stage), k, w.first_row, w.slice, kEvictFirst);
          load_box(ring.rows(stage) + kBlockBytes / 2, weight, ring.full(stage), k, second_row, w.slice, kEvictFirst);
        },
        wait_for_previous_kernel,
        [&](int32_t block, int32_t stage) {
          load_box(ring.tokens(stage), &p.x, ring.full(stage), (w.first_block + block) * kBlockK, first_token, 0, kEvictLast);
        });
  }
  __syncwarp();
  let_next_kernel_start();
  if constexpr (kAdapter) {
    if (w.is_h || w.num_blocks == 0) return;
    wait_for_previous_kernel();
    if (!Gated<kTokenTiles>(p, first_token).any() || !leader) return;
    const Updates updates(p, w);
    fill(
        ring, at, updates.count(),
        [&](int32_t i, int32_t stage) {
          const int32_t r = updates.block_of(i) * kBlockK, s = updates.slice_of(i);
          for (int32_t half = 0; half < 2; ++half) {
            const int32_t row = w.first_row + half * p.second_half;
            const bool touched = Updates::touches(p, row, s, p.n);
            // Rows that the slice does not touch are as good as none: row n is outside, nothing is read.
            load_box(ring.rows(stage) + half * (kBlockBytes / 2), &p.lora_b, ring.full(stage), r, touched ? row : p.n, 0,
                     kEvictFirst);
          }
        },
        [&] { wait_for_h(p, w.group, updates.count() > 0); },
        [&](int32_t i, int32_t stage) {
          load_box(ring.tokens(stage), &p.h, ring.full(stage), updates.block_of(i) * kBlockK, first_token,
                   updates.slice_of(i), kEvictLast);
        });
  }
}

// sums += scale (B h^T) where a token is gated and a row belongs to the slice.
template <class Element, int kTokenTiles>
__device__ __forceinline__ void add_updates(const Params& p, const Ring& ring, const Work& w, Cursor& at,
                                            const Gated<kTokenTiles>& gated, float (&sums)[kTokenTiles][32]) {
  const Updates updates(p, w);
  const int32_t lane = static_cast<int32_t>(lane_id());
  const int32_t row = 16 * static_cast<int32_t>(warp_id()) + lane / 4;  // in the tile; the other one is 8 further on
  const int32_t n = w.first_row + row / kHalfRows * p.second_half + row % kHalfRows;
  for (int32_t i = 0; i < updates.count(); i += updates.per_slice) {
    float update[kTokenTiles][32] = {};
    for (int32_t j = 0; j < updates.per_slice; ++j, at.next(ring)) {
      barrier_wait(ring.full(at.stage), at.parity);
      multiply<Element>(ring, at.stage, update);
      products_wait<0>();
      if (lane == 0) barrier_arrive(ring.empty(at.stage));
    }
    const int32_t s = updates.slice_of(i), begin = s == 0 ? 0 : p.slice_ends[s - 1], end = p.slice_ends[s];
    const bool inside[2] = {n >= begin && n < end, n + 8 >= begin && n + 8 < end};
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      pin(update[tile]);
      const uint64_t mine = gated.tile[tile] >> (2 * (lane % 4));
#pragma unroll
      for (int e = 0; e < 32; ++e) {
        const bool wanted = (mine >> (e / 4 * 8 + e % 2) & 1) && inside[e / 2 % 2];
        sums[tile][e] = wanted ? __fmaf_rn(p.scale, update[tile][e], sums[tile][e]) : sums[tile][e];
      }
    }
  }
}

// The sums of this CTA's part, to sPart[token][row].
template <class Element, int kTokenTiles, bool kAdapter>
__device__ __forceinline__ void consume(const Params& p, const Ring& ring, const Work& w, int32_t num_tokens, float* sPart) {
  const int32_t lane = static_cast<int32_t>(lane_id()), warp = static_cast<int32_t>(warp_id());
  float sums[kTokenTiles][32] = {};
  Cursor at;
  int32_t last = 0;
  for (int32_t block = 0; block < w.num_blocks; ++block, at.next(ring)) {
    barrier_wait(ring.full(at.stage), at.parity);
    multiply<Element>(ring, at.stage, sums);
    products_wait<1>();  // those of the block before
    if (block > 0 && lane == 0) barrier_arrive(ring.empty(last));
    last = at.stage;
  }
  products_wait<0>();
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) pin(sums[tile]);
  if (w.num_blocks == 0) return;
  if (lane == 0) barrier_arrive(ring.empty(last));
  if constexpr (kAdapter) {
    if (!w.is_h) {
      wait_for_previous_kernel();
      const Gated<kTokenTiles> gated(p, w.first_token(kTokenTiles * kTileTokens));
      if (gated.any()) add_updates<Element>(p, ring, w, at, gated, sums);
    }
  }
  consumers_sync();  // nobody reads the stages any more
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 32; ++e) {
      const int32_t token = tile * kTileTokens + e / 4 * 8 + lane % 4 * 2 + e % 2;
      if (token < num_tokens) sPart[token * kPartStride + 16 * warp + lane / 4 + e / 2 % 2 * 8] = sums[tile][e];
    }
  }
}

// ---- the end of a tile

// Four neighbouring sums of a token: the parts of the cluster, added in their order.
__device__ __forceinline__ float4 add_parts(const float* sPart, int32_t offset, const Work& w) {
  if (w.parts == 1) return *reinterpret_cast<const float4*>(sPart + offset);
  const uint32_t address = shared_address(sPart + offset), first = cluster_rank() - w.part;
  float4 x[kMaxCluster];
#pragma unroll
  for (int part = 0; part < kMaxCluster; ++part)
    if (part < w.parts) x[part] = load_from_cluster(address_in_cta(address, first + part));
#pragma unroll
  for (int part = 1; part < kMaxCluster; ++part) {
    if (part < w.parts) {
      x[0].x += x[part].x, x[0].y += x[part].y, x[0].z += x[part].z, x[0].w += x[part].w;
    }
  }
  return x[0];
}

__device__ __forceinline__ float bias_of(const Params& p, int32_t n) {
  if (p.bias == nullptr || n >= p.n) return 0.0f;
  switch (p.bias_dtype) {
    case DType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[n]);
    case DType::kFloat16: return __half2float(static_cast<const __half*>(p.bias)[n]);
    default: return static_cast<const float*>(p.bias)[n];
  }
}

template <class Element>
__device__ __forceinline__ void store_four(Element* to, const float4& v, int32_t valid, bool aligned) {
  using S = Scalar<Element>;
  const Pack<Element, 4> pack{{S::down(v.x), S::down(v.y), S::down(v.z), S::down(v.w)}};
  if (aligned && valid >= 4) {
    *reinterpret_cast<Pack<Element, 4>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < valid) to[i] = pack.v[i];
  }
}

// The rows of y at n .. n + 3, rounded as in memory.
template <class Element>
__device__ __forceinline__ float4 with_bias(const Params& p, float4 y, int32_t n, bool rounded) {
  using S = Scalar<Element>;
  if (p.bias != nullptr) y.x += bias_of(p, n), y.y += bias_of(p, n + 1), y.z += bias_of(p, n + 2), y.w += bias_of(p, n + 3);
  if (rounded) y = {S::up(S::down(y.x)), S::up(S::down(y.y)), S::up(S::down(y.z)), S::up(S::down(y.w))};
  return y;
}

// Each CTA of a tile finishes its share of the tokens.
template <class Element>
__device__ __forceinline__ void finish(const Params& p, const Work& w, int32_t first_token, int32_t num_tokens,
                                       const float* sPart) {
  auto* out = static_cast<Element*>(p.out);
  const int32_t lanes = (p.silu_and_mul ? kHalfRows : kTileRows) / 4;  // of a token
  const int32_t row = static_cast<int32_t>(threadIdx.x) % lanes * 4;
  const int32_t column = w.first_row + row;
  for (int32_t i = static_cast<int32_t>(threadIdx.x) / lanes;; i += kConsumers / lanes) {
    const int32_t token = i * w.parts + w.part;
    if (token >= num_tokens) break;
    const int32_t offset = token * kPartStride + row;
    float4 y = with_bias<Element>(p, add_parts(sPart, offset, w), column, p.silu_and_mul);
    if (p.silu_and_mul) {
      const float4 sums = add_parts(sPart, offset + kHalfRows, w);
      const float4 up = with_bias<Element>(p, sums, column + p.second_half, true);
      y = {silu_times(y.x, up.x), silu_times(y.y, up.y), silu_times(y.z, up.z), silu_times(y.w, up.w)};
    }
    store_four(out + (first_token + token) * p.out_stride + column, y, p.width - column, p.out_aligned);
  }
}

// h of the gated tokens, then the news of it.
template <class Element, int kTokenTiles>
__device__ __forceinline__ void finish_h(const Params& p, const Work& w, int32_t first_token, int32_t num_tokens,
                                         const Gated<kTokenTiles>& gated, const float* sPart) {
  constexpr int32_t kLanes = kTileRows / 4;
  auto* gH = static_cast<Element*>(p.gH) + w.slice * p.h_slice_stride;
  const int32_t row = static_cast<int32_t>(threadIdx.x) % kLanes * 4;
  for (int32_t i = static_cast<int32_t>(threadIdx.x) / kLanes;; i += kConsumers / kLanes) {
    const int32_t token = i * w.parts + w.part;
    if (token >= num_tokens) break;
    if (!gated(token)) continue;
    const float4 h = add_parts(sPart, token * kPartStride + row, w);
    store_four(gH + (first_token + token) * p.h_stride + w.first_row + row, h, p.rank - w.first_row - row, true);
  }
  fence_async_global();  // TMA of other CTAs reads it
  consumers_sync();
  if (threadIdx.x == 0) add_release(p.flags + 2 * w.group, 1);
}

template <class Element, int kTokenTiles, bool kAdapter>
__global__ void __launch_bounds__(kThreads, max_ctas_per_sm(kTokenTiles)) linear_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t sStages[];
  constexpr int32_t kTokens = kTokenTiles * kTileTokens;
  constexpr uint32_t kStageBytes = (1 + kTokenTiles) * kBlockBytes;
  const Ring ring{shared_address(sStages), shared_address(sStages) + p.stages * kStageBytes, p.stages, kStageBytes};
  float* sPart = reinterpret_cast<float*>(sStages);
  const Work w(p, kAdapter);
  const int32_t first_token = w.first_token(kTokens), num_tokens = min(p.num_rows - first_token, kTokens);
  if constexpr (kAdapter) {
    if (w.is_h) {
      wait_for_previous_kernel();
      if (!Gated<kTokenTiles>(p, first_token).any()) return;  // the whole cluster does
    }
  }
  if (threadIdx.x == 0) {
    for (int32_t stage = 0; stage < p.stages; ++stage) {
      barrier_init(ring.full(stage), 1);
      barrier_init(ring.empty(stage), kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (warp_id() == kConsumerWarps) {
    produce<kTokenTiles, kAdapter>(p, ring, w);
    __syncwarp();
  } else {
    consume<Element, kTokenTiles, kAdapter>(p, ring, w, num_tokens, sPart);
  }
  if (w.parts == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();  // the parts of all CTAs are there
  }
  if (warp_id() < kConsumerWarps && w.num_blocks > 0) {
    wait_for_previous_kernel();
    if (kAdapter && w.is_h) {
      finish_h<Element>(p, w, first_token, num_tokens, Gated<kTokenTiles>(p, first_token), sPart);
    } else {
      finish<Element>(p, w, first_token, num_tokens, sPart);
    }
  }
  if (w.parts > 1) {
    __syncwarp();
    cluster_arrive();
    cluster_wait();  // nobody reads this CTA's part any more
  }
}

template <class Element>
Kernel kernel_of(int32_t token_tiles, bool adapter) {
  if (token_tiles == 1) return adapter ? linear_kernel<Element, 1, true> : linear_kernel<Element, 1, false>;
  return adapter ? linear_kernel<Element, 2, true> : linear_kernel<Element, 2, false>;
}

}  // namespace idlm::gemm
