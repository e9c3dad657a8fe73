// What a kernel for Hopper needs of PTX: mbarriers, the tensor memory accelerator (TMA), wgmma, and the fences between
// them. TMA and wgmma go through the async proxy: what a thread wrote by itself is visible to them after a proxy fence.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace idlm {

__device__ __forceinline__ uint32_t shared_address(const void* s) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(s));
}

// ---- mbarriers: a phase ends when the expected arrivals and bytes are there

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barrier_init, before a barrier of all threads: TMA sees the initialised barriers.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// At the barrier that CTA `rank` of the cluster has at this address.
__device__ __forceinline__ void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n\t}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Returns once the phase with this parity has ended. On a fresh barrier parity 1 has.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- TMA

// How L2 keeps what is loaded. The words are those that createpolicy makes for the whole of an access.
constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // read once per step
constexpr uint64_t kEvictLast = 0x14F0000000000000;   // read by every CTA

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// A box of a tensor [planes, rows, columns] into shared memory; what lies outside of the tensor is 0 and costs no
// traffic. The bytes of the whole box arrive at the barrier.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t column,
                                         int32_t row, int32_t plane, uint64_t keep) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(plane), "l"(keep)
      : "memory");
}
// The same into several CTAs of the cluster: to the same place, with news at the same barrier.
struct Ctas {
  uint32_t bits;
};
__device__ __forceinline__ void load_box(Ctas ctas, uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t column,
                                         int32_t row, int32_t plane, uint64_t keep) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %7, %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(plane), "l"(keep), "h"(static_cast<uint16_t>(ctas.bits))
      : "memory");
}
// Orders accesses of this thread and what it has acquired against accesses through the async proxy, to global memory.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ __forceinline__ void store_16_bytes(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// ---- asynchronous copies by threads

// 16 bytes, or zeros; nothing is read then.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from, bool zeros) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(zeros ? 0 : 16) : "memory");
}
// This thread arrives, as one of those that the barrier expects, once its copies so far have landed.
__device__ __forceinline__ void barrier_arrive_with_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Orders this thread's accesses of shared memory, and those it has waited for, against the async proxy's.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers: the warps of a warpgroup give some back, or take some that others have given

template <int kCount>
__device__ __forceinline__ void lower_registers_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void raise_registers_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- flags in L2

__device__ __forceinline__ int32_t load_acquire(const int32_t* g) {
  int32_t v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(g) : "memory");
  return v;
}
__device__ __forceinline__ void add_release(int32_t* g, int32_t v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(g), "r"(v) : "memory");
}
__device__ __forceinline__ int32_t add_acquire_release(int32_t* g, int32_t v) {
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(g), "r"(v) : "memory");
  return before;
}

// ---- distributed shared memory

// The address of a variable in CTA `rank` of the cluster that lies at `address` in this one.
__device__ __forceinline__ uint32_t address_in_cta(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
__device__ __forceinline__ float4 load_from_cluster(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// ---- wgmma: 64 x 64 x 16, both operands in shared memory, K-major, with the 128-byte swizzle of TMA

constexpr int kSwizzleBytes = 128;

// The matrix descriptor of a tile whose rows are 128 bytes, 8 of them a swizzle atom of 1024 bytes, at a multiple of 1024.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1;
  constexpr uint64_t kAtomBytes = 8 * kSwizzleBytes;
  return (kSwizzle128 << 62) | (kAtomBytes >> 4 << 32) | (1ull << 16) | (address >> 4);
}
// Moves along K inside the atom.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Before the first product, and after other code has written accumulators.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending committed groups are running.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses to accumulators over this place.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define IDLM_WGMMA_64X64X16(TYPES)                                                                                    \
  asm volatile(                                                                                                       \
      "{\n\t.reg .pred accumulate;\n\t"                                                                               \
      "setp.ne.b32 accumulate, 1, 0;\n\t"                                                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES                                                             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                             \
      "%32, %33, accumulate, 1, 1, 0, 0;\n\t}"                                                                        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),   \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),        \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                     \
      : "l"(a), "l"(b))

// d += a b^T. Thread i of the warpgroup holds rows 16 (i / 32) + i % 32 / 4 (+ 8) of d: d[4 j + 2 h + e] is in row
// .. + 8 h and column 8 j + 2 (i % 4) + e.
template <class Element>
__device__ __forceinline__ void product(float (&d)[32], uint64_t a, uint64_t b);
template <>
__device__ __forceinline__ void product<__nv_bfloat16>(float (&d)[32], uint64_t a, uint64_t b) {
  IDLM_WGMMA_64X64X16("bf16.bf16");
}
template <>
__device__ __forceinline__ void product<__half>(float (&d)[32], uint64_t a, uint64_t b) {
  IDLM_WGMMA_64X64X16("f16.f16");
}
#undef IDLM_WGMMA_64X64X16

#define IDLM_WGMMA_REGISTERS_64X64X16(TYPES)                                                                          \
  asm volatile(                                                                                                       \
      "{\n\t.reg .pred accumulate;\n\t"                                                                               \
      "setp.ne.b32 accumulate, 1, 0;\n\t"                                                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES                                                             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                             \
      "{%32, %33, %34, %35}, %36, accumulate, 1, 1, 1;\n\t}"                                                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),   \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),        \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d += a b. a is in registers, a[2 c + h] the pair of columns 8 c + 2 (i % 4) of row .. + 8 h; b, whose rows are K, in
// shared memory as above: 16 rows of 128 bytes.
template <class Element>
__device__ __forceinline__ void product_of_registers(float (&d)[32], const uint32_t* a, uint64_t b);
template <>
__device__ __forceinline__ void product_of_registers<__nv_bfloat16>(float (&d)[32], const uint32_t* a, uint64_t b) {
  IDLM_WGMMA_REGISTERS_64X64X16("bf16.bf16");
}
template <>
__device__ __forceinline__ void product_of_registers<__half>(float (&d)[32], const uint32_t* a, uint64_t b) {
  IDLM_WGMMA_REGISTERS_64X64X16("f16.f16");
}
#undef IDLM_WGMMA_REGISTERS_64X64X16

}  // namespace idlm
