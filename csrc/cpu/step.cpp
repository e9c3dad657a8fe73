// What a decode step does before and after its forward, for requests that all decode greedily.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "job.h"
#include "pool.h"

using namespace idlm_cpu;

namespace {

// The first word of Philox4x32-10 at a counter (c0, c1, c2, 0).
uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32), c3 = 0;
  for (int round = 0; round < 10; round++) {
    const uint64_t p = (uint64_t)c0 * 0xD2511F53u, q = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(q >> 32) ^ c1 ^ k0, c1 = (uint32_t)q;
    c2 = (uint32_t)(p >> 32) ^ c3 ^ k1, c3 = (uint32_t)p;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c0;
}

constexpr uint32_t kStreamInput = 3;

}  // namespace

extern "C" {

void idlm_cpu_plan_rows(const idlm_cpu_plan* plan, int32_t most_rows) {
  const idlm_cpu_plan& p = *plan;
  int32_t t = 0;
  p.query_start_loc[0] = 0;
  for (int b = 0; b < p.batch; b++) {
    const int64_t length = p.lengths[b];
    const bool running = p.finish[b] == 0;
    const int n = std::clamp(p.num_drafts[b], 0, p.num_k), branches = p.branched ? n + 1 : 1, m = running ? 1 + n + branches * p.num_k : 0;
    for (int r = 0; r < m; r++, t++) {
      const bool is_clean = r <= n;
      const int index = r - 1 - n, branch = p.branched && p.num_k ? index / p.num_k : n;
      const int j = p.branched && p.num_k ? index % p.num_k : index;
      const int64_t at = length - 1 + r;
      const int64_t position = length - 1 + (is_clean ? r : 1 + branch + j);
      int64_t mask_id = p.mask_id;
      if (!is_clean && p.noise_below) {
        const uint64_t word = philox((uint64_t)p.seed[b], (uint32_t)at, (uint32_t)position, kStreamInput);
        mask_id = 1 + (int64_t)(word * (uint64_t)(p.noise_below - 1) >> 32);
      }
      p.ids[t] = !is_clean ? mask_id : r == 0 ? p.text[b * p.text_stride + length - 1] : p.drafts[b * p.drafts_stride + r - 1];
      p.is_mask[t] = !is_clean;
      p.positions[t] = position;
      // Beyond its pages: not kept, and the forward refuses the request.
      const bool has_page = at / p.page_size < p.page_table_stride;
      p.slots[t] = has_page ? (int64_t)p.page_table[b * p.page_table_stride + at / p.page_size] * p.page_size + at % p.page_size : -1;
      if (p.tail_mask) {
        const uint64_t own = (((uint64_t)2 << (is_clean ? 0 : j)) - 1) << std::min(63, 1 + n + (is_clean ? 0 : branch) * p.num_k);
        p.tail_mask[t] = (int64_t)(is_clean ? ((uint64_t)2 << r) - 1 : (((uint64_t)2 << branch) - 1) | own);
      }
    }
    p.seq_lens[b] = running ? (int32_t)(length - 1 + m) : 0;
    p.query_start_loc[b + 1] = t;
  }
  for (; t < p.batch * most_rows; t++) {  // padding
    p.ids[t] = 0, p.is_mask[t] = 0, p.positions[t] = 0, p.slots[t] = -1;
    if (p.tail_mask) p.tail_mask[t] = 0;
  }
}

int32_t idlm_cpu_verify_greedy(const idlm_cpu_decision* decision) {
  const idlm_cpu_decision& p = *decision;
  const Isa& kernels = isa();
  auto best = [&](int64_t row) { return kernels.best(p.logits + row * p.logits_stride, std::min(p.id_limit, p.vocabulary), p.mask_id); };
  for (int b = 0; b < p.batch; b++) {
    const int start = p.query_start_loc[b], m = p.query_start_loc[b + 1] - start, n = p.num_drafts[b];
    int64_t *tokens = p.tokens + b * (int64_t)(p.num_k + 1), *next = p.next_drafts + b * (int64_t)p.num_k;
    const int64_t* drafts = p.drafts + b * p.drafts_stride;
    std::fill(tokens, tokens + p.num_k + 1, -1);
    std::fill(next, next + p.num_k, -1);
    p.num_accepted[b] = 0, p.next_num_drafts[b] = 0;
    if (m <= 0) continue;
    if (start < 0 || start + (int64_t)m > p.rows) return 1;
    if (n < 0 || n > std::min(m - 1, p.num_k)) return 1;
    int a = 0;
    for (int i = 0; i <= n; i++) {  // every clean row, as its faults count even where its token does not
      const int64_t y = best(start + i);
      if (y < 0 || (i < n && (drafts[i] < 0 || drafts[i] >= p.vocabulary))) return 1;
      if (a == i) {
        tokens[i] = y;
        if (i < n && drafts[i] == y) a++;
      }
    }
    p.num_accepted[b] = a;
    const int first = 1 + n + (p.branched ? a * p.num_k : 0);
    if (p.num_k == 0 || first + p.num_k > m || (!p.branched && a != n)) continue;
    for (int j = 0; j < p.num_k; j++)
      if ((next[j] = best(start + first + j)) < 0) return 1;
    p.next_num_drafts[b] = p.num_k;
  }
  return 0;
}

void idlm_cpu_advance(const idlm_cpu_move* move) {
  enum { kRunning = 0, kStopped = 1, kLength = 2 };
  const idlm_cpu_move& p = *move;
  for (int b = 0; b < p.batch; b++) {
    const int64_t *tokens = p.tokens + b * p.tokens_stride, *stops = p.stop_ids + b * p.stops_stride;
    p.emitted[b] = 0;
    if (p.finish[b] != kRunning || tokens[0] < 0) continue;
    const int committed = p.num_accepted[b] + 1, room = std::max(0, p.length_limits[b] - p.lengths[b]);
    int until_stop = p.width + 1;
    for (int i = 0; i < std::min(committed, p.width) && until_stop > p.width; i++)
      if (tokens[i] >= 0 && std::find(stops, stops + p.num_stops, tokens[i]) != stops + p.num_stops) until_stop = i + 1;
    const int emitted = std::min({committed, until_stop, room});
    std::copy_n(tokens, std::min(emitted, p.width), p.text + b * p.text_stride + p.lengths[b]);
    p.lengths[b] += emitted;
    p.emitted[b] = emitted;
    if (until_stop <= emitted) p.finish[b] = kStopped;
    else if (p.lengths[b] >= p.length_limits[b]) p.finish[b] = kLength;
    std::copy_n(p.next_drafts + b * p.next_drafts_stride, p.num_k, p.drafts + b * p.drafts_stride);
    p.num_drafts[b] = p.finish[b] == kRunning ? p.next_num_drafts[b] : 0;
  }
}

static void rerank_greedy(const idlm_cpu_reranking& p, int threads) {
  constexpr int kCandidates = 32, kUnit = 64;
  const Isa& kernels = isa();
  const int units = (p.state + kUnit - 1) / kUnit, up = (p.width + kUnit - 1) / kUnit;
  std::vector<int> chosen;
  for (int b = 0; b < p.batch; b++) {
    for (int j = 0; j < p.num_k; j++) p.out[b * p.num_k + j] = p.drafts[b * p.num_k + j];
    if (p.num_drafts[b] > 0) chosen.push_back(b);
  }
  const int count = (int)chosen.size(), rows = count * p.num_k;
  if (rows == 0) return;
  struct Candidates {
    int count;
    int64_t ids[kCandidates];
    float values[kCandidates];
  };
  std::vector<Candidates> found(rows);
  std::vector<float> hidden((size_t)rows * p.width), part((size_t)rows * p.state), before((size_t)count * p.width),
      state((size_t)count * p.state), next((size_t)count * p.state), query((size_t)count * p.width);
  auto row_of = [&](int r) {
    return std::clamp<int64_t>(p.first_mask[chosen[r / p.num_k]] + (int64_t)(r % p.num_k), 0, p.rows - 1);
  };
  // A row of the embedding or of the head: where it lies, or unpacked into `space`, and its kind.
  struct Row {
    const void* data;
    int kind;
  };
  auto row_at = [&](const void* table, int kind, int64_t id, std::vector<float>& space) -> Row {
    id = std::clamp<int64_t>(id, 0, p.vocabulary - 1);
    if (!p.is_packed) return {(const uint8_t*)table + id * p.width * (kind == IDLM_CPU_F32 ? 4 : 2), kind};
    space.resize(p.width);
    idlm_cpu_unpack_rows(kind, table, p.vocabulary, p.width, &id, 1, space.data());
    return {space.data(), IDLM_CPU_F32};
  };
  auto choose = [&](int c, int j) {
    const Candidates& of = found[c * p.num_k + j];
    int64_t best = p.mask_id == 0 ? 1 : 0;
    float most = -INFINITY;
    std::vector<float> space;
    for (int i = 0; i < of.count; i++) {
      float score;
      const Row row = row_at(p.head, p.head_kind, of.ids[i], space);
      kernels.times(row.data, row.kind, &query[(size_t)c * p.width], p.width, 0, 1, &score);
      score += of.values[i];
      if (score > most) most = score, best = of.ids[i];
    }
    p.out[chosen[c] * p.num_k + j] = best;
  };
  // First every row's candidates and its part of the state; then draft after draft: previous embedding, state, query, choice.
  std::vector<int> stages = {rows, rows * units};
  for (int j = 0; j < p.num_k; j++) stages.insert(stages.end(), {count, count * units, count * up, count});
  const Pool::Unit run = [&](int stage, int unit, int) {
    if (stage == 0) {
      const int64_t row = row_of(unit);
      found[unit].count = kernels.best_few(p.logits + row * p.logits_stride, std::min(p.id_limit, p.vocabulary), p.mask_id, kCandidates,
                                           found[unit].ids, found[unit].values);
      return kernels.unit(p.hidden + row * p.width, IDLM_CPU_F32, p.width, &hidden[(size_t)unit * p.width]);
    }
    if (stage == 1) {
      const int r = unit / units, first = unit % units * kUnit;
      return kernels.times(p.from_hidden, IDLM_CPU_F32, &hidden[(size_t)r * p.width], p.width, first, std::min(p.state, first + kUnit),
                           &part[(size_t)r * p.state]);
    }
    const int j = (stage - 2) / 4;
    switch ((stage - 2) % 4) {
      case 0: {
        const int64_t previous = j == 0 ? p.previous[chosen[unit]] : p.out[chosen[unit] * p.num_k + j - 1];
        if (j) std::copy_n(&next[(size_t)unit * p.state], p.state, &state[(size_t)unit * p.state]);
        std::vector<float> space;
        const Row row = row_at(p.embedding, p.embedding_kind, previous, space);
        return kernels.unit(row.data, row.kind, p.width, &before[(size_t)unit * p.width]);
      }
      case 1: {
        const int c = unit / units, first = unit % units * kUnit, last = std::min(p.state, first + kUnit);
        float *y = &next[(size_t)c * p.state], add[kUnit];
        kernels.times(p.from_previous, IDLM_CPU_F32, &before[(size_t)c * p.width], p.width, first, last, y);
        if (j) kernels.times(p.from_state + (int64_t)first * p.state, IDLM_CPU_F32, &state[(size_t)c * p.state], p.state, 0, last - first, add);
        for (int i = first; i < last; i++) {
          const float x = part[(size_t)(c * p.num_k + j) * p.state + i] + y[i] + (j ? add[i - first] : 0.f);
          y[i] = x / (1.f + std::exp(-x));
        }
        return;
      }
      case 2: {
        const int c = unit / up, first = unit % up * kUnit;
        return kernels.times(p.to_query, IDLM_CPU_F32, &next[(size_t)c * p.state], p.state, first, std::min(p.width, first + kUnit),
                             &query[(size_t)c * p.width]);
      }
      default: return choose(unit, j);
    }
  };
  with_pool([&](Pool& pool) { pool.run(stages, threads, run); });
}

const char* idlm_cpu_rerank_greedy(const idlm_cpu_reranking* reranking, int32_t threads) {
  return guarded(threads, [&] { rerank_greedy(*reranking, threads); });
}

}  // extern "C"
