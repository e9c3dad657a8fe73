"""Backend `triton`: one kernel family per file; the functions have the names and signatures of `python_ref`.

What is not here the references compute. Not yet run on hardware.
"""

from idlm_kernels.triton.attention import strided_attention
from idlm_kernels.triton.gemm import gated_lora_linear, linear, linear_silu_and_mul, prepare_weight
from idlm_kernels.triton.layers import embed, qk_norm_rope_append, rms_norm, silu_and_mul
from idlm_kernels.triton.loaded import settle_cache_keys, spills
from idlm_kernels.triton.logprobs import top_logprobs
from idlm_kernels.triton.penalties import apply_penalties
from idlm_kernels.triton.rerank import rerank_drafts
from idlm_kernels.triton.sampling import sample_rows, verify_accept
from idlm_kernels.triton.state import advance
from idlm_kernels.triton.step import commit_step, plan_rows

__all__ = [
    "advance",
    "apply_penalties",
    "commit_step",
    "embed",
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
    "spills",
    "strided_attention",
    "top_logprobs",
    "verify_accept",
]

settle_cache_keys()
