// The smallest logit that top-k, top-p and min-p keep, without sorting.
//
// Count and mass of the values >= t fall as t rises, so each cut is the largest t whose measure reaches a target. A pass
// over the row in shared memory measures seven pivots at once; the first pivots lie near the maximum, where cuts are, the
// later ones divide what is left of the key range by eight: at most 1 + ceil(bits / 3) passes, 6 or 7 for 16-bit logits.
// Vectors below the lowest pivot are skipped after one comparison, so all passes but the first are nearly free.
//
// Masses are integers in units of 2^-40 of the largest weight: exact sums, the same for every order and split. Pivots are
// compared with logits, not quotients; lowest_equal() then adds the logits that division by T makes equal to the cut.
#pragma once

#include "sampling/cluster_reduce.cuh"
#include "sampling/row.cuh"

namespace idlm {

constexpr float kMassUnit = 0x1p40f;

template <class S, class Row, class Reduce>
struct Threshold {
  static constexpr int kPivots = 7;

  const Row& row;
  Reduce& reduce;
  const Temperature& temperature;
  float row_max;  // the largest logit, > -inf
  float z_max;

  // Keys count the values of S in order; consecutive keys are consecutive values.
  static __device__ __forceinline__ uint32_t key_of(float x) { return ordered(x) >> Scalar<S>::kShift; }
  static __device__ __forceinline__ float value_of(uint32_t key) {
    uint32_t full = key << Scalar<S>::kShift;
    if (!(full & 0x80000000u)) full |= (1u << Scalar<S>::kShift) - 1;
    return from_ordered(full);
  }
  static __device__ __forceinline__ float lowest() { return value_of(key_of(-FLT_MAX)); }

  // In units of 2^-40; relative error below 1e-5 / 2 at weights that count. The short way needs a quotient that does not
  // overflow upwards; downwards it may: fmaxf drops the NaN that the correction then is.
  __device__ __forceinline__ uint64_t mass(float x) const {
    float distance;
    if (temperature.moderate && fabsf(z_max) < 0x1p100f) {
      const float q = x * temperature.reciprocal;
      distance = fmaf(fmaf(-q, temperature.t, x), temperature.reciprocal, q) - z_max;
    } else {
      distance = temperature.z(x) - z_max;
    }
    return __float2ull_rn(exp2_approx(fmaxf(distance, -100.0f) * 1.44269504f) * kMassUnit);
  }

  // The smallest logit that is kept.
  __device__ float cut(int32_t top_k, float top_p, float min_p) {
    float t = lowest();
    if (top_k > 0) t = lowest_equal(search<false>(t, static_cast<uint64_t>(top_k), 0.0f));
    if (top_p < 1.0f) t = lowest_equal(search<true>(t, 0, top_p));
    if (min_p > 0.0f) {
      // The maximum is kept even if min_p exceeds 1.
      const float guess = fminf(row_max, FLT_MAX) + logf(fminf(min_p, 1.0f)) * temperature.t;
      t = fmaxf(t, first_from(fmaxf(guess, lowest()), [&](float x) { return expf(temperature.z(x) - z_max) >= min_p; }));
    }
    return t;
  }

  // Sum of the masses of the values >= t.
  __device__ uint64_t mass_from(float t) {
    uint64_t own = 0;
    for_each_from(t, [&](float x) { own += mass(x); });
    uint64_t sums[Reduce::kWidth] = {warp_sum(own)};
    return __shfl_sync(~0u, reduce.template all<Sum>(sums), 0);
  }

 private:
  template <class F>
  __device__ __forceinline__ void for_each_from(float t, F&& f) {
    for (int32_t v = threadIdx.x; v < row.num_vectors; v += blockDim.x) {
      const typename Row::Vector p = row.vector(v);
      if (max_of(p) >= t) {
        float x[Row::kVector];
        Row::values(p, x);
#pragma unroll
        for (int e = 0; e < Row::kVector; ++e)
          if (x[e] >= t) f(x[e]);
      }
    }
  }

