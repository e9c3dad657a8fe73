// How attention is cut into units of work. Pure. What a row's bits depend on is kTileRows, kTileSlots, kLeafSlots and
// tree_levels, and nothing else here: they are frozen.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define IDLM_ANYWHERE __host__ __device__
#else
#define IDLM_ANYWHERE
#endif

namespace idlm::attention {

constexpr int32_t kTileRows = 64;    // packed rows: the 64-row side of wgmma
constexpr int32_t kTileSlots = 64;   // slots of a step of the online softmax
constexpr int32_t kLeafSlots = 256;  // an online softmax starts at every multiple
constexpr int32_t kLeafTiles = kLeafSlots / kTileSlots;

// Leaves are joined in a binary tree up to the 4 of 1024 slots, those in their order. Beyond 128 columns shared memory has
// room for one result that waits, not three: all leaves are joined in their order.
constexpr int32_t kMaxTreeLevels = 2;
IDLM_ANYWHERE constexpr int32_t tree_levels(int32_t head_dim) { return head_dim <= 128 ? kMaxTreeLevels : 0; }

// Columns of a tile, of which the last may be zeros. 0: head_dim is too large, or no whole vectors of 16 bytes.
IDLM_ANYWHERE constexpr int32_t tile_columns(int32_t head_dim) {
  return head_dim < 8 || head_dim > 256 || head_dim % 8 ? 0 : head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

// A unit is 2^level leaves of a tile of rows, level <= tree_levels, or all of them.
constexpr int32_t kWhole = kMaxTreeLevels + 1;

// What a unit costs beside its leaves, in leaves: q, the end of the pipeline, the result.
constexpr int32_t kUnitCost = 1;
constexpr int64_t kMaxScratchBytes = int64_t{256} << 20;

IDLM_ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Results of units of packed rows, fp32: o, m and t.
constexpr int64_t scratch_bytes(int64_t packed_rows, int64_t max_leaves, int32_t level, int32_t head_dim) {
  return level >= kWhole ? 0 : packed_rows * ceil_div(max_leaves, int64_t{1} << level) * (head_dim + 2) * 4;
}

// The finest level whose results fit: kWhole if none does (prefill; there tiles of rows fill the machine).
constexpr int32_t min_level(int64_t packed_rows, int64_t max_leaves, int32_t head_dim) {
  int32_t level = 0;
  while (level < kWhole && scratch_bytes(packed_rows, max_leaves, level, head_dim) > kMaxScratchBytes)
    level = level < tree_levels(head_dim) ? level + 1 : kWhole;
  return level;
}

// Rounds of the CTAs by what a unit of them takes. Qwen3-8B on 132 SMs: one request of 1k has 8 tiles of 4 leaves: level
// 0, 32 units, 1 x (1 + 1); of 4k: level 0, 128 units. 8 of 1k: 64 tiles: level 0 is 256 units, 2 x (1 + 1), level 1 is
// 128 units, 1 x (2 + 1). 64 of 1k: whole tiles, 4 x (4 + 1). One of 32k among 16 of 1k: 384 units of level 2, 3 x (4 + 1);
// whole tiles would take 2 x (128 + 1).
IDLM_ANYWHERE constexpr int64_t cost(int64_t units, int64_t leaves, int64_t ctas) {
  return ceil_div(units, ctas) * (leaves + kUnitCost);
}

}  // namespace idlm::attention
