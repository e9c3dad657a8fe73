// What a forward hands to its kernels, and the table of kernels of one instruction set.
#pragma once
#include <functional>
#include <vector>

#include "idlm/cpu.h"
#include "pool.h"

namespace idlm_cpu {

constexpr int kBlock = 32;      // k per block of quantised weights and activations
constexpr int kTile = 16;       // slots of a tile of K

// Bytes of a group of 16 outputs over k numbers each. Groups of blocks lie in pairs, block by block, so that two groups are
// one stream of memory: of Q4 [k / 32][2 groups][256 bytes of numbers], then [2][32 bytes of d, 32 of m] in the same block; of
// Q8 [k / 32][2][512], then [2][32 bytes of d].
constexpr int64_t kQ4Pair = 640, kQ8Pair = 1088;
inline int64_t group_bytes(int kind, int64_t k) {
  switch (kind) {
    case IDLM_CPU_Q4: return k / kBlock * 320;
    case IDLM_CPU_Q8: return k / kBlock * 544;
    case IDLM_CPU_F32: return k * 64;
    default: return k * 32;
  }
}

// The rows of a linear layer, clean ones first, cut into tiles that meet a weight together. A row's place is where it is in
// that order. Quantised weights meet rows of bytes: two for a clean row (one, where the model says so), one for a MASK row,
// numbered in the same order.
struct Tile {
  int32_t first, count, clean;  // places
  int32_t wide;                 // those of them, the first ones, that have two rows of bytes
  int32_t first_byte, bytes;    // rows of bytes
};
struct RowPlan {
  int32_t count, clean;          // places, and how many of them are clean
  std::vector<int32_t> row;      // of a place
  std::vector<int32_t> tile_of;  // a place
  std::vector<Tile> tiles;
};

// The inputs of a linear layer, as fp32 and quantised in blocks of 32 along k: x = d * q. Clean rows have two rows of bytes,
// together 16 bits, so that they are what fp32 gives but for near-ties. MASK rows only propose: one, half the arithmetic.
// Whole blocks lie interleaved by the rows of a tile: block b of its row r at (first_byte * blocks + b * bytes + r).
struct Activations {
  float* x;         // [places][k]
  int8_t* q;        // [rows of bytes][k], interleaved
  float* d;         // [rows of bytes][k / 32], interleaved
  float* sum;       // the same: d * the sum of q, what the m of a Q4 block is multiplied with
  int32_t* offset;  // the same: what the sums of a Q8 block are too large by
  float* low;       // [places][parts * rank] scale * x A^T, on MASK rows
  int8_t* low_q;    // the same in blocks of 32, where the adapter has 8 bits
  float* low_d;     // [places][parts * rank / 32]
  int32_t* low_offset;
};

struct Job {
  const idlm_cpu_model* model;
  const idlm_cpu_cache* cache;
  const idlm_cpu_rows* rows;
  RowPlan all, wanted;        // the rows of the layers, and of those the ones whose logits are wanted
  Activations in;
  float* qkv;                 // [rows][(heads + 2 kv_heads) * head_dim]
  float* attended;            // [rows][heads * head_dim]
  float* activated;           // [rows][intermediate]
  float* const* scores;       // per thread [most_queries][most slots]
  int64_t score_stride;
};

// What a unit of a linear layer waits for before it adds the adapter: the open stage that computes x A^T.
struct Low {
  Pool* pool;
  int stage;
};

// Ranks of a unit of x A^T.
inline int low_ranks(const idlm_cpu_linear& w) { return w.lora_kind == IDLM_CPU_I8 ? 32 : 16; }

// The kernels of an instruction set. [first, last): places, heads, or groups of 16 outputs that a thread has claimed.
struct Isa {
  const char* name;
  bool (*runs_here)();
  int32_t most_rows;     // of a tile, rows of bytes
  int32_t most_queries;  // of one KV head that share a read of K and V
  // The rows' input of a linear layer: normed (norm not null) or as it is, and quantised.
  void (*prepare)(const Job&, const idlm_cpu_linear&, const float* source, const float* norm, int first, int last);
  void (*times_a)(const Job&, const idlm_cpu_linear&, int unit);  // of low_ranks ranks
  void (*qkv)(const Job&, Low, int layer, int first_head, int last_head);
  void (*attend)(const Job&, int layer, int thread, int request, int kv_head, int first_query, int last_query);
  void (*add_linear)(const Job&, Low, const idlm_cpu_linear&, float* y, int first_group, int last_group);
  void (*gate_up)(const Job&, Low, const idlm_cpu_linear&, int first_group, int last_group);
  void (*final_norm)(const Job&, int first, int last);
  void (*head)(const Job&, int first_group, int last_group);
  // The first of the largest of n numbers but for one (-1: none); -1 where that is not finite, or any of them is NaN.
  int64_t (*best)(const float* x, int64_t n, int64_t but);
  // The `most` best of n numbers, of ties the first ones, in order; NaN counts as -inf, which is never taken. How many.
  int (*best_few)(const float* x, int64_t n, int64_t but, int most, int64_t* ids, float* values);
  int64_t (*draw)(const idlm_cpu_drawing&);
  int64_t (*draw_among)(const idlm_cpu_drawing&, const int64_t* ids);
  // y_i = a_i . x for the rows first .. last - 1 of a matrix [..][n] of a dense kind.
  void (*times)(const void* a, int kind, const float* x, int64_t n, int64_t first, int64_t last, float* y);
  // y = x / rms(x), of a row of a dense kind.
  void (*unit)(const void* x, int kind, int64_t n, float* y);
};

const Isa& isa();
// Runs a function with the pool of this process, no other at the same time.
void with_pool(const std::function<void(Pool&)>& function);
// Null, or the sentence that says what the function threw; no exception may leave a C interface.
const char* guarded(int threads, const std::function<void()>& function);

}  // namespace idlm_cpu
