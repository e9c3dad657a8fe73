// Which unit of work a CTA takes next. Made on the device, from lengths and rows: every warp of every CTA comes to the same
// list, and takes from it every gridDim.x-th unit. Lane l looks at request 32 c + l.
#pragma once

#include "attention/heuristics.h"
#include "attention/params.h"
#include "common/device.cuh"

namespace idlm::attention {

struct Request {
  int32_t start;   // its first row in the batch
  int32_t rows;    // that are computed
  int32_t first;   // slot of its row 0; negative where there are more rows than slots
  int32_t length;  // slots
  int32_t low, end;  // slots that some row sees lie in low .. end - 1

  __device__ Request(const Params& p, int32_t b) {
    start = p.query_start_loc[b];
    const int32_t all = p.query_start_loc[b + 1] - start;
    rows = max(min(all, p.max_query_len), 0);
    length = max(min(p.seq_lens[b], p.max_slots), 0);
    first = length - all;
    low = lowest(p, first);
    end = p.tree_mask != nullptr ? length : min(first + rows, length);
  }
  // The oldest slot that is seen from a slot.
  static __device__ int32_t lowest(const Params& p, int32_t slot) {
    return p.window < 0 ? 0 : max(slot - min(p.window, slot), 0);
  }
  __device__ int32_t tiles(const Params& p) const {
    return static_cast<int32_t>(ceil_div(int64_t{rows} * p.group, kTileRows));
  }
  __device__ int32_t leaves() const {
    return end <= low ? 0 : (end - 1) / kLeafSlots - low / kLeafSlots + 1;
  }
  __device__ int32_t first_part(int32_t level) const { return low / kLeafSlots >> level; }
  // A tile of rows that see nothing has a part as well: its output is 0.
  __device__ int32_t parts(int32_t level) const {
    return level >= kWhole || end <= low ? 1 : ((end - 1) / kLeafSlots >> level) - first_part(level) + 1;
  }
};

struct Unit {
  int32_t request, row_tile, kv_head;
  int32_t part, parts;  // of the tile
};

__device__ __forceinline__ int64_t warp_scan(int64_t x) {
#pragma unroll
  for (int32_t d = 1; d < 32; d *= 2) {
    const int64_t before = __shfl_up_sync(~0u, x, d);
    if (static_cast<int32_t>(lane_id()) >= d) x += before;
  }
  return x;
}

class Schedule {
 public:
  int32_t level;

  __device__ explicit Schedule(const Params& p) : next_(blockIdx.x) {
    int64_t units[kWhole + 1] = {};
    int32_t longest = 0;
    for (int32_t b = static_cast<int32_t>(lane_id()); b < p.batch; b += 32) {
      const Request r(p, b);
      longest = max(longest, r.tiles(p) > 0 ? r.leaves() : 0);
#pragma unroll
      for (int32_t l = 0; l <= kWhole; ++l) units[l] += int64_t{r.tiles(p)} * r.parts(l);
    }
    longest = __reduce_max_sync(~0u, longest);
    level = kWhole;
    int64_t least = 0;
#pragma unroll
    for (int32_t l = kWhole; l >= 0; --l) {
      const int64_t all = __shfl_sync(~0u, warp_scan(units[l]), 31) * p.num_kv_heads;
      const int64_t c = cost(all, l == kWhole ? longest : 1 << l, gridDim.x);
      if (l == kWhole || (l >= p.min_level && l <= tree_levels(p.head_dim) && c < least)) least = c, level = l;
    }
  }

  // Whole warps call it. False: no unit is left.
  __device__ bool next(const Params& p, Unit& unit) {
    while (first_ < p.batch) {
      const int32_t b = first_ + static_cast<int32_t>(lane_id());
      int32_t tiles = 0, parts = 1;
      if (b < p.batch) {
        const Request r(p, b);
        tiles = r.tiles(p);
        parts = r.parts(level);
      }
      const int64_t end = warp_scan(int64_t{tiles} * parts * p.num_kv_heads) + before_;
      const uint32_t later = __ballot_sync(~0u, next_ < end);
      if (later != 0) {
        const int32_t lane = __ffs(static_cast<int>(later)) - 1;
        tiles = __shfl_sync(~0u, tiles, lane);
        parts = __shfl_sync(~0u, parts, lane);
        int64_t i = next_ - (__shfl_sync(~0u, end, lane) - int64_t{tiles} * parts * p.num_kv_heads);
        unit.request = first_ + lane;
        unit.parts = parts;
        unit.part = static_cast<int32_t>(i % parts);
        i /= parts;
        unit.kv_head = static_cast<int32_t>(i % p.num_kv_heads);
        // Late tiles of a prefill see most: they go first.
        unit.row_tile = tiles - 1 - static_cast<int32_t>(i / p.num_kv_heads);
        next_ += gridDim.x;
        return true;
      }
      before_ = __shfl_sync(~0u, end, 31);
      first_ += 32;
    }
    return false;
  }

 private:
  int64_t next_;        // unit
  int32_t first_ = 0;   // request
  int64_t before_ = 0;  // units of the requests before
};

// The slots of a unit, as tiles: first_tile .. end_tile - 1.
struct Extent {
  int32_t low, end;  // slots that some row of the tile sees, at most
  int32_t first_tile, end_tile;
  int32_t first_whole, end_whole;  // tiles of which every row sees every slot

  __device__ Extent(const Params& p, const Request& r, const Unit& u, int32_t level) {
    const int32_t first_row = static_cast<int32_t>(int64_t{u.row_tile} * kTileRows / p.group);
    const int32_t last_row =
        min(static_cast<int32_t>((int64_t{u.row_tile} * kTileRows + kTileRows - 1) / p.group), r.rows - 1);
    low = Request::lowest(p, r.first + first_row);
    end = p.tree_mask != nullptr ? r.length : min(r.first + last_row + 1, r.length);
    int32_t begin = low, stop = end;
    if (level < kWhole) {
      const int64_t first_slot = (int64_t{r.first_part(level)} + u.part) * kLeafSlots << level;
      begin = static_cast<int32_t>(max(int64_t{low}, first_slot));
      stop = static_cast<int32_t>(min(int64_t{end}, first_slot + (int64_t{kLeafSlots} << level)));
    }
    first_tile = begin / kTileSlots;
    end_tile = stop <= begin ? first_tile : (stop - 1) / kTileSlots + 1;
    first_whole = (Request::lowest(p, r.first + last_row) + kTileSlots - 1) / kTileSlots;
    end_whole = min(p.tree_mask != nullptr ? r.first : r.first + first_row + 1, r.length) / kTileSlots;
  }
  __device__ bool whole(int32_t tile) const { return tile >= first_whole && tile < end_whole; }
};

}  // namespace idlm::attention
