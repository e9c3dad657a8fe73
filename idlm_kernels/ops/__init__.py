"""The public ops: contract and checks here, arithmetic in the backends. One file per family."""

# Before torch: torch imports it half-way through, and a Ctrl-C there would leave it in pieces and go unheard.
import numpy  # noqa: F401

from idlm_kernels.ops._dispatch import (
    Backend,
    backends,
    current_backend,
    implementation,
    register_backend,
    set_backend,
    use_backend,
)
from idlm_kernels.ops.attention import strided_attention
from idlm_kernels.ops.gemm import gated_lora_linear, linear, linear_silu_and_mul, prepare_weight
from idlm_kernels.ops.layers import embed, qk_norm_rope_append, rms_norm, silu_and_mul
from idlm_kernels.ops.logprobs import top_logprobs
from idlm_kernels.ops.penalties import apply_penalties
from idlm_kernels.ops.rerank import rerank_drafts
from idlm_kernels.ops.sampling import sample_rows, verify_accept
from idlm_kernels.ops.state import advance
from idlm_kernels.ops.step import commit_step, plan_rows

OPS = (
    "strided_attention",
    "apply_penalties",
    "verify_accept",
    "sample_rows",
    "top_logprobs",
    "rerank_drafts",
    "advance",
    "plan_rows",
    "commit_step",
    "prepare_weight",
    "linear",
    "gated_lora_linear",
    "linear_silu_and_mul",
    "rms_norm",
    "qk_norm_rope_append",
    "silu_and_mul",
    "embed",
)

__all__ = [
    "OPS",
    "Backend",
    "advance",
    "apply_penalties",
    "backends",
    "commit_step",
    "current_backend",
    "embed",
    "gated_lora_linear",
    "implementation",
    "linear",
    "linear_silu_and_mul",
    "plan_rows",
    "prepare_weight",
    "qk_norm_rope_append",
    "register_backend",
    "rerank_drafts",
    "rms_norm",
    "sample_rows",
    "set_backend",
    "silu_and_mul",
    "strided_attention",
    "top_logprobs",
    "use_backend",
    "verify_accept",
]
