// The generator of the noise (docs/step.md, section 4).
#pragma once
#include <array>
#include <cstdint>

namespace idlm_cpu {

// The words of Philox4x32-10 with the counter (c0, c1, stream, 0), keyed by a request's seed.
inline std::array<uint32_t, 4> philox(int64_t seed, uint32_t c0, uint32_t c1, uint32_t stream) {
  std::array<uint32_t, 4> c = {c0, c1, stream, 0};
  uint32_t key[2] = {(uint32_t)seed, (uint32_t)((uint64_t)seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t x = 0xD2511F53ull * c[0], y = 0xCD9E8D57ull * c[2];
    c = {(uint32_t)(y >> 32) ^ c[1] ^ key[0], (uint32_t)y, (uint32_t)(x >> 32) ^ c[3] ^ key[1], (uint32_t)x};
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return c;
}

}  // namespace idlm_cpu
