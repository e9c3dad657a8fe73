// Sixteen lanes, whatever the instruction set: GCC's and Clang's vector extensions, and the few instructions they lack.
// Included once per instruction set, inside a namespace of that name (see isa_*.cpp).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define IDLM_INLINE static inline __attribute__((always_inline))

namespace idlm_cpu {
namespace IDLM_ISA {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));

template <class T>
IDLM_INLINE T load(const void* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
IDLM_INLINE void store(float* p, F v) { memcpy(p, &v, sizeof v); }
IDLM_INLINE F splat(float x) { return F{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
IDLM_INLINE I splat_i(int32_t x) { return I{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
IDLM_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
IDLM_INLINE F select(I mask, F a, F b) { return mask ? a : b; }
IDLM_INLINE F max(F a, F b) { return a > b ? a : b; }
IDLM_INLINE F abs(F a) { return (F)((I)a & 0x7fffffff); }

#if defined(__AVX512F__)
IDLM_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
IDLM_INLINE F load_f16(const uint16_t* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
IDLM_INLINE F load_bf16(const uint16_t* p) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
IDLM_INLINE F load_i8(const int8_t* p) {
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// Sums of products of four bytes each, exact, so that any order gives the same bits. dot_q4: of weights 0 .. 15; its sums are
// whole after total_q4, for up to eight products. dot_q8: of what q8_weights makes of signed bytes; its sums are too large by
// kQ8Offset times the sum of the activations. Activations are of magnitude 127 at most.
constexpr int kQ8Offset = 128;
IDLM_INLINE I q8_weights(U v) { return (I)(v ^ 0x80808080u); }
IDLM_INLINE I dot_q8(I sum, I bytes, int32_t four) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, _mm512_set1_epi32(four));
}
IDLM_INLINE I dot_q4(I sum, I bytes, int32_t four) { return dot_q8(sum, bytes, four); }
IDLM_INLINE I total_q4(I sum) { return sum; }
#elif defined(__AVX2__)
struct Halves {
  __m256i low, high;
};
IDLM_INLINE Halves halves(const void* v) {
  return {_mm256_loadu_si256((const __m256i*)v), _mm256_loadu_si256((const __m256i*)v + 1)};
}
template <class T>
IDLM_INLINE T joined(__m256i low, __m256i high) {
  T v;
  memcpy(&v, &low, 32);
  memcpy((char*)&v + 32, &high, 32);
  return v;
}
IDLM_INLINE F fma(F a, F b, F c) {
  Halves x = halves(&a), y = halves(&b), z = halves(&c);
  return joined<F>((__m256i)_mm256_fmadd_ps((__m256)x.low, (__m256)y.low, (__m256)z.low),
                   (__m256i)_mm256_fmadd_ps((__m256)x.high, (__m256)y.high, (__m256)z.high));
}
IDLM_INLINE F load_f16(const uint16_t* p) {
  return joined<F>((__m256i)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                   (__m256i)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1)));
}
IDLM_INLINE F load_bf16(const uint16_t* p) {
  return joined<F>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16),
                   _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1)), 16));
}
IDLM_INLINE F load_i8(const int8_t* p) {
  return joined<F>((__m256i)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
                   (__m256i)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))));
}
constexpr int kQ8Offset = 0;
IDLM_INLINE I q8_weights(U v) { return (I)v; }
IDLM_INLINE I dot_q8(I sum, I bytes, int32_t four) {  // |w| times x with the sign of w: pairs of products fit into 16 bits
  Halves s = halves(&sum), w = halves(&bytes);
  __m256i x = _mm256_set1_epi32(four), one = _mm256_set1_epi16(1);
  __m256i low = _mm256_maddubs_epi16(_mm256_abs_epi8(w.low), _mm256_sign_epi8(x, w.low));
  __m256i high = _mm256_maddubs_epi16(_mm256_abs_epi8(w.high), _mm256_sign_epi8(x, w.high));
  return joined<I>(_mm256_add_epi32(s.low, _mm256_madd_epi16(low, one)), _mm256_add_epi32(s.high, _mm256_madd_epi16(high, one)));
}
IDLM_INLINE I dot_q4(I sum, I bytes, int32_t four) {  // sums of 16 bits: 8 times 2 * 15 * 127 is below 32,768
  Halves s = halves(&sum), w = halves(&bytes);
  __m256i x = _mm256_set1_epi32(four);
  return joined<I>(_mm256_add_epi16(s.low, _mm256_maddubs_epi16(w.low, x)), _mm256_add_epi16(s.high, _mm256_maddubs_epi16(w.high, x)));
}
IDLM_INLINE I total_q4(I sum) {
  Halves s = halves(&sum);
  __m256i one = _mm256_set1_epi16(1);
  return joined<I>(_mm256_madd_epi16(s.low, one), _mm256_madd_epi16(s.high, one));
}
#else
IDLM_INLINE F fma(F a, F b, F c) { return a * b + c; }  // rounded twice: the bits of this set are its own
IDLM_INLINE U load_u16(const uint16_t* p) {
  typedef uint16_t H __attribute__((vector_size(32)));
  return __builtin_convertvector(load<H>(p), U);
}
IDLM_INLINE F load_f16(const uint16_t* p) {
  U h = load_u16(p), sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  F tiny = __builtin_convertvector((I)rest, F) * 0x1p-24f;  // subnormals, exact
  I value = rest < 0x400u ? (I)tiny : (I)((rest << 13) + (rest < 0x7c00u ? U{} + 0x38000000u : U{} + 0x70000000u));
  return (F)((U)value | sign);
}
IDLM_INLINE F load_bf16(const uint16_t* p) { return (F)(load_u16(p) << 16); }
IDLM_INLINE F load_i8(const int8_t* p) {
  typedef int8_t B __attribute__((vector_size(16)));
  return __builtin_convertvector(__builtin_convertvector(load<B>(p), I), F);
}
typedef int16_t H __attribute__((vector_size(64)));
constexpr int kQ8Offset = 0;
IDLM_INLINE I q8_weights(U v) { return (I)v; }
IDLM_INLINE H pair_of(int low, int high) { return (H)splat_i((int32_t)((uint32_t)(low & 0xffff) | (uint32_t)high << 16)); }
IDLM_INLINE I dot_q8(I sum, I bytes, int32_t four) {
  H even = (H)((U)bytes << 8 & 0xff00ff00u) >> 8, odd = (H)bytes >> 8;
  H a = even * pair_of((int8_t)four, (int8_t)(four >> 16)), b = odd * pair_of((int8_t)(four >> 8), (int8_t)(four >> 24));
  return sum + (((I)a << 16) >> 16) + ((I)a >> 16) + (((I)b << 16) >> 16) + ((I)b >> 16);
}
IDLM_INLINE I dot_q4(I sum, I bytes, int32_t four) { return dot_q8(sum, bytes, four); }
IDLM_INLINE I total_q4(I sum) { return sum; }
#endif

