"""The decision of `rejection`: draft x of distribution q is accepted iff u q(x) < p(x); else a sample of max(0, p - q).

Two launches after the slices are sampled, both over slices of ids and requests:

1. _residual_kernel: every CTA decides for itself which drafts are accepted (a few hundred numbers: cheaper than a
   broadcast), then samples its slice of the residual of the first rejected one, where one is needed: not for greedy
   requests, whose distributions are points, nor for a draft that is no id. Where the residual is empty, p is sampled:
   that is what the row's slices hold already.
2. _conclude_kernel writes the results and replaces the distributions in draft_dists by those of the new drafts.

Bytes: p's row and q's row once more for a request that rejects a draft; K rows copied for one that proposes. A row
without a finite logit is a point on the lowest id; its normaliser is stored as -0.0, by which it is known.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from idlm_kernels.triton.common import follow_previous_launch, launch
from idlm_kernels.triton.decision import Results, Step, best_of_slices, commit, drafts_of, proposal
from idlm_kernels.triton.noise import log, noise, uniform_of_positions
from idlm_kernels.triton.perturb import SampledSlices, kBlockPerturb
from idlm_kernels.triton.rows import kGreedyBelow, kNoId, lowest_id, span_of, transformed
from idlm_kernels.triton.structs import DraftLogits, Logits, LogitsRow
from python_ref import STREAM_ACCEPT, STREAM_TARGET, DraftDistributions

kStreamTarget, kStreamAccept = tl.constexpr(STREAM_TARGET), tl.constexpr(STREAM_ACCEPT)
kPointMass = tl.constexpr(-0x80000000)  # the bits of -0.0
kBlockCopy = 4096


class Residual(NamedTuple):
    """The best of every slice of a request's residual."""

    score: Any  # fp32 [B, SLICES]
    ids: Any  # int32 [B, SLICES]


@triton.jit
def _distribution_of(slices, row, has_row, shape: tl.constexpr):
    """Normaliser (log of the sum of the kept exp(z)) and least kept z of rows [n]."""
    s = tl.arange(0, shape.BLOCK_SLICES)[None, :]
    place = row.to(tl.int64)[:, None] * shape.SLICES + s
    inside = has_row[:, None] & (s < shape.SLICES)
    slice_max = tl.load(slices.max + place, mask=inside, other=float("-inf"))
    largest = tl.max(slice_max, axis=1)
    is_empty = largest == float("-inf")
    finite = tl.where(is_empty, 0.0, largest)
    total = tl.load(slices.total + place, mask=inside, other=0.0) * tl.exp(slice_max - finite[:, None])
    log_norm = finite + log(tl.where(is_empty, 1.0, tl.sum(total, axis=1)))
    least = tl.min(tl.load(slices.least + place, mask=inside, other=float("inf")), axis=1)
    bits = tl.where(is_empty, kPointMass, log_norm.to(tl.int32, bitcast=True))  # Triton takes -0.0 for 0.0
    return bits.to(tl.float32, bitcast=True), tl.where(is_empty, 0.0, least)


@triton.jit
def _probability(z, id_, log_norm, cut, mask_id):
    """Of ids under the distribution (log_norm, cut) of their row."""
    is_point = log_norm.to(tl.int32, bitcast=True) == kPointMass
    p = tl.where(z >= cut, tl.exp(z - log_norm), 0.0)
    return tl.where(is_point, tl.where(id_ == lowest_id(mask_id), 1.0, 0.0), p)


@triton.jit
def _log_of_any(x):
    """Natural log of fp32 above 0, subnormal ones included."""
    is_tiny = x < 1e-30
    return log(tl.where(is_tiny, x * 1152921504606846976.0, x)) - tl.where(is_tiny, 41.58883083359672, 0.0)


