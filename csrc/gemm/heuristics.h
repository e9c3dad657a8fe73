// How a linear layer is cut into CTAs. Pure. `shape` decides the bits of a row, so only n and k may enter there; what
// `fit` chooses no result depends on.
#pragma once

#include <cstdint>

namespace idlm::gemm {

constexpr int32_t kTileRows = 64;   // weight rows of a CTA: the 64-row side of wgmma
constexpr int32_t kHalfRows = 32;   // they come as two boxes, with the activation gate rows and their up rows
constexpr int32_t kTileTokens = 64;  // the other side, and the one instruction shape: 64 x 64 x 16
constexpr int32_t kBlockK = 64;     // 128 bytes: a row of the swizzle
constexpr int32_t kMaxCluster = 8;  // the largest that every Hopper part launches
constexpr int32_t kMinBlocksPerPart = 4;
constexpr int32_t kCtasForSplit = 264;  // two on each of the 132 SMs of an H100; adapters find room beside them

constexpr int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

struct Shape {
  int32_t splits;    // parts of K, summed inside a cluster: 1, 2, 4 or 8
  int32_t h_splits;  // of the adapter's h = x A^T: splits or twice as many. The cluster size where there is an adapter
                     // or x is shared; without either a cluster holds the parts of one tile
};

// Powers of two: the cluster sizes that are in use everywhere. h is cut once more, so that it is ready under the main
// loop; a cluster of that size holds two tiles of the weight side by side, which share what they load of x.
// Qwen3-8B: qkv [6144, 4096] 96 tiles x 2 = 192 CTAs, h in 4; o and down [4096, ..] 64 x 4 = 256, h in 8; gate_up
// [24576, 4096] 384 x 1, h in 2.
constexpr Shape shape(int32_t n, int32_t k) {
  const int32_t tiles = ceil_div(n, kTileRows), blocks = ceil_div(k, kBlockK);
  const auto fits = [&](int32_t parts) { return parts <= kMaxCluster && blocks >= parts * kMinBlocksPerPart; };
  int32_t splits = 1;
  while (fits(2 * splits) && tiles * 2 * splits <= kCtasForSplit) splits *= 2;
  return {splits, fits(2 * splits) ? 2 * splits : splits};
}

constexpr int32_t kSms = 132, kGpcs = 8, kSmsPerGpc = 16;  // a cluster lives in one GPC; some have 18 SMs
constexpr int64_t kSharedBytesPerSm = 228 * 1024;          // of which every CTA costs 1 KB more than it asks for
constexpr int64_t kSharedBytesPerCta = 227 * 1024;
constexpr int32_t kMaxStages = 8;
constexpr int64_t kBarrierBytes = 2 * kMaxStages * 8;  // full and empty, one of each per stage

// What a CTA computes: tiles of 64 weight rows, a warpgroup each, and tiles of 64 tokens. What further tokens cost is L2
// traffic, which a larger tile shares. Up to 64 tokens, with an adapter up to 128, a CTA stays small enough that those of
// h find room beside the others: o and down would else be 136 CTAs for 132 SMs.
struct Tile {
  int32_t rows, tokens;  // in tiles of 64
  bool adapter;

  // The producer is a warp, or a warpgroup where registers are moved from it to those that multiply.
  constexpr bool moves_registers() const { return tokens == 4; }
  constexpr int32_t threads() const { return rows * 128 + (moves_registers() ? 128 : 32); }
  constexpr int64_t stage_bytes() const { return (rows + tokens) * int64_t{kTileRows} * kBlockK * 2; }
  constexpr int64_t shared_bytes(int32_t stages) const { return stages * stage_bytes() + kBarrierBytes; }
  // By registers, of which each quarter of an SM has 512 per lane: 4 x 5 warps or 2 x 9 of up to 96, 3 x 5 of 128, or
  // one of 12 warps of 168.
  constexpr int32_t max_ctas_per_sm() const { return tokens == 1 ? 4 : tokens == 4 ? 1 : rows == 1 ? 3 : 2; }
};
constexpr Tile tile_of(int32_t token_tiles, bool adapter) {
  return {token_tiles == 4 || (token_tiles == 2 && !adapter) ? 2 : 1, token_tiles, adapter};
}
constexpr Tile tile_for(int32_t num_rows, bool adapter) {
  return tile_of(num_rows <= kTileTokens ? 1 : num_rows <= 2 * kTileTokens ? 2 : 4, adapter);
}

// Whether two tiles side by side load half of x each, for both: where x is as much as W, not for a few rows.
constexpr bool shares_tokens(int32_t num_rows, const Shape& cut) {
  return num_rows > kTileTokens / 2 && cut.h_splits == 2 * cut.splits;
}

// How many clusters run at once. Two SMs next to each other, of which a GPC has eight or nine pairs, hold one of two.
constexpr int64_t resident(int32_t cluster, int32_t ctas_per_sm) {
  return cluster <= 2 ? int64_t{kSms} * ctas_per_sm / cluster : int64_t{kGpcs} * (kSmsPerGpc * ctas_per_sm / cluster);
}

// Stages of the ring: as many as there is room for when the fewest CTAs per SM hold the whole launch, and where none do,
// those of 3 per SM. Qwen3-8B at 1 .. 64 rows: qkv, o and down 7 (56 KB of weights in flight per CTA), gate_up
// 4; with an adapter of rank 128 qkv 7, o and down 4, gate_up 4: 8.4 MB and more in flight, 64 KB per SM.
constexpr int32_t fit(int64_t clusters, int32_t cluster, const Tile& tile) {
  const int32_t most = tile.max_ctas_per_sm();
  int32_t per_sm = 1;
  while (per_sm < most && resident(cluster, per_sm) < clusters) ++per_sm;
  if (resident(cluster, per_sm) < clusters) per_sm = most < 3 ? most : 3;
  int32_t stages = kMaxStages;
  const auto room = [&](int32_t s) {
    const int64_t bytes = tile.shared_bytes(s);
    return bytes <= kSharedBytesPerCta && (bytes + 1024) * per_sm <= kSharedBytesPerSm;
  };
  while (!room(stages)) --stages;
  return stages;
}

}  // namespace idlm::gemm
