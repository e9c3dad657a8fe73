// The kernel of linear, gated_lora_linear and linear_silu_and_mul.
//
// y[t, n] = sum_k x[t, k] W[n, k]  (+ bias)  (+ scale sum_r h[t, r] B[n, r] where lora_mask[t], h = x A^T)  (-> silu and mul)
//
// Swapped operands: 64 rows of W fill the 64-row side of wgmma, 64 tokens its other side, so that a step of 7 or 16 rows
// reads every weight once. A producer warp moves 64 columns of W and of x at a time by TMA into a ring of stages; the
// four warps of a warpgroup multiply. The CTAs of a cluster may share a tile and take a part of K each; the parts are
// added in their order out of distributed shared memory. Where K is cut depends on (n, k) alone, and every row count runs
// the same instruction over the same blocks of K in the same order: a row has the same bits in any company.
//
// The adapter is part of the launch. Its first clusters compute h of the gated rows (A is but another weight) and announce
// it by a counter in L2. A main CTA runs its share of (B, h) through the ring as further blocks, into accumulators of
// their own, and adds them to its sums where a row is gated: selected, never multiplied by 0. It waits for h behind its
// last block of K, and h comes from the CTAs with the lowest indices, which have all started. No gated row: none of this.
//
// From 65 tokens on a CTA has 128 or 256 tokens, and two tiles of W, one per warpgroup (one beside an adapter at up to
// 128). From 33 on two CTAs of a cluster with neighbouring tiles load half of x each, for both, and give stages back to
// both.
//
//   bytes   W, A and B once per 64, 128 or 256 tokens; x once per two CTA tiles of W (up to 32 tokens per one), out of L2
//   bound   qkv of Qwen3-8B: 50.3 MB, 15.0 us at 3.35 TB/s; 64 padded tokens cost a fifth of the tensor cores at that rate
#pragma once

#include "common/device.cuh"
#include "common/hopper.cuh"
#include "common/scalar.cuh"
#include "gemm/activation.cuh"
#include "gemm/heuristics.h"
#include "gemm/params.h"
#include "gemm/ring.cuh"

namespace idlm::gemm {

constexpr int kGroupThreads = 128;  // a warpgroup multiplies a tile of weight rows
constexpr int kPartStride = kTileRows + 4;  // floats between tokens of a part: no bank conflicts, 16-byte alignment
constexpr int kBlockBytes = kTileRows * kBlockK * 2;
constexpr int kTileFloats = kTileTokens * kPartStride;

// What depends on the tile of a CTA.
template <int kTokenTiles, bool kAdapter>
struct Size {
  static constexpr Tile kTile = tile_of(kTokenTiles, kAdapter);
  static constexpr int kRowTiles = kTile.rows;
  static constexpr bool kHasAdapter = kAdapter;
  static constexpr bool kMovesRegisters = kTile.moves_registers();
  static constexpr int kTokens = kTokenTiles * kTileTokens;
  static constexpr int kPartFloats = kTokenTiles * kTileFloats;  // of a warpgroup
  static constexpr uint32_t kRowBytes = kRowTiles * kBlockBytes, kTokenBytes = kTokenTiles * kBlockBytes;
  static constexpr uint32_t kStageBytes = kTile.stage_bytes();
  static_assert(kRowTiles * kPartFloats * 4 <= 3 * kStageBytes, "parts take the place of the stages");
};

__device__ __forceinline__ int32_t warpgroup() { return static_cast<int32_t>(threadIdx.x) / kGroupThreads; }
__device__ __forceinline__ int32_t thread_of_group() { return static_cast<int32_t>(threadIdx.x) % kGroupThreads; }
// All warps but those of the producer.
template <int kRowTiles>
__device__ __forceinline__ void multipliers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kGroupThreads * kRowTiles) : "memory");
}

// ---- products

// d += rows tokens^T over the 64 columns of a stage; rows, tokens: addresses of tiles.
template <class Element, int kTokenTiles>
__device__ __forceinline__ void multiply(uint32_t rows, uint32_t tokens, float (&d)[kTokenTiles][32]) {
  const uint64_t a = tile_descriptor(rows);
  products_begin();
#pragma unroll
  for (int k = 0; k < kSwizzleBytes; k += 32) {
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile)
      product<Element>(d[tile], advanced(a, k), advanced(tile_descriptor(tokens + tile * kBlockBytes), k));
  }
  products_commit();
}

