// The kernel of strided_attention: o = softmax(q K^T sm_scale) V over the slots of a paged cache that each row sees.
//
// A tile is 64 packed rows: the query heads of a KV head, row i and head g at i G + g, so that every row count runs the
// same matrix instruction. A unit is a tile and a range of its slots (schedule.cuh); the CTAs of a persistent grid take
// units in turn. Four warps walk the page table ahead and copy K and V, 64 slots at a time, into a ring of blocks; slots
// that no row sees become zeros unread. The warpgroup computes S = q K^T of the next 64 slots while it takes the softmax of
// these, then o += P V with P from registers.
//
//   256 slots at a multiple of 256 are a leaf: an online softmax that starts afresh. Leaves are joined in a binary tree up
//   to the 4 of 1024 slots, and those in their order. The halves of the tree that wait lie in shared memory. A tile that
//   several CTAs share is joined, by the same tree, by the one that comes last.
//
// head_dim is filled up to 64, 128 or 256 columns, with zeros that are neither read from memory nor written to it. With 256
// registers and shared memory are short: products and softmax take turns, and leaves are joined in their order, no tree.
//
// So the bits of a row depend on what it sees alone. Where a row sees less than others of its tile, a V that is not finite
// is taken out of the block and added to the rows that see it: 0 * NaN never happens.
//
//   bytes   K and V once per tile of rows; per unit 520 B and row of results, out and in, where a tile is shared
//   bound   Qwen3-8B: 4096 B per slot and layer, 5.0 us for 4096 slots at 3.35 TB/s. 64 slots are 33 KB, 1.29 us of an
//           SM's share, of which the tensor cores take 0.28 us.
#pragma once

#include "attention/combine.cuh"
#include "attention/copy.cuh"
#include "common/hopper.cuh"
#include "common/scalar.cuh"

namespace idlm::attention {

// What the multiplying warps tell one another of a unit.
struct Board {
  Unit unit;
  int32_t last;  // is this CTA the last of its tile?
};

// What depends on the columns of a tile: kDim, of which p.head_dim are the caller's.
template <int kDim>
struct Size {
  static constexpr int kPanels = kDim / 64;
  static constexpr int32_t kBlocks = Ring<kDim>::kBlocks;
  static constexpr int32_t kBlockBytes = Ring<kDim>::kBlockBytes;  // of q, and of 64 slots of K or V
  static constexpr int32_t kTreeLevels = tree_levels(kDim);
  static constexpr int32_t kSuperLeaves = 1 << kTreeLevels;
  static constexpr bool kOverlaps = kDim <= 128;  // beyond, scores and weights and o are too many registers at once
  static constexpr int32_t kStackSlots = kTreeLevels + 1;
  static constexpr int32_t kStackVectors = kPanels * 8 + 1;      // float4 of a thread
  static constexpr int32_t kStackBytes = kStackVectors * kGroupThreads * 16;
  static constexpr int32_t kBarrierBytes = 2 * kBlocks * 8;
  static constexpr int32_t kBytes =
      (1 + kBlocks) * kBlockBytes + kStackSlots * kStackBytes + kBarrierBytes + int32_t{sizeof(Board)};
  static_assert(kBytes <= 227 * 1024);
};

// Of the multiplying warps.
__device__ __forceinline__ void group_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kGroupThreads) : "memory"); }
__device__ __forceinline__ bool group_any(bool x) {
  uint32_t any;
  asm volatile(
      "{\n\t.reg .pred mine, any;\n\t"
      "setp.ne.u32 mine, %1, 0;\n\t"
      "barrier.cta.red.or.pred any, 1, %2, mine;\n\t"
      "selp.u32 %0, 1, 0, any;\n\t}"
      : "=r"(any)
      : "r"(uint32_t{x}), "n"(kGroupThreads)
      : "memory");
  return any != 0;
}

// ---- the multiplying warpgroup

template <class Element, int kDim>
struct Multiplier {
  using S = Size<kDim>;
  const Params& p;
  uint8_t* sQ;      // a block; the output on its way out
  uint8_t* sStack;  // [kStackSlots][kStackVectors][threads] float4
  Board* sBoard;
  Ring<kDim> ring;
  float o[S::kPanels][32];
  float m[2], t[2];  // of the thread's rows; t of its own columns until the leaf ends
  uint32_t have = 0;  // slots of the stack in use

