// Strided-causal paged attention for a few query vectors of one KV head, which share every read of K and V.
//
// Scores of all slots are kept (fp32, one row per query), so that each query is: a dot product per slot in the order of
// head_dim; the maximum; exponentials; their sum, slot s in lane s % 16; and one chain of fused multiply-adds over the
// slots that the row sees, in their order. None of it depends on pages, on other queries, or on how units are cut.
// A slot that a row does not see is left out by selection: whatever it holds never reaches the row.
#pragma once
#include <type_traits>

#include "stages.h"

namespace idlm_cpu {
namespace IDLM_ISA {

template <int Q>
void attend_queries(const Job& job, int layer, int thread, int request, int kv_head, int first_query) {
  const idlm_cpu_model& m = *job.model;
  const idlm_cpu_cache& cache = *job.cache;
  const idlm_cpu_rows& rows = *job.rows;
  const int dim = m.head_dim, per_kv = m.heads / m.kv_heads, n = (m.heads + 2 * m.kv_heads) * dim;
  const int page_size = cache.page_size, tiles = (page_size + kTile - 1) / kTile;
  const int first_row = rows.query_start_loc[request], m_rows = rows.query_start_loc[request + 1] - first_row;
  const int length = rows.seq_lens[request], before = length - m_rows;  // slots that every row of the request sees
  const int32_t* pages = rows.page_table + request * rows.page_table_stride;

  // What each query sees: all slots below `common`, and of the rest those of its mask, or those up to its own.
  int row_of[Q], common = length;
  uint64_t mask[Q];
  float* out[Q];
  float* p[Q];
  alignas(64) float q[256 * Q];
  const float scale = 1.f / std::sqrt((float)dim);
  for (int i = 0; i < Q; i++) {
    const int index = (first_query + i) / per_kv, head = kv_head * per_kv + (first_query + i) % per_kv;
    row_of[i] = index;
    mask[i] = rows.tree_mask ? (uint64_t)rows.tree_mask[first_row + index] : 0;
    const int seen = rows.tree_mask ? before : before + index + 1;
    common = seen < common ? seen : common;
    out[i] = job.attended + (first_row + index) * (int64_t)(m.heads * dim) + head * dim;
    p[i] = job.scores[thread] + i * job.score_stride;
    const float* source = job.qkv + (first_row + index) * (int64_t)n + head * dim;
    for (int d = 0; d < dim; d++) q[d * Q + i] = source[d] * scale;
  }
  auto sees = [&](int i, int slot) {
    const int j = slot - before;
    return j < 0 || (rows.tree_mask ? (j < 64 && (mask[i] >> j & 1)) : j <= row_of[i]);
  };

  // Scores, some tiles of keys at a time: as many as keep the adders busy. While they are computed the values of their slots
  // and the keys after them are fetched, which lie in other pages.
  constexpr int kTiles = Q >= 4 ? 2 : 4;
  struct Slots {
    int slot;
    const float *k, *v;
  };
  int start = 0, t = 0;
  const auto next = [&] {
    const int64_t page = (layer * cache.num_pages + pages[start / page_size]) * m.kv_heads + kv_head;
    const Slots found = {start + t, cache.k + (page * tiles + t / kTile) * dim * kTile, cache.v + (page * page_size + t) * dim};
    t += kTile;
    if (t >= page_size) start += page_size, t = 0;
    return found;
  };
  Slots now[kTiles], then[kTiles];
  const auto take = [&](Slots* into) {
    int count = 0;
    while (count < kTiles && start + t < length) into[count++] = next();
    return count;
  };
  for (int count = take(now), following; count; count = following) {
    following = take(then);
    for (int j = count; j < kTiles; j++) now[j] = now[0];  // computed for nothing
    F s[kTiles][Q] = {};
    for (int d = 0; d < dim; d++) {
      F keys[kTiles];
#pragma GCC unroll 4
      for (int j = 0; j < kTiles; j++) keys[j] = load<F>(now[j].k + d * kTile);
      for (int j = 0; j < count; j++) __builtin_prefetch(now[j].v + d * kTile, 0, 2);
      for (int j = 0; j < following; j++) __builtin_prefetch(then[j].k + d * kTile, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < Q; i++) {
        F x = splat(q[d * Q + i]);
#pragma GCC unroll 4
        for (int j = 0; j < kTiles; j++) s[j][i] = fma(keys[j], x, s[j][i]);
      }
    }
    for (int j = 0; j < count; j++)  // past the page's end: the next page writes there
      for (int i = 0; i < Q; i++) store(p[i] + now[j].slot, s[j][i]);
    for (int j = 0; j < following; j++) now[j] = then[j];
  }
  float inverse[Q];
  const int padded = (length + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < Q; i++) {
    for (int s = common; s < padded; s++)
      if (s >= length || !sees(i, s)) p[i][s] = -INFINITY;
    F top = splat(-3.4e38f);
    for (int s = 0; s < padded; s += kLanes) top = max(load<F>(p[i] + s), top);
    const float most = max_lanes(top);
    F sum = {};
    for (int s = 0; s < padded; s += kLanes) {
      F v = load<F>(p[i] + s), e = exp(v - most);
      e = select(v == -INFINITY, F{}, e);
      sum += e;
      store(p[i] + s, e);
    }
    inverse[i] = 1.f / sum_lanes(sum);
  }
  // One chain over the slots for each number of the output, some vectors of 16 numbers at a time.
  const auto weigh = [&](auto vectors, int d) {
    constexpr int kVectors = decltype(vectors)::value;
    F sums[kVectors][Q] = {};
    for (int start = 0; start < length; start += page_size) {
      const float* v = cache.v + ((layer * cache.num_pages + pages[start / page_size]) * m.kv_heads + kv_head) * (int64_t)page_size * dim + d;
      const int end = length - start < page_size ? length : start + page_size;
      int s = start;
      for (; s < end && s < common; s++, v += dim) {
        F x[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) x[j] = load<F>(v + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Q; i++) {
          F w = splat(p[i][s]);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; j++) sums[j][i] = fma(x[j], w, sums[j][i]);
        }
      }
      for (; s < end; s++, v += dim)
        for (int i = 0; i < Q; i++) {
          if (!sees(i, s)) continue;
          for (int j = 0; j < kVectors; j++) sums[j][i] = fma(load<F>(v + j * kLanes), splat(p[i][s]), sums[j][i]);
        }
    }
    for (int i = 0; i < Q; i++)
      for (int j = 0; j < kVectors; j++) store(out[i] + d + j * kLanes, sums[j][i] * inverse[i]);
  };
  int d = 0;
  if constexpr (Q <= 4)
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes) weigh(std::integral_constant<int, 4>(), d);
  for (; d < dim; d += 2 * kLanes) weigh(std::integral_constant<int, 2>(), d);
}

// Queries at once: sums of two tiles of keys, or of two vectors of values, stay in registers.
#if defined(__AVX512F__)
constexpr int kMostQueries = 8;
#else
constexpr int kMostQueries = 2;
#endif

template <int Q = 1>
void attend(const Job& job, int layer, int thread, int request, int kv_head, int first, int last) {
  if constexpr (Q < kMostQueries)
    if (last - first > Q) return attend<Q + 1>(job, layer, thread, request, kv_head, first, last);
  attend_queries<Q>(job, layer, thread, request, kv_head, first);
}

}  // namespace IDLM_ISA
}  // namespace idlm_cpu