// ---- what a CTA has to do

struct Work {
  bool is_h;
  int32_t first_token;
  int32_t group;        // of tokens
  int32_t first_row;    // of the weight, or of h: its rank index
  int32_t next_tile;    // the rows of the next warpgroup are this far on
  int32_t second_half;  // and the second 32 rows of a tile so far
  int32_t slice;        // of h
  int32_t part, parts;  // which part of K, of how many; a cluster holds the parts of a tile side by side
  int32_t first_block, num_blocks;
  // CTAs that load tokens for one another: this one and the one with the same part of the cluster's other tile, or itself.
  int32_t sharers;
  int32_t half;      // of the tokens, that it loads
  uint32_t partner;  // rank in the cluster

  template <class S>
  __device__ Work(const Params& p, S) {
    const int32_t size = static_cast<int32_t>(cluster_size()), rank = static_cast<int32_t>(cluster_rank());
    const int32_t cluster = static_cast<int32_t>(blockIdx.x) / size;
    // Groups of one tile follow each other, so that they find its rows in L2.
    const int32_t h_clusters = S::kHasAdapter ? p.num_slices * p.h_tiles * p.groups : 0;
    is_h = cluster < h_clusters;
    group = (is_h ? cluster : cluster - h_clusters) % p.groups;
    first_token = group * S::kTokens;
    const int32_t index = (is_h ? cluster : cluster - h_clusters) / p.groups;
    parts = is_h ? size : p.splits;
    part = rank % parts;
    slice = is_h ? index / p.h_tiles : 0;
    next_tile = is_h ? kTileRows : p.rows_per_tile;
    second_half = is_h ? kHalfRows : p.second_half;
    const int32_t tile = is_h ? index % p.h_tiles : index * (size / p.splits) + rank / p.splits;
    first_row = tile * S::kRowTiles * next_tile;
    const bool idle = !is_h && tile >= p.tiles;  // fills the last cluster
    first_block = p.blocks * part / parts;
    num_blocks = idle ? 0 : p.blocks * (part + 1) / parts - first_block;
    half = rank / p.splits;
    partner = static_cast<uint32_t>(half == 0 ? rank + p.splits : rank - p.splits);
    sharers = p.shares_tokens && !is_h && tile - half + 1 < p.tiles ? 2 : 1;
  }
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
        int32_t lora_mask = 0;
        if (t < p.num_rows)
          lora_mask = p.lora_mask_is_int32 ? static_cast<const int32_t*>(p.lora_mask)[t] : static_cast<const uint8_t*>(p.lora_mask)[t];
        half[j] = __ballot_sync(~0u, lora_mask != 0);
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
    uint64_t bits = tile[0];
#pragma unroll
    for (int i = 1; i < kTokenTiles; ++i) bits = token >= i * kTileTokens ? tile[i] : bits;
    return bits >> (token % kTileTokens) & 1;
  }
};

// ---- the adapter's blocks (B, h) of a main CTA

// Slices that the CTA's rows touch, one after the other; of each the blocks of the rank that are this part's.
struct Updates {
  uint32_t slices = 0;  // bits
  int32_t per_slice;
  int32_t first_block, stride;

  __device__ Updates(const Params& p, const Work& w, int32_t row_tiles) : first_block(w.part), stride(w.parts) {
    per_slice = (p.rank_blocks - w.part + w.parts - 1) / w.parts;
    for (int32_t s = 0; s < p.num_slices; ++s) {
      for (int32_t tile = 0; tile < row_tiles; ++tile) {
        const int32_t row = w.first_row + tile * w.next_tile;
        if (touches(p, row, s, p.silu_and_mul ? p.width : p.n) || touches(p, row + w.second_half, s, p.n))
          slices |= 1u << s;
      }
    }
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
    const int32_t wanted = p.num_slices * p.h_tiles * static_cast<int32_t>(cluster_size());
    while (load_acquire(arrived) != wanted) __nanosleep(64);
    fence_async_global();  // TMA reads what was acquired
  }
  if (add_acquire_release(arrived + 1, 1) == p.tiles * p.splits - 1) arrived[0] = arrived[1] = 0;
}

