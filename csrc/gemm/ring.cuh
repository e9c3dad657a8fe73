// The ring of stages in shared memory that a producer fills by TMA and warpgroups empty.
#pragma once

#include "common/hopper.cuh"

namespace idlm::gemm {

struct Ring {
  uint32_t tiles, barriers;  // addresses
  int32_t stages;
  uint32_t bytes, row_bytes;  // of a stage, and of the rows in it; the tokens come behind them

  __device__ uint32_t rows(int32_t stage) const { return tiles + stage * bytes; }
  __device__ uint32_t tokens(int32_t stage) const { return rows(stage) + row_bytes; }
  // A phase of `full` ends with the bytes of a stage, one of `empty` when all who read the stage, here and in the CTA that
  // gets tokens from here, have given it back.
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

}  // namespace idlm::gemm
