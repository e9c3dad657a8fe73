// What every launcher returns: a code and a sentence. Launchers never throw, never allocate and never synchronise.
#pragma once

namespace idlm {

enum class Code : int {
  kOk = 0,
  kInvalidArgument = 1,  // the parameters contradict the contract; nothing was launched
  kUnsupported = 2,      // legal, but not something that this build computes
  kCuda = 3,             // the CUDA runtime refused the launch
};

struct Status {
  Code code = Code::kOk;
  char message[248] = {};

  bool ok() const { return code == Code::kOk; }
};

}  // namespace idlm