// ---- roles

template <int kTokenTiles, bool kAdapter>
__device__ __forceinline__ void produce(const Params& p, const Ring& ring, const Work& w) {
  using S = Size<kTokenTiles, kAdapter>;
  constexpr int kRowTiles = S::kRowTiles;
  const bool leader = lane_id() == 0;
  Cursor at;
  // A weight that another kernel may have written waits for that kernel like everything else.
  if (!p.weight_is_constant) wait_for_previous_kernel();
  if (leader) {
    const CUtensorMap* weight = w.is_h ? &p.lora_a : &p.weight;
    prefetch_map(weight);
    prefetch_map(&p.x);
    fill(
        ring, at, w.num_blocks,
        [&](int32_t block, int32_t stage) {
#pragma unroll
          for (int32_t half = 0; half < 2 * kRowTiles; ++half) {
            const int32_t row = w.first_row + half / 2 * w.next_tile + half % 2 * w.second_half;
            load_box(ring.rows(stage) + half * (kBlockBytes / 2), weight, ring.full(stage),
                     (w.first_block + block) * kBlockK, row, w.slice, kEvictFirst);
          }
        },
        wait_for_previous_kernel,
        [&](int32_t block, int32_t stage) {
          const int32_t k = (w.first_block + block) * kBlockK;
          const auto to = static_cast<uint16_t>(1u << cluster_rank() | 1u << w.partner);
#pragma unroll
          for (int32_t half = 0; half < 2; ++half) {
            const uint32_t place = ring.tokens(stage) + half * (S::kTokenBytes / 2);
            const int32_t token = w.first_token + half * (S::kTokens / 2);
            if (w.sharers == 1) {
              load_box(place, &p.x, ring.full(stage), k, token, 0, kEvictLast);
            } else if (w.half == half) {
              load_box(Ctas{to}, place, &p.x, ring.full(stage), k, token, 0, kEvictLast);
            }
          }
        });
  }
  __syncwarp();
  let_next_kernel_start();
  if constexpr (kAdapter) {
    if (w.is_h || w.num_blocks == 0) return;
    wait_for_previous_kernel();
    if (!Gated<kTokenTiles>(p, w.first_token).any() || !leader) return;
    const Updates updates(p, w, kRowTiles);
    fill(
        ring, at, updates.count(),
        [&](int32_t i, int32_t stage) {
          const int32_t r = updates.block_of(i) * kBlockK, s = updates.slice_of(i);
#pragma unroll
          for (int32_t half = 0; half < 2 * kRowTiles; ++half) {
            const int32_t row = w.first_row + half / 2 * w.next_tile + half % 2 * w.second_half;
            const bool touched = Updates::touches(p, row, s, p.n);
            // Rows that the slice does not touch are as good as none: row n is outside, nothing is read.
            load_box(ring.rows(stage) + half * (kBlockBytes / 2), &p.lora_b, ring.full(stage), r, touched ? row : p.n, 0,
                     kEvictFirst);
          }
        },
        [&] { wait_for_h(p, w.group, updates.count() > 0); },
        [&](int32_t i, int32_t stage) {
          load_box(ring.tokens(stage), &p.h, ring.full(stage), updates.block_of(i) * kBlockK, w.first_token,
                   updates.slice_of(i), kEvictLast);
        });
  }
}