  __device__ Multiplier(const Params& params, uint8_t* q, uint8_t* stack, Board* board, const Ring<kDim>& r)
      : p(params), sQ(q), sStack(stack), sBoard(board), ring(r) {}

  // Of the tile: the two that this thread holds numbers of.
  static __device__ int32_t row(int32_t h) {
    return thread_of_group() / 32 * 16 + static_cast<int32_t>(lane_id()) / 4 + 8 * h;
  }

  __device__ void load_q(const Request& r, const Unit& u) {
    group_sync();  // the output of the unit before has been read from there
    if (thread_of_group() == 0) sBoard->unit = u;
    constexpr int32_t kPieces = kDim / 8;
#pragma unroll 4
    for (int32_t j = 0; j < kTileRows * kPieces / kGroupThreads; ++j) {
      const int32_t at = thread_of_group() + j * kGroupThreads, row = at / kPieces, piece = at % kPieces;
      const Row which(p, r, u, row);
      uint4 x = {};
      if (which.exists && piece * 8 < p.head_dim)
        x = load_16_bytes(static_cast<const Element*>(p.q) + which.row * p.q_stride_row +
                          which.head * p.q_stride_head + piece * 8);
      *reinterpret_cast<uint4*>(sQ + place(row, piece)) = x;
    }
    fence_async_shared();
    group_sync();
  }

  // s = q K^T of a block; on its way when this returns.
  __device__ void start_scores(const Ring<kDim>& at, float (&s)[32]) {
    barrier_wait(at.full(), at.parity);
    fence_async_shared();  // what was copied
#pragma unroll
    for (int32_t e = 0; e < 32; ++e) s[e] = 0.0f;
    products_begin();
#pragma unroll
    for (int32_t panel = 0; panel < S::kPanels; ++panel) {
      const uint64_t a = tile_descriptor(shared_address(sQ) + panel * kPanelBytes);
      const uint64_t b = tile_descriptor(at.block() + panel * kPanelBytes);
#pragma unroll
      for (int32_t k = 0; k < kSwizzleBytes; k += 32) product<Element>(s, advanced(a, k), advanced(b, k));
    }
    products_commit();
  }

  // o += P V.
  __device__ void start_update(const uint32_t (&weights)[16]) {
    products_begin();
#pragma unroll
    for (int32_t k = 0; k < kTileSlots / 16; ++k) {
#pragma unroll
      for (int32_t panel = 0; panel < S::kPanels; ++panel) {
        const uint64_t b = tile_descriptor(ring.block() + panel * kPanelBytes + k * 16 * kSwizzleBytes);
        product_of_registers<Element>(o[panel], weights + 4 * k, b);
      }
    }
    products_commit();
  }

  // After an update: o may be touched, and V is given back.
  __device__ void settle() {
#pragma unroll
    for (int32_t panel = 0; panel < S::kPanels; ++panel) pin(o[panel]);
    give_back(ring.empty());
  }

  __device__ void give_back(uint32_t empty) {
    if (lane_id() == 0) barrier_arrive(empty);
  }

