"""Backend `cuda`: the ops that the compiled module computes, with the names and signatures of the references.

Where the CUDA runtime is an emulator the same functions take CPU tensors (call them directly, as the tests do).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idlm_kernels.native import attention, gemm, load
from idlm_kernels.native.attention import strided_attention
from idlm_kernels.native.gemm import (
    gated_lora_linear,
    linear,
    linear_silu_and_mul,
    prepare_weight,
    silu_and_mul,
    stream_of,
)
from python_ref import STREAM_TARGET, DraftDistributions

__all__ = [
    "LIMITS",
    "advance",
    "gated_lora_linear",
    "linear",
    "linear_silu_and_mul",
    "prepare_weight",
    "sample_rows",
    "silu_and_mul",
    "strided_attention",
    "verify_accept",
]

LIMITS = {**gemm.LIMITS, **attention.LIMITS}
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MAX_DRAFTS = 31

# CTAs per row (1, 2, 4 or 8; 0: chosen by size), for tests and tuning. No result depends on it.
cluster_size = 0


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _options(op: str, device: torch.device) -> Any:
    """A LaunchOptions."""
    return load().LaunchOptions(stream=stream_of(op, device), cluster_size=cluster_size)


def _dtype(op: str, name: str, x: Tensor, allowed: tuple[torch.dtype, ...] = tuple(_DTYPES)) -> int:
    if x.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(allowed))
        given = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: backend 'cuda' takes {name} in {names}, got {given}; use backend 'torch'")
    return _DTYPES[x.dtype]


def _check_plan(op: str, num_spec_tokens: int) -> None:
    if num_spec_tokens > MAX_DRAFTS:
        raise ValueError(
            f"{op}: drafts have {num_spec_tokens} columns, backend 'cuda' takes at most {MAX_DRAFTS} (chain plans have "
            "N <= 32); use backend 'torch'"
        )


def _logits(op: str, logits: Tensor, id_limit: int, mask_id: int, bias: Tensor | None) -> Any:
    """A Logits."""
    rows, vocab_size = logits.shape
    found = load().Logits(
        data=logits.data_ptr(),
        row_stride=logits.stride(0),
        dtype=_dtype(op, "logits", logits),
        num_rows=rows,
        vocab_size=vocab_size,
        id_limit=id_limit,
        mask_id=mask_id,
    )
    if bias is not None:
        found.bias_dtype = _dtype(op, "logit_bias", bias)
        found.bias, found.bias_row_stride = bias.data_ptr(), bias.stride(0)
    return found


def _sampling(temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor) -> Any:
    """A SamplingParams."""
    return load().SamplingParams(
        temperature=temperature.data_ptr(),
        top_k=top_k.data_ptr(),
        top_p=top_p.data_ptr(),
        min_p=min_p.data_ptr(),
        seed=seed.data_ptr(),
    )


def sample_rows(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    stream: int = STREAM_TARGET,
    logit_bias: Tensor | None = None,
    error_flags: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `idlm_kernels.sample_rows`; logits and logit_bias bf16, fp16 or fp32."""
    op = "sample_rows"
    options = _options(op, logits.device)
    description = _logits(op, logits, id_limit, mask_id, logit_bias)
    ids = _empty((logits.shape[0],), torch.int64, logits.device) if out is None else out
    if not logits.shape[0]:
        return ids
    params = load().SampleRowsParams(
        logits=description,
        sampling=_sampling(temperature, top_k, top_p, min_p, seed),
        positions=positions.data_ptr(),
        positions_are_int64=positions.dtype == torch.int64,
        noise_stream=stream,
        ids=ids.data_ptr(),
        error_flags=_address(error_flags),
    )
    load().sample_rows(params, options)
    return ids