// sums += scale (B h^T) where a token is gated and a row belongs to the slice, 64 columns of the rank after the other.
template <class Element, int kTokenTiles>
__device__ __forceinline__ void add_updates(const Params& p, const Ring& ring, const Work& w, Cursor& at,
                                            const Gated<kTokenTiles>& gated, float (&sums)[kTokenTiles][32]) {
  const Updates updates(p, w, Size<kTokenTiles, true>::kRowTiles);
  const int32_t lane = static_cast<int32_t>(lane_id());
  const int32_t row = thread_of_group() / 32 * 16 + lane / 4;  // in the tile; the other one is 8 further on
  const int32_t n = w.first_row + warpgroup() * w.next_tile + row / kHalfRows * w.second_half + row % kHalfRows;
  for (int32_t i = 0; i < updates.count(); ++i, at.next(ring)) {
    const int32_t s = updates.slice_of(i), begin = s == 0 ? 0 : p.slice_ends[s - 1], end = p.slice_ends[s];
    const bool inside[2] = {n >= begin && n < end, n + 8 >= begin && n + 8 < end};
    barrier_wait(ring.full(at.stage), at.parity);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      float update[1][32] = {};
      multiply<Element>(ring.rows(at.stage) + warpgroup() * kBlockBytes, ring.tokens(at.stage) + tile * kBlockBytes,
                        update);
      products_wait<0>();
      pin(update[0]);
      const uint64_t mine = gated.tile[tile] >> (2 * (lane % 4));
#pragma unroll
      for (int e = 0; e < 32; ++e) {
        const bool wanted = (mine >> (e / 4 * 8 + e % 2) & 1) && inside[e / 2 % 2];
        sums[tile][e] = wanted ? __fmaf_rn(p.scale, update[0][e], sums[tile][e]) : sums[tile][e];
      }
    }
    if (lane < w.sharers) barrier_arrive(ring.empty(at.stage));  // for the partner too, who has blocks of his own
  }
}

// Gives a stage back to all who load into it. Whole warps call it.
__device__ __forceinline__ void give_back(const Ring& ring, int32_t stage, const Work& w) {
  const int32_t lane = static_cast<int32_t>(lane_id());
  if (lane < w.sharers) barrier_arrive_in(ring.empty(stage), lane == 0 ? cluster_rank() : w.partner);
}

// The sums of this warpgroup's tile and part, to sPart[token][row].
template <class Element, int kTokenTiles, bool kAdapter>
__device__ __forceinline__ void consume(const Params& p, const Ring& ring, const Work& w, int32_t num_tokens,
                                        float* sPart) {
  using S = Size<kTokenTiles, kAdapter>;
  const int32_t lane = static_cast<int32_t>(lane_id()), warp = thread_of_group() / 32;
  float sums[kTokenTiles][32] = {};
  Cursor at;
  int32_t last = 0;
  for (int32_t block = 0; block < w.num_blocks; ++block, at.next(ring)) {
    barrier_wait(ring.full(at.stage), at.parity);
    multiply<Element>(ring.rows(at.stage) + warpgroup() * kBlockBytes, ring.tokens(at.stage), sums);
    products_wait<1>();  // those of the block before
    if (block > 0) give_back(ring, last, w);
    last = at.stage;
  }
  products_wait<0>();
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) pin(sums[tile]);
  if (w.num_blocks == 0) return;
  give_back(ring, last, w);
  if constexpr (kAdapter) {
    if (!w.is_h) {
      wait_for_previous_kernel();
      const Gated<kTokenTiles> gated(p, w.first_token);
      if (gated.any()) add_updates<Element>(p, ring, w, at, gated, sums);
    }
  }
  multipliers_sync<S::kRowTiles>();  // nobody reads the stages any more
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

// Each CTA of a tile finishes its share of the tokens. first_row: of the tile.
template <class Element>
__device__ __forceinline__ void finish(const Params& p, const Work& w, int32_t first_row, int32_t num_tokens,
                                       const float* sPart) {
  auto* out = static_cast<Element*>(p.out);
  const int32_t lanes = (p.silu_and_mul ? kHalfRows : kTileRows) / 4;  // of a token
  const int32_t row = thread_of_group() % lanes * 4;
  const int32_t column = first_row + row;
  for (int32_t i = thread_of_group() / lanes;; i += kGroupThreads / lanes) {
    const int32_t token = i * w.parts + w.part;
    if (token >= num_tokens) break;
    const int32_t offset = token * kPartStride + row;
    float4 y = with_bias<Element>(p, add_parts(sPart, offset, w), column, p.silu_and_mul);
    if (p.silu_and_mul) {
      const float4 sums = add_parts(sPart, offset + kHalfRows, w);
      const float4 up = with_bias<Element>(p, sums, column + p.second_half, true);
      y = {silu_times(y.x, up.x), silu_times(y.y, up.y), silu_times(y.z, up.z), silu_times(y.w, up.w)};
    }
    store_four(out + (w.first_token + token) * p.out_stride + column, y, p.width - column, p.out_aligned);
  }
}