  // Scores to weights, and what o has to be multiplied by. sees: of the thread's rows, bit c slot c.
  __device__ void softmax(float (&s)[32], const uint64_t (&sees)[2], bool all, float scale, float (&share)[2]) {
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      const uint64_t mine = sees[h] >> 2 * (lane_id() % 4);
      float top = kNothing;
#pragma unroll
      for (int32_t j = 0; j < 8; ++j) {
#pragma unroll
        for (int32_t e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * h + e];
          x = __fmul_rn(x, scale);
          if (!all) x = mine >> (8 * j + e) & 1 ? x : kNothing;
          top = fmaxf(top, x);
        }
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float largest = fmaxf(m[h], top), finite = largest == kNothing ? 0.0f : largest;
      share[h] = exp2_approx(m[h] - finite);
      m[h] = largest;
      float sum = 0.0f;
#pragma unroll
      for (int32_t j = 0; j < 8; ++j) {
        const float x = exp2_approx(s[4 * j + 2 * h] - finite), y = exp2_approx(s[4 * j + 2 * h + 1] - finite);
        sum += x + y;
        s[4 * j + 2 * h] = x, s[4 * j + 2 * h + 1] = y;
      }
      t[h] = __fmaf_rn(t[h], share[h], sum);
    }
  }

  // P in pairs, as wgmma takes it from registers.
  __device__ void pack(const float (&s)[32], uint32_t (&weights)[16]) {
#pragma unroll
    for (int32_t i = 0; i < 16; ++i) weights[i] = packed<Element>(s[2 * i], s[2 * i + 1]);
  }

  // Of the thread's rows the slots whose weight is 0, bit c slot c: each thread of four holds 16 of a row's 64.
  __device__ void find_weightless(const uint32_t (&weights)[16], uint64_t (&none)[2]) {
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      uint64_t mine = 0;
#pragma unroll
      for (int32_t j = 0; j < 8; ++j) {
        const uint32_t pair = weights[2 * j + h];
        mine |= (uint64_t{(pair & 0x7FFFu) == 0} | uint64_t{(pair & 0x7FFF0000u) == 0} << 1) << 8 * j;
      }
      mine <<= 2 * (lane_id() % 4);
      mine |= __shfl_xor_sync(~0u, mine, 1);
      none[h] = mine | __shfl_xor_sync(~0u, mine, 2);
    }
  }

  // Takes every V that is not finite out of the block and adds it to the rows that see it, as the product would have: a
  // weight of 0 makes it NaN.
  __device__ void take_out(const uint64_t (&sees)[2], const uint32_t (&weights)[16]) {
    constexpr uint32_t kExponent = kExponentBits<Element>;
    const auto strange = [](uint32_t bits) { return (bits & kExponent) == kExponent; };
    uint8_t* sV = sQ + (ring.block() - shared_address(sQ));
    constexpr int32_t kWords = S::kBlockBytes / 4 / kGroupThreads;
    bool found = false;
#pragma unroll 2
    for (int32_t j = 0; j < kWords / 4; ++j) {
      const uint4 x = reinterpret_cast<const uint4*>(sV)[thread_of_group() + j * kGroupThreads];
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) found |= strange(words[i]) || strange(words[i] >> 16);
    }
    if (!group_any(found)) return;
    uint64_t none[2];
    find_weightless(weights, none);
    const int32_t pair = 4 * static_cast<int32_t>(lane_id() % 4);  // bytes
#pragma unroll 1
    for (int32_t c = 0; c < kTileSlots; ++c) {
      const bool seen[2] = {(sees[0] >> c & 1) != 0, (sees[1] >> c & 1) != 0};
      const bool weighs[2] = {(none[0] >> c & 1) == 0, (none[1] >> c & 1) == 0};
#pragma unroll
      for (int32_t panel = 0; panel < S::kPanels; ++panel) {
#pragma unroll
        for (int32_t j = 0; j < 8; ++j) {
          const auto* at = reinterpret_cast<const Element*>(sV + place(c, panel * 8 + j) + pair);
#pragma unroll
          for (int32_t e = 0; e < 2; ++e) {
            const float v = Scalar<Element>::up(at[e]);
#pragma unroll
            for (int32_t h = 0; h < 2; ++h)
              if (seen[h] && !isfinite(v)) o[panel][4 * j + 2 * h + e] += weighs[h] ? v : __int_as_float(0x7FC00000);
          }
        }
      }
    }
    group_sync();
