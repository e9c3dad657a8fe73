// How K and V come into shared memory: four warps walk the page table ahead and fill a ring of blocks, 64 slots of K and 64
// of V in turn, laid out as wgmma reads them. Slots that no row of the tile sees become zeros, and nothing of them is read.
#pragma once

#include <cuda_fp8.h>

#include "attention/softmax.cuh"
#include "common/hopper.cuh"

namespace idlm::attention {

constexpr int32_t kPanelBytes = kTileSlots * kSwizzleBytes;  // 64 slots or rows of 64 columns

// Asked for anew each time: what follows from it would take registers all the way through the loops.
__device__ __forceinline__ int32_t thread_of_group() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int32_t>(thread) % kGroupThreads;
}
// Where piece `piece` (16 bytes) of a row lies in a block: panels of 128-byte rows, with the swizzle of wgmma.
__device__ __forceinline__ int32_t place(int32_t row, int32_t piece) {
  return piece / 8 * kPanelBytes + row * kSwizzleBytes + ((piece % 8) ^ (row % 8)) * 16;
}

template <int kDim>
struct Ring {
  static constexpr int32_t kBlocks = kDim <= 128 ? 6 : 4;  // K and V in turn
  static constexpr int32_t kBlockBytes = kDim / 64 * kPanelBytes;

  uint32_t blocks, barriers;  // addresses
  int32_t index = 0;
  uint32_t parity = 0;

  __device__ uint32_t block() const { return blocks + index * kBlockBytes; }
  __device__ uint32_t full() const { return barriers + 16 * index; }
  __device__ uint32_t empty() const { return full() + 8; }
  __device__ void next() {
    if (++index == kBlocks) index = 0, parity ^= 1;
  }
};

template <class Element, int kDim>
__device__ __forceinline__ void produce(const Params& p, Ring<kDim> ring) {
  constexpr int32_t kPieces = kDim / 8;                      // of a slot
  constexpr int32_t kStep = kGroupThreads / kPieces;         // slots between those of a thread
  constexpr int32_t kCount = kTileSlots / kStep;
  const int32_t piece = thread_of_group() % kPieces, first = thread_of_group() / kPieces;
  const bool filled_up = piece * 8 >= p.head_dim;
  Schedule schedule(p);
  Unit u;
  while (schedule.next(p, u)) {
    const Request r(p, u.request);
    const Extent x(p, r, u, schedule.level);
    const int32_t* table = p.page_table + u.request * p.page_table_stride;
    const auto* k = static_cast<const Element*>(p.k_cache) + u.kv_head * p.k_stride_head + piece * 8;
    const auto* v = static_cast<const Element*>(p.v_cache) + u.kv_head * p.v_stride_head + piece * 8;
    int32_t page[kCount];
    const auto look_up = [&](int32_t tile) {
#pragma unroll
      for (int32_t j = 0; j < kCount; ++j) {
        const int32_t slot = tile * kTileSlots + first + j * kStep;
        const bool none = filled_up || slot < x.low || slot >= x.end;
        page[j] = none ? -1 : min(max(table[slot / p.page_size], 0), p.num_pages - 1);
      }
    };
    const auto copy = [&](const int32_t (&pages)[kCount], const Element* cache, int64_t stride_page, int64_t stride_slot,
                          int32_t tile) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
#pragma unroll
      for (int32_t j = 0; j < kCount; ++j) {
        const int32_t row = first + j * kStep, slot = (tile * kTileSlots + row) % p.page_size;
        const bool none = pages[j] < 0;
        const Element* from = none ? cache : cache + pages[j] * stride_page + slot * stride_slot;
        copy_16_bytes(ring.block() + place(row, piece), from, none);
      }
      barrier_arrive_with_copies(ring.full());
      ring.next();
    };
    if (x.first_tile < x.end_tile) look_up(x.first_tile);
    for (int32_t tile = x.first_tile; tile < x.end_tile; ++tile) {
      int32_t pages[kCount];
#pragma unroll
      for (int32_t j = 0; j < kCount; ++j) pages[j] = page[j];
      if (tile + 1 < x.end_tile) look_up(tile + 1);  // on the way while this tile is copied
      copy(pages, k, p.k_stride_page, p.k_stride_slot, tile);
      copy(pages, v, p.v_stride_page, p.v_stride_slot, tile);
    }
  }
  let_next_kernel_start();
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- caches of fp8

