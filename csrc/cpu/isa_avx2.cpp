#define IDLM_ISA avx2
#include "attention.h"
#include "draw.h"
#include "search.h"

namespace idlm_cpu {
namespace {
bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
}  // namespace
extern const Isa isa_avx2 = {"avx2", runs_here, avx2::kMostRows, avx2::kMostQueries,
                     avx2::prepare, avx2::times_a, avx2::qkv, avx2::attend<>, avx2::add_linear, avx2::gate_up, avx2::final_norm, avx2::head,
                     avx2::best, avx2::best_few, avx2::draw, avx2::draw_among, avx2::times, avx2::unit};
}  // namespace idlm_cpu
