#pragma once

#include <cstdint>

namespace idlm {

enum class DType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

}  // namespace idlm
