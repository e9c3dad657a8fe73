#define IDLM_ISA plain
#include "attention.h"
#include "draw.h"
#include "search.h"

namespace idlm_cpu {
namespace {
bool runs_here() { return true; }
}  // namespace
extern const Isa isa_plain = {"plain", runs_here, plain::kMostRows, plain::kMostQueries,
                     plain::prepare, plain::times_a, plain::qkv, plain::attend<>, plain::add_linear, plain::gate_up, plain::final_norm, plain::head,
                     plain::best, plain::best_few, plain::draw, plain::draw_among, plain::times, plain::unit};
}  // namespace idlm_cpu
