"""The CPU backend: torch's own kernels, arranged so that a row's bits depend on nothing but the row.

Functions have the names and signatures of the references in `python_ref`; what is missing here, the reference computes.
So does it for fp64, which serves to judge the other dtypes. No function supports autograd.
"""

from idlm_kernels.cpu.attention import strided_attention
from idlm_kernels.cpu.gemm import gated_lora_linear, linear, linear_silu_and_mul, prepare_weight, strategy_of
from idlm_kernels.cpu.layers import qk_norm_rope_append, rms_norm, silu_and_mul
from idlm_kernels.cpu.logprobs import top_logprobs
from idlm_kernels.cpu.penalties import apply_penalties
from idlm_kernels.cpu.rerank import rerank_drafts
from idlm_kernels.cpu.sampling import sample_rows, verify_accept
from idlm_kernels.cpu.state import advance, commit_step, plan_rows

__all__ = [
    "advance",
    "apply_penalties",
    "commit_step",
    "gated_lora_linear",
    "linear",
    "linear_silu_and_mul",
    "plan_rows",
    "prepare_weight",
    "qk_norm_rope_append",
    "rerank_drafts",
    "rms_norm",
    "sample_rows",
    "silu_and_mul",
    "strategy_of",
    "strided_attention",
    "top_logprobs",
    "verify_accept",
]
