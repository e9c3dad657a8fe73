// The CPU side: one call computes a whole forward of a transformer, with a LoRA adapter on MASK rows. A C interface
// without torch, CUDA or Python in it; every struct is plain memory that the caller owns.
//
// Exactness: the bits of a row depend on that row, on what it sees, on the model and on the instruction set in use. They
// do not depend on other rows, on their number, on the batch, on pages, or on the number of threads.
#ifndef IDLM_CPU_H
#define IDLM_CPU_H

#include <stdint.h>

#define IDLM_CPU_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// How numbers are stored. Q4 and Q8 are GGUF's blocks of 32 along k: value = d * q + m (Q4_1; Q4_0 with m = -8 d), d * q (Q8_0).
enum { IDLM_CPU_Q4 = 0, IDLM_CPU_Q8 = 1, IDLM_CPU_F16 = 2, IDLM_CPU_BF16 = 3, IDLM_CPU_F32 = 4, IDLM_CPU_I8 = 5 };
// What a source of `idlm_cpu_pack` may be besides: GGUF's own block layouts.
enum { IDLM_CPU_GGUF_Q4_0 = 10, IDLM_CPU_GGUF_Q4_1 = 11, IDLM_CPU_GGUF_Q8_0 = 12 };

// y = x W^T + bias, and on MASK rows + scale * (x A_p^T) B^T, where p is the part of A that a group of 16 outputs takes.
typedef struct {
  const void* weight;  // [ceil(n / 16)] groups of 16 outputs, from idlm_cpu_pack
  const float* bias;   // [n] or null
  const void* lora_a;  // [parts][rank / 16][k][16], or null: no adapter; of I8 [parts][rank / 32][k / 32][2][8][16][4]
  const void* lora_b;  // [n / 16][rank][16]; of I8 [n / 16][rank / 4][16][4]
  const float* lora_a_scale;  // [parts * rank], what numbers of I8 are multiplied with; null else
  const float* lora_b_scale;  // [n]
  const uint8_t* part;  // [n / 16]
  int32_t kind;         // of weight
  int32_t lora_kind;    // F16, BF16, F32 or I8
  int32_t n, k;
  int32_t rank, parts;  // rank: padded to a multiple of 16, of I8 to one of 32
  float scale;
} idlm_cpu_linear;

typedef struct {
  const float* attention_norm;  // [hidden]
  const float* mlp_norm;        // [hidden]
  const float* q_norm;          // [head_dim] or null
  const float* k_norm;
  idlm_cpu_linear qkv;          // n = (heads + 2 kv_heads) * head_dim
  idlm_cpu_linear o;
  idlm_cpu_linear gate_up;      // groups of 16 outputs in turns: gate, up
  idlm_cpu_linear down;
} idlm_cpu_layer;

typedef struct {
  const idlm_cpu_layer* layers;
  const float* norm;     // [hidden]
  const float* rotary;   // [positions][head_dim]: the cosines of head_dim / 2 angles, then the sines
  idlm_cpu_linear head;  // n = vocabulary
  int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim;
  float eps;
  int32_t has_adapter;
  int32_t int8_activations;  // 1: of clean rows too, where weights are quantised; 0: those have 16 bits
} idlm_cpu_model;

// Keys lie transposed in tiles of 16 slots, so that 16 scores are 16 lanes.
typedef struct {
  float* k;  // [layers][pages][kv_heads][ceil(page_size / 16)][head_dim][16]
  float* v;  // [layers][pages][kv_heads][page_size][head_dim]
  int64_t num_pages;
  int32_t page_size;
} idlm_cpu_cache;

// The rows of a forward, packed by request; rows past query_start_loc[batch] are not computed.
typedef struct {
  const int64_t* positions;        // [rows]
  const int64_t* slots;            // [rows] page * page_size + offset, -1: K and V are not kept
  const uint8_t* is_mask;          // [rows]
  const int32_t* page_table;       // [batch][page_table_stride]
  const int32_t* seq_lens;         // [batch], these rows included
  const int32_t* query_start_loc;  // [batch + 1]
  const int64_t* tree_mask;        // [rows] or null: plain causal rows
  const int64_t* logits_rows;      // [num_logits] or null: all rows
  float* x;                        // [rows][hidden] in: embeddings; overwritten
  float* hidden;                   // [num_logits][hidden] out: what the LM head reads
  float* logits;                   // [num_logits][vocabulary] out
  int64_t page_table_stride;
  int64_t max_position;            // rows of the rotary table
  int32_t rows, batch, num_logits;
} idlm_cpu_rows;

