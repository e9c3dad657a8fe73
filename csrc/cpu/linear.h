// y = x W^T for a few rows at a time. The weight is read and unpacked once for all rows of a tile, 16 outputs to a vector.
//
// Quantised weights meet rows of bytes: of a MASK row its numbers in 8 bits, of a clean row two digits to the base of 255,
// 255 high + low, each a row of bytes of its own. A block of 32 along k is summed in integers, which is exact in any order,
// then enters one chain of fused multiply-adds over the blocks; a clean row is the sum of its two chains. fp16, bf16 and
// fp32 weights are one such chain over k. So how many rows and groups are computed together changes no bit. A Q4 block of
// 16 outputs is 320 bytes and takes 8 dot products of 512 bits per row of bytes: at two of those a cycle and 10 bytes a
// cycle from memory, about eight rows of bytes cost what the weight costs.
#pragma once
#include <cmath>

#include "job.h"
#include "vec.h"

namespace idlm_cpu {
namespace IDLM_ISA {

// Rows of bytes of a tile: with its groups it takes two registers per row and group, of 32 with AVX-512 and of 16 halves else.
#if defined(__AVX512F__)
constexpr int kMostRows = 12;
#elif defined(__AVX2__)
constexpr int kMostRows = 6;
#else
constexpr int kMostRows = 4;
#endif

// The activations of the rows of one tile.
struct RowTile {
  const float* x;   // [rows][k]
  const int8_t* q;  // [k / 32][rows of bytes][32]
  const float *d, *sum;  // [k / 32][rows of bytes]
  const int32_t* offset;
  bool fetches;  // the weights that follow; the first tile does, for all of them
};

// Bytes from what is computed to what is fetched: far ahead into the second cache, which has more requests under way, and from
// there into the nearest.
constexpr int kFar = 20480, kNear = 2048;
template <int Lines>
IDLM_INLINE void fetch(const uint8_t* at) {
#pragma GCC unroll 32
  for (int i = 0; i < Lines; i++) {
    __builtin_prefetch(at + kFar + 64 * i, 0, 2);
    __builtin_prefetch(at + kNear + 64 * i);
  }
}

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
void dense_tile(const uint8_t* pair, int64_t first, int64_t k, const RowTile& a, F* out) {
  const int64_t group = group_bytes(Kind, k);
  const uint8_t* w = pair + first * group;
  F c[G][R] = {};
  for (int64_t i = 0; i < k; i++) {
    F v[G];
    if (i % kBlock == 0 && a.fetches)
      for (int g = 0; g < G; g++) fetch<Kind == IDLM_CPU_F32 ? 32 : 16>(w + g * group + i * (Kind == IDLM_CPU_F32 ? 64 : 32));
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) v[g] = load_weight<Kind>(w + g * group, i * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      F x = splat(a.x[r * k + i]);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) c[g][r] = fma(v[g], x, c[g][r]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int r = 0; r < R; r++) out[g * R + r] = c[g][r];
}

// Sums of one block for G groups and R rows of bytes. Few rows leave few chains of additions: those are split P ways.
template <int R, int G>
struct Sums {
  static constexpr int P = R * G >= 7 ? 1 : R * G >= 4 ? 2 : 4;
  I part[G][R][P] = {};
  // Adds quadruple i of each row.
  IDLM_INLINE void add_q4(Sums& s, int g, int i, I weights, const int8_t* q) {
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) s.part[g][r][i % P] = dot_q4(s.part[g][r][i % P], weights, word_at(q + r * kBlock + 4 * i));
  }
  IDLM_INLINE void add_q8(Sums& s, int g, int i, I weights, const int8_t* q, int64_t stride) {
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) s.part[g][r][i % P] = dot_q8(s.part[g][r][i % P], weights, word_at(q + r * stride + 4 * i));
  }
  IDLM_INLINE I total(const Sums& s, int g, int r, I (*whole)(I)) {
    I t = whole(s.part[g][r][0]);
#pragma GCC unroll 4
    for (int p = 1; p < P; p++) t += whole(s.part[g][r][p]);
    return t;
  }
};

