"""The decision of a step from its sampled slices: the accepted drafts, the token after them, and the next drafts."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from idlm_kernels.triton.common import follow_previous_launch, launch, next_power_of_2
from idlm_kernels.triton.perturb import SampledSlices
from idlm_kernels.triton.rows import kBadDraft, kEmptyRow, kFinite, kInf, kNan, kNoId, lowest_id, or_, span_of
from idlm_kernels.triton.structs import Logits, SamplingParameters


class DecisionShape(NamedTuple):
    """Of the kernels that decide."""

    K: int
    QUADRATIC: bool
    SLICES: int
    BLOCK_SLICES: int
    BLOCK_K: int
    HAS_FLAGS: bool


class Results(NamedTuple):
    """What a step writes for every request, but how many drafts it accepted."""

    tokens: Any  # int64 [B, K + 1]
    next_drafts: Any  # int64 [B, K]
    next_num_drafts: Any  # int32 [B]
    error_flags: Any  # int32 [B] or None
    stride_tokens: Any
    stride_next: Any


@triton.jit
def best_of_slices(slices, row, has_row, mask_id, SLICES: tl.constexpr, BLOCK_SLICES: tl.constexpr):
    """Token and error flags of rows [n], from their slices."""
    s = tl.arange(0, BLOCK_SLICES)[None, :]
    place = row.to(tl.int64)[:, None] * SLICES + s
    inside = has_row[:, None] & (s < SLICES)
    score = tl.load(slices.score + place, mask=inside, other=float("-inf"))
    id_ = tl.load(slices.ids + place, mask=inside, other=kNoId)
    flags = tl.reduce(tl.load(slices.flags + place, mask=inside, other=0), 1, or_)
    token = tl.min(tl.where(score == tl.max(score, axis=1)[:, None], id_, kNoId), axis=1)
    is_empty = (flags & kFinite) == 0
    token = tl.where(is_empty, lowest_id(mask_id), token)
    error_flags = (flags & (kNan | kInf)) | tl.where(is_empty, kEmptyRow, 0)
    return token, tl.where(has_row, error_flags, 0)


@triton.jit
def proposal(a, span, K: tl.constexpr, QUADRATIC: tl.constexpr):
    """The first MASK row of branch a, counted from the request's first row, and how many drafts it proposes: K or none.
    A chain has branch n only."""
    first_mask = 1 + span.n
    if QUADRATIC:
        first_mask += a * K
    is_proposed = (span.m_rows > 0) & (first_mask + K <= span.m_rows) & (K > 0)
    if not QUADRATIC:
        is_proposed = is_proposed & (a == span.n)
    return first_mask, tl.where(is_proposed, K, 0)


@triton.jit
def commit(
    slices,
    results,
    gNumDrafts,  # [B]
    span,
    a,
    draft,  # [BLOCK_K]
    y,  # [BLOCK_K], token after draft i
    is_bad,  # [BLOCK_K]
    error_flags,  # [BLOCK_K]
    mask_id,
    shape: tl.constexpr,
):
    """Write what follows from a accepted drafts: tokens, new drafts and error_flags."""
    request = span.request
    i = tl.arange(0, shape.BLOCK_K)
    token = tl.where(i < a, draft, y.to(tl.int64))
    token = tl.where((i <= a) & (i < span.m_rows), token, -1)
    tl.store(results.tokens + request.to(tl.int64) * results.stride_tokens + i, token, mask=i <= shape.K)

    first_mask, num_proposed = proposal(a, span, shape.K, shape.QUADRATIC)
    has_new = i < num_proposed
    new_row = span.start + first_mask + i
    new, new_flags = best_of_slices(slices, new_row, has_new, mask_id, shape.SLICES, shape.BLOCK_SLICES)
    new = tl.where(has_new, new, -1).to(tl.int64)
    tl.store(results.next_drafts + request.to(tl.int64) * results.stride_next + i, new, mask=i < shape.K)
    tl.store(results.next_num_drafts + request, num_proposed)
    if shape.HAS_FLAGS:
        bits = tl.reduce(error_flags | new_flags | tl.where(is_bad, kBadDraft, 0), 0, or_)
        if span.m_rows > 0:
            if tl.load(gNumDrafts + request) != span.n:
                bits = bits | kBadDraft
            tl.store(results.error_flags + request, tl.load(results.error_flags + request) | bits)


@triton.jit
def drafts_of(gDrafts, stride_drafts, span, is_clean, vocab_size, shape: tl.constexpr):
    """The drafts of a request [BLOCK_K], which of them are there, and which of these are no ids."""
    i = tl.arange(0, shape.BLOCK_K)
    draft = tl.load(gDrafts + span.request.to(tl.int64) * stride_drafts + i, mask=i < shape.K, other=-1)
    is_draft = (i < span.n) & is_clean
    return draft, is_draft, is_draft & ((draft < 0) | (draft >= vocab_size))


@triton.jit(
    do_not_specialize=["vocab_size", "mask_id", "stride_drafts", "stride_tokens", "stride_next"],
    do_not_specialize_on_alignment=[
        "gQueryStart",
        "gNumDrafts",
        "gDrafts",
        "gNumAccepted",
        "gTokens",
        "gNextDrafts",
        "gNextNumDrafts",
        "gErrorFlags",
    ],
)
def _decide_kernel(
    slices,  # Slices
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gDrafts,  # [B, K]
    gNumAccepted,  # [B]
    gTokens,  # [B, K + 1]
    gNextDrafts,  # [B, K]
    gNextNumDrafts,  # [B]
    gErrorFlags,  # [B]
    vocab_size,
    mask_id,
    stride_drafts,
    stride_tokens,
    stride_next,
    shape: tl.constexpr,
):
    follow_previous_launch()
    results = Results(
        tokens=gTokens,
        next_drafts=gNextDrafts,
        next_num_drafts=gNextNumDrafts,
        error_flags=gErrorFlags,
        stride_tokens=stride_tokens,
        stride_next=stride_next,
    )
    request = tl.program_id(0)
    span = span_of(gQueryStart, gNumDrafts, request, shape.K)
    i = tl.arange(0, shape.BLOCK_K)
    is_clean = (i <= span.n) & (i < span.m_rows)
    y, error_flags = best_of_slices(slices, span.start + i, is_clean, mask_id, shape.SLICES, shape.BLOCK_SLICES)
    draft, is_draft, is_bad = drafts_of(gDrafts, stride_drafts, span, is_clean, vocab_size, shape)
    rejected = is_draft & (is_bad | (draft != y.to(tl.int64)))
    a = tl.min(tl.where(rejected, i, span.n), axis=0)
    tl.store(gNumAccepted + request, tl.where(span.m_rows > 0, a, 0))
    commit(slices, results, gNumDrafts, span, a, draft, y, is_bad, error_flags, mask_id, shape)


class Step(NamedTuple):
    """verify_accept's view of a step, on the host."""

    logits: Logits
    query_start_loc: Tensor
    num_drafts: Tensor
    drafts: Tensor
    positions: Tensor
    parameters: SamplingParameters
    id_limit: int
    mask_id: int
    quadratic: bool
    error_flags: Tensor | None
    out: tuple[Tensor, Tensor, Tensor, Tensor]

    def shape(self, sampled: SampledSlices) -> DecisionShape:
        num_spec_tokens = self.drafts.shape[1]
        return DecisionShape(
            K=num_spec_tokens,
            QUADRATIC=self.quadratic,
            SLICES=sampled.count,
            BLOCK_SLICES=next_power_of_2(sampled.count),
            BLOCK_K=next_power_of_2(num_spec_tokens + 1),
            HAS_FLAGS=self.error_flags is not None,
        )


def decide(sampled: SampledSlices, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decision of `match`: one launch."""
    num_accepted, tokens, next_drafts, next_num_drafts = step.out
    launch(
        _decide_kernel,
        (step.drafts.shape[0],),
        step.drafts,
        sampled.slices,
        step.query_start_loc,
        step.num_drafts,
        step.drafts,
        num_accepted,
        tokens,
        next_drafts,
        next_num_drafts,
        step.error_flags,
        step.logits.vocab_size,
        step.mask_id,
        step.drafts.stride(0),
        tokens.stride(0),
        next_drafts.stride(0),
        shape=step.shape(sampled),
        num_warps=4,
    )
    return step.out