// Bytes of a packed weight.
IDLM_CPU_API int64_t idlm_cpu_packed_bytes(int32_t kind, int64_t n, int64_t k);
// Packs rows of `source` (row_bytes apart; order[i] is the source row of output i, null: i) as the groups first,
// first + step, .. of a packed weight. Returns 0, or 1 where a block's scale is not finite.
IDLM_CPU_API int32_t idlm_cpu_pack(int32_t source_kind, const void* source, int64_t row_bytes, const int32_t* order, int64_t n, int64_t k,
                      void* packed, int64_t first_group, int64_t step);
// Rows of a packed weight in fp32, out [count][k]; an id outside 0 .. n - 1 gives zeros.
IDLM_CPU_API void idlm_cpu_unpack_rows(int32_t kind, const void* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count, float* out);

// Runs a forward on up to `threads` threads, the caller's included. Returns null, or a sentence: then nothing was computed.
IDLM_CPU_API const char* idlm_cpu_forward(const idlm_cpu_model* model, const idlm_cpu_cache* cache, const idlm_cpu_rows* rows, int32_t threads);

// What a step does besides the forward; contracts in docs, references in python_ref.

// The requests of a batch.
typedef struct {
  int64_t* text;    // [batch][text_stride]; pending is the last of `lengths` tokens
  int64_t* drafts;  // [batch][drafts_stride]
  int32_t *lengths, *num_drafts, *draft_source, *finish_reason;  // [batch], as the next two and the seed
  const int32_t *max_drafts, *length_limits, *error_flags;
  const int64_t* stop_ids;    // [batch][stops_stride]
  const int32_t* page_table;  // [batch][page_table_stride]
  const int64_t* seed;
  int64_t text_stride, drafts_stride, stops_stride, page_table_stride;
  int32_t batch, max_len, num_spec_tokens, num_stops, max_pages;  // columns of text, drafts, stop_ids and page_table
} idlm_cpu_state;

typedef struct {
  int64_t mask_id;      // the id that MASK rows are given
  int64_t noise_below;  // if not 0: ids drawn from 1 .. noise_below - 1 instead (python_ref/noise.py, noise_ids)
  int32_t page_size, quadratic, rows;  // rows: batch times the most rows of a request
  int64_t* ids;  // out [rows], as the next four
  uint8_t* is_mask;
  int64_t *positions, *slots, *tree_mask;
  int32_t* seq_lens;         // out [batch]
  int32_t* query_start_loc;  // out [batch + 1]
} idlm_cpu_plan;
// The rows of the next step of every running request, packed; padding rows have slot -1, and zeros.
IDLM_CPU_API void idlm_cpu_plan_rows(const idlm_cpu_state* state, const idlm_cpu_plan* plan);

typedef struct {
  const float* logits;             // [rows][logits_stride]
  const int32_t* query_start_loc;  // [batch + 1]
  const int32_t* num_drafts;
  const int64_t* drafts;     // [batch][drafts_stride]
  const float* temperature;  // [batch]; below greedy_below a request is greedy
  int64_t logits_stride, drafts_stride, vocabulary, id_limit, mask_id;
  int32_t rows, batch, num_spec_tokens, quadratic;
  int32_t* num_accepted;     // out [batch]
  int64_t* tokens;           // out [batch][num_spec_tokens + 1]
  int64_t* next_drafts;      // out [batch][num_spec_tokens]
  int32_t* next_num_drafts;  // out [batch]
  float greedy_below;
} idlm_cpu_decision;
// `match` where every request is greedy. Returns 1, with nothing decided, where one is not, or where a row or a draft is out
// of the ordinary (NaN, infinity, an id beyond the vocabulary, rows that are not there): the general way then finds the
// right result and the error flags.
IDLM_CPU_API int32_t idlm_cpu_verify_greedy(const idlm_cpu_decision* decision);