IDLM_INLINE I total_q8(I sum) { return sum; }

// The nearest integer, ties to even, as a float; for magnitudes below 2^22.
IDLM_INLINE F nearest(F x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// e^x within 2 ulp; below -87 it is e^-87, above 88 e^88. NaN stays.
IDLM_INLINE F exp(F x) {
  F y = x < -87.f ? splat(-87.f) : x > 88.f ? splat(88.f) : x;
  F n = nearest(y * 1.44269504f);
  F f = fma(n, splat(-0.693359375f), y);
  f = fma(n, splat(2.12194440e-4f), f);
  F p = splat(1.9875691e-4f);
  p = fma(p, f, splat(1.3981999e-3f));
  p = fma(p, f, splat(8.3334519e-3f));
  p = fma(p, f, splat(4.1665796e-2f));
  p = fma(p, f, splat(1.6666665e-1f));
  p = fma(p, f, splat(5.0000001e-1f));
  p = fma(p, f * f, f + 1.f);
  F r = (F)((I)p + (__builtin_convertvector(n, I) << 23));
  return x == x ? r : x;
}

// The lanes of a vector in one fixed tree: halves, quarters, ..
template <class V>
IDLM_INLINE V by_8(V v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
template <class V>
IDLM_INLINE V by_4(V v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
template <class V>
IDLM_INLINE V by_2(V v) { return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
template <class V>
IDLM_INLINE V by_1(V v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }
template <class V>
IDLM_INLINE auto sum_lanes(V v) {
  v += by_8(v);
  v += by_4(v);
  v += by_2(v);
  v += by_1(v);
  return v[0];
}
template <class V>
IDLM_INLINE auto max_lanes(V v) {
  V w = by_8(v);
  v = v > w ? v : w;
  w = by_4(v);
  v = v > w ? v : w;
  w = by_2(v);
  v = v > w ? v : w;
  w = by_1(v);
  v = v > w ? v : w;
  return v[0];
}

}  // namespace IDLM_ISA
}  // namespace idlm_cpu
