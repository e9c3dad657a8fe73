// How many CTAs share a row. Pure; the results of a launch do not depend on it.
#pragma once

#include <cstdint>

namespace idlm {

constexpr int32_t kNumSms = 132;                     // H100 SXM
constexpr int64_t kSharedBytesPerCta = 227 * 1024;   // the most that a CTA can have
constexpr int64_t kReducedBytes = 4 * 1024;          // static shared memory of the kernel, rounded up
constexpr int64_t kSharedForTwoCtas = 108 * 1024;    // of 227 KB: one CTA loads while another computes
constexpr int64_t kMinBytesPerCta = 8 * 1024;        // below this a cluster barrier costs more than it saves

// row_bytes: of a row as it is held in shared memory. 0: no cluster holds such a row.
inline int32_t choose_cluster_size(int64_t num_rows, int64_t row_bytes) {
  const auto part = [&](int32_t size) { return (row_bytes + size - 1) / size; };
  int32_t size = 1;
  while (size < 8 && part(size) > kSharedForTwoCtas) size *= 2;
  // Few rows: use more of the chip for each, as long as all run at once and the parts are worth it.
  while (size < 8 && num_rows * size * 2 <= kNumSms && part(size * 2) >= kMinBytesPerCta) size *= 2;
  return part(size) + kReducedBytes <= kSharedBytesPerCta ? size : 0;
}

}  // namespace idlm