#pragma unroll 1
    for (int32_t j = 0; j < kWords; ++j) {
      uint32_t& w = reinterpret_cast<uint32_t*>(sV)[thread_of_group() + j * kGroupThreads];
      w &= (strange(w) ? 0xFFFF0000u : ~0u) & (strange(w >> 16) ? 0x0000FFFFu : ~0u);
    }
    fence_async_shared();
    group_sync();
  }

  // ---- the tree of leaves

  __device__ float4* slot(int32_t index) const {
    return reinterpret_cast<float4*>(sStack + index * S::kStackBytes) + thread_of_group();
  }
  __device__ void push(int32_t index) {
    float4* s = slot(index);
#pragma unroll
    for (int32_t i = 0; i < S::kPanels * 8; ++i) {
      const float* x = &o[i / 8][i % 8 * 4];
      s[i * kGroupThreads] = make_float4(x[0], x[1], x[2], x[3]);
    }
    s[S::kPanels * 8 * kGroupThreads] = make_float4(m[0], m[1], t[0], t[1]);
    have |= 1u << index;
  }
  // Joins what lies there, if anything does, with the range behind it.
  __device__ void pop(int32_t index) {
    if (!(have >> index & 1)) return;
    have &= ~(1u << index);
    const float4* s = slot(index);
    const float4 before = s[S::kPanels * 8 * kGroupThreads];
    const Join first(before.x, m[0]), second(before.y, m[1]);
    constexpr int32_t kAtOnce = kDim <= 128 ? 4 : 1;  // vectors on their way: registers are short
#pragma unroll
    for (int32_t i = 0; i < S::kPanels * 8; ++i) {
      if (i % kAtOnce == 0) asm volatile("" ::: "memory");
      const float4 y = s[i * kGroupThreads];
      float* x = &o[i / 8][i % 8 * 4];
      x[0] = first(y.x, x[0]), x[1] = first(y.y, x[1]);
      x[2] = second(y.z, x[2]), x[3] = second(y.w, x[3]);
    }
    t[0] = first(before.z, t[0]), t[1] = second(before.w, t[1]);
    m[0] = first.m, m[1] = second.m;
  }
  __device__ void begin_leaf() { m[0] = m[1] = kNothing, t[0] = t[1] = 0.0f; }
  __device__ void clear() {
#pragma unroll
    for (int32_t panel = 0; panel < S::kPanels; ++panel) {
#pragma unroll
      for (int32_t e = 0; e < 32; ++e) o[panel][e] = 0.0f;
    }
  }
  __device__ void rescale(const float (&share)[2]) {
#pragma unroll
    for (int32_t panel = 0; panel < S::kPanels; ++panel) {
#pragma unroll
      for (int32_t e = 0; e < 32; ++e) o[panel][e] *= share[e / 2 % 2];
    }
  }
  __device__ void end_leaf(int32_t leaf, bool last) {
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      t[h] += __shfl_xor_sync(~0u, t[h], 1);
      t[h] += __shfl_xor_sync(~0u, t[h], 2);
    }
    const bool super = last || leaf % S::kSuperLeaves == S::kSuperLeaves - 1;
