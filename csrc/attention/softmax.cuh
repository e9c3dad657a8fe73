// What a thread of the multiplying warpgroup knows of its two packed rows: which slots they see, how far their online
// softmax has come, and how results of neighbouring ranges of slots are joined. A row's bits are made here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/schedule.cuh"

namespace idlm::attention {

// A pair of numbers for wgmma, rounded.
template <class Element>
__device__ __forceinline__ uint32_t packed(float low, float high);
template <>
__device__ __forceinline__ uint32_t packed<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t packed<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// All of them are set in what is not finite.
template <class Element>
constexpr uint32_t kExponentBits = 0x7F80;
template <>
inline constexpr uint32_t kExponentBits<__half> = 0x7C00;

// Of K or V of a KV head.
__device__ __forceinline__ float scale_of(const float* scales, int64_t stride, int32_t kv_head) {
  return scales == nullptr ? 1.0f : scales[kv_head * stride];
}

// ---- packed rows

struct Row {
  bool exists;
  int32_t i;     // of the step
  int32_t head;  // of q
  int64_t row;   // of the batch

  __device__ Row(const Params& p, const Request& r, const Unit& u, int32_t row_of_tile) {
    const int64_t packed_row = int64_t{u.row_tile} * kTileRows + row_of_tile;
    i = static_cast<int32_t>(packed_row / p.group);
    head = u.kv_head * p.group + static_cast<int32_t>(packed_row % p.group);
    exists = i < r.rows;
    row = int64_t{r.start} + i;
  }
};

// What a row sees.
struct Sight {
  int32_t i;      // of the step
  uint64_t tail;  // step slots that it sees, with a tree mask

  __device__ Sight(const Params& p, const Request& r, int32_t row) : i(row) {
    tail = i < r.rows && p.tree_mask != nullptr ? static_cast<uint64_t>(p.tree_mask[int64_t{r.start} + i]) : 0;
  }

  // Bit c: it sees slot first_slot + c.
  __device__ uint64_t sees(const Params& p, const Request& r, int32_t first_slot) const {
    const int64_t step = int64_t{r.first} - first_slot;  // where the step begins
    uint64_t bits;
    if (p.tree_mask != nullptr) {
      const uint64_t own = step >= 64 || step <= -64 ? 0 : step >= 0 ? tail << step : tail >> -step;
      bits = below(step) | own;
    } else {
      bits = below(step + i + 1);
      if (p.window >= 0) bits &= ~below(step + i - p.window);
    }
    return bits & below(int64_t{r.length} - first_slot);
  }

 private:
  static __device__ uint64_t below(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }
};

// ---- joining ranges

// m: the largest score, base 2; t: the sum of 2^(score - m); o: that of 2^(score - m) v. Of nothing: -inf, 0, 0.
constexpr float kNothing = -INFINITY;

// Two neighbouring ranges of slots, the earlier one first. One that shows the row nothing changes no bit of the other.
struct Join {
  float m, earlier, later;  // shares

  __device__ Join(float m_earlier, float m_later) {
    m = fmaxf(m_earlier, m_later);
    const float finite = m == kNothing ? 0.0f : m;
    earlier = exp2_approx(m_earlier - finite);
    later = exp2_approx(m_later - finite);
  }
  __device__ float operator()(float x, float y) const { return __fmaf_rn(x, earlier, __fmul_rn(y, later)); }
};

// The result of a row: o / t. Zeros come out positive: what is masked may turn a -0 into 0.
struct Result {
  float factor, lse;

  __device__ Result(float m, float t, float v_scale) {
    factor = __fdiv_rn(v_scale, t == 0.0f ? 1.0f : t);
    lse = (m + log2f(t)) * 0.693147180559945309f;
  }
  __device__ float operator()(float o) const { return __fadd_rn(__fmul_rn(o, factor), 0.0f); }
};

}  // namespace idlm::attention