  // The largest t in [floor, row_max] such that the measure of {x >= t} reaches the target: a count, or, by mass, the
  // share top_p of the mass of {x >= floor}. The floor itself is taken to reach it.
  template <bool kMass>
  __device__ float search(float floor, uint64_t target, float top_p) {
    // Distances of the first pivots from the maximum, in units of T (nats).
    constexpr float kNear[kPivots - 1] = {1, 2, 4, 6, 9, 14};
    uint32_t low = key_of(floor), high = key_of(row_max) + 1;
    uint64_t above = 0;  // measure of {x >= value_of(high)}
    float pivots[kPivots];  // falling
#pragma unroll
    for (int j = 0; j < kPivots - 1; ++j) {
      const float pivot = fmaxf(fminf(row_max, FLT_MAX) - kNear[j] * temperature.t, floor);
      pivots[j] = value_of(min(key_of(pivot), high - 1));
    }
    // By mass, the first pass also measures all that is above the floor, which the target is a share of.
    pivots[kPivots - 1] = kMass ? floor : pivots[kPivots - 2];
    for (bool first = true; first || high - low > 1; first = false) {
      if (!first) {
#pragma unroll
        for (int j = 0; j < kPivots; ++j)
          pivots[j] = value_of(low + static_cast<uint32_t>((static_cast<uint64_t>(high - low) * (kPivots - j)) >> 3));
      }
      const uint64_t measure = above + measure_pivots<kMass>(pivots, value_of(high));  // of pivot lane_id() % 8
      if (kMass && first) {
        const double whole = static_cast<double>(__shfl_sync(~0u, measure, kPivots - 1));
        target = max(static_cast<uint64_t>(ceil(static_cast<double>(top_p) * whole)), static_cast<uint64_t>(1));
      }
      const uint32_t missed = __ballot_sync(~0u, lane_id() < kPivots && measure < target);
      const int num_missed = __popc(missed);  // pivots fall, measures rise: the first ones
      if (num_missed > 0) above = __shfl_sync(~0u, measure, num_missed - 1);
#pragma unroll
      for (int j = 0; j < kPivots; ++j) {
        if (j + 1 == num_missed) high = key_of(pivots[j]);
        if (j == num_missed) low = key_of(pivots[j]);
      }
    }
    return value_of(low);
  }

  // In lane i: the measure of {pivots[i] <= x < end}; end is NaN right above +inf, which no value reaches.
  template <bool kMass>
  __device__ uint64_t measure_pivots(const float (&pivots)[kPivots], float end) {
    uint64_t sums[Reduce::kWidth] = {};
    for_each_from(pivots[kPivots - 1], [&](float x) {
      if (x >= end) return;
      const uint64_t weight = kMass ? mass(x) : 1;
      sums[kPivots - 1] += weight;
      if (x >= pivots[kPivots - 2]) {
#pragma unroll
        for (int j = 0; j < kPivots - 1; ++j) sums[j] += x >= pivots[j] ? weight : 0;
      }
    });
#pragma unroll
    for (int j = 0; j < kPivots; ++j)
      sums[j] = kMass ? warp_sum(sums[j]) : __reduce_add_sync(~0u, static_cast<uint32_t>(sums[j]));
    return reduce.template all<Sum>(sums);
  }

  // The smallest value whose quotient by T is that of x.
  __device__ float lowest_equal(float x) const {
    const float z = temperature.z(x);
    return first_from(x, [&](float y) { return temperature.z(y) >= z; });
  }

  // The smallest value up to row_max for which `holds`, which does not fall as its argument rises; row_max if there is
  // none. Steps double away from the guess, then halve.
  template <class Holds>
  __device__ float first_from(float guess, Holds&& holds) const {
    const uint32_t bottom = key_of(-FLT_MAX), top = key_of(row_max);
    uint32_t low = key_of(guess), high = low;  // afterwards: holds at high (or it is the top), not at low (or it is the bottom - 1)
    uint32_t step = 1;
    if (holds(value_of(low))) {
      do {
        high = low;
        low = low - bottom < step ? bottom - 1 : low - step;
        step *= 2;
      } while (low >= bottom && holds(value_of(low)));
    } else {
      do {
        low = high;
        high = top - high < step ? top : high + step;
        step *= 2;
      } while (high < top && !holds(value_of(high)));
    }
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      if (holds(value_of(middle))) {
        high = middle;
      } else {
        low = middle;
      }
    }
    return value_of(high);
  }
};

}  // namespace idlm