def verify_accept(
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    quadratic: bool,
    rule: str,
    draft_dists: DraftDistributions | None = None,
    logit_bias: Tensor | None = None,
    error_flags: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `idlm_kernels.verify_accept`; logits and logit_bias bf16, fp16 or fp32, K up to 31.

    `rejection` stores the distributions of the next drafts with forbidden ids and NaN at -inf, and a row without a
    finite logit as the point mass that it was sampled from; distributions of requests without next drafts are left as
    they are.
    """
    op, device = "verify_accept", logits.device
    options = _options(op, device)
    description = _logits(op, logits, id_limit, mask_id, logit_bias)
    batch, num_spec_tokens = drafts.shape
    _check_plan(op, num_spec_tokens)
    distributions = load().DraftDistributions()
    if rule == "rejection" and num_spec_tokens:
        assert draft_dists is not None
        # What was sampled from is stored without rounding, and biased logits are fp32.
        allowed = (torch.float32,) if logit_bias is not None else (logits.dtype, torch.float32)
        distributions = load().DraftDistributions(
            logits=draft_dists.logits.data_ptr(),
            stride_request=draft_dists.logits.stride(0),
            stride_draft=draft_dists.logits.stride(1),
            dtype=_dtype(op, "draft_dists.logits", draft_dists.logits, allowed),
            cut=draft_dists.cut.data_ptr(),
            cut_stride=draft_dists.cut.stride(0),
            log_norm=draft_dists.log_norm.data_ptr(),
            log_norm_stride=draft_dists.log_norm.stride(0),
        )
    if out is None:
        out = (
            _empty((batch,), torch.int32, device),
            _empty((batch, num_spec_tokens + 1), torch.int64, device),
            _empty((batch, num_spec_tokens), torch.int64, device),
            _empty((batch,), torch.int32, device),
        )
    if not batch:
        return out
    num_accepted, tokens, next_drafts, next_num_drafts = out
    workspace = _empty((batch, num_spec_tokens + 1), torch.int32, device)
    params = load().VerifyAcceptParams(
        logits=description,
        sampling=_sampling(temperature, top_k, top_p, min_p, seed),
        batch=batch,
        num_spec_tokens=num_spec_tokens,
        query_start_loc=query_start_loc.data_ptr(),
        num_drafts=num_drafts.data_ptr(),
        drafts=drafts.data_ptr(),
        drafts_stride=drafts.stride(0),
        positions=positions.data_ptr(),
        quadratic=quadratic,
        rejection=rule == "rejection",
        draft_dists=distributions,
        error_flags=_address(error_flags),
        num_accepted=num_accepted.data_ptr(),
        tokens=tokens.data_ptr(),
        tokens_stride=tokens.stride(0),
        next_drafts=next_drafts.data_ptr(),
        next_drafts_stride=next_drafts.stride(0),
        next_num_drafts=next_num_drafts.data_ptr(),
        workspace=workspace.data_ptr(),
    )
    load().verify_accept(params, options)
    return out


def advance(
    num_accepted: Tensor,
    tokens: Tensor,
    next_drafts: Tensor,
    next_num_drafts: Tensor,
    *,
    text: Tensor,
    lengths: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    length_limits: Tensor,
    stop_ids: Tensor,
    finish_reason: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """As `idlm_kernels.advance`; K up to 31."""
    op, device = "advance", tokens.device
    options = _options(op, device)
    batch, num_spec_tokens = drafts.shape
    _check_plan(op, num_spec_tokens)
    emitted = _empty((batch,), torch.int32, device) if out is None else out
    params = load().AdvanceParams(
        batch=batch,
        num_spec_tokens=num_spec_tokens,
        num_accepted=num_accepted.data_ptr(),
        tokens=tokens.data_ptr(),
        tokens_stride=tokens.stride(0),
        next_drafts=next_drafts.data_ptr(),
        next_drafts_stride=next_drafts.stride(0),
        next_num_drafts=next_num_drafts.data_ptr(),
        length_limits=length_limits.data_ptr(),
        stop_ids=stop_ids.data_ptr(),
        stop_ids_stride=stop_ids.stride(0),
        num_stop_ids=stop_ids.shape[1],
        text=text.data_ptr(),
        text_stride=text.stride(0),
        max_len=text.shape[1],
        lengths=lengths.data_ptr(),
        drafts=drafts.data_ptr(),
        drafts_stride=drafts.stride(0),
        num_drafts=num_drafts.data_ptr(),
        finish_reason=finish_reason.data_ptr(),
        num_emitted=emitted.data_ptr(),
    )
    load().advance(params, options)
    return emitted
