#define IDLM_ISA avx512
#include "attention.h"
#include "draw.h"
#include "search.h"

namespace idlm_cpu {
namespace {
bool runs_here() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"); }
}  // namespace
extern const Isa isa_avx512 = {"avx512", runs_here, avx512::kMostRows, avx512::kMostQueries,
                     avx512::prepare, avx512::times_a, avx512::qkv, avx512::attend<>, avx512::add_linear, avx512::gate_up, avx512::final_norm, avx512::head,
                     avx512::best, avx512::best_few, avx512::draw, avx512::draw_among, avx512::times, avx512::unit};
}  // namespace idlm_cpu