// Two e4m3 numbers as two of q's, which hold them exactly.
template <class Element>
__device__ __forceinline__ uint32_t widened(uint32_t two) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
  const float2 x = __half22float2(__half2(raw));
  return packed<Element>(x.x, x.y);
}

// The same by way of registers, where the numbers are widened; those of a tile are asked for while the one before is stored.
template <class Element, int kDim>
__device__ __forceinline__ void produce_from_fp8(const Params& p, Ring<kDim> ring) {
  constexpr int32_t kChunks = kDim / 16;  // of 16 numbers, of a slot
  constexpr int32_t kStep = kGroupThreads / kChunks;
  constexpr int32_t kCount = kTileSlots / kStep;
  const int32_t chunk = thread_of_group() % kChunks, first = thread_of_group() / kChunks;
  const bool filled_up = chunk * 16 >= p.head_dim;
  Schedule schedule(p);
  Unit u;
  while (schedule.next(p, u)) {
    const Request r(p, u.request);
    const Extent x(p, r, u, schedule.level);
    const int32_t* table = p.page_table + u.request * p.page_table_stride;
    const auto* k = static_cast<const uint8_t*>(p.k_cache) + u.kv_head * p.k_stride_head + chunk * 16;
    const auto* v = static_cast<const uint8_t*>(p.v_cache) + u.kv_head * p.v_stride_head + chunk * 16;
    uint4 loaded[2][kCount];
    const auto load = [&](int32_t tile) {
#pragma unroll
      for (int32_t j = 0; j < kCount; ++j) {
        const int32_t slot = tile * kTileSlots + first + j * kStep;
        loaded[0][j] = loaded[1][j] = uint4{};
        if (filled_up || slot < x.low || slot >= x.end) continue;
        const int64_t page = min(max(table[slot / p.page_size], 0), p.num_pages - 1);
        const int64_t in_page = slot % p.page_size;
        loaded[0][j] = load_16_bytes(k + page * p.k_stride_page + in_page * p.k_stride_slot);
        loaded[1][j] = load_16_bytes(v + page * p.v_stride_page + in_page * p.v_stride_slot);
      }
    };
    const auto store = [&](const uint4 (&numbers)[kCount]) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
#pragma unroll
      for (int32_t j = 0; j < kCount; ++j) {
        const uint32_t words[4] = {numbers[j].x, numbers[j].y, numbers[j].z, numbers[j].w};
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          const uint32_t a = words[2 * half], b = words[2 * half + 1];
          store_16_bytes(ring.block() + place(first + j * kStep, 2 * chunk + half),
                         {widened<Element>(a & 0xFFFF), widened<Element>(a >> 16), widened<Element>(b & 0xFFFF),
                          widened<Element>(b >> 16)});
        }
      }
      fence_async_shared();
      barrier_arrive(ring.full());
      ring.next();
    };
    if (x.first_tile < x.end_tile) load(x.first_tile);
    for (int32_t tile = x.first_tile; tile < x.end_tile; ++tile) {
      uint4 here[2][kCount];
#pragma unroll
      for (int32_t j = 0; j < kCount; ++j) here[0][j] = loaded[0][j], here[1][j] = loaded[1][j];
      if (tile + 1 < x.end_tile) load(tile + 1);
      store(here[0]);
      store(here[1]);
    }
  }
  let_next_kernel_start();
}

}  // namespace idlm::attention
