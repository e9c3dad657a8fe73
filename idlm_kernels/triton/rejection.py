"""The decision of `rejection`: draft x of law q stands iff u q(x) < p(x); else a sample of max(0, p - q).

Two launches after the slices are sampled, both over slices of ids and requests:

1. _residual_kernel: every CTA decides for itself which drafts stand (a few hundred numbers), then samples its slice of
   the residual of the first one that does not, where one is needed: not for greedy requests, whose laws are points, nor
   for a draft that is no id. Where the residual is empty, p is sampled: that is what the row's slices hold already.
2. _conclude_kernel writes the results and replaces the laws in q_state by those of the new drafts.

Bytes: p's row and q's row once more for a request that refuses a draft; K rows copied for one that proposes. The law of
a row without a finite logit is a point on the lowest id; its normaliser is stored as -0.0, by which it is known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idlm_kernels.triton.common import launch, next_power_of_2
from idlm_kernels.triton.decision import best_of_slices, commit, drafts_of, proposal
from idlm_kernels.triton.noise import log, noise, uniform_of_positions
from idlm_kernels.triton.perturb import SampledSlices, kBlockPerturb
from idlm_kernels.triton.rows import draft_count, kGreedyBelow, kNoId, lowest_id, transformed
from python_ref import STREAM_ACCEPT, STREAM_TARGET, QState

kStreamTarget, kStreamAccept = tl.constexpr(STREAM_TARGET), tl.constexpr(STREAM_ACCEPT)
kPointMass = tl.constexpr(-0x80000000)  # the bits of -0.0
kBlockCopy = 4096


@triton.jit
def _law_of(gMax, gTotal, gLeast, row, has_row, SLICES: tl.constexpr, BLOCK_SLICES: tl.constexpr):
    """Normaliser (log of the sum of the kept exp(z)) and least kept z of rows [n]."""
    s = tl.arange(0, BLOCK_SLICES)[None, :]
    place = row.to(tl.int64)[:, None] * SLICES + s
    inside = has_row[:, None] & (s < SLICES)
    slice_max = tl.load(gMax + place, mask=inside, other=float("-inf"))
    largest = tl.max(slice_max, axis=1)
    is_empty = largest == float("-inf")
    finite = tl.where(is_empty, 0.0, largest)
    total = tl.load(gTotal + place, mask=inside, other=0.0) * tl.exp(slice_max - finite[:, None])
    log_norm = finite + log(tl.where(is_empty, 1.0, tl.sum(total, axis=1)))
    least = tl.min(tl.load(gLeast + place, mask=inside, other=float("inf")), axis=1)
    bits = tl.where(is_empty, kPointMass, log_norm.to(tl.int32, bitcast=True))  # Triton takes -0.0 for 0.0
    return bits.to(tl.float32, bitcast=True), tl.where(is_empty, 0.0, least)


@triton.jit
def _probability(z, id_, log_norm, cut, mask_id):
    """Of ids under the law (log_norm, cut) of their row."""
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
    gLogits,  # [T, V]
    gBias,  # [T, V]
    gScore,  # [T, SLICES]; so the next five
    gId,
    gFlags,
    gMax,
    gTotal,
    gLeast,
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gDrafts,  # [B, K]
    gPositions,  # [B]
    gTemperature,  # [B]
    gSeed,  # [B]
    gQLogits,  # [B, K, V]
    gQCut,  # [B, K]
    gQLogNorm,  # [B, K]
    gNumAccepted,  # [B]
    gResidualScore,  # fp32 [B, SLICES]
    gResidualId,  # int32 [B, SLICES]
    stride_logits,
    stride_bias,
    stride_drafts,
    stride_q_request,
    stride_q_draft,
    stride_cut,
    stride_log_norm,
    vocab_size,
    id_limit,
    mask_id,
    slice_ids,
    K: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    start = tl.load(gQueryStart + request)
    m_rows = tl.load(gQueryStart + request + 1) - start
    n = draft_count(gNumDrafts, request, m_rows, K)
    temperature, seed = tl.load(gTemperature + request), tl.load(gSeed + request)
    is_greedy = temperature < kGreedyBelow
    i = tl.arange(0, BLOCK_K)
    is_clean = (i <= n) & (i < m_rows)
    row = (start + i).to(tl.int64)
    y = best_of_slices(gScore, gId, gFlags, start + i, is_clean, mask_id, SLICES, BLOCK_SLICES)[0]
    draft, is_draft, is_bad = drafts_of(gDrafts, request, n, is_clean, vocab_size, stride_drafts, K, BLOCK_K)

    # u q(x) < p(x) for every draft x. What is no draft looks up the id vocab_size, which is never read.
    x = tl.where(is_draft & (is_bad == 0), draft, vocab_size).to(tl.int32)
    log_norm, cut = _law_of(gMax, gTotal, gLeast, start + i, is_clean, SLICES, BLOCK_SLICES)
    pRow = gLogits + row * stride_logits
    pBias = gBias + row * stride_bias if HAS_BIAS else gBias
    z = transformed(pRow, pBias, x, temperature, vocab_size, id_limit, mask_id, HAS_BIAS)[0]
    p = _probability(z, x, log_norm, cut, mask_id)
    q_cut = tl.load(gQCut + request * stride_cut + i, mask=is_draft, other=0.0)
    q_log_norm = tl.load(gQLogNorm + request * stride_log_norm + i, mask=is_draft, other=0.0)
    gQ = gQLogits + request * stride_q_request
    z = transformed(gQ + i.to(tl.int64) * stride_q_draft, gQ, x, temperature, vocab_size, id_limit, mask_id, False)[0]
    q = _probability(z, x, q_log_norm, q_cut, mask_id)
    first_position = tl.load(gPositions + request) + 1
    u = uniform_of_positions(seed, first_position + i, kStreamAccept, BLOCK_K)
    stands = tl.where(is_greedy, draft == y.to(tl.int64), u * q < p)
    a = tl.min(tl.where(is_draft & (is_bad | (stands == 0)), i, n), axis=0)
    if tl.program_id(1) == 0:
        tl.store(gNumAccepted + request, tl.where(m_rows > 0, a, 0))

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], kNoId, tl.int32)
    bad_at_a = tl.max(tl.where(i == a, is_bad.to(tl.int32), 0), axis=0)
    if (a < n) & (is_greedy == 0) & (bad_at_a == 0):
        p_log_norm, p_cut = _at(log_norm, i, a), _at(cut, i, a)
        q_log_norm_a, q_cut_a = _at(q_log_norm, i, a), _at(q_cut, i, a)
        gP = gLogits + (start + a).to(tl.int64) * stride_logits
        gPBias = gBias + (start + a).to(tl.int64) * stride_bias if HAS_BIAS else gBias
        gQRow = gQ + a.to(tl.int64) * stride_q_draft
        begin = tl.program_id(1) * slice_ids
        for first in range(begin, tl.minimum(begin + slice_ids, id_limit), BLOCK):
            id_ = first + tl.arange(0, BLOCK)
            z_p = transformed(gP, gPBias, id_, temperature, vocab_size, id_limit, mask_id, HAS_BIAS)[0]
            z_q = transformed(gQRow, gQ, id_, temperature, vocab_size, id_limit, mask_id, False)[0]
            residual = _probability(z_p, id_, p_log_norm, p_cut, mask_id) - _probability(
                z_q, id_, q_log_norm_a, q_cut_a, mask_id
            )
            has_any = tl.max(residual, axis=0) > 0.0
            if has_any:
                g = noise(seed, first // 4 + tl.arange(0, BLOCK // 4), first_position + a, kStreamTarget, BLOCK // 4)
                score = _log_of_any(tl.where(residual > 0.0, residual, 1.0)) + g
                is_better = (residual > 0.0) & (score > best)
                best = tl.where(is_better, score, best)
                best_id = tl.where(is_better, id_, best_id)
    top = tl.max(best, axis=0)
    place = request * SLICES + tl.program_id(1)
    tl.store(gResidualScore + place, top)
    tl.store(gResidualId + place, tl.min(tl.where(best == top, best_id, kNoId), axis=0))


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
        "gStatus",
    ],
)
def _conclude_kernel(
    gLogits,  # [T, V]
    gBias,  # [T, V]
    gScore,  # [T, SLICES]; so the next five
    gId,
    gFlags,
    gMax,
    gTotal,
    gLeast,
    gResidualScore,  # [B, SLICES]
    gResidualId,
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gDrafts,  # [B, K]
    gNumAccepted,  # [B]
    gQLogits,  # [B, K, V]
    gQCut,  # [B, K]
    gQLogNorm,  # [B, K]
    gTokens,  # [B, K + 1]
    gNextDrafts,  # [B, K]
    gNextNumDrafts,  # [B]
    gStatus,  # [B]
    stride_logits,
    stride_bias,
    stride_drafts,
    stride_q_request,
    stride_q_draft,
    stride_cut,
    stride_log_norm,
    stride_tokens,
    stride_next,
    vocab_size,
    mask_id,
    K: tl.constexpr,
    BRANCHED: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    start = tl.load(gQueryStart + request)
    m_rows = tl.load(gQueryStart + request + 1) - start
    n = draft_count(gNumDrafts, request, m_rows, K)
    a = tl.load(gNumAccepted + request)
    first_mask, num_proposed = proposal(a, n, m_rows, K, BRANCHED)
    if tl.program_id(1) == 0:
        i = tl.arange(0, BLOCK_K)
        is_clean = (i <= n) & (i < m_rows)
        y, status = best_of_slices(gScore, gId, gFlags, start + i, is_clean, mask_id, SLICES, BLOCK_SLICES)
        draft, _, is_bad = drafts_of(gDrafts, request, n, is_clean, vocab_size, stride_drafts, K, BLOCK_K)
        s = tl.arange(0, BLOCK_SLICES)
        score = tl.load(gResidualScore + request * SLICES + s, mask=s < SLICES, other=float("-inf"))
        id_ = tl.load(gResidualId + request * SLICES + s, mask=s < SLICES, other=kNoId)
        best = tl.max(score, axis=0)
        residual_id = tl.min(tl.where(score == best, id_, kNoId), axis=0)
        y = tl.where(i == tl.where(best > float("-inf"), a, -1), residual_id, y)
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
        is_new = i < num_proposed
        log_norm, cut = _law_of(gMax, gTotal, gLeast, start + first_mask + i, is_new, SLICES, BLOCK_SLICES)
        tl.store(gQCut + request * stride_cut + i, cut, mask=is_new)
        tl.store(gQLogNorm + request * stride_log_norm + i, log_norm, mask=is_new)

    # Where nothing is proposed nothing is written: a later step will need the laws of drafts that are still there.
    id_ = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for j in range(num_proposed):
        row = (start + first_mask + j).to(tl.int64)
        raw = tl.load(gLogits + row * stride_logits + id_, mask=id_ < vocab_size)
        if HAS_BIAS:
            raw = raw.to(tl.float32) + tl.load(gBias + row * stride_bias + id_, mask=id_ < vocab_size).to(tl.float32)
        pQ = gQLogits + request * stride_q_request + tl.cast(j, tl.int64) * stride_q_draft + id_
        tl.store(pQ, raw.to(gQLogits.dtype.element_ty), mask=id_ < vocab_size)


def judge(
    sampled: SampledSlices,
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    positions: Tensor,
    temperature: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    branched: bool,
    q_state: QState,
    logit_bias: Tensor | None,
    status: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decision of `rejection`: two launches."""
    (batch, num_k), vocab_size = drafts.shape, logits.shape[1]
    num_accepted, tokens, next_drafts, next_num_drafts = out
    slices = sampled.score.shape[1]
    residual_score = torch.empty(batch, slices, dtype=torch.float32, device=logits.device)
    residual_id = torch.empty(batch, slices, dtype=torch.int32, device=logits.device)
    q_strides = (*q_state.logits.stride()[:2], q_state.cut.stride(0), q_state.log_norm.stride(0))
    rows = (logits, logit_bias, sampled.score, sampled.ids, sampled.flags, *sampled.law)
    row_strides = (logits.stride(0), 0 if logit_bias is None else logit_bias.stride(0), drafts.stride(0))
    common = {
        "K": num_k,
        "SLICES": slices,
        "BLOCK_SLICES": next_power_of_2(slices),
        "BLOCK_K": next_power_of_2(num_k + 1),
        "HAS_BIAS": logit_bias is not None,
    }
    launch(
        _residual_kernel,
        (batch, slices),
        logits,
        *rows,
        query_start_loc,
        num_drafts,
        drafts,
        positions,
        temperature,
        seed,
        q_state.logits,
        q_state.cut,
        q_state.log_norm,
        num_accepted,
        residual_score,
        residual_id,
        *row_strides,
        *q_strides,
        vocab_size,
        id_limit,
        mask_id,
        sampled.slice_ids,
        BLOCK=kBlockPerturb,
        num_warps=8,
        **common,
    )
    launch(
        _conclude_kernel,
        (batch, triton.cdiv(vocab_size, kBlockCopy) if num_k else 1),
        logits,
        *rows,
        residual_score,
        residual_id,
        query_start_loc,
        num_drafts,
        drafts,
        num_accepted,
        q_state.logits,
        q_state.cut,
        q_state.log_norm,
        tokens,
        next_drafts,
        next_num_drafts,
        status,
        *row_strides,
        *q_strides,
        tokens.stride(0),
        next_drafts.stride(0),
        vocab_size,
        mask_id,
        BRANCHED=branched,
        HAS_STATUS=status is not None,
        BLOCK=kBlockCopy,
        num_warps=4,
        **common,
    )
    return out