#pragma unroll
    for (int32_t level = 0; level < S::kTreeLevels; ++level)
      if (super || (leaf >> level & 1)) pop(level);
      else break;
    if (super) pop(S::kTreeLevels);
    if (!last) push(super ? S::kTreeLevels : leaf & 1);
  }

  // ---- a unit

  // What the thread's rows see of a tile that not all rows see whole. Looked up again, since registers are short.
  __device__ void look(const int32_t (&i)[2], int32_t tile, uint64_t (&sees)[2]) {
    const Request r(p, sBoard->unit.request);
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) sees[h] = Sight(p, r, i[h]).sees(p, r, tile * kTileSlots);
  }

  // The softmax of the scores in s, of a tile's slots.
  __device__ void weigh(const Extent& x, const int32_t (&i)[2], float scale, int32_t tile, float (&s)[32],
                        float (&share)[2]) {
    const bool all = x.whole(tile);
    uint64_t sees[2] = {~uint64_t{0}, ~uint64_t{0}};
    if (!all) look(i, tile, sees);
    softmax(s, sees, all, scale, share);
  }

  // Returns once V of a tile is there, without what is not finite where a row must not meet it.
  __device__ void await_v(const Extent& x, const int32_t (&i)[2], int32_t tile, const uint32_t (&weights)[16]) {
    barrier_wait(ring.full(), ring.parity);
    fence_async_shared();
    if (x.whole(tile)) return;
    uint64_t sees[2];
    look(i, tile, sees);
    take_out(sees, weights);
  }

  // All tiles of a unit, one after the other.
  __device__ void attend_in_turns(const Extent& x, const int32_t (&i)[2], float scale) {
#pragma unroll 1
    for (int32_t tile = x.first_tile; tile < x.end_tile; ++tile) {
      uint32_t weights[16];
      {
        float s[32], share[2];
        start_scores(ring, s);
        products_wait<0>();
        pin(s);
        give_back(ring.empty());
        ring.next();
        weigh(x, i, scale, tile, s, share);
        rescale(share);
        pack(s, weights);
      }
      await_v(x, i, tile, weights);
      start_update(weights);
      products_wait<0>();
      settle();
      ring.next();
      const bool last = tile + 1 == x.end_tile;
      if (last || tile % kLeafTiles == kLeafTiles - 1) {
        end_leaf(tile / kLeafTiles, last);
        if (!last) begin_leaf(), clear();
      }
    }
  }

  // The same, to the bit, with the softmax of a tile beside the update of the one before.
  __device__ void attend_overlapping(const Extent& x, const int32_t (&i)[2], float scale) {
    float s[32], share[2];
    uint32_t weights[16];
    start_scores(ring, s);
    products_wait<0>();
    pin(s);
    give_back(ring.empty());
    ring.next();
    weigh(x, i, scale, x.first_tile, s, share);
    pack(s, weights);
    const int32_t last = x.end_tile - 1;
#pragma unroll 1
    for (int32_t tile = x.first_tile; tile < last; ++tile) {
      Ring<kDim> ahead = ring;  // ring: V of this tile; behind it lies K of the next
      ahead.next();
      await_v(x, i, tile, weights);
      start_scores(ahead, s);
      start_update(weights);
      products_wait<1>();
      pin(s);
      give_back(ahead.empty());
      // The next tile's softmax, while this one's update runs.
      const bool leaf_ends = tile % kLeafTiles == kLeafTiles - 1;
      const float of_leaf[4] = {m[0], m[1], t[0], t[1]};
      if (leaf_ends) begin_leaf();
      weigh(x, i, scale, tile + 1, s, share);
      products_wait<0>();
      settle();
      if (leaf_ends) {
        const float of_next[4] = {m[0], m[1], t[0], t[1]};
        m[0] = of_leaf[0], m[1] = of_leaf[1], t[0] = of_leaf[2], t[1] = of_leaf[3];
        end_leaf(tile / kLeafTiles, false);
        m[0] = of_next[0], m[1] = of_next[1], t[0] = of_next[2], t[1] = of_next[3];
        clear();
      } else {
        rescale(share);
      }
      pack(s, weights);
      ring = ahead;
      ring.next();
    }
    await_v(x, i, last, weights);
    start_update(weights);
    products_wait<0>();
    settle();
    ring.next();
    end_leaf(last / kLeafTiles, true);
  }

  // i: the thread's rows, of the step. k_scale: of K.
  __device__ void attend(const Extent& x, const int32_t (&i)[2], float k_scale) {
    const float scale = p.sm_scale * 1.44269504088896341f * k_scale;
    begin_leaf();
    clear();
    if (x.first_tile >= x.end_tile) return;
    if constexpr (S::kOverlaps) attend_overlapping(x, i, scale);
    else attend_in_turns(x, i, scale);
  }

  // The tile's rows, by way of the place of q.
  __device__ void store_rows(const Request& r, const Unit& u) {
    const float v_scale = scale_of(p.v_scale, p.v_scale_stride, u.kv_head);
    const int32_t lane = static_cast<int32_t>(lane_id());
    group_sync();  // all products with q are done
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      const Result result(m[h], t[h], v_scale);
      const Row which(p, r, u, row(h));
#pragma unroll
      for (int32_t panel = 0; panel < S::kPanels; ++panel) {
#pragma unroll
        for (int32_t j = 0; j < 8; ++j) {
          const uint32_t pair =
              packed<Element>(result(o[panel][4 * j + 2 * h]), result(o[panel][4 * j + 2 * h + 1]));
          *reinterpret_cast<uint32_t*>(sQ + place(row(h), panel * 8 + j) + 4 * (lane % 4)) = pair;
        }
      }
      if (p.lse != nullptr && which.exists && lane % 4 == 0)
        p.lse[which.row * p.lse_stride + which.head] = result.lse;
    }
    group_sync();
    constexpr int32_t kPieces = kDim / 8;