template <int R, int G>
void q4_tile(const uint8_t* pair, int64_t first, int64_t k, const RowTile& a, F* out) {
  using S = Sums<R, G>;
  F c[G][R] = {};
  const uint8_t* w = pair + 256 * first;
  const uint16_t* scales = (const uint16_t*)(pair + 512 + 64 * first);
  const int8_t* q = a.q;
  const float *d = a.d, *sum = a.sum;
  for (int64_t b = 0; b < k / kBlock; b++, w += kQ4Pair, scales += kQ4Pair / 2, q += R * kBlock, d += R, sum += R) {
    S sums;
    if (a.fetches) {
      if (G == 2) {
        fetch<10>(w);
      } else {
        fetch<4>(w);
        fetch<1>((const uint8_t*)scales);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // 8 of the 32 k
#pragma GCC unroll 2
      for (int g = 0; g < G; g++) {
        U v = load<U>(w + 256 * g + 64 * i);
        S::add_q4(sums, g, 2 * i, (I)(v & 0x0f0f0f0fu), q);
        S::add_q4(sums, g, 2 * i + 1, (I)((v >> 4) & 0x0f0f0f0fu), q);
      }
    }
#pragma GCC unroll 2
    for (int g = 0; g < G; g++) {
      F scale = load_f16(scales + 2 * kLanes * g), m = load_f16(scales + 2 * kLanes * g + kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        c[g][r] = fma(to_float(S::total(sums, g, r, total_q4)) * scale, splat(d[r]), c[g][r]);
        c[g][r] = fma(m, splat(sum[r]), c[g][r]);
      }
    }
  }
  for (int g = 0; g < G; g++)
    for (int r = 0; r < R; r++) out[g * R + r] = c[g][r];
}

// The sums of one block of 8-bit weights, [G][8][16 outputs][4], with R rows of bytes that lie `stride` apart.
template <int R, int G>
IDLM_INLINE Sums<R, G> q8_block(const uint8_t* w, const int8_t* q, int64_t stride) {
  Sums<R, G> sums;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) Sums<R, G>::add_q8(sums, g, i, q8_weights(load<U>(w + 512 * g + 64 * i)), q, stride);
  }
  return sums;
}

template <int R, int G>
void q8_tile(const uint8_t* pair, int64_t first, int64_t k, const RowTile& a, F* out) {
  F c[G][R] = {};
  const uint8_t* w = pair + 512 * first;
  const uint16_t* scales = (const uint16_t*)(pair + 1024 + 32 * first);
  const int8_t* q = a.q;
  const float* d = a.d;
  const int32_t* offset = a.offset;
  for (int64_t b = 0; b < k / kBlock; b++, w += kQ8Pair, scales += kQ8Pair / 2, q += R * kBlock, d += R, offset += R) {
    if (a.fetches) {
      if (G == 2) {
        fetch<17>(w);
      } else {
        fetch<8>(w);
        fetch<1>((const uint8_t*)scales);
      }
    }
    const Sums<R, G> sums = q8_block<R, G>(w, q, kBlock);
#pragma GCC unroll 2
    for (int g = 0; g < G; g++) {
      F scale = load_f16(scales + kLanes * g);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        I total = Sums<R, G>::total(sums, g, r, total_q8) - splat_i(offset[r]);
        c[g][r] = fma(to_float(total) * scale, splat(d[r]), c[g][r]);
      }
    }
  }
  for (int g = 0; g < G; g++)
    for (int r = 0; r < R; r++) out[g * R + r] = c[g][r];
}

// A product of a tile of rows with G groups of a weight: those from `first` (0 or 1) on of a pair.
using TileFunction = void (*)(const uint8_t*, int64_t, int64_t, const RowTile&, F*);

template <int R, int G>
TileFunction tile_of(int kind) {
  switch (kind) {
    case IDLM_CPU_Q4: return q4_tile<R, G>;
    case IDLM_CPU_Q8: return q8_tile<R, G>;
    case IDLM_CPU_F16: return dense_tile<IDLM_CPU_F16, R, G>;
    case IDLM_CPU_BF16: return dense_tile<IDLM_CPU_BF16, R, G>;
    default: return dense_tile<IDLM_CPU_F32, R, G>;
  }
}

