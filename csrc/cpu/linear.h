// y = x W^T for a few rows at a time. The weight is read once for up to ten rows, 16 outputs to a vector.
//
// Quantised weights meet quantised activations: a block of 32 along k is summed in integers, which is exact in any order,
// then enters one chain of fused multiply-adds over the blocks. fp16, bf16 and fp32 weights are one such chain over k. So
// how many rows and groups are computed together changes no bit. A Q4 block of 16 outputs is 320 bytes; per row it takes 16
// dot products of 512 bits, 8 on a MASK row. At two of those a cycle and 10 bytes a cycle from memory, about four clean
// rows cost what the bytes cost.
#pragma once
#include <cmath>

#include "job.h"
#include "vec.h"

namespace idlm_cpu {
namespace IDLM_ISA {

// Rows of a tile: with its groups it takes two registers per row and group, of 32 with AVX-512 and of 16 halves else.
#if defined(__AVX512F__)
constexpr int kMostRows = 10;
#elif defined(__AVX2__)
constexpr int kMostRows = 4;
#else
constexpr int kMostRows = 2;
#endif

// The activations of the rows of one tile, and what it fetches for the groups after: so many lines with every block.
struct RowTile {
  const float* x;  // [rows][k]
  const int16_t* q;
  const float *d, *sum;
  mutable const uint8_t* next;
  int lines;
  bool near;  // into the nearest cache: where no other tile needs what is there
  IDLM_INLINE void fetch(const RowTile& a) {
    if (a.near)
      for (int i = 0; i < a.lines; i++, a.next += 64) __builtin_prefetch(a.next);
    else
      for (int i = 0; i < a.lines; i++, a.next += 64) __builtin_prefetch(a.next, 0, 2);
  }
};

IDLM_INLINE int32_t word_at(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return word;
}

template <int Kind>
IDLM_INLINE F load_weight(const uint8_t* w, int64_t index) {
  if (Kind == IDLM_CPU_F16) return load_f16((const uint16_t*)w + index);
  if (Kind == IDLM_CPU_BF16) return load_bf16((const uint16_t*)w + index);
  if (Kind == IDLM_CPU_I8) return load_i8((const int8_t*)w + index);
  return load<F>((const float*)w + index);
}

template <int Kind, int R, int G>
void dense_tile(const uint8_t* w, int64_t group, int64_t k, const RowTile& a, F* out) {
  F c[G][R] = {};
  for (int64_t i = 0; i < k; i++) {
    F v[G];
    if (i % kBlock == 0) RowTile::fetch(a);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) v[g] = load_weight<Kind>(w + g * group, i * kLanes);
#pragma GCC unroll 10
    for (int r = 0; r < R; r++) {
      F x = splat(a.x[r * k + i]);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) c[g][r] = fma(v[g], x, c[g][r]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int r = 0; r < R; r++) out[g * R + r] = c[g][r];
}

// Sums of one block for G groups and R rows. Few rows leave few chains of additions: those are split P ways.
template <int R, int G>
struct Sums {
  static constexpr int P = R * G >= 6 ? 1 : R * G >= 4 ? 2 : 4;
  I part[G][R][P] = {};
  // Adds pair i of each row; of MASK rows quadruple i.
  template <bool Mask>
  IDLM_INLINE void add(Sums& s, int g, int i, I weights, const int16_t* q) {
#pragma GCC unroll 10
    for (int r = 0; r < R; r++) {
      const int32_t x = word_at(q + r * kBlock + 2 * i);
      I& sum = s.part[g][r][i % P];
      sum = Mask ? dot_bytes(sum, weights, x) : dot(sum, weights, x);
    }
  }
  IDLM_INLINE I total(const Sums& s, int g, int r) {
    I t = s.part[g][r][0];
#pragma GCC unroll 4
    for (int p = 1; p < P; p++) t += s.part[g][r][p];
    return t;
  }
};

template <bool Mask, int R, int G>
void q4_tile(const uint8_t* w, int64_t group, int64_t k, const RowTile& a, F* out) {
  using S = Sums<R, G>;
  F c[G][R] = {};
  const int16_t* q = a.q;
  const float *d = a.d, *sum = a.sum;
  for (int64_t b = 0; b < k / kBlock; b++, w += 320, q += R * kBlock, d += R, sum += R) {
    S sums;
    RowTile::fetch(a);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // 8 of the 32 k; see q4_shift
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        U v = load<U>(w + g * group + 64 * i);
        if (Mask) {
          S::template add<true>(sums, g, 2 * i, (I)(v & 0x0f0f0f0fu), q);
          S::template add<true>(sums, g, 2 * i + 1, (I)((v >> 4) & 0x0f0f0f0fu), q);
        } else {
          S::template add<false>(sums, g, 4 * i, (I)(v & 0x000f000fu), q);
          S::template add<false>(sums, g, 4 * i + 2, (I)((v >> 4) & 0x000f000fu), q);
          S::template add<false>(sums, g, 4 * i + 1, (I)((v >> 8) & 0x000f000fu), q);
          S::template add<false>(sums, g, 4 * i + 3, (I)((v >> 12) & 0x000f000fu), q);
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const uint16_t* scales = (const uint16_t*)(w + g * group + 256);
      F scale = load_f16(scales), m = load_f16(scales + kLanes);
#pragma GCC unroll 10
      for (int r = 0; r < R; r++) {
        c[g][r] = fma(to_float(S::total(sums, g, r)) * scale, splat(d[r]), c[g][r]);
        c[g][r] = fma(m, splat(sum[r]), c[g][r]);
      }
    }
  }
  for (int g = 0; g < G; g++)
    for (int r = 0; r < R; r++) out[g * R + r] = c[g][r];
}

template <int R, int G>
void q8_tile(const uint8_t* w, int64_t group, int64_t k, const RowTile& a, F* out) {
  using S = Sums<R, G>;
  F c[G][R] = {};
  const int16_t* q = a.q;
  const float* d = a.d;
  const uint8_t* scales = w + k * kLanes;  // behind the numbers
  for (int64_t b = 0; b < k / kBlock; b++, w += 512, scales += 32, q += R * kBlock, d += R) {
    S sums;
    RowTile::fetch(a);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {  // 4 of the 32 k: a lane's bytes are k 0, 2, 1, 3
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        U v = load<U>(w + g * group + 64 * i);
        typedef int16_t H __attribute__((vector_size(64)));
        S::template add<false>(sums, g, 2 * i, (I)((H)(v << 8 & 0xff00ff00u) >> 8), q);
        S::template add<false>(sums, g, 2 * i + 1, (I)((H)v >> 8), q);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      F scale = load_f16((const uint16_t*)(scales + g * group));
#pragma GCC unroll 10
      for (int r = 0; r < R; r++) c[g][r] = fma(to_float(S::total(sums, g, r)) * scale, splat(d[r]), c[g][r]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int r = 0; r < R; r++) out[g * R + r] = c[g][r];
}

using TileFunction = void (*)(const uint8_t*, int64_t, int64_t, const RowTile&, F*);

template <int R, int G>
TileFunction tile_of(int kind, bool is_mask) {
  switch (kind) {
    case IDLM_CPU_Q4: return is_mask ? q4_tile<true, R, G> : q4_tile<false, R, G>;
    case IDLM_CPU_Q8: return q8_tile<R, G>;
    case IDLM_CPU_F16: return dense_tile<IDLM_CPU_F16, R, G>;
    case IDLM_CPU_BF16: return dense_tile<IDLM_CPU_BF16, R, G>;
    default: return dense_tile<IDLM_CPU_F32, R, G>;
  }
}

// Groups computed at once for so many rows: as many as registers allow, for one group alone starves the adders.
IDLM_INLINE int groups_for(int rows) { return kMostRows / rows >= 4 ? 4 : kMostRows / rows >= 2 ? 2 : 1; }

template <int R = 1>
IDLM_INLINE TileFunction tile_for(int kind, bool is_mask, int rows, int groups) {
  if constexpr (R < kMostRows)
    if (rows > R) return tile_for<R + 1>(kind, is_mask, rows, groups);
  if constexpr (kMostRows / R >= 4)
    if (groups == 4) return tile_of<R, 4>(kind, is_mask);
  if constexpr (kMostRows / R >= 2)
    if (groups == 2) return tile_of<R, 2>(kind, is_mask);
  return tile_of<R, 1>(kind, is_mask);
}

// y += B low for R rows and one group of outputs: a chain over the even and one over the odd ranks.
template <int Kind, int R>
void add_b(const uint8_t* b, const float* scale, int rank, const float* low, int64_t stride, F* y) {
  F even[R] = {}, odd[R] = {};
  for (int i = 0; i < rank; i += 2) {
    F u = load_weight<Kind>(b, (int64_t)i * kLanes), v = load_weight<Kind>(b, (int64_t)(i + 1) * kLanes);
#pragma GCC unroll 10
    for (int r = 0; r < R; r++) {
      even[r] = fma(u, splat(low[r * stride + i]), even[r]);
      odd[r] = fma(v, splat(low[r * stride + i + 1]), odd[r]);
    }
  }
  F s = Kind == IDLM_CPU_I8 ? load<F>(scale) : splat(1.f);
  for (int r = 0; r < R; r++) y[r] += Kind == IDLM_CPU_I8 ? (even[r] + odd[r]) * s : even[r] + odd[r];
}

using AddB = void (*)(const uint8_t*, const float*, int, const float*, int64_t, F*);

template <int R = 1>
IDLM_INLINE AddB add_b_for(int kind, int rows) {
  if constexpr (R < kMostRows)
    if (rows > R) return add_b_for<R + 1>(kind, rows);
  switch (kind) {
    case IDLM_CPU_F16: return add_b<IDLM_CPU_F16, R>;
    case IDLM_CPU_BF16: return add_b<IDLM_CPU_BF16, R>;
    case IDLM_CPU_I8: return add_b<IDLM_CPU_I8, R>;
    default: return add_b<IDLM_CPU_F32, R>;
  }
}

// Calls write(group, row, y) for the groups [first, last) and the rows of the plan; groups come in order for each row.
template <class Write>
IDLM_INLINE void linear(const Job& job, const RowPlan& plan, const idlm_cpu_linear& w, int first, int last, Write write) {
  const int64_t size = group_bytes(w.kind, w.k), blocks = w.k / kBlock;
  const uint8_t* weight = (const uint8_t*)w.weight;
  const int lora_size = w.lora_kind == IDLM_CPU_F32 ? 4 : w.lora_kind == IDLM_CPU_I8 ? 1 : 2, groups = (w.n + kLanes - 1) / kLanes;
  constexpr int kNear = 4;  // groups that the first tile leaves in the nearest cache for the next
  for (int near = first; near < last; near += kNear) {
    const int end = near + kNear < last ? near + kNear : last;
    for (const Tile& tile : plan.tiles) {
      const int count = tile.count, at_once = groups_for(count);
      const int64_t at = tile.first * (int64_t)w.k, scales_at = tile.first * blocks;
      RowTile a = {job.in.x + at, job.in.q + at, job.in.d + scales_at, job.in.sum + scales_at, nullptr, 0, plan.tiles.size() == 1};
      const bool has_lora = w.lora_a && tile.is_mask;
      for (int g = near; g < end;) {
        const int together = end - g >= at_once ? at_once : end - g >= 2 && at_once >= 2 ? 2 : 1;
        // The groups that follow these, a part by each tile: memory is read while all of them compute.
        const int64_t part = together * size / (int64_t)plan.tiles.size();
        a.next = weight + (g + kNear) * size + part * (&tile - plan.tiles.data());
        a.lines = g + kNear < groups ? (int)(part / 64 * kBlock / w.k + 1) : 0;
        F y[kMostRows];
        tile_for(w.kind, tile.is_mask, count, together)(weight + g * size, size, w.k, a, y);
        for (int j = 0; j < together; j++, g++) {
          F* found = y + j * count;
          if (w.bias)
            for (int r = 0; r < count; r++) found[r] += load<F>(w.bias + g * kLanes);
          if (has_lora) {
            const int64_t stride = w.parts * w.rank, bytes = (int64_t)w.rank * kLanes * lora_size;
            const uint8_t* b = (const uint8_t*)w.lora_b + g * bytes;
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(b + kNear * bytes + i);
            add_b_for(w.lora_kind, count)(b, w.lora_b_scale + g * kLanes, w.rank, job.in.low + tile.first * stride + (int64_t)w.part[g] * w.rank, stride, found);
          }
          for (int r = 0; r < count; r++) write(g, plan.row[tile.first + r], found[r]);
        }
      }
    }
  }
}

// low = scale * x A^T of R rows, each a chain over the even and one over the odd k.
template <int Kind, int R>
IDLM_INLINE void times_a(const idlm_cpu_linear& w, const float* x, float* low) {
  const uint8_t* a = (const uint8_t*)w.lora_a;
  const int width = w.parts * w.rank;
  for (int p = 0; p < width / kLanes; p++) {
    F even[R] = {}, odd[R] = {};
    const int64_t at = (int64_t)p * w.k * kLanes;
    for (int64_t k = 0; k < w.k; k += 2) {
      F u = load_weight<Kind>(a, at + k * kLanes), v = load_weight<Kind>(a, at + (k + 1) * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        even[r] = fma(u, splat(x[r * w.k + k]), even[r]);
        odd[r] = fma(v, splat(x[r * w.k + k + 1]), odd[r]);
      }
    }
    F scale = splat(w.scale);
    if (Kind == IDLM_CPU_I8) scale *= load<F>(w.lora_a_scale + p * kLanes);
    for (int r = 0; r < R; r++) store(low + r * width + p * kLanes, (even[r] + odd[r]) * scale);
  }
}

template <int Kind>
void times_a(const idlm_cpu_linear& w, int count, const float* x, float* low) {
  const int64_t width = w.parts * w.rank;
  for (; count >= 4; count -= 4, x += 4 * w.k, low += 4 * width) times_a<Kind, 4>(w, x, low);
  if (count == 3) times_a<Kind, 3>(w, x, low);
  if (count == 2) times_a<Kind, 2>(w, x, low);
  if (count == 1) times_a<Kind, 1>(w, x, low);
}

IDLM_INLINE bool is_quantised(int kind) { return kind == IDLM_CPU_Q4 || kind == IDLM_CPU_Q8; }

// One place in blocks of 32 along k: q = x / d to the nearest, d = max |x| / most. A block that is not finite has d = NaN.
IDLM_INLINE void quantise(const float* x, int64_t k, const RowPlan& plan, int place, int kind, Activations& in) {
  const Tile& tile = plan.tiles[plan.tile_of[place]];
  const int64_t blocks = k / kBlock;
  const bool in_bytes = tile.is_mask && kind == IDLM_CPU_Q4;
  const float most = in_bytes ? 127.f : 32767.f;
  typedef int16_t H __attribute__((vector_size(32)));
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t at = tile.first * blocks + b * tile.count + place - tile.first;
    F u = load<F>(x + b * kBlock), v = load<F>(x + b * kBlock + kLanes);
    I size_u = (I)u & 0x7fffffff, size_v = (I)v & 0x7fffffff;  // as integers magnitudes keep their order, NaN the largest
    const int32_t bits = max_lanes(size_u > size_v ? size_u : size_v);
    float top, d, inverse;
    memcpy(&top, &bits, 4);
    if (bits >= 0x7f800000) {
      d = NAN, inverse = 0.f, u = v = F{};
    } else {
      d = top / most, inverse = top < 1e-30f ? 0.f : most / top;
    }
    I qu = __builtin_convertvector(nearest(u * inverse), I), qv = __builtin_convertvector(nearest(v * inverse), I);
    if (in_bytes) {
      typedef int8_t B __attribute__((vector_size(16)));
      B bu = __builtin_convertvector(qu, B), bv = __builtin_convertvector(qv, B);
      bu = __builtin_shufflevector(bu, bu, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
      bv = __builtin_shufflevector(bv, bv, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
      memcpy(in.q + at * kBlock, &bu, 16);
      memcpy(in.q + at * kBlock + 8, &bv, 16);
    } else {
      H hu = __builtin_convertvector(qu, H), hv = __builtin_convertvector(qv, H);
      memcpy(in.q + at * kBlock, &hu, 32);
      memcpy(in.q + at * kBlock + kLanes, &hv, 32);
    }
    in.d[at] = d;
    in.sum[at] = d * (float)sum_lanes(qu + qv);
  }
}

}  // namespace IDLM_ISA
}  // namespace idlm_cpu