@triton.jit
def _at(x, i, a):
    """Element a of fp32 x [n], its sign of zero kept."""
    return tl.sum(tl.where(i == a, x.to(tl.int32, bitcast=True), 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=["id_limit", "mask_id", "slice_ids", "stride_drafts"],
    do_not_specialize_on_alignment=[
        "gQueryStart",
        "gNumDrafts",
        "gDrafts",
        "gPositions",
        "gTemperature",
        "gSeed",
        "gQCut",
        "gQLogNorm",
        "gNumAccepted",
    ],
)
def _residual_kernel(
    logits,  # Logits
    slices,  # Slices
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gDrafts,  # [B, K]
    gPositions,  # [B]
    gTemperature,  # [B]
    gSeed,  # [B]
    q_logits,  # DraftLogits
    gQCut,  # [B, K]
    gQLogNorm,  # [B, K]
    gNumAccepted,  # [B]
    residual,  # Residual
    id_limit,
    mask_id,
    slice_ids,
    stride_drafts,
    shape: tl.constexpr,
    BLOCK: tl.constexpr,
):
    follow_previous_launch()
    K: tl.constexpr = shape.K
    BLOCK_K: tl.constexpr = shape.BLOCK_K
    vocab_size = logits.vocab_size
    request = tl.program_id(0).to(tl.int64)
    span = span_of(gQueryStart, gNumDrafts, request, K)
    start, m_rows, n = span.start, span.m_rows, span.n
    temperature, seed = tl.load(gTemperature + request), tl.load(gSeed + request)
    is_greedy = temperature < kGreedyBelow
    i = tl.arange(0, BLOCK_K)
    is_clean = (i <= n) & (i < m_rows)
    row = (start + i).to(tl.int64)
    y = best_of_slices(slices, start + i, is_clean, mask_id, shape.SLICES, shape.BLOCK_SLICES)[0]
    draft, is_draft, is_bad = drafts_of(gDrafts, stride_drafts, span, is_clean, vocab_size, shape)

    # u q(x) < p(x) for every draft x. What is no draft looks up the id vocab_size, which is never read.
    x = tl.where(is_draft & (is_bad == 0), draft, vocab_size).to(tl.int32)
    log_norm, cut = _distribution_of(slices, start + i, is_clean, shape)
    p_of_drafts = LogitsRow(logits=logits, row=row, temperature=temperature, id_limit=id_limit, mask_id=mask_id)
    z = transformed(p_of_drafts, x)[0]
    p = _probability(z, x, log_norm, cut, mask_id)
    q_cut = tl.load(gQCut + request * q_logits.stride_cut + i, mask=is_draft, other=0.0)
    q_log_norm = tl.load(gQLogNorm + request * q_logits.stride_log_norm + i, mask=is_draft, other=0.0)
    gQ = q_logits.logits + request * q_logits.stride_request
    q_rows = Logits(data=gQ, bias=None, stride=q_logits.stride_draft, stride_bias=0, vocab_size=vocab_size)
    q_of_drafts = LogitsRow(
        logits=q_rows, row=i.to(tl.int64), temperature=temperature, id_limit=id_limit, mask_id=mask_id
    )
    z = transformed(q_of_drafts, x)[0]
    q = _probability(z, x, q_log_norm, q_cut, mask_id)
    first_position = tl.load(gPositions + request) + 1
    u = uniform_of_positions(seed, first_position + i, kStreamAccept, BLOCK_K)
    is_accepted = tl.where(is_greedy, draft == y.to(tl.int64), u * q < p)
    a = tl.min(tl.where(is_draft & (is_bad | (is_accepted == 0)), i, n), axis=0)
    if tl.program_id(1) == 0:
        tl.store(gNumAccepted + request, tl.where(m_rows > 0, a, 0))

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], kNoId, tl.int32)
    bad_at_a = tl.max(tl.where(i == a, is_bad.to(tl.int32), 0), axis=0)
    if (a < n) & (is_greedy == 0) & (bad_at_a == 0):
        p_log_norm, p_cut = _at(log_norm, i, a), _at(cut, i, a)
        q_log_norm_a, q_cut_a = _at(q_log_norm, i, a), _at(q_cut, i, a)
        row_a, draft_a = (start + a).to(tl.int64), a.to(tl.int64)
        p_row = LogitsRow(logits=logits, row=row_a, temperature=temperature, id_limit=id_limit, mask_id=mask_id)
        q_row = LogitsRow(logits=q_rows, row=draft_a, temperature=temperature, id_limit=id_limit, mask_id=mask_id)
        begin = tl.program_id(1) * slice_ids
        for first in range(begin, tl.minimum(begin + slice_ids, id_limit), BLOCK):
            id_ = first + tl.arange(0, BLOCK)
            z_p, z_q = transformed(p_row, id_)[0], transformed(q_row, id_)[0]
            q_of_id = _probability(z_q, id_, q_log_norm_a, q_cut_a, mask_id)
            excess = _probability(z_p, id_, p_log_norm, p_cut, mask_id) - q_of_id
            has_any = tl.max(excess, axis=0) > 0.0
            if has_any:
                g = noise(seed, first // 4 + tl.arange(0, BLOCK // 4), first_position + a, kStreamTarget, BLOCK // 4)
                score = _log_of_any(tl.where(excess > 0.0, excess, 1.0)) + g
                is_better = (excess > 0.0) & (score > best)
                best = tl.where(is_better, score, best)
                best_id = tl.where(is_better, id_, best_id)
    top = tl.max(best, axis=0)
    place = request * shape.SLICES + tl.program_id(1)
    tl.store(residual.score + place, top)
    tl.store(residual.ids + place, tl.min(tl.where(best == top, best_id, kNoId), axis=0))


@triton.jit(
    do_not_specialize=["mask_id", "stride_drafts", "stride_tokens", "stride_next"],
    do_not_specialize_on_alignment=[
        "gQueryStart",
        "gNumDrafts",
        "gDrafts",
        "gNumAccepted",
        "gQCut",
        "gQLogNorm",
        "gTokens",
        "gNextDrafts",
        "gNextNumDrafts",
        "gErrorFlags",
    ],
)
def _conclude_kernel(
    logits,  # Logits
    slices,  # Slices
    residual,  # Residual
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gDrafts,  # [B, K]
    gNumAccepted,  # [B]
    q_logits,  # DraftLogits
    gQCut,  # [B, K]
    gQLogNorm,  # [B, K]
    gTokens,  # [B, K + 1]
    gNextDrafts,  # [B, K]
    gNextNumDrafts,  # [B]
    gErrorFlags,  # [B]
    mask_id,
    stride_drafts,
    stride_tokens,
    stride_next,
    shape: tl.constexpr,
    BLOCK: tl.constexpr,
):
    follow_previous_launch()
    K: tl.constexpr = shape.K
    BLOCK_K: tl.constexpr = shape.BLOCK_K
    results = Results(
        tokens=gTokens,
        next_drafts=gNextDrafts,
        next_num_drafts=gNextNumDrafts,
        error_flags=gErrorFlags,
        stride_tokens=stride_tokens,
        stride_next=stride_next,
    )
    vocab_size = logits.vocab_size
    request = tl.program_id(0).to(tl.int64)
    span = span_of(gQueryStart, gNumDrafts, request, K)
    start, m_rows, n = span.start, span.m_rows, span.n
    a = tl.load(gNumAccepted + request)
    first_mask, num_proposed = proposal(a, span, K, shape.QUADRATIC)
    if tl.program_id(1) == 0:
        i = tl.arange(0, BLOCK_K)
        is_clean = (i <= n) & (i < m_rows)
        y, error_flags = best_of_slices(slices, start + i, is_clean, mask_id, shape.SLICES, shape.BLOCK_SLICES)
        draft, _, is_bad = drafts_of(gDrafts, stride_drafts, span, is_clean, vocab_size, shape)
        s = tl.arange(0, shape.BLOCK_SLICES)
        has_slice = s < shape.SLICES
        score = tl.load(residual.score + request * shape.SLICES + s, mask=has_slice, other=float("-inf"))
        id_ = tl.load(residual.ids + request * shape.SLICES + s, mask=has_slice, other=kNoId)
        best = tl.max(score, axis=0)
        residual_id = tl.min(tl.where(score == best, id_, kNoId), axis=0)
        y = tl.where(i == tl.where(best > float("-inf"), a, -1), residual_id, y)
        commit(slices, results, gNumDrafts, span, a, draft, y, is_bad, error_flags, mask_id, shape)
        is_new = i < num_proposed
        log_norm, cut = _distribution_of(slices, start + first_mask + i, is_new, shape)
        tl.store(gQCut + request * q_logits.stride_cut + i, cut, mask=is_new)
        tl.store(gQLogNorm + request * q_logits.stride_log_norm + i, log_norm, mask=is_new)

    # Where nothing is proposed nothing is written: a later step will need the distributions of drafts still there.
    id_ = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = id_ < vocab_size
    for j in range(num_proposed):
        row = (start + first_mask + j).to(tl.int64)
        raw = tl.load(logits.data + row * logits.stride + id_, mask=inside)
        if logits.bias is not None:
            raw = raw.to(tl.float32) + tl.load(logits.bias + row * logits.stride_bias + id_, mask=inside).to(tl.float32)
        pQ = q_logits.logits + request * q_logits.stride_request + tl.cast(j, tl.int64) * q_logits.stride_draft + id_
        tl.store(pQ, raw.to(q_logits.logits.dtype.element_ty), mask=inside)


def judge(sampled: SampledSlices, step: Step, draft_dists: DraftDistributions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decision of `rejection`: two launches."""
    (batch, num_spec_tokens), vocab_size = step.drafts.shape, step.logits.vocab_size
    num_accepted, tokens, next_drafts, next_num_drafts = step.out
    score = torch.empty(batch, sampled.count, dtype=torch.float32, device=tokens.device)
    residual = Residual(score, torch.empty_like(score, dtype=torch.int32))
    q = (DraftLogits.of(draft_dists), draft_dists.cut, draft_dists.log_norm)
    drafts = (step.query_start_loc, step.num_drafts, step.drafts)
    launch(
        _residual_kernel,
        (batch, sampled.count),
        tokens,
        step.logits,
        sampled.slices,
        *drafts,
        step.positions,
        step.parameters.temperature,
        step.parameters.seed,
        *q,
        num_accepted,
        residual,
        step.id_limit,
        step.mask_id,
        sampled.slice_ids,
        step.drafts.stride(0),
        shape=step.shape(sampled),
        BLOCK=kBlockPerturb,
        num_warps=8,
    )
    launch(
        _conclude_kernel,
        (batch, triton.cdiv(vocab_size, kBlockCopy) if num_spec_tokens else 1),
        tokens,
        step.logits,
        sampled.slices,
        residual,
        *drafts,
        num_accepted,
        *q,
        tokens,
        next_drafts,
        next_num_drafts,
        step.error_flags,
        step.mask_id,
        step.drafts.stride(0),
        tokens.stride(0),
        next_drafts.stride(0),
        shape=step.shape(sampled),
        BLOCK=kBlockCopy,
        num_warps=4,
    )
    return step.out