// Groups computed at once for so many rows: as many as registers allow, for one group alone starves the adders.
IDLM_INLINE int groups_for(int rows) { return kMostRows / rows >= 2 ? 2 : 1; }

template <int R = 1>
IDLM_INLINE TileFunction tile_for(int kind, int rows, int groups) {
  if constexpr (R < kMostRows)
    if (rows > R) return tile_for<R + 1>(kind, rows, groups);
  if constexpr (kMostRows / R >= 2)
    if (groups == 2) return tile_of<R, 2>(kind);
  return tile_of<R, 1>(kind);
}

// y += B low for R MASK rows and one group of outputs: a chain over the even and one over the odd ranks.
template <int Kind, int R>
void add_b(const uint8_t* b, const idlm_cpu_linear& w, int, const Activations& in, int place, int64_t at, F* y) {
  const int64_t stride = (int64_t)w.parts * w.rank;
  const float* low = in.low + place * stride + at;
  F even[R] = {}, odd[R] = {};
  for (int i = 0; i < w.rank; i += 2) {
    F u = load_weight<Kind>(b, (int64_t)i * kLanes), v = load_weight<Kind>(b, (int64_t)(i + 1) * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      even[r] = fma(u, splat(low[r * stride + i]), even[r]);
      odd[r] = fma(v, splat(low[r * stride + i + 1]), odd[r]);
    }
  }
  for (int r = 0; r < R; r++) y[r] += even[r] + odd[r];
}

// The same where B and low have 8 bits: one chain over blocks of 32 ranks.
template <int R>
void add_b_bytes(const uint8_t* b, const idlm_cpu_linear& w, int group, const Activations& in, int place, int64_t at, F* y) {
  const int64_t stride = (int64_t)w.parts * w.rank, blocks = stride / kBlock, first = place * blocks + at / kBlock;
  F c[R] = {};
  for (int64_t i = 0; i < w.rank / kBlock; i++, b += 512) {
    const Sums<R, 1> sums = q8_block<R, 1>(b, in.low_q + place * stride + at + i * kBlock, stride);
    for (int r = 0; r < R; r++) {
      const int64_t block = first + i + r * blocks;
      I total = Sums<R, 1>::total(sums, 0, r, total_q8) - splat_i(in.low_offset[block]);
      c[r] = fma(to_float(total), splat(in.low_d[block]), c[r]);
    }
  }
  F scale = load<F>(w.lora_b_scale + group * kLanes);
  for (int r = 0; r < R; r++) y[r] = fma(c[r], scale, y[r]);
}

using AddB = void (*)(const uint8_t*, const idlm_cpu_linear&, int, const Activations&, int, int64_t, F*);

template <int R = 1>
IDLM_INLINE AddB add_b_for(int kind, int rows) {
  if constexpr (R < kMostRows)
    if (rows > R) return add_b_for<R + 1>(kind, rows);
  switch (kind) {
    case IDLM_CPU_F16: return add_b<IDLM_CPU_F16, R>;
    case IDLM_CPU_BF16: return add_b<IDLM_CPU_BF16, R>;
    case IDLM_CPU_I8: return add_b_bytes<R>;
    default: return add_b<IDLM_CPU_F32, R>;
  }
}

IDLM_INLINE bool is_quantised(int kind) { return kind == IDLM_CPU_Q4 || kind == IDLM_CPU_Q8; }

