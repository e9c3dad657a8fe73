// Strided-causal paged attention for a few query vectors of one KV head, which share every read of K and V.
//
// Scores of all slots are kept (fp32, one row per query), so that each query is: a dot product per slot in the order of
// head_dim; the maximum; exponentials; their sum, slot s in lane s % 16; and one chain of fused multiply-adds over the
// slots that the row sees, in their order. None of it depends on pages, on other queries, or on how units are cut.
// A slot that a row does not see is left out by selection: whatever it holds never reaches the row.
#pragma once
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
    mask[i] = rows.tail_mask ? (uint64_t)rows.tail_mask[first_row + index] : 0;
    const int seen = rows.tail_mask ? before : before + index + 1;
    common = seen < common ? seen : common;
    out[i] = job.attended + (first_row + index) * (int64_t)(m.heads * dim) + head * dim;
    p[i] = job.scores[thread] + i * job.score_stride;
    const float* source = job.qkv + (first_row + index) * (int64_t)n + head * dim;
    for (int d = 0; d < dim; d++) q[d * Q + i] = source[d] * scale;
  }
  auto sees = [&](int i, int slot) {
    const int j = slot - before;
    return j < 0 || (rows.tail_mask ? (j < 64 && (mask[i] >> j & 1)) : j <= row_of[i]);
  };

  for (int start = 0; start < length; start += page_size) {
    const float* k = cache.k + ((layer * cache.num_pages + pages[start / page_size]) * m.kv_heads + kv_head) * (int64_t)tiles * dim * kTile;
    const int end = length - start < page_size ? length - start : page_size;
    int t = 0;
    for (; t + kTile < end; t += 2 * kTile, k += 2 * dim * kTile) {
      F s[2][Q] = {};
      for (int d = 0; d < dim; d++) {
        F left = load<F>(k + d * kTile), right = load<F>(k + (dim + d) * kTile);
#pragma GCC unroll 8
        for (int i = 0; i < Q; i++) {
          F x = splat(q[d * Q + i]);
          s[0][i] = fma(left, x, s[0][i]);
          s[1][i] = fma(right, x, s[1][i]);
        }
      }
      for (int i = 0; i < Q; i++) {  // past the page's end: the next page writes there
        store(p[i] + start + t, s[0][i]);
        store(p[i] + start + t + kTile, s[1][i]);
      }
    }
    if (t < end) {
      F s[Q] = {};
      for (int d = 0; d < dim; d++) {
        F keys = load<F>(k + d * kTile);
#pragma GCC unroll 8
        for (int i = 0; i < Q; i++) s[i] = fma(keys, splat(q[d * Q + i]), s[i]);
      }
      for (int i = 0; i < Q; i++) store(p[i] + start + t, s[i]);
    }
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
  for (int d = 0; d < dim; d += 2 * kLanes) {
    F a[Q] = {}, b[Q] = {};
    for (int start = 0; start < length; start += page_size) {
      const float* v = cache.v + ((layer * cache.num_pages + pages[start / page_size]) * m.kv_heads + kv_head) * (int64_t)page_size * dim + d;
      const int end = length - start < page_size ? length : start + page_size;
      int s = start;
      for (; s < end && s < common; s++, v += dim) {
        F x = load<F>(v), y = load<F>(v + kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Q; i++) {
          F w = splat(p[i][s]);
          a[i] = fma(x, w, a[i]);
          b[i] = fma(y, w, b[i]);
        }
      }
      for (; s < end; s++, v += dim) {
        F x = load<F>(v), y = load<F>(v + kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Q; i++) {
          F w = splat(p[i][s]);
          I seen = splat_i(sees(i, s) ? -1 : 0);
          a[i] = select(seen, fma(x, w, a[i]), a[i]);
          b[i] = select(seen, fma(y, w, b[i]), b[i]);
        }
      }
    }
    for (int i = 0; i < Q; i++) {
      store(out[i] + d, a[i] * inverse[i]);
      store(out[i] + d + kLanes, b[i] * inverse[i]);
    }
  }
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
