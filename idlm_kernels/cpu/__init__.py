"""The CPU backend: torch's own kernels, arranged so that a row's bits depend on nothing but the row.

Functions have the names and signatures of the references in `python_ref`; what is missing here, the reference computes.
"""

from idlm_kernels.cpu.attention import strided_attention
from idlm_kernels.cpu.gemm import gated_lora_linear, linear, prepare_weight, strategy_of

__all__ = [
    "gated_lora_linear",
    "linear",
    "prepare_weight",
    "strategy_of",
    "strided_attention",
]
