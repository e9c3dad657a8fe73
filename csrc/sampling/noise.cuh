// The noise of the exactness contract: Philox4x32-10 words (Salmon, Moraes, Dror, Shaw, SC 2011), their uniforms and
// Gumbel variables. counter = (id / 4, position of the predicted token, stream, 0), key = seed, word = id % 4:
//   v = min(fp32(word) 2^-32 + 2^-33, 1 - 2^-24)    E = -log1p(-v)    g = -log E
// v has the same bits in every backend (2^-32 is a power of two, so fma and multiply-add agree). Every rounding is written
// out, so that the compiler cannot contract it here and not there: all kernels share the bits of g. Denormals are kept.
#pragma once

#include <cstdint>

namespace idlm {

struct Words {
  uint32_t w[4];
};

__device__ __forceinline__ Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ float word_to_uniform(uint32_t word) {
  return fminf(fmaf(__uint2float_rn(word), 0x1p-32f, 0x1p-33f), 1.0f - 0x1p-24f);
}

__device__ __forceinline__ float uniform_to_gumbel(float v) {
  // 1 - v loses the digits of a small v; the series of -log1p(-v) has them.
  const float series = __fmul_rn(v, fmaf(v, fmaf(v, fmaf(v, fmaf(v, 0.2f, 0.25f), 1.0f / 3), 0.5f), 1.0f));
  const float exponential = v < 0x1p-5f ? series : -logf(__fsub_rn(1.0f, v));
  return -logf(exponential);
}

// The noise of one row: a request's seed and the position that the row predicts.
struct NoiseSource {
  uint32_t key_low, key_high, position;

  __device__ __forceinline__ Words quad(uint32_t id_over_4, uint32_t stream) const {
    return philox4x32(id_over_4, position, stream, 0, key_low, key_high);
  }
};

}  // namespace idlm