#pragma unroll 1
    for (int32_t at = thread_of_group(); at < kTileRows * kPieces; at += kGroupThreads) {
      const int32_t row = at / kPieces, piece = at % kPieces;
      const Row which(p, r, u, row);
      if (which.exists && piece * 8 < p.head_dim)
        store_piece<Element>(p, which.row, which.head, piece, *reinterpret_cast<const uint4*>(sQ + place(row, piece)));
    }
  }

  // This part of the tile's rows, for whoever joins the parts.
  __device__ void store_part(const Request& r, const Unit& u) {
    const int32_t lane = static_cast<int32_t>(lane_id());
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      const Row which(p, r, u, row(h));
      if (!which.exists) continue;
      const int64_t at = (which.row * p.num_heads + which.head) * p.max_parts + u.part;
      if (lane % 4 == 0) p.gMT[at] = make_float2(m[h], t[h]);
      float* gO = p.gO + at * p.head_dim + 2 * (lane % 4);
#pragma unroll
      for (int32_t panel = 0; panel < S::kPanels; ++panel) {
#pragma unroll
        for (int32_t j = 0; j < 8; ++j)
          if (panel * 64 + 8 * j < p.head_dim)
            *reinterpret_cast<float2*>(gO + panel * 64 + 8 * j) =
                make_float2(o[panel][4 * j + 2 * h], o[panel][4 * j + 2 * h + 1]);
      }
    }
  }

  // Are all parts of the tile stored? One CTA alone is told so.
  __device__ bool comes_last(const Unit& u) {
    group_sync();
    if (thread_of_group() == 0) {
      int32_t* word = p.flags + (int64_t{u.request} * p.row_tiles + u.row_tile) * p.num_kv_heads + u.kv_head;
      const bool last = add_acquire_release(word, 1) == u.parts - 1;
      if (last) *word = 0;  // nobody looks any more; the next launch comes after this one's end
      sBoard->last = last;
    }
    group_sync();
    return sBoard->last != 0;
  }

  __device__ void run() {
    Schedule schedule(p);
    Unit u;
    while (schedule.next(p, u)) {
      {
        const Request r(p, u.request);
        load_q(r, u);
        attend(Extent(p, r, u, schedule.level), {Row(p, r, u, row(0)).i, Row(p, r, u, row(1)).i},
               scale_of(p.k_scale, p.k_scale_stride, u.kv_head));
      }
      const Unit done = sBoard->unit;  // and not u, which would take registers all the while
      const Request r(p, done.request);
      if (done.parts == 1) {
        store_rows(r, done);
      } else {
        store_part(r, done);
        if (comes_last(done)) join_parts<Element, kDim>(p, r, done, schedule.level);
      }
    }
  }
};

template <class Element, int kDim>
__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const __grid_constant__ Params p) {
  using S = Size<kDim>;
  extern __shared__ __align__(1024) uint8_t sQ[];
  uint8_t* sBlocks = sQ + S::kBlockBytes;
  uint8_t* sStack = sBlocks + S::kBlocks * S::kBlockBytes;
  uint8_t* sBarriers = sStack + S::kStackSlots * S::kStackBytes;
  const Ring<kDim> ring{shared_address(sBlocks), shared_address(sBarriers)};
  wait_for_previous_kernel();
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < S::kBlocks; ++i) {
      barrier_init(ring.barriers + 16 * i, kGroupThreads);
      barrier_init(ring.barriers + 16 * i + 8, kGroupThreads / 32);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    Multiplier<Element, kDim>(p, sQ, sStack, reinterpret_cast<Board*>(sBarriers + S::kBarrierBytes), ring).run();
  } else {
    zero_padding<Element, kDim>(p);
    if (p.cache_is_fp8) produce_from_fp8<Element, kDim>(p, ring);
    else produce<Element, kDim>(p, ring);
  }
}

template <class Element>
Kernel kernel_of(int32_t head_dim) {
  const int32_t columns = tile_columns(head_dim);
  return columns == 64 ? attention_kernel<Element, 64>
                       : columns == 128 ? attention_kernel<Element, 128> : attention_kernel<Element, 256>;
}
constexpr int32_t bytes_of(int32_t head_dim) {
  const int32_t columns = tile_columns(head_dim);
  return columns == 64 ? Size<64>::kBytes : columns == 128 ? Size<128>::kBytes : Size<256>::kBytes;
}

}  // namespace idlm::attention
