// Weights from their stored form into groups of 16 outputs, and single rows back. No value changes.
#include <cmath>
#include <cstring>

#include "job.h"

namespace {

using namespace idlm_cpu;

constexpr int kLanes = 16;

float from_f16(uint16_t h) {
  const uint32_t rest = h & 0x7fff;
  uint32_t bits = rest < 0x400 ? 0 : (rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u);
  float value;
  memcpy(&value, &bits, 4);
  if (rest < 0x400) value = (float)rest * 0x1p-24f;
  return h & 0x8000 ? -value : value;
}

bool is_finite_f16(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

// -8 d of Q4_0, exact but for scales of 8192 and more, which no such file holds.
uint16_t minus_eight(uint16_t d) {
  const int exponent = d >> 10 & 31;
  if ((d & 0x7fff) == 0) return 0;
  if (exponent == 0) {  // a subnormal, times eight
    uint32_t fraction = (d & 0x3ff) << 3, e = 1;
    if (fraction < 0x400) e = 0;
    while (fraction >= 0x800) fraction >>= 1, e++;
    return (uint16_t)(((d & 0x8000) ^ 0x8000) | (e << 10) | (fraction & 0x3ff));
  }
  return (uint16_t)((((d & 0x8000) ^ 0x8000) | ((exponent + 3) << 10)) | (d & 0x3ff));
}

// One row of Q4 or Q8 blocks into lane `lane` of group `which` of a pair. False where a scale is not finite.
bool pack_row(int source_kind, const uint8_t* row, int64_t k, uint8_t* pair, int which, int lane) {
  for (int64_t b = 0; b < k / kBlock; b++) {
    uint16_t d, m = 0;
    memcpy(&d, row, 2);
    row += 2;
    if (source_kind == IDLM_CPU_GGUF_Q8_0) {
      uint8_t* target = pair + b * kQ8Pair + 512 * which;
      for (int i = 0; i < kBlock; i++) target[i / 4 * 64 + lane * 4 + i % 4] = row[i];
      memcpy(pair + b * kQ8Pair + 1024 + 32 * which + lane * 2, &d, 2);
      row += kBlock;
    } else {
      if (source_kind == IDLM_CPU_GGUF_Q4_1) {
        memcpy(&m, row, 2);
        row += 2;
      } else {
        if ((d >> 10 & 31) > 27) return false;
        m = minus_eight(d);
      }
      uint8_t *target = pair + b * kQ4Pair + 256 * which, *scales = pair + b * kQ4Pair + 512 + 64 * which + lane * 2;
      const auto number = [&](int at) { return at < 16 ? row[at] & 15 : row[at - 16] >> 4; };
      for (int i = 0; i < 16; i++) {  // a byte holds a number and the one four further on
        const int at = i / 4 * 8 + i % 4;
        target[i / 4 * 64 + lane * 4 + i % 4] = (uint8_t)(number(at) | number(at + 4) << 4);
      }
      memcpy(scales, &d, 2);
      memcpy(scales + 32, &m, 2);
      row += 16;
    }
    if (!is_finite_f16(d) || !is_finite_f16(m)) return false;
  }
  return true;
}

// Lane `lane` of group `which` of a pair, in fp32.
void unpack_row(int kind, const uint8_t* pair, int which, int lane, int64_t k, float* out) {
  const uint8_t* group = pair + which * group_bytes(kind, k);  // of a dense kind
  if (kind == IDLM_CPU_F32) {
    for (int64_t c = 0; c < k; c++) memcpy(out + c, group + (c * kLanes + lane) * 4, 4);
  } else if (kind == IDLM_CPU_F16 || kind == IDLM_CPU_BF16) {
    for (int64_t c = 0; c < k; c++) {
      uint16_t half;
      memcpy(&half, group + (c * kLanes + lane) * 2, 2);
      const uint32_t bits = (uint32_t)half << 16;
      if (kind == IDLM_CPU_BF16) memcpy(out + c, &bits, 4);
      else out[c] = from_f16(half);
    }
  } else if (kind == IDLM_CPU_Q8) {
    for (int64_t b = 0; b < k / kBlock; b++, out += kBlock, pair += kQ8Pair) {
      uint16_t half;
      memcpy(&half, pair + 1024 + 32 * which + lane * 2, 2);
      const float d = from_f16(half);
      const uint8_t* four = pair + 512 * which + lane * 4;
      for (int i = 0; i < kBlock; i++) out[i] = d * (float)(int8_t)four[i / 4 * 64 + i % 4];
    }
  } else {
    for (int64_t b = 0; b < k / kBlock; b++, out += kBlock, pair += kQ4Pair) {
      uint16_t scale, least;
      memcpy(&scale, pair + 512 + 64 * which + lane * 2, 2);
      memcpy(&least, pair + 544 + 64 * which + lane * 2, 2);
      const float d = from_f16(scale), m = from_f16(least);
      const uint8_t* four = pair + 256 * which + lane * 4;
      for (int i = 0; i < kBlock; i++) out[i] = d * (float)(four[i / 8 * 64 + i % 4] >> (i & 4) & 15) + m;
    }
  }
}

}  // namespace

extern "C" {

int64_t idlm_cpu_packed_bytes(int32_t kind, int64_t n, int64_t k) { return (n + 2 * kLanes - 1) / (2 * kLanes) * 2 * group_bytes(kind, k); }

int32_t idlm_cpu_pack(int32_t source_kind, const void* source, int64_t row_bytes, const int32_t* order, int64_t n, int64_t k,
                      void* packed, int64_t first_group, int64_t step) {
  const bool is_q4 = source_kind == IDLM_CPU_GGUF_Q4_0 || source_kind == IDLM_CPU_GGUF_Q4_1;
  const int kind = is_q4 ? IDLM_CPU_Q4 : source_kind == IDLM_CPU_GGUF_Q8_0 ? IDLM_CPU_Q8 : source_kind;
  const int64_t size = group_bytes(kind, k);
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = first_group + i / kLanes * step;
    uint8_t *pair = (uint8_t*)packed + at / 2 * 2 * size, *group = pair + at % 2 * size;
    const int lane = i % kLanes;
    const uint8_t* row = (const uint8_t*)source + (order ? order[i] : i) * row_bytes;
    if (kind == IDLM_CPU_F32) {
      for (int64_t c = 0; c < k; c++) memcpy(group + (c * kLanes + lane) * 4, row + c * 4, 4);
    } else if (kind == IDLM_CPU_F16 || kind == IDLM_CPU_BF16) {
      for (int64_t c = 0; c < k; c++) memcpy(group + (c * kLanes + lane) * 2, row + c * 2, 2);
    } else if (!pack_row(source_kind, row, k, pair, at % 2, lane)) {
      return 1;
    }
  }
  return 0;
}

void idlm_cpu_unpack_rows(int32_t kind, const void* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count, float* out) {
  const int64_t size = group_bytes(kind, k);
  for (int64_t i = 0; i < count; i++, out += k) {
    if (ids[i] < 0 || ids[i] >= n) {
      memset(out, 0, k * sizeof(float));
      continue;
    }
    unpack_row(kind, (const uint8_t*)packed + ids[i] / (2 * kLanes) * 2 * size, ids[i] / kLanes % 2, ids[i] % kLanes, k, out);
  }
}

}  // extern "C"