// Calls write(group, row, y) for the groups [first, last) and the rows of the plan; groups come in order for each row.
template <class Write>
IDLM_INLINE void linear(const Job& job, const RowPlan& plan, const idlm_cpu_linear& w, Low low, int first, int last, Write write) {
  const int64_t size = group_bytes(w.kind, w.k), blocks = w.k / kBlock;
  const uint8_t* weight = (const uint8_t*)w.weight;
  const int lora_size = w.lora_kind == IDLM_CPU_F32 ? 4 : w.lora_kind == IDLM_CPU_I8 ? 1 : 2;
  const bool in_bytes = is_quantised(w.kind);
  constexpr int kTogether = 2;  // groups that the first tile leaves in the nearest cache for the others
  for (int near = first; near < last; near += kTogether) {
    const int end = near + kTogether < last ? near + kTogether : last;
    for (const Tile& tile : plan.tiles) {
      const int count = in_bytes ? tile.bytes : tile.count, at_once = groups_for(count);
      const int64_t at = tile.first_byte * blocks;
      RowTile a = {job.in.x + tile.first * (int64_t)w.k, job.in.q + at * kBlock, job.in.d + at, job.in.sum + at, job.in.offset + at, &tile == plan.tiles.data()};
      for (int g = near; g < end;) {
        const int together = g % 2 == 0 && end - g >= at_once ? at_once : 1;
        F found[kMostRows];
        tile_for(w.kind, count, together)(weight + g / 2 * 2 * size, g % 2, w.k, a, found);
        for (int j = 0; j < together; j++, g++) {
          F y[kMostRows];
          const F* from = found + j * count;
          for (int r = 0; r < tile.count; r++) {
            y[r] = *from++;
            if (in_bytes && r < tile.wide) y[r] += *from++;
            if (w.bias) y[r] += load<F>(w.bias + g * kLanes);
          }
          if (w.lora_a && tile.clean < tile.count) {
            low.pool->wait(low.stage);
            const int64_t bytes = (int64_t)w.rank * kLanes * lora_size;
            const uint8_t* b = (const uint8_t*)w.lora_b + g * bytes;
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(b + kTogether * bytes + i);
            add_b_for(w.lora_kind, tile.count - tile.clean)(b, w, g, job.in, tile.first + tile.clean, (int64_t)w.part[g] * w.rank, y + tile.clean);
          }
          for (int r = 0; r < tile.count; r++) write(g, plan.row[tile.first + r], y[r]);
        }
      }
    }
  }
}

// 16 ranks of low = scale * x A^T of R MASK rows, each a chain over the even and one over the odd k.
template <int Kind, int R>
IDLM_INLINE void times_a(const idlm_cpu_linear& w, int group, const float* x, float* low) {
  const uint8_t* a = (const uint8_t*)w.lora_a;
  F even[R] = {}, odd[R] = {};
  const int64_t at = (int64_t)group * w.k * kLanes;
  for (int64_t k = 0; k < w.k; k += 2) {
    F u = load_weight<Kind>(a, at + k * kLanes), v = load_weight<Kind>(a, at + (k + 1) * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      even[r] = fma(u, splat(x[r * w.k + k]), even[r]);
      odd[r] = fma(v, splat(x[r * w.k + k + 1]), odd[r]);
    }
  }
  for (int r = 0; r < R; r++) store(low + r * w.parts * w.rank + group * kLanes, (even[r] + odd[r]) * splat(w.scale));
}

template <int Kind>
void times_a(const idlm_cpu_linear& w, int group, int count, const float* x, float* low) {
  const int64_t width = w.parts * w.rank;
  for (; count >= 4; count -= 4, x += 4 * w.k, low += 4 * width) times_a<Kind, 4>(w, group, x, low);
  if (count == 3) times_a<Kind, 3>(w, group, x, low);
  if (count == 2) times_a<Kind, 2>(w, group, x, low);
  if (count == 1) times_a<Kind, 1>(w, group, x, low);
}

// What a block of 32 numbers becomes: x = d * q, with d = max |x| / most. A block that is not finite has d = NaN.
struct Quantised {
  I u, v;
  float d;
};
IDLM_INLINE Quantised quantised(F u, F v, float most) {
  I size_u = (I)u & 0x7fffffff, size_v = (I)v & 0x7fffffff;  // as integers magnitudes keep their order, NaN the largest
  const int32_t bits = max_lanes(size_u > size_v ? size_u : size_v);
  float top;
  memcpy(&top, &bits, 4);
  if (bits >= 0x7f800000) return {I{}, I{}, NAN};
  const float inverse = top < 1e-30f ? 0.f : most / top;
  return {__builtin_convertvector(nearest(u * inverse), I), __builtin_convertvector(nearest(v * inverse), I), top / most};
}

// Writes a block of a row of bytes; the offset is what 8-bit weights add to its sums (see q8_weights).
IDLM_INLINE void put_bytes(I u, I v, float d, int8_t* q, float* to_d, int32_t* sum) {
  typedef int8_t B __attribute__((vector_size(16)));
  B bu = __builtin_convertvector(u, B), bv = __builtin_convertvector(v, B);
  memcpy(q, &bu, 16);
  memcpy(q + 16, &bv, 16);
  *to_d = d;
  *sum = sum_lanes(u + v);
}

