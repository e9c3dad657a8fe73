"""advance: commit what a step gave and leave the state that the next one starts from. One CTA per request.

A few hundred bytes per request: launch latency is all that it costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idlm_kernels.triton.common import follow_previous_launch, launch, next_power_of_2
from python_ref.contract import LENGTH, RUNNING, STOPPED

kRunning, kStopped, kLength = tl.constexpr(RUNNING), tl.constexpr(STOPPED), tl.constexpr(LENGTH)


@triton.jit
def outcome_of(
    token,  # [BLOCK_WIDTH], -1 where there is none
    committed,  # how many of them stand
    length,
    limit,
    gStop,  # [num_stops]
    num_stops,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """How many tokens a running request commits, and how it ends with them."""
    i = tl.arange(0, BLOCK_WIDTH)
    is_stop = tl.zeros([BLOCK_WIDTH], tl.int32)
    for s in range(num_stops):
        is_stop |= (token == tl.load(gStop + s)).to(tl.int32)
    is_stop = (is_stop != 0) & (token >= 0) & (i < committed)
    until_stop = tl.min(tl.where(is_stop, i + 1, WIDTH + 1), axis=0)
    emitted = tl.minimum(tl.minimum(committed, until_stop), tl.maximum(limit - length, 0))
    is_full = length + emitted >= limit
    return emitted, tl.where(until_stop <= emitted, kStopped, tl.where(is_full, kLength, kRunning))


@triton.jit(
    do_not_specialize=[
        "num_stops",
        "stride_tokens",
        "stride_next",
        "stride_text",
        "stride_drafts",
        "stride_stops",
    ],
    do_not_specialize_on_alignment=[
        "gNumAccepted",
        "gTokens",
        "gNextDrafts",
        "gNextNumDrafts",
        "gText",
        "gLengths",
        "gDrafts",
        "gNumDrafts",
        "gLimits",
        "gStops",
        "gFinishReason",
        "gOut",
    ],
)
def _advance_kernel(
    gNumAccepted,  # [B]
    gTokens,  # [B, WIDTH]
    gNextDrafts,  # [B, WIDTH - 1]
    gNextNumDrafts,  # [B]
    gText,  # [B, max_len]
    gLengths,  # [B]
    gDrafts,  # [B, WIDTH - 1]
    gNumDrafts,  # [B]
    gLimits,  # [B]
    gStops,  # [B, num_stops]
    gFinishReason,  # [B]
    gOut,  # [B]
    num_stops,
    stride_tokens,
    stride_next,
    stride_text,
    stride_drafts,
    stride_stops,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    follow_previous_launch()
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_WIDTH)
    token = tl.load(gTokens + b * stride_tokens + i, mask=i < WIDTH, other=-1)
    finish_reason = tl.load(gFinishReason + b)
    if (finish_reason != kRunning) | (tl.load(gTokens + b * stride_tokens) < 0):
        tl.store(gOut + b, 0)
        return
    committed = tl.load(gNumAccepted + b) + 1
    length, limit = tl.load(gLengths + b), tl.load(gLimits + b)
    gStop = gStops + b * stride_stops
    emitted, finish_reason = outcome_of(token, committed, length, limit, gStop, num_stops, WIDTH, BLOCK_WIDTH)

    tl.store(gText + b * stride_text + length + i, token, mask=i < emitted)
    tl.store(gLengths + b, length + emitted)
    tl.store(gFinishReason + b, finish_reason)
    draft = tl.load(gNextDrafts + b * stride_next + i, mask=i < WIDTH - 1, other=-1)
    tl.store(gDrafts + b * stride_drafts + i, draft, mask=i < WIDTH - 1)
    num_next = tl.load(gNextNumDrafts + b)
    tl.store(gNumDrafts + b, tl.where(finish_reason == kRunning, num_next, 0))
    tl.store(gOut + b, emitted)


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
    """See `idlm_kernels.advance`."""
    batch, width = tokens.shape
    emitted = torch.empty_like(num_accepted) if out is None else out
    if batch == 0:
        return emitted
    launch(
        _advance_kernel,
        (batch,),
        tokens,
        num_accepted,
        tokens,
        next_drafts,
        next_num_drafts,
        text,
        lengths,
        drafts,
        num_drafts,
        length_limits,
        stop_ids,
        finish_reason,
        emitted,
        stop_ids.shape[1],
        tokens.stride(0),
        next_drafts.stride(0),
        text.stride(0),
        drafts.stride(0),
        stop_ids.stride(0),
        WIDTH=width,
        BLOCK_WIDTH=next_power_of_2(width),
        num_warps=1,
    )
    return emitted