// h of the gated tokens, then the news of it.
template <class Element, int kTokenTiles>
__device__ __forceinline__ void finish_h(const Params& p, const Work& w, int32_t first_row, int32_t num_tokens,
                                         const Gated<kTokenTiles>& gated, const float* sPart) {
  constexpr int32_t kLanes = kTileRows / 4;
  auto* gH = static_cast<Element*>(p.gH) + w.slice * p.h_slice_stride;
  const int32_t row = thread_of_group() % kLanes * 4, r = first_row + row;
  for (int32_t i = thread_of_group() / kLanes;; i += kGroupThreads / kLanes) {
    const int32_t token = i * w.parts + w.part;
    if (token >= num_tokens) break;
    if (!gated(token)) continue;
    const float4 h = add_parts(sPart, token * kPartStride + row, w);
    store_four(gH + (w.first_token + token) * p.h_stride + r, h, p.rank - r, true);
  }
  fence_async_global();  // TMA of other CTAs reads it
  multipliers_sync<Size<kTokenTiles, true>::kRowTiles>();
  if (threadIdx.x == 0) add_release(p.flags + 2 * w.group, 1);
}

// Returns once the parts of all CTAs of a tile are stored.
__device__ __forceinline__ void meet(const Work& w) {
  if (w.parts == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}
// Returns once nobody reads this CTA's parts any more, or gives stages back to it.
__device__ __forceinline__ void leave(const Work& w) {
  if (w.parts == 1 && w.sharers == 1) return;
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}

template <class Element, int kTokenTiles, bool kAdapter>
__global__ void __launch_bounds__(tile_of(kTokenTiles, kAdapter).threads(),
                                   tile_of(kTokenTiles, kAdapter).max_ctas_per_sm())
    linear_kernel(const __grid_constant__ Params p) {
  using S = Size<kTokenTiles, kAdapter>;
  extern __shared__ __align__(1024) uint8_t sStages[];
  const uint32_t stages = shared_address(sStages);
  const Ring ring{stages, stages + p.stages * S::kStageBytes, p.stages, S::kStageBytes, S::kRowBytes};
  const Work w(p, S{});
  const int32_t num_tokens = min(p.num_rows - w.first_token, S::kTokens);
  if constexpr (kAdapter) {
    if (w.is_h) {
      wait_for_previous_kernel();
      if (!Gated<kTokenTiles>(p, w.first_token).any()) return;  // the whole cluster does
    }
  }
  if (threadIdx.x == 0) {
    for (int32_t stage = 0; stage < p.stages; ++stage) {
      barrier_init(ring.full(stage), 1);
      barrier_init(ring.empty(stage), w.sharers * S::kRowTiles * kGroupThreads / 32);
    }
    fence_barrier_init();
  }
  if (p.shares_tokens) {  // the partner's are ready too
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  if (warpgroup() == S::kRowTiles) {
    if constexpr (S::kMovesRegisters) lower_registers_to<40>();
    if (thread_of_group() < 32) produce<kTokenTiles, kAdapter>(p, ring, w);
    __syncwarp();
    meet(w);
    leave(w);
  } else {
    if constexpr (S::kMovesRegisters) raise_registers_to<232>();
    float* sPart = reinterpret_cast<float*>(sStages) + warpgroup() * S::kPartFloats;
    consume<Element, kTokenTiles, kAdapter>(p, ring, w, num_tokens, sPart);
    meet(w);
    wait_for_previous_kernel();
    const int32_t first_row = w.first_row + warpgroup() * w.next_tile;
    if (kAdapter && w.is_h) {
      finish_h<Element>(p, w, first_row, num_tokens, Gated<kTokenTiles>(p, w.first_token), sPart);
    } else if (w.num_blocks > 0) {
      finish<Element>(p, w, first_row, num_tokens, sPart);
    }
    leave(w);
  }
}

template <class Element, int kTokenTiles>
Kernel kernel_of(bool adapter) {
  return adapter ? linear_kernel<Element, kTokenTiles, true> : linear_kernel<Element, kTokenTiles, false>;
}
template <class Element>
Kernel kernel_of(const Tile& tile) {
  switch (tile.tokens) {
    case 1: return kernel_of<Element, 1>(tile.adapter);
    case 2: return kernel_of<Element, 2>(tile.adapter);
    default: return kernel_of<Element, 4>(tile.adapter);
  }
}

}  // namespace idlm::gemm
