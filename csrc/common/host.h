// What launchers share on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdarg>
#include <cstdio>

#include "idlm/status.h"

namespace idlm {

__attribute__((format(printf, 2, 3))) inline Status failure(Code code, const char* format, ...) {
  Status s;
  s.code = code;
  va_list args;
  va_start(args, format);
  vsnprintf(s.message, sizeof s.message, format, args);
  va_end(args);
  return s;
}

inline Status launch_status(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return failure(Code::kCuda, "%s: CUDA error %d: %s", op, static_cast<int>(error), cudaGetErrorString(error));
}

}  // namespace idlm
