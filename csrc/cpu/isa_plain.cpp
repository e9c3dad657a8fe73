#define IDLM_ISA plain
#include "attention.h"

namespace idlm_cpu {
namespace {
bool runs_here() { return true; }
}  // namespace
extern const Isa isa_plain = {"plain", runs_here, plain::kMostRows, plain::kMostQueries, plain::prepare, plain::qkv, plain::attend<>, plain::add_linear, plain::gate_up, plain::final_norm, plain::head};
}  // namespace idlm_cpu
