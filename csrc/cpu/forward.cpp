// A forward as a list of stages over a pool of threads: per layer thirteen, then the final norm and the LM head.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "job.h"
#include "pool.h"

namespace idlm_cpu {

extern const Isa isa_plain;
#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avx512;
#endif

namespace {

const Isa* const kSets[] = {
#if defined(__x86_64__)
    &isa_avx512, &isa_avx2,
#endif
    &isa_plain};

// Memory that grows and is never shrunk.
template <class T>
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  T* at_least(size_t count) {
    if (count > count_) {
      std::free(data_);
      count_ = 0;
      data_ = (T*)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
      if (!data_) throw std::bad_alloc();
      count_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

struct Scratch {
  Buffer<float> x, d, sum, low, low_d, qkv, attended, activated, scores;
  Buffer<int8_t> q, low_q;
  Buffer<int32_t> offset, low_offset;
};

// One forward at a time. A child of fork has none of the threads: it starts anew and leaves what it inherited alone.
struct Process {
  std::mutex busy;
  pid_t owner = getpid();
  Pool pool;
  Scratch scratch;
};

Process& process() {
  static std::atomic<Process*> one{new Process};  // never destroyed: a thread may outlive static objects
  Process* found = one.load();
  if (found->owner == getpid()) return *found;
  auto own = std::make_unique<Process>();
  if (one.compare_exchange_strong(found, own.get())) return *own.release();
  return *found;  // another thread of this child was first
}

std::atomic<const Isa*> chosen_isa{nullptr};

thread_local char message[200];

template <class... Args>
const char* fault(const char* format, Args... args) {
  snprintf(message, sizeof message, format, args...);
  return message;
}

// Whether every index of the rows lies where it may; whatever passes is computed without a further look.
const char* fault_of(const idlm_cpu_cache& c, const idlm_cpu_rows& r) {
  if (r.query_start_loc[0] != 0) return fault("query_start_loc begins with %d, wanted 0", r.query_start_loc[0]);
  for (int b = 0; b < r.batch; b++) {
    const int count = r.query_start_loc[b + 1] - r.query_start_loc[b];
    if (count < 0) return fault("query_start_loc falls at request %d", b);
    if (count == 0) continue;
    const int64_t pages = ((int64_t)r.seq_lens[b] + c.page_size - 1) / c.page_size;
    if (r.seq_lens[b] < count) return fault("request %d has %d rows, but a length of %d", b, count, r.seq_lens[b]);
    if (pages > r.page_table_stride) return fault("request %d has %d tokens, more than its pages hold", b, r.seq_lens[b]);
    for (int64_t p = 0; p < pages; p++) {
      const int32_t page = r.page_table[b * r.page_table_stride + p];
      if (page < 0 || page >= c.num_pages) return fault("page_table names page %d of %lld", page, (long long)c.num_pages);
    }
  }
  const int count = r.query_start_loc[r.batch];
  if (count > r.rows) return fault("query_start_loc ends with %d, there are %d rows", count, r.rows);
  for (int i = 0; i < count; i++) {
    if (r.positions[i] < 0 || r.positions[i] >= r.max_position)
      return fault("row %d has position %lld, the rotary table %lld rows", i, (long long)r.positions[i], (long long)r.max_position);
    if (r.slots[i] >= c.num_pages * c.page_size) return fault("row %d has slot %lld, beyond the cache", i, (long long)r.slots[i]);
  }
  for (int i = 0; i < r.num_logits; i++) {
    const int64_t row = r.logits_rows ? r.logits_rows[i] : i;
    if (row < 0 || row >= count) return fault("logits are wanted of row %lld, there are %d", (long long)row, count);
  }
  return nullptr;
}

int ceil_div(int64_t a, int64_t b) { return (int)((a + b - 1) / b); }

// Groups of 16 outputs of a unit: enough units for every thread to have some work left when another is late.
int groups_per_unit(int groups, int threads, int multiple) {
  const int wanted = std::max(1, groups / (threads * 8));
  return ceil_div(wanted, multiple) * multiple;
}

// The places of `count` rows (those of `chosen`, where it is given): clean rows, then MASK rows, in tiles of even work.
RowPlan plan_of(int count, const idlm_cpu_rows& rows, const int64_t* chosen, int most_bytes, bool is_wide) {
  RowPlan plan = {count, 0, {}, std::vector<int32_t>(count), {}};
  for (bool masks : {false, true})
    for (int i = 0; i < count; i++)
      if ((rows.is_mask[chosen ? chosen[i] : i] != 0) == masks) plan.row.push_back(i), plan.clean += !masks;
  const int wide = is_wide ? plan.clean : 0;
  for (int place = 0, at = 0, left = wide + count; place < count;) {
    const int tiles = ceil_div(left, most_bytes), size = std::min(most_bytes, (ceil_div(left, tiles) + 1) / 2 * 2);
    Tile tile = {place, 0, 0, 0, at, 0};
    for (; place < count && tile.bytes + 1 + (place < wide) <= size; place++) {
      tile.bytes += 1 + (place < wide);
      tile.wide += place < wide, tile.clean += place < plan.clean, tile.count++;
      plan.tile_of[place] = (int)plan.tiles.size();
    }
    at += tile.bytes, left -= tile.bytes;
    plan.tiles.push_back(tile);
  }
  return plan;
}

// Low: the adapter's x A^T, an open stage, so that a thread without a part of it begins with the layer's own product.
enum StageKind {
  kPrepareQkv, kLowQkv, kQkv, kAttend, kPrepareO, kLowO, kO, kPrepareUp, kLowUp, kGateUp, kPrepareDown, kLowDown, kDown, kPerLayer
};

void run(const idlm_cpu_model& m, const idlm_cpu_cache& cache, const idlm_cpu_rows& rows, int threads, Process& p) {
  const Isa& kernels = isa();
  const int count = rows.query_start_loc[rows.batch];
  const int most = std::max(count, rows.num_logits);
  const int widest = std::max({m.hidden, m.heads * m.head_dim, m.intermediate});
  int lowest = 0, longest = 0;
  for (int l = 0; l < m.num_layers; l++)
    for (const idlm_cpu_linear* w : {&m.layers[l].qkv, &m.layers[l].o, &m.layers[l].gate_up, &m.layers[l].down})
      if (w->lora_a) lowest = std::max(lowest, w->parts * w->rank);
  int64_t queries = 0;
  for (int b = 0; b < rows.batch; b++) {
    const int own = rows.query_start_loc[b + 1] - rows.query_start_loc[b];
    if (own) longest = std::max(longest, rows.seq_lens[b]);
    queries += own * (m.heads / m.kv_heads);
  }

  Scratch& s = p.scratch;
  Job job = {};
  job.model = &m;
  job.cache = &cache;
  job.rows = &rows;
  job.all = plan_of(count, rows, nullptr, kernels.most_rows, !m.int8_activations);
  job.wanted = plan_of(rows.num_logits, rows, rows.logits_rows, kernels.most_rows, !m.int8_activations);
  const size_t activations = (size_t)most * widest, low = (size_t)most * lowest;
  job.in = {s.x.at_least(activations), s.q.at_least(2 * activations), s.d.at_least(2 * activations / kBlock + 2),
            s.sum.at_least(2 * activations / kBlock + 2), s.offset.at_least(2 * activations / kBlock + 2), s.low.at_least(low + 1),
            s.low_q.at_least(low + 1), s.low_d.at_least(low / kBlock + 1), s.low_offset.at_least(low / kBlock + 1)};
  job.qkv = s.qkv.at_least((size_t)count * (m.heads + 2 * m.kv_heads) * m.head_dim + 1);
  job.attended = s.attended.at_least((size_t)count * m.heads * m.head_dim + 1);
  job.activated = s.activated.at_least((size_t)count * m.intermediate + 1);
  job.score_stride = ((int64_t)longest + 2 * kTile + 15) / 16 * 16 + 16;
  float* scores = s.scores.at_least((size_t)threads * kernels.most_queries * job.score_stride);
  std::vector<float*> per_thread(threads);
  for (int t = 0; t < threads; t++) per_thread[t] = scores + (size_t)t * kernels.most_queries * job.score_stride;
  job.scores = per_thread.data();

  // Attention units: (request, KV head, some of its query vectors), narrower where there would be too few of them.
  int at_once = kernels.most_queries;
  while (at_once > 1 && queries * m.kv_heads / at_once < 3 * threads) at_once--;
  struct Unit {
    int request, head, first, last;
  };
  std::vector<Unit> attention;
  for (int b = 0; b < rows.batch; b++) {
    const int own = (rows.query_start_loc[b + 1] - rows.query_start_loc[b]) * (m.heads / m.kv_heads);
    const int parts = ceil_div(own, at_once);
    for (int h = 0; h < m.kv_heads; h++)
      for (int i = 0; i < parts; i++) attention.push_back({b, h, own * i / parts, own * (i + 1) / parts});
  }
  const int attended_at_once = std::max(1, ceil_div(attention.size(), Pool::kMostUnits));

  const int all_heads = m.heads + 2 * m.kv_heads;
  const int o = groups_per_unit(m.hidden / 16, threads, 4), up = groups_per_unit(m.intermediate / 8, threads, 4);
  const int vocabulary_groups = ceil_div(m.head.n, 16), head = groups_per_unit(vocabulary_groups, threads, 4);
  const int masks = job.all.count - job.all.clean;
  std::vector<Pool::Stage> stages;
  const auto add = [&](int64_t count, int each) { stages.push_back({ceil_div(count, each)}); };
  // At least one unit for each thread, if without rows: it fetches what the thread reads next.
  const auto add_input = [&](const idlm_cpu_linear& w) {
    stages.push_back({std::max((int)job.all.tiles.size(), threads)});
    stages.push_back({w.lora_a && masks ? w.parts * w.rank / low_ranks(w) : 0, true});
  };
  for (int l = 0; l < m.num_layers; l++) {
    const idlm_cpu_layer& layer = m.layers[l];
    add_input(layer.qkv), add(all_heads, 1);
    add(attention.size(), attended_at_once);
    add_input(layer.o), add(m.hidden / 16, o);
    add_input(layer.gate_up), add(m.intermediate / 8, up);
    add_input(layer.down), add(m.hidden / 16, o);
  }
  stages.push_back({(int)job.wanted.tiles.size()});
  add(rows.num_logits ? vocabulary_groups : 0, head);

  const auto run_unit = [&](int stage, int unit, int thread) {
    const int layer = stage / kPerLayer;
    // Rows are normed and quantised a tile at a time: its rows lie interleaved, and two threads would share their lines.
    const std::vector<Tile>& tiles = layer == m.num_layers ? job.wanted.tiles : job.all.tiles;
    const int first = unit < (int)tiles.size() ? tiles[unit].first : 0, last = unit < (int)tiles.size() ? first + tiles[unit].count : 0;
    if (layer == m.num_layers) {
      if (stage % kPerLayer == 0) return kernels.final_norm(job, first, last);
      return kernels.head(job, unit * head, std::min(vocabulary_groups, (unit + 1) * head));
    }
    const idlm_cpu_layer& l = m.layers[layer];
    const Low low = {&p.pool, stage - 1};
    switch (stage % kPerLayer) {
      case kPrepareQkv: return kernels.prepare(job, l.qkv, rows.x, l.attention_norm, first, last);
      case kQkv: return kernels.qkv(job, low, layer, unit, unit + 1);
      case kAttend: {
        const size_t end = std::min(attention.size(), (size_t)(unit + 1) * attended_at_once);
        for (size_t i = (size_t)unit * attended_at_once; i < end; i++) {
          const Unit& a = attention[i];
          kernels.attend(job, layer, thread, a.request, a.head, a.first, a.last);
        }
        return;
      }
      case kLowQkv: return kernels.times_a(job, l.qkv, unit);
      case kLowO: return kernels.times_a(job, l.o, unit);
      case kLowUp: return kernels.times_a(job, l.gate_up, unit);
      case kLowDown: return kernels.times_a(job, l.down, unit);
      case kPrepareO: return kernels.prepare(job, l.o, job.attended, nullptr, first, last);
      case kO: return kernels.add_linear(job, low, l.o, rows.x, unit * o, std::min(m.hidden / 16, (unit + 1) * o));
      case kPrepareUp: return kernels.prepare(job, l.gate_up, rows.x, l.mlp_norm, first, last);
      case kGateUp: return kernels.gate_up(job, low, l.gate_up, unit * up, std::min(m.intermediate / 8, (unit + 1) * up));
      case kPrepareDown: return kernels.prepare(job, l.down, job.activated, nullptr, first, last);
      default: return kernels.add_linear(job, low, l.down, rows.x, unit * o, std::min(m.hidden / 16, (unit + 1) * o));
    }
  };
  // While rows are normed and quantised memory is idle: each thread fetches the weights that it meets first.
  const auto fetch = [&](int stage, int thread) {
    const int layer = stage / kPerLayer, kind = stage % kPerLayer;
    if (layer == m.num_layers) return;
    const idlm_cpu_layer& l = m.layers[layer];
    const idlm_cpu_linear* w = kind == kPrepareQkv ? &l.qkv : kind == kPrepareO ? &l.o : kind == kPrepareUp ? &l.gate_up : kind == kPrepareDown ? &l.down : nullptr;
    if (!w) return;
    const auto fetch_lines = [](const void* from, int64_t bytes) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
    };
    const auto share = [&](int of) { return Pool::share(stages[of].units, thread, threads); };
    if (stages[stage + 1].units > share(stage + 1)) {
      const int64_t bytes = low_ranks(*w) * w->k * (w->lora_kind == IDLM_CPU_I8 ? 1 : w->lora_kind == IDLM_CPU_F32 ? 4 : 2);
      fetch_lines((const char*)w->lora_a + share(stage + 1) * bytes, std::min<int64_t>(bytes, 16384));
    }
    const int each = kind == kPrepareQkv ? m.head_dim / 16 : kind == kPrepareUp ? up : o;
    fetch_lines((const char*)w->weight + share(stage + 2) * each * group_bytes(w->kind, w->k), 8192);
  };
  p.pool.run(stages, threads, run_unit, fetch);
}

}  // namespace

const Isa& isa() {
  const Isa* chosen = chosen_isa.load();
  for (const Isa* set : kSets)
    if (!chosen && set->runs_here()) chosen_isa = chosen = set;
  return *chosen;
}

void with_pool(const std::function<void(Pool&)>& function) {
  Process& p = process();
  std::lock_guard<std::mutex> lock(p.busy);
  function(p.pool);
}

const char* guarded(int threads, const std::function<void()>& function) {
  if (threads < 1 || threads > 1024) return fault("%d threads, wanted 1 to 1024", threads);
  try {
    function();
  } catch (const std::bad_alloc&) {
    return fault("there is not enough memory");
  } catch (const std::exception& error) {
    return fault("%s", error.what());
  }
  return nullptr;
}

}  // namespace idlm_cpu

using namespace idlm_cpu;

extern "C" {

const char* idlm_cpu_forward(const idlm_cpu_model* model, const idlm_cpu_cache* cache, const idlm_cpu_rows* rows, int32_t threads) {
  if (const char* found = fault_of(*cache, *rows)) return found;
  const int count = rows->query_start_loc[rows->batch];
  if (count == 0) return nullptr;
  return guarded(threads, [&] {
    Process& p = process();
    std::lock_guard<std::mutex> lock(p.busy);
    try {
      run(*model, *cache, *rows, threads, p);
    } catch (const std::bad_alloc&) {
      throw std::runtime_error("there is no memory for a forward of " + std::to_string(count) + " rows");
    }
  });
}

const char* idlm_cpu_isa(int32_t index) {
  for (const Isa* set : kSets)
    if (set->runs_here() && index-- == 0) return set->name;
  return nullptr;
}

int32_t idlm_cpu_use_isa(const char* name) {
  for (const Isa* set : kSets)
    if (set->runs_here() && strcmp(set->name, name) == 0) {
      chosen_isa = set;
      return 0;
    }
  return 1;
}

int32_t idlm_cpu_abi(void) {
  return (int32_t)(sizeof(idlm_cpu_linear) + 1000 * sizeof(idlm_cpu_layer) + 7 * sizeof(idlm_cpu_model) + 11 * sizeof(idlm_cpu_cache) +
                   13 * sizeof(idlm_cpu_rows) + 17 * sizeof(idlm_cpu_plan) + 19 * sizeof(idlm_cpu_decision) +
                   23 * sizeof(idlm_cpu_reranking) + 29 * sizeof(idlm_cpu_move) + 31 * sizeof(idlm_cpu_state) + 37 * sizeof(idlm_cpu_commit) + 41 * sizeof(idlm_cpu_drawing));
}

const char* idlm_cpu_source_hash(void) { return IDLM_CPU_SOURCE_HASH; }

}  // extern "C"
