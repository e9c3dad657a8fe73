"""The decision of a step from its sampled slices: which drafts stand, the token after them, and the next drafts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from idlm_kernels.triton.common import launch, next_power_of_2
from idlm_kernels.triton.perturb import SampledSlices
from idlm_kernels.triton.rows import draft_count, kBadDraft, kEmptyRow, kFinite, kInf, kNan, kNoId, lowest_id, or_


@triton.jit
def best_of_slices(gScore, gId, gFlags, row, has_row, mask_id, SLICES: tl.constexpr, BLOCK_SLICES: tl.constexpr):
    """Token and status bits of rows [n], from their slices."""
    s = tl.arange(0, BLOCK_SLICES)[None, :]
    place = row.to(tl.int64)[:, None] * SLICES + s
    inside = has_row[:, None] & (s < SLICES)
    score = tl.load(gScore + place, mask=inside, other=float("-inf"))
    id_ = tl.load(gId + place, mask=inside, other=kNoId)
    flags = tl.reduce(tl.load(gFlags + place, mask=inside, other=0), 1, or_)
    token = tl.min(tl.where(score == tl.max(score, axis=1)[:, None], id_, kNoId), axis=1)
    is_empty = (flags & kFinite) == 0
    token = tl.where(is_empty, lowest_id(mask_id), token)
    status = (flags & (kNan | kInf)) | tl.where(is_empty, kEmptyRow, 0)
    return token, tl.where(has_row, status, 0)


@triton.jit
def proposal(a, n, m_rows, K: tl.constexpr, BRANCHED: tl.constexpr):
    """The first MASK row of branch a, counted from the request's first row, and how many drafts it proposes: K or none.
    A chain has branch n only."""
    first_mask = 1 + n
    if BRANCHED:
        first_mask += a * K
    is_proposed = (m_rows > 0) & (first_mask + K <= m_rows) & (K > 0)
    if not BRANCHED:
        is_proposed = is_proposed & (a == n)
    return first_mask, tl.where(is_proposed, K, 0)


@triton.jit
def commit(
    gScore,  # [T, SLICES]
    gId,
    gFlags,
    gNumDrafts,  # [B]
    gTokens,  # [B, K + 1]
    gNextDrafts,  # [B, K]
    gNextNumDrafts,  # [B]
    gStatus,  # [B]
    request,
    start,
    m_rows,
    n,
    a,
    draft,  # [BLOCK_K]
    y,  # [BLOCK_K], token after draft i
    is_bad,  # [BLOCK_K]
    status,  # [BLOCK_K]
    mask_id,
    stride_tokens,
    stride_next,
    K: tl.constexpr,
    BRANCHED: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_STATUS: tl.constexpr,
):
    """Write what follows from a accepted drafts: tokens, new drafts and status."""
    i = tl.arange(0, BLOCK_K)
    token = tl.where(i < a, draft, y.to(tl.int64))
    token = tl.where((i <= a) & (i < m_rows), token, -1)
    tl.store(gTokens + request.to(tl.int64) * stride_tokens + i, token, mask=i <= K)

    first_mask, num_proposed = proposal(a, n, m_rows, K, BRANCHED)
    new_row = start + first_mask + i
    new, new_status = best_of_slices(gScore, gId, gFlags, new_row, i < num_proposed, mask_id, SLICES, BLOCK_SLICES)
    new = tl.where(i < num_proposed, new, -1).to(tl.int64)
    tl.store(gNextDrafts + request.to(tl.int64) * stride_next + i, new, mask=i < K)
    tl.store(gNextNumDrafts + request, num_proposed)
    if HAS_STATUS:
        bits = tl.reduce(status | new_status | tl.where(is_bad, kBadDraft, 0), 0, or_)
        if m_rows > 0:
            if tl.load(gNumDrafts + request) != n:
                bits = bits | kBadDraft
            tl.store(gStatus + request, tl.load(gStatus + request) | bits)


@triton.jit
def drafts_of(gDrafts, request, n, is_clean, vocab_size, stride_drafts, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The drafts of a request [BLOCK_K], which of them are there, and which of these are no ids."""
    i = tl.arange(0, BLOCK_K)
    draft = tl.load(gDrafts + request.to(tl.int64) * stride_drafts + i, mask=i < K, other=-1)
    is_draft = (i < n) & is_clean
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
        "gStatus",
    ],
)
def _decide_kernel(
    gScore,  # [T, SLICES]
    gId,
    gFlags,
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gDrafts,  # [B, K]
    gNumAccepted,  # [B]
    gTokens,  # [B, K + 1]
    gNextDrafts,  # [B, K]
    gNextNumDrafts,  # [B]
    gStatus,  # [B]
    vocab_size,
    mask_id,
    stride_drafts,
    stride_tokens,
    stride_next,
    K: tl.constexpr,
    BRANCHED: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_STATUS: tl.constexpr,
):
    request = tl.program_id(0)
    start = tl.load(gQueryStart + request)
    m_rows = tl.load(gQueryStart + request + 1) - start
    n = draft_count(gNumDrafts, request, m_rows, K)
    i = tl.arange(0, BLOCK_K)
    is_clean = (i <= n) & (i < m_rows)
    y, status = best_of_slices(gScore, gId, gFlags, start + i, is_clean, mask_id, SLICES, BLOCK_SLICES)
    draft, is_draft, is_bad = drafts_of(gDrafts, request, n, is_clean, vocab_size, stride_drafts, K, BLOCK_K)
    refused = is_draft & (is_bad | (draft != y.to(tl.int64)))
    a = tl.min(tl.where(refused, i, n), axis=0)
    tl.store(gNumAccepted + request, tl.where(m_rows > 0, a, 0))
    commit(
        gScore,
        gId,
        gFlags,
        gNumDrafts,
        gTokens,
        gNextDrafts,
        gNextNumDrafts,
        gStatus,
        request,
        start,
        m_rows,
        n,
        a,
        draft,
        y,
        is_bad,
        status,
        mask_id,
        stride_tokens,
        stride_next,
        K,
        BRANCHED,
        SLICES,
        BLOCK_SLICES,
        BLOCK_K,
        HAS_STATUS,
    )


def decide(
    sampled: SampledSlices,
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    mask_id: int,
    branched: bool,
    status: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decision of `match`: one launch."""
    num_k = drafts.shape[1]
    num_accepted, tokens, next_drafts, next_num_drafts = out
    launch(
        _decide_kernel,
        (drafts.shape[0],),
        logits,
        sampled.score,
        sampled.ids,
        sampled.flags,
        query_start_loc,
        num_drafts,
        drafts,
        num_accepted,
        tokens,
        next_drafts,
        next_num_drafts,
        status,
        logits.shape[1],
        mask_id,
        drafts.stride(0),
        tokens.stride(0),
        next_drafts.stride(0),
        K=num_k,
        BRANCHED=branched,
        SLICES=sampled.score.shape[1],
        BLOCK_SLICES=next_power_of_2(sampled.score.shape[1]),
        BLOCK_K=next_power_of_2(num_k + 1),
        HAS_STATUS=status is not None,
        num_warps=4,
    )
    return out
