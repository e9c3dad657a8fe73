// The best of many logits, and small dense products: what a step does after its forward.
#pragma once
#include "stages.h"

namespace idlm_cpu {
namespace IDLM_ISA {

int64_t best(const float* x, int64_t n, int64_t but) {
  F top = splat(-INFINITY), sound = splat(0.f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    F v = load<F>(x + i);
    sound += v * 0.f;  // NaN as soon as one is not finite; -inf is looked at below
    if (but >= i && but < i + kLanes) v[but - i] = -INFINITY;
    top = max(v, top);
  }
  float most = max_lanes(top);
  for (; i < n; i++) {
    if (x[i] != x[i]) return -1;
    if (i != but && x[i] > most) most = x[i];
  }
  if (!std::isfinite(most)) return -1;
  if (sum_lanes(sound) != 0.f)
    for (i = 0; i < n; i++)
      if (x[i] != x[i]) return -1;
  for (i = 0; i < n; i++)
    if (x[i] == most && i != but) return i;
  return -1;
}

int best_few(const float* x, int64_t n, int64_t but, int most, int64_t* ids, float* values) {
  int count = 0, least = 0;  // least: the place of the worst of those kept, of ties the last
  float bound = -INFINITY;
  auto offer = [&](int64_t id) {
    float v = x[id] > 3.402823466e38f ? 3.402823466e38f : x[id];
    if (id == but || !(v > bound)) return;
    if (count < most) {
      ids[count] = id;
      values[count++] = v;
      if (count < most) return;
    } else {  // the others keep their order
      for (int i = least; i + 1 < most; i++) ids[i] = ids[i + 1], values[i] = values[i + 1];
      ids[most - 1] = id;
      values[most - 1] = v;
    }
    least = 0;
    for (int i = 1; i < most; i++)
      if (values[i] <= values[least]) least = i;
    bound = values[least];
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    F a = max(load<F>(x + i), load<F>(x + i + kLanes)), b = max(load<F>(x + i + 2 * kLanes), load<F>(x + i + 3 * kLanes));
    // A NaN hides its neighbours from `max`, not from the second look.
    I over = (max(a, b) > bound) | (a != a) | (b != b);
    if (max_lanes((I)over & 1))
      for (int j = 0; j < 4 * kLanes; j++) offer(i + j);
  }
  for (; i < n; i++) offer(i);
  return count;
}

template <int Kind>
IDLM_INLINE float dot_row(const uint8_t* a, const float* x, int64_t n) {
  F u = {}, v = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    u = fma(load_weight<Kind>(a, i), load<F>(x + i), u);
    v = fma(load_weight<Kind>(a, i + kLanes), load<F>(x + i + kLanes), v);
  }
  if (i < n) u = fma(load_weight<Kind>(a, i), load<F>(x + i), u);
  return sum_lanes(u + v);
}

void times(const void* a, int kind, const float* x, int64_t n, int64_t first, int64_t last, float* y) {
  const uint8_t* rows = (const uint8_t*)a;
  for (int64_t i = first; i < last; i++) {
    if (kind == IDLM_CPU_F16) y[i] = dot_row<IDLM_CPU_F16>(rows + i * n * 2, x, n);
    else if (kind == IDLM_CPU_BF16) y[i] = dot_row<IDLM_CPU_BF16>(rows + i * n * 2, x, n);
    else y[i] = dot_row<IDLM_CPU_F32>(rows + i * n * 4, x, n);
  }
}

void unit(const void* x, int kind, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const uint8_t* row = (const uint8_t*)x;
    store(y + i, kind == IDLM_CPU_F16    ? load_weight<IDLM_CPU_F16>(row, i)
                 : kind == IDLM_CPU_BF16 ? load_weight<IDLM_CPU_BF16>(row, i)
                                         : load_weight<IDLM_CPU_F32>(row, i));
  }
  F squares = {};
  for (int64_t i = 0; i < n; i += kLanes) squares = fma(load<F>(y + i), load<F>(y + i), squares);
  const float inverse = 1.f / std::sqrt(sum_lanes(squares) / (float)n + 1.1920929e-7f);
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load<F>(y + i) * inverse);
}

}  // namespace IDLM_ISA
}  // namespace idlm_cpu
