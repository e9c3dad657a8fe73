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
  int32_t h_splits;  // of the adapter's h = x A^T, a multiple of splits: the cluster size of launches with an adapter
};

// Powers of two: the cluster sizes that are in use everywhere. h is cut finer, so that it is ready under the main loop.
// Qwen3-8B: qkv [6144, 4096] 96 tiles x 2 = 192 CTAs, h in 4; o and down [4096, ..] 64 x 4 = 256, h in 8; gate_up
// [24576, 4096] 384 x 1, h in 4.
constexpr Shape shape(int32_t n, int32_t k) {
  const int32_t tiles = ceil_div(n, kTileRows), blocks = ceil_div(k, kBlockK);
  const auto fits = [&](int32_t parts) { return parts <= kMaxCluster && blocks >= parts * kMinBlocksPerPart; };
  int32_t splits = 1;
  while (fits(2 * splits) && tiles * 2 * splits <= kCtasForSplit) splits *= 2;
  int32_t h_splits = splits;
  for (int doublings = splits == 1 ? 2 : 1; doublings > 0 && fits(2 * h_splits); --doublings) h_splits *= 2;
  return {splits, h_splits};
}

constexpr int32_t kGpcs = 8, kSmsPerGpc = 16;          // a cluster lives in one GPC; some have 18 SMs
constexpr int64_t kSharedBytesPerSm = 228 * 1024;      // of which every CTA costs 1 KB more than it asks for
constexpr int64_t kSharedBytesPerCta = 227 * 1024;
constexpr int32_t kMaxStages = 8;
constexpr int64_t kBarrierBytes = 2 * kMaxStages * 8;  // full and empty, one of each per stage

// A CTA has one tile of the weight and 64 tokens, 2 x 128, or 2 x 256: what further tokens cost is L2 traffic, which a
// larger tile shares.
constexpr int32_t token_tiles_for(int32_t num_rows) {
  return num_rows <= kTileTokens ? 1 : num_rows <= 2 * kTileTokens ? 2 : 4;
}
constexpr int32_t row_tiles_for(int32_t token_tiles) { return token_tiles == 1 ? 1 : 2; }

constexpr int64_t stage_bytes(int32_t token_tiles) {
  return (kTileRows * row_tiles_for(token_tiles) + kTileTokens * token_tiles) * int64_t{kBlockK} * 2;
}
constexpr int64_t shared_bytes(int32_t stages, int32_t token_tiles) {
  return stages * stage_bytes(token_tiles) + kBarrierBytes;
}
// CTAs on an SM by registers, of which each quarter of an SM has 512 per lane: 4 x 5 warps or 2 x 9 warps of up to 96, or
// one of 9 or 12 warps of 168.
constexpr int32_t max_ctas_per_sm(int32_t token_tiles, bool adapter) {
  return token_tiles == 1 ? 4 : token_tiles == 2 && !adapter ? 2 : 1;
}

// Stages of the ring: as many as there is room for when the fewest CTAs per SM hold the whole launch, and where none do,
// those of 3 per SM. Qwen3-8B at 1 .. 64 rows: qkv, o and down 7 (56 KB of weights in flight per CTA), gate_up
// 4; with an adapter of rank 128 qkv 7, o and down 4, gate_up 3: 8.4 MB and more in flight, 64 KB per SM.
constexpr int32_t fit(int64_t clusters, int32_t cluster, int32_t token_tiles, bool adapter) {
  const int32_t most = max_ctas_per_sm(token_tiles, adapter);
  int32_t per_sm = 1;
  while (per_sm < most && int64_t{kGpcs} * (kSmsPerGpc * per_sm / cluster) < clusters) ++per_sm;
  if (int64_t{kGpcs} * (kSmsPerGpc * per_sm / cluster) < clusters) per_sm = most < 3 ? most : 3;
  int32_t stages = kMaxStages;
  const auto room = [&](int32_t s) {
    const int64_t bytes = shared_bytes(s, token_tiles);
    return bytes <= kSharedBytesPerCta && (bytes + 1024) * per_sm <= kSharedBytesPerSm;
  };
  while (!room(stages)) --stages;
  return stages;
}

}  // namespace idlm::gemm
