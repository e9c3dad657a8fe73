"""plan_rows and commit_step: one launch each, one CTA per request.

plan_rows. A CTA writes R rows: its request's, behind those of the requests before it, which it counts itself, and as
many padding rows as its request leaves free. Bytes: 33 per row, and two words of every request.
commit_step. What _advance_kernel does, and what else the host or the next step wants of a step. With `suffix` the CTA
walks its text, 8 bytes a token (eight times, out of L1); with logits it walks the N clean rows of its request, which
verification left in L2. Without them it is a few hundred bytes per request: launch latency is all that it costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import python_ref
from idlm_kernels.triton.common import follow_previous_launch, launch, next_power_of_2
from idlm_kernels.triton.noise import log, uniform_of_positions
from idlm_kernels.triton.rows import kEmptyRow, kLargest, kNan
from idlm_kernels.triton.state import kRunning, outcome_of
from python_ref import StepState, contract
from python_ref.step import LONGEST_MATCH, OUTCOME, Planned

kFailed = tl.constexpr(contract.FAILED)
kNoDrafts, kMaskDrafts = tl.constexpr(contract.NO_DRAFTS), tl.constexpr(contract.MASK_DRAFTS)
kSuffixDrafts = tl.constexpr(contract.SUFFIX_DRAFTS)
kFillMatch, kOverrideMatch = tl.constexpr(contract.FILL_MATCH), tl.constexpr(contract.OVERRIDE_MATCH)
kLongestMatch = tl.constexpr(LONGEST_MATCH)
kFigures = tl.constexpr(len(OUTCOME))
kAcceptStream, kInputStream = tl.constexpr(contract.STREAM_ACCEPT), tl.constexpr(contract.STREAM_INPUT)
kRequests = tl.constexpr(128)  # that a CTA counts at a time
kTokens = tl.constexpr(1024)  # of the text, at a time
kIds = tl.constexpr(2048)  # of a row of logits, at a time


class PlanShape(NamedTuple):
    """What the compiler knows of a plan."""

    K: int
    R: int  # the most rows of a request
    QUADRATIC: bool
    NOISE: bool  # MASK rows have ids of their own
    BLOCK_R: int


class CommitShape(NamedTuple):
    """What the compiler knows of a commit."""

    K: int
    QUADRATIC: bool
    SUFFIX: bool
    PRETEND: bool
    LOGPROBS: bool
    BLOCK_N: int


class Text(NamedTuple):
    """The text of a request."""

    tokens: Any  # int64 [max_len]
    length: Any
    max_len: Any


@triton.jit
def _rows_of(gNumDrafts, gFinishReason, request, batch, shape: tl.constexpr):
    """Drafts and rows of requests [n]; none of a request that does not run."""
    n = tl.load(gNumDrafts + request, mask=request < batch, other=0)
    n = tl.minimum(tl.maximum(n, 0), shape.K)
    finish_reason = tl.load(gFinishReason + request, mask=request < batch, other=kFailed)
    branches = 1
    if shape.QUADRATIC:
        branches = n + 1
    return n, tl.where(finish_reason == kRunning, 1 + n + branches * shape.K, 0)


@triton.jit(
    do_not_specialize=[
        *("batch", "mask_id", "noise_below", "page_size", "max_pages"),
        *("stride_text", "stride_drafts", "stride_table"),
    ],
    do_not_specialize_on_alignment=[
        "gText",
        "gLengths",
        "gDrafts",
        "gNumDrafts",
        "gFinishReason",
        "gPageTable",
        "gSeed",
    ],
)
def _plan_kernel(
    gText,  # [B, max_len]
    gLengths,  # [B]
    gDrafts,  # [B, K]
    gNumDrafts,  # [B]
    gFinishReason,  # [B]
    gPageTable,  # [B, max_pages]
    gSeed,  # [B]
    gIds,  # [B * R], as the next four
    gIsMask,
    gPositions,
    gSlots,
    gTreeMask,
    gSeqLens,  # [B]
    gQueryStart,  # [B + 1]
    batch,
    mask_id,
    noise_below,
    page_size,
    max_pages,
    stride_text,
    stride_drafts,
    stride_table,
    shape: tl.constexpr,
):
    follow_previous_launch()
    b = tl.program_id(0)
    start, total = 0, 0
    for first in range(0, batch, kRequests):
        request = first + tl.arange(0, kRequests)
        _, rows = _rows_of(gNumDrafts, gFinishReason, request, batch, shape)
        start += tl.sum(tl.where(request < b, rows, 0), axis=0)
        total += tl.sum(rows, axis=0)
    n, m = _rows_of(gNumDrafts, gFinishReason, b, batch, shape)
    length = tl.load(gLengths + b)
    if b == 0:
        tl.store(gQueryStart, 0)
    tl.store(gQueryStart + b + 1, start + m)
    tl.store(gSeqLens + b, tl.where(m > 0, length - 1 + m, 0))

    b = b.to(tl.int64)
    r = tl.arange(0, shape.BLOCK_R)
    is_row = r < m
    is_clean = r <= n
    branch, j = n + tl.zeros_like(r), tl.maximum(r - 1 - n, 0)
    if shape.QUADRATIC and shape.K > 0:
        branch = j // shape.K
        j -= branch * shape.K
    token = tl.load(gText + b * stride_text + length - 1 + tl.zeros_like(r), mask=r == 0, other=0)
    if shape.K > 0:
        is_draft = is_row & is_clean & (r > 0)
        token = tl.where(r == 0, token, tl.load(gDrafts + b * stride_drafts + r - 1, mask=is_draft, other=0))
    position = length - 1 + tl.where(is_clean, r, 1 + branch + j)
    if shape.NOISE:
        seed, zero = tl.load(gSeed + b), tl.zeros_like(r)
        word, _, _, _ = tl.philox(seed, (length - 1 + r).to(tl.int32), position.to(tl.int32), zero + kInputStream, zero)
        mask_id = 1 + (word.to(tl.int64) * (noise_below - 1) >> 32)
    token = tl.where(is_clean, token, mask_id)

    two = tl.full([shape.BLOCK_R], 2, tl.int64)
    seen = (two << r) - 1
    if shape.QUADRATIC:
        own = ((two << j) - 1) << tl.minimum(1 + n + branch * shape.K, 63)
        seen = tl.where(is_clean, seen, ((two << branch) - 1) | own)

    index = length - 1 + r
    page = index // page_size
    has_page = is_row & (page < max_pages)
    slot = tl.load(gPageTable + b * stride_table + page, mask=has_page, other=0).to(tl.int64) * page_size
    slot += index % page_size

    # Row r of the request, or the next padding row: those before it left R - m of them each.
    place = tl.where(is_row, start + r, total + b * shape.R - start + r - m).to(tl.int64)
    inside = r < shape.R
    tl.store(gIds + place, tl.where(is_row, token, 0), mask=inside)
    tl.store(gIsMask + place, is_row & (r > n), mask=inside)
    tl.store(gPositions + place, tl.where(is_row, position, 0).to(tl.int64), mask=inside)
    tl.store(gSlots + place, tl.where(has_page, slot, -1), mask=inside)
    tl.store(gTreeMask + place, tl.where(is_row, seen, 0), mask=inside)


def plan_rows(
    state: StepState, mask_id: int, page_size: int, *, quadratic: bool, noise_below: int = 0, out: Planned | None = None
) -> Planned:
    """See `idlm_kernels.plan_rows`."""
    (batch, num_spec_tokens), device = state.drafts.shape, state.lengths.device
    most = (num_spec_tokens + 1) ** 2 if quadratic else 2 * num_spec_tokens + 1
    if batch == 0:
        return python_ref.plan_rows(state, mask_id, page_size, quadratic=quadratic, noise_below=noise_below, out=out)
    if out is None:
        rows = batch * most
        ids, positions, slots, tree_mask = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(4))
        is_mask, starts = torch.empty(rows, dtype=torch.bool, device=device), state.lengths.new_empty(batch + 1)
        out = ids, is_mask, positions, slots, tree_mask, torch.empty_like(state.lengths), starts
    launch(
        _plan_kernel,
        (batch,),
        state.lengths,
        state.text,
        state.lengths,
        state.drafts,
        state.num_drafts,
        state.finish_reason,
        state.page_table,
        state.seed,
        *out,
        batch,
        mask_id,
        noise_below,
        page_size,
        state.page_table.shape[1],
        state.text.stride(0),
        state.drafts.stride(0),
        state.page_table.stride(0),
        shape=PlanShape(
            K=num_spec_tokens, R=most, QUADRATIC=quadratic, NOISE=noise_below > 0, BLOCK_R=next_power_of_2(most)
        ),
        num_warps=1,
    )
    return out


@triton.jit
def _last_occurrence(text):
    """Where the last of the longest earlier occurrences of the end of a text ends, and how many tokens it has."""
    best = tl.full([], -1, tl.int64)
    for first in range(0, text.length - 1, kTokens):
        end = first + tl.arange(0, kTokens)
        goes_on = end < text.length - 1
        match = tl.zeros([kTokens], tl.int64)
        for back in tl.static_range(kLongestMatch):
            goes_on = goes_on & (end >= back)
            token = tl.load(text.tokens + end - back, mask=goes_on, other=0)
            last = tl.load(text.tokens + text.length - 1 - back, mask=text.length > back, other=0)
            goes_on = goes_on & (token == last)
            match += goes_on.to(tl.int64)
        found = tl.where(end < text.length - 1, (match << 32) + end, -1)
        best = tl.maximum(best, tl.max(found, axis=0))
    best = tl.maximum(best, 0)
    return (best & 0x7FFFFFFF).to(tl.int32), (best >> 32).to(tl.int32)


@triton.jit
def _log_sum_exp(gRow, vocab_size):
    """Of a row of logits, fp32, in an order that depends on nothing but the width."""
    largest = tl.full([kIds], -kLargest, tl.float32)
    total = tl.zeros([kIds], tl.float32)
    for first in range(0, vocab_size, kIds):
        id_ = first + tl.arange(0, kIds)
        x = tl.load(gRow + id_, mask=id_ < vocab_size, other=float("-inf")).to(tl.float32)
        new = tl.minimum(tl.maximum(largest, x), kLargest)
        total = total * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
    most = tl.max(largest, axis=0)
    sum_ = tl.sum(total * tl.exp(largest - most), axis=0)
    normal = (sum_ > 0) & (sum_ < float("inf"))
    return most + tl.where(normal, log(tl.where(normal, sum_, 1.0)), tl.where(sum_ == 0, float("-inf"), sum_))


@triton.jit(
    do_not_specialize=[
        *("num_stops", "max_len", "num_rows", "acceptance"),
        *("stride_tokens", "stride_next", "stride_text", "stride_drafts", "stride_stops", "stride_out"),
    ],
    do_not_specialize_on_alignment=[
        *("gNumAccepted", "gTokens", "gNextDrafts", "gNextNumDrafts", "gText", "gLengths", "gDrafts", "gNumDrafts"),
        *("gMaxDrafts", "gSource", "gLimits", "gStops", "gFinishReason", "gErrorFlags", "gSeed", "gQueryStart", "gOut"),
    ],
)
def _commit_kernel(
    gNumAccepted,  # [B]
    gTokens,  # [B, N]
    gNextDrafts,  # [B, K]
    gNextNumDrafts,  # [B]
    gText,  # [B, max_len]
    gLengths,  # [B]
    gDrafts,  # [B, K]
    gNumDrafts,  # [B]
    gMaxDrafts,  # [B]
    gSource,  # [B]
    gLimits,  # [B]
    gStops,  # [B, num_stops]
    gFinishReason,  # [B]
    gErrorFlags,  # [B]
    gSeed,  # [B]
    gLogits,  # [T, V] or None
    gQueryStart,  # [B + 1] or None
    gOut,  # [B, 6 + N or 6 + 2 N]
    num_stops,
    max_len,
    num_rows,
    vocab_size,
    acceptance,
    stride_tokens,
    stride_next,
    stride_text,
    stride_drafts,
    stride_stops,
    stride_logits,
    stride_out,
    shape: tl.constexpr,
):
    follow_previous_launch()
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, shape.BLOCK_N)
    is_token, is_draft = i <= shape.K, i < shape.K
    token = tl.load(gTokens + b * stride_tokens + i, mask=is_token, other=-1)
    new_draft = tl.load(gNextDrafts + b * stride_next + i, mask=is_draft, other=-1)
    a, num_next = tl.load(gNumAccepted + b), tl.load(gNextNumDrafts + b)
    n, source = tl.load(gNumDrafts + b), tl.load(gSource + b)
    most = tl.minimum(tl.load(gMaxDrafts + b), shape.K)
    length, limit = tl.load(gLengths + b), tl.load(gLimits + b)
    finish_reason, error_flags = tl.load(gFinishReason + b), tl.load(gErrorFlags + b)
    gDraft = gDrafts + b * stride_drafts + i

    if shape.PRETEND:
        draft = tl.load(gDraft, mask=is_draft, other=0)
        u = uniform_of_positions(tl.load(gSeed + b), length + i, kAcceptStream, shape.BLOCK_N)
        is_accepted = (u < acceptance) & (i < n) & is_draft
        is_present = tl.max(tl.where(i == 0, token, -1), axis=0) >= 0
        a = tl.where(is_present, tl.min(tl.where(is_accepted, shape.BLOCK_N, i), axis=0), 0)
        sampled = tl.max(token, axis=0)
        token = tl.where((i <= a) & is_present, tl.maximum(tl.where(i == a, sampled, draft), 0), -1)
        new_draft = tl.maximum(new_draft, 0)
        drafts_again = is_present
        if not shape.QUADRATIC:
            drafts_again = drafts_again & (a == n)
        num_next = tl.where(drafts_again, shape.K, 0)

    failed = (error_flags & (kNan | kEmptyRow)) != 0
    token = tl.where(failed, -1, token)
    is_moving = (finish_reason == kRunning) & (tl.max(tl.where(i == 0, token, -1), axis=0) >= 0)
    gStop = gStops + b * stride_stops
    emitted, new_reason = outcome_of(token, a + 1, length, limit, gStop, num_stops, shape.K + 1, shape.BLOCK_N)
    emitted = tl.where(is_moving, emitted, 0)
    tl.store(gText + b * stride_text + length + i, token, mask=i < emitted)
    tl.store(gDraft, new_draft, mask=is_draft & is_moving)
    new_n = tl.minimum(tl.where(is_moving, tl.where(new_reason == kRunning, num_next, 0), n), most)
    finish_reason = tl.where(
        is_moving, new_reason, tl.where(failed & (finish_reason == kRunning), kFailed, finish_reason)
    )
    length += emitted
    new_source = tl.where(emitted > 0, tl.where(new_n > 0, kMaskDrafts, kNoDrafts), source)

    if shape.SUFFIX and shape.K > 0:
        tl.debug_barrier()  # the text is the CTA's own, written by some of its threads
        if (finish_reason == kRunning) & (most > 0):
            text = Text(tokens=gText + b * stride_text, length=length, max_len=max_len)
            end, matched = _last_occurrence(text)
            if matched >= tl.where(new_n > 0, kOverrideMatch, kFillMatch):
                at = tl.minimum(end + 1 + i, text.max_len - 1)
                tl.store(gDraft, tl.load(text.tokens + at, mask=is_draft, other=0), mask=is_draft)
                new_n = tl.minimum(length - 1 - end, most)
                new_source = tl.full([], kSuffixDrafts, tl.int32)

    tl.store(gLengths + b, length)
    tl.store(gNumDrafts + b, new_n)
    tl.store(gSource + b, new_source)
    tl.store(gFinishReason + b, finish_reason)
    gOutcome = gOut + b * stride_out
    tl.store(gOutcome, n.to(tl.int64))
    tl.store(gOutcome + 1, a.to(tl.int64))
    tl.store(gOutcome + 2, emitted.to(tl.int64))
    tl.store(gOutcome + 3, finish_reason.to(tl.int64))
    tl.store(gOutcome + 4, error_flags.to(tl.int64))
    tl.store(gOutcome + 5, source.to(tl.int64))
    tl.store(gOutcome + kFigures + i, token, mask=is_token)

    if shape.LOGPROBS:
        start = tl.load(gQueryStart + b)
        for place in range(shape.K + 1):
            chosen = tl.max(tl.where(i == place, token, -1), axis=0)
            logprob = tl.full([], 0.0, tl.float32)
            if chosen >= 0:
                gRow = gLogits + tl.minimum(start + place, num_rows - 1).to(tl.int64) * stride_logits
                logprob = tl.load(gRow + chosen).to(tl.float32) - _log_sum_exp(gRow, vocab_size)
            bits = logprob.to(tl.float64).to(tl.int64, bitcast=True)
            tl.store(gOutcome + kFigures + shape.K + 1 + place, bits)


def commit_step(
    num_accepted: Tensor,
    tokens: Tensor,
    next_drafts: Tensor,
    next_num_drafts: Tensor,
    state: StepState,
    *,
    quadratic: bool = False,
    suffix: bool = False,
    acceptance: float | None = None,
    logits: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.commit_step`."""
    batch, width = tokens.shape
    if batch == 0 or (logits is not None and logits.dtype == torch.float64):
        return python_ref.commit_step(
            *(num_accepted, tokens, next_drafts, next_num_drafts, state),
            quadratic=quadratic,
            suffix=suffix,
            acceptance=acceptance,
            logits=logits,
            query_start_loc=query_start_loc,
            out=out,
        )
    if out is None:
        out = tokens.new_empty(batch, len(OUTCOME) + width * (1 if logits is None else 2))
    launch(
        _commit_kernel,
        (batch,),
        tokens,
        num_accepted,
        tokens,
        next_drafts,
        next_num_drafts,
        state.text,
        state.lengths,
        state.drafts,
        state.num_drafts,
        state.max_drafts,
        state.draft_source,
        state.length_limits,
        state.stop_ids,
        state.finish_reason,
        state.error_flags,
        state.seed,
        logits,
        query_start_loc,
        out,
        state.stop_ids.shape[1],
        state.text.shape[1],
        *((0, 0) if logits is None else logits.shape),
        0.0 if acceptance is None else acceptance,
        tokens.stride(0),
        next_drafts.stride(0),
        state.text.stride(0),
        state.drafts.stride(0),
        state.stop_ids.stride(0),
        0 if logits is None else logits.stride(0),
        out.stride(0),
        shape=CommitShape(
            K=width - 1,
            QUADRATIC=quadratic,
            SUFFIX=suffix,
            PRETEND=acceptance is not None,
            LOGPROBS=logits is not None,
            BLOCK_N=next_power_of_2(width),
        ),
        num_warps=4 if suffix or logits is not None else 1,
    )
    return out
