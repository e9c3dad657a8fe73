// Storage types, and several values side by side.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace idlm {

// How a storage type is read: kShift is the number of low bits of its fp32 image that are always 0.
template <class T>
struct Scalar;
template <>
struct Scalar<__nv_bfloat16> {
  static constexpr int kShift = 16;
  static __device__ __forceinline__ float up(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 down(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Scalar<__half> {
  static constexpr int kShift = 13;
  static __device__ __forceinline__ float up(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half down(float x) { return __float2half_rn(x); }
};
template <>
struct Scalar<float> {
  static constexpr int kShift = 0;
  static __device__ __forceinline__ float up(float x) { return x; }
  static __device__ __forceinline__ float down(float x) { return x; }
};

// kCount values of T side by side, as registers.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};

}  // namespace idlm
