// A token from a row of logits: temperature, truncation, and the noise of the request's seed (docs/step.md, section 4).
//
// Noise is computed where it can decide: an id whose logit lies further below the best than noise reaches is passed over,
// which changes no result and leaves few of a vocabulary.
#pragma once
#include <algorithm>

#include "philox.h"
#include "stages.h"

namespace idlm_cpu {
namespace IDLM_ISA {

constexpr int kDrawn = 4 * kLanes;     // ids at a time: a word of the generator is for four
constexpr float kMostNoise = 22.875f;  // what no Gumbel variable exceeds: the word 0 gives 33 log 2

typedef uint64_t W __attribute__((vector_size(64)));
// The products of the even words of a with m, which is below 2^32.
#if defined(__AVX512F__)
IDLM_INLINE W times_even(U a, uint32_t m) { return (W)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m)); }
#else
IDLM_INLINE W times_even(U a, uint32_t m) { return ((W)a & 0xffffffffu) * (uint64_t)m; }
#endif
struct Product {
  U high, low;
};
IDLM_INLINE Product product(U a, uint32_t m) {
  const W even = times_even(a, m), odd = times_even((U)((W)a >> 32), m);
  return {(U)(even >> 32 | (odd & 0xffffffff00000000u)), (U)((even & 0xffffffffu) | odd << 32)};
}

template <int Half>
IDLM_INLINE U zipped(U a, U b) {
  if (Half == 0) return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// The words of the ids first .. first + 63 in their order, first a multiple of four: Philox4x32-10, word id % 4.
IDLM_INLINE void words_of(int64_t first, int64_t seed, int64_t position, int stream, U out[4]) {
  const U lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  U c0 = lanes + (uint32_t)(first / 4), c1 = U{} + (uint32_t)position, c2 = U{} + (uint32_t)stream, c3 = {};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const Product a = product(c0, 0xD2511F53u), b = product(c2, 0xCD9E8D57u);
    c0 = b.high ^ c1 ^ k0, c1 = b.low, c2 = a.high ^ c3 ^ k1, c3 = a.low;
  }
  const U even_low = zipped<0>(c0, c2), even_high = zipped<1>(c0, c2), odd_low = zipped<0>(c1, c3), odd_high = zipped<1>(c1, c3);
  out[0] = zipped<0>(even_low, odd_low), out[1] = zipped<1>(even_low, odd_low);
  out[2] = zipped<0>(even_high, odd_high), out[3] = zipped<1>(even_high, odd_high);
}

// log x within 2 ulp, of positive normal numbers.
IDLM_INLINE F log(F x) {
  I bits = (I)x, e = (bits >> 23) - 127;
  F m = (F)((bits & 0x7fffff) | 0x3f800000);
  const I over = m > 1.41421356f;
  m = over ? m * 0.5f : m;
  const F exponent = to_float(e - over), f = m - 1.f, square = f * f;
  F p = splat(7.0376836e-2f);
  p = fma(p, f, splat(-1.1514610e-1f));
  p = fma(p, f, splat(1.1676999e-1f));
  p = fma(p, f, splat(-1.2420141e-1f));
  p = fma(p, f, splat(1.4249323e-1f));
  p = fma(p, f, splat(-1.6668058e-1f));
  p = fma(p, f, splat(2.0000715e-1f));
  p = fma(p, f, splat(-2.4999994e-1f));
  p = fma(p, f, splat(3.3333331e-1f));
  F rest = p * f * square;
  rest = fma(exponent, splat(-2.12194440e-4f), rest);
  rest = fma(square, splat(-0.5f), rest);
  return fma(exponent, splat(0.693359375f), f + rest);
}

// Gumbel variables of words: g = -log E, E = -log1p(-v) of v in (0, 1).
IDLM_INLINE F gumbel(U words) {
  F v = __builtin_convertvector(words, F) * 0x1p-32f + 0x1p-33f;
  v = v > 1.f - 0x1p-24f ? splat(1.f - 0x1p-24f) : v;
  F series = fma(v, splat(1.f / 5), splat(1.f / 4));
  series = fma(v, series, splat(1.f / 3));
  series = fma(v, series, splat(1.f / 2));
  series = v * fma(v, series, splat(1.f));
  return -log(v < 0x1p-5f ? series : -log(1.f - v));
}

