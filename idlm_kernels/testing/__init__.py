"""The test kit: what "right" means for a kernel, and problems to find out. For your own kernels too: docs/proof.md.

- `calls`: a `Problem` is shapes, a `Call` arguments; `check` compares a function with the reference, `check_rows` the
  bits of rows alone and among others.
- `problems`: one for each op.
- `numerics`: the judgement itself: bits, errors against fp64, distances in ulps.
- `decided`: sampled ids one by one: which of them the contract decides whatever the rounding, and mixes to try them on.
- `timing`: the time of a call, on a CPU or a GPU.
"""

from idlm_kernels.testing.calls import Call, Draw, Problem, Ran, check, check_rows
from idlm_kernels.testing.numerics import (
    Wrong,
    bits,
    check_bits,
    check_close,
    check_distributions,
    check_norm,
    same_bits,
    verdict,
)
from idlm_kernels.testing.problems import (
    PROBLEMS,
    Advance,
    ApplyPenalties,
    CommitStep,
    Embed,
    GatedLoraLinear,
    Linear,
    LinearSiluAndMul,
    PlanRows,
    QkNormRopeAppend,
    RerankDrafts,
    RmsNorm,
    SampleRows,
    SiluAndMul,
    StridedAttention,
    TopLogprobs,
    VerifyAccept,
)
from idlm_kernels.testing.timing import microseconds

__all__ = [
    "PROBLEMS",
    "Advance",
    "ApplyPenalties",
    "Call",
    "CommitStep",
    "Draw",
    "Embed",
    "GatedLoraLinear",
    "Linear",
    "LinearSiluAndMul",
    "PlanRows",
    "Problem",
    "QkNormRopeAppend",
    "Ran",
    "RerankDrafts",
    "RmsNorm",
    "SampleRows",
    "SiluAndMul",
    "StridedAttention",
    "TopLogprobs",
    "VerifyAccept",
    "Wrong",
    "bits",
    "check",
    "check_bits",
    "check_close",
    "check_distributions",
    "check_norm",
    "check_rows",
    "microseconds",
    "same_bits",
    "verdict",
]
