// The stages of a layer around the linear ones: norms, rotary embedding with the K and V write, gated SiLU.
#pragma once
#include "linear.h"

namespace idlm_cpu {
namespace IDLM_ISA {

// y = x * rsqrt(mean(x^2) + eps) * weight over n numbers; one chain per lane, then a fixed tree.
IDLM_INLINE void norm(const float* x, const float* weight, int n, float eps, float* y) {
  F squares = {};
  for (int i = 0; i < n; i += kLanes) {
    F v = load<F>(x + i);
    squares = fma(v, v, squares);
  }
  const float inverse = 1.f / std::sqrt(sum_lanes(squares) / (float)n + eps);
  for (int i = 0; i < n; i += kLanes) store(y + i, load<F>(x + i) * inverse * load<F>(weight + i));
}

void prepare(const Job& job, const idlm_cpu_linear& w, const float* source, const float* norm_weight, int first, int last) {
  Activations in = job.in;
  for (int place = first; place < last; place++) {
    const float* x = source + job.all.row[place] * (int64_t)w.k;
    float* target = in.x + place * (int64_t)w.k;
    if (norm_weight) norm(x, norm_weight, w.k, job.model->eps, target);
    else memcpy(target, x, w.k * sizeof(float));
    if (is_quantised(w.kind)) quantise(target, w.k, job.all, place, in);
  }
}

// One unit of x A^T, for all MASK rows.
void times_a(const Job& job, const idlm_cpu_linear& w, int unit) {
  const RowPlan& plan = job.all;
  const int first = plan.clean, count = plan.count - first;
  if (w.lora_kind == IDLM_CPU_I8) return times_a_bytes(w, plan, unit, job.in);
  const float* x = job.in.x + first * (int64_t)w.k;
  float* low = job.in.low + (int64_t)first * w.parts * w.rank;
  if (w.lora_kind == IDLM_CPU_F16) times_a<IDLM_CPU_F16>(w, unit, count, x, low);
  else if (w.lora_kind == IDLM_CPU_BF16) times_a<IDLM_CPU_BF16>(w, unit, count, x, low);
  else times_a<IDLM_CPU_F32>(w, unit, count, x, low);
}

// Rotary embedding in the half-split convention, in place.
IDLM_INLINE void rotate(float* x, const float* table, int dim) {
  const int half = dim / 2;
  for (int i = 0; i < half; i += kLanes) {
    F a = load<F>(x + i), b = load<F>(x + half + i), c = load<F>(table + i), s = load<F>(table + half + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
}

void qkv(const Job& job, Low low, int layer, int first_head, int last_head) {
  const idlm_cpu_model& m = *job.model;
  const idlm_cpu_layer& l = m.layers[layer];
  const idlm_cpu_cache& cache = *job.cache;
  const int dim = m.head_dim, per_head = dim / kLanes, n = l.qkv.n, tiles = (cache.page_size + kTile - 1) / kTile;
  linear(job, job.all, l.qkv, low, first_head * per_head, last_head * per_head,
         [&](int group, int row, F v) { store(job.qkv + row * (int64_t)n + group * kLanes, v); });
  for (int head = first_head; head < last_head; head++) {
    const bool is_q = head < m.heads, is_k = !is_q && head < m.heads + m.kv_heads;
    const float* weight = is_q ? l.q_norm : is_k ? l.k_norm : nullptr;
    const int kv_head = (head - m.heads) % m.kv_heads;
    for (int row = 0; row < job.all.count; row++) {
      float* x = job.qkv + row * (int64_t)n + head * dim;
      if (weight) norm(x, weight, dim, m.eps, x);
      if (is_q || is_k) rotate(x, m.rotary + job.rows->positions[row] * dim, dim);
      const int64_t slot = job.rows->slots[row];
      if (is_q || slot < 0) continue;
      const int64_t page = slot / cache.page_size, at = slot % cache.page_size;
      const int64_t place = (layer * cache.num_pages + page) * m.kv_heads + kv_head;
      if (is_k) {
        float* k = cache.k + (place * tiles + at / kTile) * dim * kTile + at % kTile;
        for (int d = 0; d < dim; d++) k[d * kTile] = x[d];
      } else {
        memcpy(cache.v + (place * cache.page_size + at) * dim, x, dim * sizeof(float));
      }
    }
  }
}

void add_linear(const Job& job, Low low, const idlm_cpu_linear& w, float* y, int first, int last) {
  linear(job, job.all, w, low, first, last, [&](int group, int row, F v) {
    float* target = y + row * (int64_t)w.n + group * kLanes;
    store(target, load<F>(target) + v);
  });
}

void gate_up(const Job& job, Low low, const idlm_cpu_linear& w, int first, int last) {
  linear(job, job.all, w, low, first, last, [&](int group, int row, F v) {
    float* target = job.activated + row * (int64_t)(w.n / 2) + group / 2 * kLanes;
    if (group % 2 == 0) return store(target, v);
    F gate = load<F>(target);
    store(target, gate / (exp(-gate) + 1.f) * v);
  });
}

void final_norm(const Job& job, int first, int last) {
  const idlm_cpu_model& m = *job.model;
  Activations in = job.in;
  for (int place = first; place < last; place++) {
    const int i = job.wanted.row[place];
    const int64_t row = job.rows->logits_rows ? job.rows->logits_rows[i] : i;
    float *hidden = job.rows->hidden + i * (int64_t)m.hidden, *target = in.x + place * (int64_t)m.hidden;
    norm(job.rows->x + row * m.hidden, m.norm, m.hidden, m.eps, hidden);
    // An adapter's finite weights may still overflow: that spoils a proposal and nothing else.
    if (m.has_adapter && job.rows->is_mask[row])
      for (int k = 0; k < m.hidden; k++) hidden[k] = std::isfinite(hidden[k]) ? hidden[k] : 0.f;
    memcpy(target, hidden, m.hidden * sizeof(float));
    if (is_quantised(m.head.kind)) quantise(target, m.hidden, job.wanted, place, in);
  }
}

void head(const Job& job, int first, int last) {
  const idlm_cpu_linear& w = job.model->head;
  linear(job, job.wanted, w, Low{}, first, last, [&](int group, int row, F v) {
    float* target = job.rows->logits + row * (int64_t)w.n + group * kLanes;
    const int left = w.n - group * kLanes;
    if (left >= kLanes) store(target, v);
    else memcpy(target, &v, left * sizeof(float));
  });
}

}  // namespace IDLM_ISA
}  // namespace idlm_cpu
