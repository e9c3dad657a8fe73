"""References: every op of idlm_kernels in plain PyTorch, slow and obvious, in the notation of the I-DLM paper.

They define what the kernels must compute. Each function has the signature of its public twin in `idlm_kernels`
and imports nothing of it. Arithmetic is fp32, or fp64 when the floating-point inputs are fp64: passing fp64 tensors
is the way to get a high-precision result to judge a kernel by. No function reads a device value on the host.
"""

from python_ref.attention import strided_attention
from python_ref.contract import (
    FLAG_BAD_DRAFT,
    FLAG_EMPTY_ROW,
    FLAG_INF,
    FLAG_NAN,
    STREAM_ACCEPT,
    STREAM_DRAFT,
    STREAM_TARGET,
    DraftDistributions,
)
from python_ref.gemm import gated_lora_linear, linear, linear_silu_and_mul, prepare_weight
from python_ref.layers import embed, qk_norm_rope_append, rms_norm, rotary_table, silu_and_mul
from python_ref.logprobs import top_logprobs
from python_ref.noise import gumbel, philox4x32, uniform
from python_ref.penalties import Penalties, apply_penalties
from python_ref.rerank import rerank_drafts
from python_ref.sampling import sample_rows
from python_ref.state import advance
from python_ref.step import StepState, commit_step, plan_rows
from python_ref.verify import verify_accept

__all__ = [
    "FLAG_BAD_DRAFT",
    "FLAG_EMPTY_ROW",
    "FLAG_INF",
    "FLAG_NAN",
    "STREAM_ACCEPT",
    "STREAM_DRAFT",
    "STREAM_TARGET",
    "DraftDistributions",
    "Penalties",
    "StepState",
    "advance",
    "apply_penalties",
    "commit_step",
    "embed",
    "gated_lora_linear",
    "gumbel",
    "linear",
    "linear_silu_and_mul",
    "philox4x32",
    "plan_rows",
    "prepare_weight",
    "qk_norm_rope_append",
    "rerank_drafts",
    "rms_norm",
    "rotary_table",
    "sample_rows",
    "silu_and_mul",
    "strided_attention",
    "top_logprobs",
    "uniform",
    "verify_accept",
]