// The numbers of z that are at least `bound`, in their order.
inline void collect(const float* z, int64_t n, float bound, std::vector<float>& out) {
  out.clear();
  for (int64_t i = 0; i < n; i += kLanes) {
    const I found = load<F>(z + i) >= bound;
    if (!max_lanes((I)(found & 1))) continue;
    for (int j = 0; j < kLanes; j++)
      if (z[i + j] >= bound) out.push_back(z[i + j]);
  }
}

// The smallest number of z that top-k, top-p and min-p keep, in this order; -inf where all are kept. z: n numbers and -inf
// up to a multiple of kDrawn, the largest `top`, which is finite and always stays.
inline float cut_of(const float* z, int64_t n, float top, const idlm_cpu_drawing& p) {
  std::vector<float> some;
  const int64_t padded = (n + kDrawn - 1) / kDrawn * kDrawn;
  const float lowest = -3.402823466e38f;
  float cut = -INFINITY;
  const auto reach = [&](float distance) { return distance < 1e6f ? std::max(lowest, top - distance) : lowest; };
  if (p.top_k > 0 && p.top_k < n)  // what is looked at begins near the largest and grows until it is enough
    for (float distance = 8;; distance *= 4) {
      collect(z, padded, reach(distance), some);
      if ((int64_t)some.size() >= p.top_k) {
        std::nth_element(some.begin(), some.begin() + (p.top_k - 1), some.end(), std::greater<float>());
        cut = some[p.top_k - 1];
      } else if (reach(distance) != lowest) {
        continue;
      }
      some.clear();
      break;
    }
  if (p.top_p < 1) {
    // Mass in fp64 by how far below the largest it lies, so that only the part where it reaches top_p is sorted. What lies
    // far below may be rounded to fp32 before it is added.
    constexpr int kParts = 1024, kPerUnit = 16;
    const auto parts_of = [&](F v) {
      const F at = (top - v) * (float)kPerUnit;
      return __builtin_convertvector(at < (float)(kParts - 1) ? at : splat((float)(kParts - 1)), I);
    };
    std::vector<double> mass_of(kParts);
    double total = 0, mass = 0;
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F v = load<F>(z + i), distance = v - top;
      const I kept = (v >= cut) & (v > -INFINITY);
      if (!max_lanes((I)(kept & 1))) continue;
      const bool is_near = max_lanes((I)(kept & (distance > -16.f) & 1));
      const F mass_here = select(kept, exp(distance), F{});
      const I parts = parts_of(v);
      float far[kLanes];
      int32_t part[kLanes];
      memcpy(far, &mass_here, sizeof far);
      memcpy(part, &parts, sizeof part);
      for (int j = 0; j < kLanes; j++) mass_of[part[j]] += is_near && far[j] > 0 ? std::exp((double)(z[i + j] - top)) : (double)far[j];
    }
    for (double of : mass_of) total += of;
    int part = 0, last = kParts - 1;
    while (last > 0 && mass_of[last] == 0) last--;
    while (part < last && (mass + mass_of[part]) / total < (double)p.top_p) mass += mass_of[part++];
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F v = load<F>(z + i);
      const I found = (v >= cut) & (v > -INFINITY) & (parts_of(v) == part);
      if (!max_lanes((I)(found & 1))) continue;
      for (int j = 0; j < kLanes; j++)
        if (found[j]) some.push_back(z[i + j]);
    }
    std::sort(some.begin(), some.end(), std::greater<float>());
    size_t before = 0;  // tokens of this part that do not reach top_p yet
    while (before + 1 < some.size() && (mass += std::exp((double)(some[before] - top))) / total < (double)p.top_p) before++;
    cut = some[before];
  }
  if (p.min_p > 0) {
    F least = splat(top);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F v = load<F>(z + i);
      least = select((exp(v - top) >= p.min_p) & (v - top >= -87.f) & (v < least), v, least);
    }
    cut = std::max(cut, -max_lanes(-least));
  }
  return cut;
}

