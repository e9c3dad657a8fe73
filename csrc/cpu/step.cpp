// What a decode step does before and after its forward: rows, commit and re-ranking for all requests, verification for
// those that all decode greedily, and single draws for the others.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "job.h"
#include "philox.h"
#include "pool.h"

using namespace idlm_cpu;

namespace {

enum { kRunning = 0, kStopped = 1, kLength = 2, kFailed = 4 };  // values of finish_reason

// A request of a batch: pending is text[*length - 1].
struct Place {
  int64_t *text, *drafts;
  const int64_t* stop_ids;
  int32_t *length, *num_drafts, *finish_reason;
  int limit, num_spec_tokens, num_stops;
};

// Commits the first tokens up to a stop or the limit; returns how many.
int advanced(const Place& p, int num_accepted, const int64_t* tokens, int width, const int64_t* next_drafts, int next_num_drafts) {
  if (*p.finish_reason != kRunning || tokens[0] < 0) return 0;
  const int committed = num_accepted + 1, room = std::max(0, p.limit - *p.length);
  int until_stop = width + 1;
  for (int i = 0; i < std::min(committed, width) && until_stop > width; i++)
    if (tokens[i] >= 0 && std::find(p.stop_ids, p.stop_ids + p.num_stops, tokens[i]) != p.stop_ids + p.num_stops) until_stop = i + 1;
  const int emitted = std::min({committed, until_stop, room});
  std::copy_n(tokens, std::min(emitted, width), p.text + *p.length);
  *p.length += emitted;
  if (until_stop <= emitted) *p.finish_reason = kStopped;
  else if (*p.length >= p.limit) *p.finish_reason = kLength;
  std::copy_n(next_drafts, p.num_spec_tokens, p.drafts);
  *p.num_drafts = *p.finish_reason == kRunning ? next_num_drafts : 0;
  return emitted;
}

// Where the last of the longest earlier occurrences of the end of a text ends, and how many tokens it has, at most 8.
std::pair<int, int> last_occurrence(const int64_t* text, int length) {
  constexpr int kLongest = 8;
  int best = 0, matched = 0;
  for (int end = length - 2; end >= 0 && matched < kLongest; end--) {
    int run = 0;
    while (run < kLongest && run <= end && text[end - run] == text[length - 1 - run]) run++;
    if (run > matched) best = end, matched = run;
  }
  return {best, matched};
}

enum { kStreamTarget = 0, kStreamAccept = 2, kStreamInput = 3 };

// The acceptance uniform of a seed at a position.
float uniform(int64_t seed, int64_t position) {
  return std::min((float)philox(seed, 0, (uint32_t)position, kStreamAccept)[0] * 0x1p-32f + 0x1p-33f, 1.f - 0x1p-24f);
}

}  // namespace