// The rows of bytes of one place. Two: q up to 32,512 as 255 high + low, both of magnitude 127 at most.
IDLM_INLINE void quantise(const float* x, int64_t k, const RowPlan& plan, int place, const Activations& in) {
  const Tile& tile = plan.tiles[plan.tile_of[place]];
  const int index = place - tile.first;
  const bool is_wide = index < tile.wide;
  const int64_t own = tile.first_byte * (k / kBlock) + (is_wide ? 2 * index : tile.wide + index);
  auto put = [&](I u, I v, float d, int64_t at) {
    int32_t sum;
    put_bytes(u, v, d, in.q + at * kBlock, in.d + at, &sum);
    in.sum[at] = d * (float)sum, in.offset[at] = sum * kQ8Offset;
  };
  for (int64_t b = 0; b < k / kBlock; b++) {
    const int64_t at = own + b * tile.bytes;
    const Quantised block = quantised(load<F>(x + b * kBlock), load<F>(x + b * kBlock + kLanes), is_wide ? 32512.f : 127.f);
    I u = block.u, v = block.v;
    if (is_wide) {
      I high_u = __builtin_convertvector(nearest(to_float(u) * (1 / 255.f)), I), high_v = __builtin_convertvector(nearest(to_float(v) * (1 / 255.f)), I);
      put(high_u, high_v, block.d * 255.f, at);
      u -= high_u * 255, v -= high_v * 255;
    }
    put(u, v, block.d, at + is_wide);
  }
}

// 32 ranks of low = scale * x A^T of R MASK rows of one tile, in 8 bits: a chain over the blocks of k.
template <int R>
void times_a_bytes(const idlm_cpu_linear& w, const Tile& tile, int block, int place, const Activations& in) {
  const int64_t blocks = w.k / kBlock, own = tile.first_byte * blocks + tile.wide + place - tile.first;
  const uint8_t* a = (const uint8_t*)w.lora_a + block * (int64_t)w.k * kBlock;
  F c[2][R] = {};
  for (int64_t b = 0; b < blocks; b++, a += 1024) {
    const int64_t at = own + b * tile.bytes;
    for (int i = 0; i < 16; i++) __builtin_prefetch(a + 8192 + 64 * i);
    const Sums<R, 2> sums = q8_block<R, 2>(a, in.q + at * kBlock, kBlock);
    for (int g = 0; g < 2; g++)
      for (int r = 0; r < R; r++) {
        I total = Sums<R, 2>::total(sums, g, r, total_q8) - splat_i(in.offset[at + r]);
        c[g][r] = fma(to_float(total), splat(in.d[at + r]), c[g][r]);
      }
  }
  const float* scale = w.lora_a_scale + block * kBlock;
  const F left = load<F>(scale) * splat(w.scale), right = load<F>(scale + kLanes) * splat(w.scale);
  for (int r = 0; r < R; r++) {
    const int64_t to = (place + r) * (int64_t)(w.parts * w.rank / kBlock) + block;
    const Quantised low = quantised(c[0][r] * left, c[1][r] * right, 127.f);
    put_bytes(low.u, low.v, low.d, in.low_q + to * kBlock, in.low_d + to, in.low_offset + to);
    in.low_offset[to] *= kQ8Offset;
  }
}

IDLM_INLINE void times_a_bytes(const idlm_cpu_linear& w, const RowPlan& plan, int block, const Activations& in) {
  for (const Tile& tile : plan.tiles)
    for (int place = tile.first + tile.clean, left = tile.count - tile.clean; left > 0; place += 4, left -= 4) {
      if (left >= 4) times_a_bytes<4>(w, tile, block, place, in);
      else if (left == 3) times_a_bytes<3>(w, tile, block, place, in);
      else if (left == 2) times_a_bytes<2>(w, tile, block, place, in);
      else times_a_bytes<1>(w, tile, block, place, in);
    }
}

}  // namespace IDLM_ISA
}  // namespace idlm_cpu