int64_t draw(const idlm_cpu_drawing& p) {
  const int64_t n = p.n, padded = (n + kDrawn - 1) / kDrawn * kDrawn;
  static thread_local std::vector<float> space;
  space.resize(padded + kLanes);
  float* z = space.data();
  F top = splat(-INFINITY);
  I odd = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    F v = splat(-INFINITY);
    if (i + kLanes <= n) v = load<F>(p.logits + i) / p.temperature;
    else
      for (int64_t j = i; j < n; j++) v[j - i] = p.logits[j] / p.temperature;
    if (p.mask_id >= i && p.mask_id < i + kLanes) v[p.mask_id - i] = -INFINITY;
    odd |= v != v;
    top = max(v, top);
    store(z + i, v);
  }
  const float most = max_lanes(top);
  if (max_lanes((I)(odd & 1)) || !std::isfinite(most)) return -1;
  const bool truncates = p.top_k > 0 || p.top_p < 1 || p.min_p > 0;
  const float cut = truncates ? cut_of(z, n, most, p) : -INFINITY;

  // Scores of 64 ids; the best of them, and its id of ties the lowest.
  struct Best {
    float score;
    int64_t id;
  };
  const auto best_of = [&](int64_t first, float largest, float bound) {
    U words[4];
    words_of(first, p.seed, p.position, p.stream, words);
    Best best = {-INFINITY, -1};
    // g <= -log v, and v is at least the power of two of the smallest word: most ids are passed over without a logarithm.
    U least = words[0];
    for (int j = 1; j < 4; j++) least = words[j] < least ? words[j] : least;
    const uint32_t word = ~max_lanes(~least);
    if (largest + (float)(33 - (word ? 32 - __builtin_clz(word) : 0)) * 0.6931473f < bound) return best;
    for (int j = 0; j < 4; j++) {
      const F v = load<F>(z + first + j * kLanes);
      const F score = select((v >= cut) & (v > -INFINITY), v + gumbel(words[j]), splat(-INFINITY));
      const float found = max_lanes(score);
      if (!(found > best.score)) continue;
      best.score = found;
      for (int i = kLanes - 1; i >= 0; i--)
        if (score[i] == found) best.id = first + j * kLanes + i;
    }
    return best;
  };
  int64_t at = 0;
  while (!(z[at] == most)) at++;
  const Best near = best_of(at / kDrawn * kDrawn, most, -INFINITY);  // a bound for all others
  Best best = {-INFINITY, -1};
  for (int64_t i = 0; i < padded; i += kDrawn) {
    F largest = load<F>(z + i);
    for (int j = 1; j < 4; j++) largest = max(load<F>(z + i + j * kLanes), largest);
    const float bound = std::max(near.score, best.score) - 1e-3f, highest = max_lanes(largest);
    if (highest < cut || highest + kMostNoise < bound) continue;
    const Best found = best_of(i, highest, bound);
    if (found.score > best.score) best = found;
  }
  return best.id;
}

// The same of p.n scores of some ids, at most kDrawn of them, ascending. NaN is never drawn; -1: there is nothing to draw.
int64_t draw_among(const idlm_cpu_drawing& p, const int64_t* ids) {
  const float big = 3.402823466e38f;
  alignas(64) float z[kDrawn];
  float top = -INFINITY;
  for (int i = 0; i < kDrawn; i++) {
    z[i] = i < p.n && p.logits[i] > -INFINITY ? std::min(std::max(std::min(p.logits[i], big) / p.temperature, -big), big) : -INFINITY;
    top = std::max(top, z[i]);
  }
  if (top == -INFINITY) return -1;
  const float cut = cut_of(z, p.n, top, p);
  U words[4] = {};
  for (int i = 0; i < p.n; i++) words[i / kLanes][i % kLanes] = philox(p.seed, (uint32_t)(ids[i] / 4), (uint32_t)p.position, p.stream)[ids[i] % 4];
  float best = -INFINITY;
  int64_t id = -1;
  for (int j = 0; j < 4; j++) {
    const F score = load<F>(z + j * kLanes) + gumbel(words[j]);
    for (int i = 0; i < kLanes; i++)
      if (z[j * kLanes + i] > -INFINITY && z[j * kLanes + i] >= cut && score[i] > best) best = score[i], id = ids[j * kLanes + i];
  }
  return id;
}

}  // namespace IDLM_ISA
}  // namespace idlm_cpu