typedef struct {
  const float* logits;     // [n]: of the ids 0 .. n - 1, which alone may be sampled
  int64_t n, mask_id;      // mask_id is never sampled; -1: there is none
  int64_t seed, position;  // of the request; of the token that is predicted
  float temperature, top_p, min_p;
  int32_t top_k, stream;
} idlm_cpu_drawing;
// The token that a row gives a request with temperature, truncation and noise (docs/step.md, section 4). -1 where a number
// is NaN, the largest is not finite, or the request is greedy: the general way then finds the token and the error flags.
IDLM_CPU_API int64_t idlm_cpu_draw(const idlm_cpu_drawing* drawing);

typedef struct {
  const int32_t* num_accepted;     // [batch]
  const int64_t* tokens;           // [batch][width]
  const int64_t* next_drafts;      // [batch][num_spec_tokens]
  const int32_t* next_num_drafts;  // [batch]
  const int64_t* stop_ids;         // [batch][num_stops]
  const int32_t* length_limits;    // [batch]
  int64_t tokens_stride, next_drafts_stride, stops_stride, text_stride, drafts_stride;
  int32_t batch, width, num_spec_tokens, num_stops;
  int64_t *text, *drafts;          // moved forward in place
  int32_t *lengths, *num_drafts, *finish_reason;
  int32_t* emitted;                // out [batch]
} idlm_cpu_move;
IDLM_CPU_API void idlm_cpu_advance(const idlm_cpu_move* move);

typedef struct {
  const int32_t* num_accepted;     // [batch], as the next three of verification
  const int64_t* tokens;           // [batch][tokens_stride], num_spec_tokens + 1 of them
  const int64_t* next_drafts;      // [batch][next_drafts_stride]
  const int32_t* next_num_drafts;  // [batch]
  int64_t* outcome;                // out [batch][outcome_stride]: 6 figures, then num_spec_tokens + 1 tokens
  int64_t tokens_stride, next_drafts_stride, outcome_stride;
  float acceptance;                // below 0: drafts stand as they were verified; else with this probability
  int32_t quadratic, suffix;
} idlm_cpu_commit;
// Moves the state forward by the outcome of one step, and gives all that the host reads of it but the logprobs.
IDLM_CPU_API void idlm_cpu_commit_step(const idlm_cpu_state* state, const idlm_cpu_commit* commit);

typedef struct {
  const float *logits, *hidden;  // [rows][logits_stride], [rows][width]
  const int32_t* first_mask;     // [batch]
  const int64_t* previous;       // [batch]
  const int64_t* drafts;         // [batch][num_spec_tokens]
  const int32_t* num_drafts;     // [batch]
  const void *embedding, *head;  // [vocabulary][width] of F16, BF16 or F32; or of any kind, from idlm_cpu_pack
  const float *from_hidden, *from_previous, *from_state, *to_query;  // [state][width] twice, [state][state], [width][state]
  int64_t logits_stride, vocabulary, id_limit, mask_id;
  int32_t batch, num_spec_tokens, rows, width, state, embedding_kind, head_kind, is_packed;
  int64_t* out;  // [batch][num_spec_tokens]
  const float *temperature, *top_p, *min_p;  // [batch], as the next three; below greedy_below a request is greedy
  const int32_t *top_k, *positions;          // positions: of the token that the first draft follows
  const int64_t* seed;
  float greedy_below;
} idlm_cpu_reranking;
// rerank_drafts of the rule `match`. Returns null or a sentence.
IDLM_CPU_API const char* idlm_cpu_rerank(const idlm_cpu_reranking* reranking, int32_t threads);

// The instruction sets that this build has and this CPU runs, best first, by name; null past the last one.
IDLM_CPU_API const char* idlm_cpu_isa(int32_t index);
// Chooses one by name for the process; returns 0, or 1 where there is none such.
IDLM_CPU_API int32_t idlm_cpu_use_isa(const char* name);
IDLM_CPU_API const char* idlm_cpu_source_hash(void);  // of the sources that it was built from
IDLM_CPU_API int32_t idlm_cpu_abi(void);  // sizes of the structs above, mixed: a caller with other ones must not go on

#ifdef __cplusplus
}
#endif
#endif