extern "C" {

void idlm_cpu_plan_rows(const idlm_cpu_state* state, const idlm_cpu_plan* plan) {
  const idlm_cpu_state& s = *state;
  const idlm_cpu_plan& p = *plan;
  int32_t t = 0;
  p.query_start_loc[0] = 0;
  for (int b = 0; b < s.batch; b++) {
    const int64_t length = s.lengths[b];
    const bool running = s.finish_reason[b] == kRunning;
    const int n = std::clamp(s.num_drafts[b], 0, s.num_spec_tokens), branches = p.quadratic ? n + 1 : 1;
    const int m = running ? 1 + n + branches * s.num_spec_tokens : 0;
    for (int r = 0; r < m; r++, t++) {
      const bool is_clean = r <= n;
      const int index = r - 1 - n, branch = p.quadratic && s.num_spec_tokens ? index / s.num_spec_tokens : n;
      const int j = p.quadratic && s.num_spec_tokens ? index % s.num_spec_tokens : index;
      const int64_t at = length - 1 + r;
      const int64_t position = length - 1 + (is_clean ? r : 1 + branch + j);
      int64_t mask_id = p.mask_id;
      if (p.noise_below) mask_id = 1 + (int64_t)((uint64_t)philox(s.seed[b], (uint32_t)at, (uint32_t)position, kStreamInput)[0] * (uint64_t)(p.noise_below - 1) >> 32);
      p.ids[t] = !is_clean ? mask_id : r == 0 ? s.text[b * s.text_stride + length - 1] : s.drafts[b * s.drafts_stride + r - 1];
      p.is_mask[t] = !is_clean;
      p.positions[t] = position;
      // Beyond its pages: not kept, and the forward refuses the request.
      const bool has_page = at / p.page_size < s.max_pages;
      p.slots[t] = has_page ? (int64_t)s.page_table[b * s.page_table_stride + at / p.page_size] * p.page_size + at % p.page_size : -1;
      uint64_t seen = ((uint64_t)2 << r) - 1;
      if (p.quadratic && !is_clean)
        seen = (((uint64_t)2 << branch) - 1) | (((uint64_t)2 << j) - 1) << std::min(63, 1 + n + branch * s.num_spec_tokens);
      p.tree_mask[t] = (int64_t)seen;
    }
    p.seq_lens[b] = running ? (int32_t)(length - 1 + m) : 0;
    p.query_start_loc[b + 1] = t;
  }
  for (; t < p.rows; t++) p.ids[t] = 0, p.is_mask[t] = 0, p.positions[t] = 0, p.slots[t] = -1, p.tree_mask[t] = 0;  // padding
}

int32_t idlm_cpu_verify_greedy(const idlm_cpu_decision* decision) {
  const idlm_cpu_decision& p = *decision;
  const Isa& kernels = isa();
  for (int b = 0; b < p.batch; b++)
    if (!(p.temperature[b] < p.greedy_below)) return 1;
  auto best = [&](int64_t row) { return kernels.best(p.logits + row * p.logits_stride, std::min(p.id_limit, p.vocabulary), p.mask_id); };
  for (int b = 0; b < p.batch; b++) {
    const int start = p.query_start_loc[b], m = p.query_start_loc[b + 1] - start, n = p.num_drafts[b];
    int64_t *tokens = p.tokens + b * (int64_t)(p.num_spec_tokens + 1), *next = p.next_drafts + b * (int64_t)p.num_spec_tokens;
    const int64_t* drafts = p.drafts + b * p.drafts_stride;
    std::fill(tokens, tokens + p.num_spec_tokens + 1, -1);
    std::fill(next, next + p.num_spec_tokens, -1);
    p.num_accepted[b] = 0, p.next_num_drafts[b] = 0;
    if (m <= 0) continue;
    if (start < 0 || start + (int64_t)m > p.rows) return 1;
    if (n < 0 || n > std::min(m - 1, p.num_spec_tokens)) return 1;
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
    const int first = 1 + n + (p.quadratic ? a * p.num_spec_tokens : 0);
    if (p.num_spec_tokens == 0 || first + p.num_spec_tokens > m || (!p.quadratic && a != n)) continue;
    for (int j = 0; j < p.num_spec_tokens; j++)
      if ((next[j] = best(start + first + j)) < 0) return 1;
    p.next_num_drafts[b] = p.num_spec_tokens;
  }
  return 0;
}

int64_t idlm_cpu_draw(const idlm_cpu_drawing* drawing) {
  const idlm_cpu_drawing& p = *drawing;
  if (p.n <= 0 || !(p.temperature > 0)) return -1;
  int64_t id = -1;
  return guarded(1, [&] { id = isa().draw(p); }) ? -1 : id;
}

void idlm_cpu_advance(const idlm_cpu_move* move) {
  const idlm_cpu_move& p = *move;
  for (int b = 0; b < p.batch; b++) {
    const Place place = {p.text + b * p.text_stride, p.drafts + b * p.drafts_stride, p.stop_ids + b * p.stops_stride, &p.lengths[b],
                         &p.num_drafts[b],           &p.finish_reason[b],                   p.length_limits[b],              p.num_spec_tokens,
                         p.num_stops};
    p.emitted[b] = advanced(place, p.num_accepted[b], p.tokens + b * p.tokens_stride, p.width, p.next_drafts + b * p.next_drafts_stride,
                            p.next_num_drafts[b]);
  }
}

void idlm_cpu_commit_step(const idlm_cpu_state* state, const idlm_cpu_commit* commit) {
  enum { kNoDrafts = 0, kMaskDrafts = 1, kSuffixDrafts = 2 };
  enum { kFillMatch = 2, kOverrideMatch = 6 };
  enum { kNan = 1, kEmptyRow = 4 };  // of error_flags
  const idlm_cpu_state& s = *state;
  const idlm_cpu_commit& p = *commit;
  const int width = s.num_spec_tokens + 1;
  for (int b = 0; b < s.batch; b++) {
    int64_t *outcome = p.outcome + b * p.outcome_stride, *tokens = outcome + 6, *drafts = s.drafts + b * s.drafts_stride;
    const int64_t* text = s.text + b * s.text_stride;
    const Place place = {s.text + b * s.text_stride, drafts, s.stop_ids + b * s.stops_stride, &s.lengths[b], &s.num_drafts[b], &s.finish_reason[b],
                         s.length_limits[b],         s.num_spec_tokens, s.num_stops};
    const int n = s.num_drafts[b], source = s.draft_source[b];
    const bool pretends = p.acceptance >= 0, failed = s.error_flags[b] & (kNan | kEmptyRow), was_running = s.finish_reason[b] == kRunning;
    int a = p.num_accepted[b], next_n = p.next_num_drafts[b];
    std::copy_n(p.tokens + b * p.tokens_stride, width, tokens);
    if (pretends) {
      const bool present = tokens[0] >= 0;
      const int64_t sampled = std::max<int64_t>(*std::max_element(tokens, tokens + width), 0);
      for (a = 0; present && a < std::min(n, s.num_spec_tokens) && uniform(s.seed[b], s.lengths[b] + a) < p.acceptance;) a++;
      for (int i = 0; i < width; i++) tokens[i] = !present || i > a ? -1 : i == a ? sampled : std::max<int64_t>(drafts[i], 0);
      next_n = present && (p.quadratic || a == n) ? s.num_spec_tokens : 0;
    }
    if (failed) std::fill_n(tokens, width, -1);
    const bool moves = was_running && tokens[0] >= 0;
    const int emitted = advanced(place, a, tokens, width, p.next_drafts + b * p.next_drafts_stride, next_n);
    if (pretends && moves)
      for (int j = 0; j < s.num_spec_tokens; j++) drafts[j] = std::max<int64_t>(drafts[j], 0);
    if (failed && was_running) s.finish_reason[b] = kFailed;
    s.num_drafts[b] = std::min(s.num_drafts[b], s.max_drafts[b]);
    if (emitted > 0) s.draft_source[b] = s.num_drafts[b] > 0 ? kMaskDrafts : kNoDrafts;
    if (p.suffix && std::min(s.num_spec_tokens, s.max_drafts[b]) > 0 && s.finish_reason[b] == kRunning) {
      const auto [end, matched] = last_occurrence(text, s.lengths[b]);
      if (matched >= (s.num_drafts[b] > 0 ? kOverrideMatch : kFillMatch)) {
        for (int j = 0; j < s.num_spec_tokens; j++) drafts[j] = text[std::min(end + 1 + j, s.max_len - 1)];
        s.num_drafts[b] = std::min({s.lengths[b] - 1 - end, s.num_spec_tokens, s.max_drafts[b]});
        s.draft_source[b] = kSuffixDrafts;
      }
    }
    const int64_t figures[] = {n, a, emitted, s.finish_reason[b], s.error_flags[b], source};
    std::copy_n(figures, 6, outcome);
  }
}

static void rerank(const idlm_cpu_reranking& p, int threads) {
  constexpr int kCandidates = 32, kUnit = 64;
  const Isa& kernels = isa();
  const int units = (p.state + kUnit - 1) / kUnit, up = (p.width + kUnit - 1) / kUnit;
  std::vector<int> chosen;
  for (int b = 0; b < p.batch; b++) {
    for (int j = 0; j < p.num_spec_tokens; j++) p.out[b * p.num_spec_tokens + j] = p.drafts[b * p.num_spec_tokens + j];
    if (p.num_drafts[b] > 0) chosen.push_back(b);
  }
  const int count = (int)chosen.size(), rows = count * p.num_spec_tokens;
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
    return std::clamp<int64_t>(p.first_mask[chosen[r / p.num_spec_tokens]] + (int64_t)(r % p.num_spec_tokens), 0, p.rows - 1);
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
    const Candidates& of = found[c * p.num_spec_tokens + j];
    const int b = chosen[c];
    float scores[kCandidates];
    std::vector<float> space;
    for (int i = 0; i < of.count; i++) {
      const Row row = row_at(p.head, p.head_kind, of.ids[i], space);
      kernels.times(row.data, row.kind, &query[(size_t)c * p.width], p.width, 0, 1, &scores[i]);
      scores[i] += of.values[i];
    }
    int64_t best = -1;
    if (p.temperature[b] < p.greedy_below) {
      float most = -INFINITY;
      for (int i = 0; i < of.count; i++)
        if (scores[i] > most) most = scores[i], best = of.ids[i];
    } else {
      best = kernels.draw_among({scores, of.count, -1, p.seed[b], p.positions[b] + 1 + j, p.temperature[b], p.top_p[b], p.min_p[b], p.top_k[b], kStreamTarget}, of.ids);
    }
    p.out[b * p.num_spec_tokens + j] = best >= 0 ? best : p.mask_id == 0 ? 1 : 0;
  };
  // First every row's candidates and its part of the state; then draft after draft: previous embedding, state, query, choice.
  std::vector<Pool::Stage> stages = {{rows}, {rows * units}};
  for (int j = 0; j < p.num_spec_tokens; j++) stages.insert(stages.end(), {{count}, {count * units}, {count * up}, {count}});
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
        const int64_t previous = j == 0 ? p.previous[chosen[unit]] : p.out[chosen[unit] * p.num_spec_tokens + j - 1];
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
          const float x = part[(size_t)(c * p.num_spec_tokens + j) * p.state + i] + y[i] + (j ? add[i - first] : 0.f);
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

const char* idlm_cpu_rerank(const idlm_cpu_reranking* reranking, int32_t threads) {
  return guarded(threads, [&] { rerank(*reranking, threads); });
}

}  // extern "C"
