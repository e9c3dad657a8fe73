"""Kernels and a decoding loop for Introspective Diffusion Language Models (I-DLM, arXiv 2604.11035).

The ops are functions of torch tensors; `LLM` answers prompts, and what it is made of is in `idlm_kernels.generate`.
Importing this package initialises no device and compiles nothing; torch is imported with the first name asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from idlm_kernels._version import __version__

if TYPE_CHECKING:
    from idlm_kernels.generate import LLM, DecodeOptions, GenerationResult, SamplingParams
    from idlm_kernels.ops import (
        advance,
        apply_penalties,
        backends,
        commit_step,
        current_backend,
        embed,
        gated_lora_linear,
        linear,
        linear_silu_and_mul,
        plan_rows,
        prepare_weight,
        qk_norm_rope_append,
        rerank_drafts,
        rms_norm,
        sample_rows,
        set_backend,
        silu_and_mul,
        strided_attention,
        top_logprobs,
        use_backend,
        verify_accept,
    )
    from python_ref import DraftDistributions, Penalties, StepState, rotary_table

__all__ = [
    "LLM",
    "DecodeOptions",
    "DraftDistributions",
    "GenerationResult",
    "Penalties",
    "SamplingParams",
    "StepState",
    "__version__",
    "advance",
    "apply_penalties",
    "backends",
    "commit_step",
    "current_backend",
    "embed",
    "gated_lora_linear",
    "linear",
    "linear_silu_and_mul",
    "plan_rows",
    "prepare_weight",
    "qk_norm_rope_append",
    "rerank_drafts",
    "rms_norm",
    "rotary_table",
    "sample_rows",
    "set_backend",
    "silu_and_mul",
    "strided_attention",
    "top_logprobs",
    "use_backend",
    "verify_accept",
]

_HOMES = {
    **dict.fromkeys(("DraftDistributions", "Penalties", "StepState", "rotary_table"), "python_ref"),
    **dict.fromkeys(("LLM", "DecodeOptions", "GenerationResult", "SamplingParams"), "idlm_kernels.generate"),
}


def __getattr__(name: str) -> Any:
    if name == "QState":
        from idlm_kernels._deprecated import warn_renamed

        warn_renamed("", "idlm_kernels.QState", "idlm_kernels.DraftDistributions")
        name = "DraftDistributions"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "idlm_kernels.ops")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
