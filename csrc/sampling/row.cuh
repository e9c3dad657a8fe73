// One logits row, with its bias if there is one, held in the shared memory of a cluster: read once from device memory,
// then as often as needed from here. CTA r owns a range of 16-byte vectors that starts at a cache line of the row. NaN
// and forbidden ids are stored as -inf; +inf stays (z() makes it finite). All of this is exact, so the split over CTAs
// and threads never shows in a result.
#pragma once

#include <cfloat>
#include <type_traits>

#include "common/device.cuh"
#include "common/scalar.cuh"
#include "idlm/sampling.h"

namespace idlm {

// Loads kCount consecutive values, in one instruction where `aligned` says that the address allows it.
template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* g, bool aligned, int valid) {
  Pack<T, kCount> p;
  constexpr int kBytes = sizeof(T) * kCount;
  static_assert(kBytes == 8 || kBytes == 16 || kBytes == 32);
  if (aligned && valid >= kCount) {
    if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(&p) = load_8_bytes(g);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) reinterpret_cast<uint4*>(&p)[i] = load_16_bytes(g + i * (kCount / (kBytes / 16)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) p.v[i] = i < valid ? g[i] : Scalar<T>::down(-INFINITY);
  }
  return p;
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// The largest value of a vector, NaN if there is one. Two lanes at a time for the 16-bit types.
__device__ __forceinline__ float max_of(const Pack<float, 4>& p) {
  return max_or_nan(max_or_nan(p.v[0], p.v[1]), max_or_nan(p.v[2], p.v[3]));
}
__device__ __forceinline__ float max_of(const Pack<__nv_bfloat16, 8>& p) {
  const auto* w = reinterpret_cast<const __nv_bfloat162*>(&p);
  const __nv_bfloat162 m = __hmax2_nan(__hmax2_nan(w[0], w[1]), __hmax2_nan(w[2], w[3]));
  return max_or_nan(__low2float(m), __high2float(m));
}
__device__ __forceinline__ float max_of(const Pack<__half, 8>& p) {
  const auto* w = reinterpret_cast<const __half2*>(&p);
  const __half2 m = __hmax2_nan(__hmax2_nan(w[0], w[1]), __hmax2_nan(w[2], w[3]));
  return max_or_nan(__low2float(m), __high2float(m));
}

// Four consecutive values of a type known at run time, in fp32; beyond `valid` they are -inf.
__device__ __forceinline__ void load_quad(const void* g, DType type, int64_t offset, bool aligned, int valid, float (&x)[4]) {
  const auto load = [&](auto* typed) {
    const auto pack = load_pack<4>(typed + offset, aligned, valid);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = Scalar<std::decay_t<decltype(pack.v[0])>>::up(pack.v[e]);
  };
  switch (type) {
    case DType::kBFloat16: return load(static_cast<const __nv_bfloat16*>(g));
    case DType::kFloat16: return load(static_cast<const __half*>(g));
    default: return load(static_cast<const float*>(g));
  }
}

// Source of a row: logits of type L, and a bias or none. The sum is fp32.
template <class L>
struct RowSource {
  const L* logits;
  const void* bias;
  DType bias_dtype;
  bool aligned;  // both start at 16-byte addresses
  int32_t num_ids;
  int32_t mask_id;
};

template <class L, class S, int kThreads>
struct ClusterRow {
  static constexpr int kVector = 16 / sizeof(S);
  using Vector = Pack<S, kVector>;
  using Quad = Pack<S, 4>;

  Vector* sVectors;      // this CTA's part
  int32_t num_vectors;   // of this part
  int32_t first_id;      // id of its first value
  // Over the vectors of this thread:
  float thread_max;      // +inf counts as the largest finite value; -inf if there are none
  int32_t max_vector;    // the first one that holds it
  bool has_nan, has_inf;

  __device__ ClusterRow(void* shared, int32_t num_ids, int32_t vectors_per_cta, uint32_t rank) {
    sVectors = static_cast<Vector*>(shared);
    const int32_t all = (num_ids + kVector - 1) / kVector;
    const int32_t first = min(static_cast<int32_t>(rank) * vectors_per_cta, all);
    num_vectors = min(vectors_per_cta, all - first);
    first_id = first * kVector;
  }

  // Ends without a barrier: a thread may read its own vectors at once, those of others after one.
  __device__ void load(const RowSource<L>& row) {
    thread_max = -INFINITY;
    max_vector = -1;
    has_nan = has_inf = false;
    constexpr int kInFlight = 4;  // 16-byte loads per thread before the first use
    for (int32_t base = threadIdx.x; base < num_vectors; base += kInFlight * kThreads) {
      Pack<L, kVector> raw[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int32_t v = base + i * kThreads;
        const int32_t id = first_id + v * kVector;
        if (v < num_vectors) raw[i] = load_pack<kVector>(row.logits + id, row.aligned, row.num_ids - id);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int32_t v = base + i * kThreads;
        if (v < num_vectors) store(v, add_bias(raw[i], row, first_id + v * kVector), row);
      }
    }
  }

  // The lowest id of this thread whose value is thread_max; that must be finite.
  __device__ int32_t id_of_max() const {
    float x[kVector];
    values(vector(max_vector), x);
    int32_t found = 0;
#pragma unroll
    for (int e = kVector - 1; e >= 0; --e)
      if (fminf(x[e], FLT_MAX) == thread_max) found = e;
    return first_id + max_vector * kVector + found;
  }

  // In one 16-byte access: taken apart by the compiler it would be one of many bank conflicts.
  __device__ __forceinline__ Vector vector(int32_t v) const {
    const uint4 raw = reinterpret_cast<const uint4*>(sVectors)[v];
    return *reinterpret_cast<const Vector*>(&raw);
  }
  __device__ __forceinline__ static void values(const Vector& p, float (&x)[kVector]) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) x[e] = Scalar<S>::up(p.v[e]);
  }
  __device__ __forceinline__ int32_t num_quads() const { return num_vectors * (kVector / 4); }
  __device__ __forceinline__ void quad(int32_t q, float (&x)[4]) const {
    const Quad p = reinterpret_cast<const Quad*>(sVectors)[q];
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = Scalar<S>::up(p.v[e]);
  }

 private:
  __device__ __forceinline__ static Vector add_bias(const Pack<L, kVector>& raw, const RowSource<L>& row, int32_t id) {
    if constexpr (std::is_same_v<L, S>) {
      if (row.bias == nullptr) return raw;
    }
    Vector sum = {};
    if constexpr (std::is_same_v<S, float>) {
      float bias[4];
      load_quad(row.bias, row.bias_dtype, id, row.aligned, row.num_ids - id, bias);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.v[e] = Scalar<L>::up(raw.v[e]) + bias[e];  // beyond the last id both are -inf
    }
    return sum;
  }

  __device__ __forceinline__ void store(int32_t v, Vector p, const RowSource<L>& row) {
    const int32_t id = first_id + v * kVector;
    if (static_cast<uint32_t>(row.mask_id - id) < kVector) {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (id + e == row.mask_id) p.v[e] = Scalar<S>::down(-INFINITY);
    }
    float largest = max_of(p);
    if (largest != largest) {
      has_nan = true;
      largest = -INFINITY;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        float x = Scalar<S>::up(p.v[e]);
        if (x != x) {
          x = -INFINITY;
          p.v[e] = Scalar<S>::down(x);
        }
        largest = fmaxf(largest, x);
      }
    }
    has_inf |= largest == INFINITY;
    largest = fminf(largest, FLT_MAX);
    if (largest > thread_max) {
      thread_max = largest;
      max_vector = v;
    }
    sVectors[v] = p;
  }
};

// Division by the temperature, rounded as fp32 division rounds; finite for finite x and +inf.
struct Temperature {
  float t, reciprocal;
  bool moderate;  // the short way is exact

  __device__ explicit Temperature(float temperature) {
    t = temperature;
    reciprocal = __frcp_rn(temperature);
    moderate = temperature < 0x1p60f;
  }

  // x is not NaN and not -inf.
  __device__ __forceinline__ float z(float x) const {
    x = fminf(x, FLT_MAX);
    float q = x * reciprocal;
    if (moderate && fabsf(q) < 0x1p100f && (fabsf(q) > 0x1p-100f || x == 0.0f)) {
      // Markstein: with a correctly rounded reciprocal, one exact remainder gives the correctly rounded quotient.
      q = fmaf(fmaf(-q, t, x), reciprocal, q);
      return fmaf(fmaf(-q, t, x), reciprocal, q);
    }
    return fmaxf(fminf(__fdiv_rn(x, t), FLT_MAX), -FLT_MAX);
  }
};

}  // namespace idlm
