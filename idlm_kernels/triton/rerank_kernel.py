"""The launches of rerank_drafts that follow one another draft by draft; rerank.py says which bytes they read.

For draft j of a request, with x the hidden row, e the embedding of the token before it and unit(x) = x / rms(x):

    s_j = silu(A unit(x) + P unit(e) + S s_{j-1});    u = Q s_j;    score_c = logit_c + head_c . u  of 32 candidates c

A, P and S are [W, H], [W, H] and [W, W], Q is [H, W]. Products are sums of fp32 multiply-adds in one fixed order: what
is small here (one row per request) is bound by the bytes of the matrices, and the state stays in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from idlm_kernels.triton.common import silu_times
from idlm_kernels.triton.noise import gumbel, log, uniform
from idlm_kernels.triton.rows import kGreedyBelow, kLargest, kNoId, lowest_id
from python_ref import STREAM_DRAFT, STREAM_TARGET
from python_ref.rerank import NUM_CANDIDATES

kCandidates = tl.constexpr(NUM_CANDIDATES)
kStreamTarget, kStreamDraft = tl.constexpr(STREAM_TARGET), tl.constexpr(STREAM_DRAFT)
kUnitEps = tl.constexpr(2.0**-23)  # as torch's rms_norm of fp32


@triton.jit
def _product(
    gWeight,  # [N, LENGTH]
    gX,  # [LENGTH]
    n,  # [BLOCK_N], rows of the weight
    stride_weight,
    N: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows n of the weight times x, fp32 [BLOCK_N], and the sum of the squares of x."""
    gRows = gWeight + n.to(tl.int64)[:, None] * stride_weight
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, LENGTH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        weight = tl.load(gRows + k[None, :], mask=(n < N)[:, None] & (k < LENGTH)[None, :], other=0.0).to(tl.float32)
        x = tl.load(gX + k, mask=k < LENGTH, other=0.0).to(tl.float32)
        total = tl.fma(weight, tl.broadcast_to(x[None, :], [BLOCK_N, BLOCK_K]), total)
        squares = tl.fma(x, x, squares)
    return tl.sum(total, axis=1), tl.sum(squares, axis=0)


@triton.jit
def _inverse_rms(squares, LENGTH: tl.constexpr):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, LENGTH * 1.0) + kUnitEps))


@triton.jit
def _cut(z, largest, top_k, top_p, min_p):
    """The least kept z [32] after top-k, top-p and min-p; ties of it are kept. By pairs, nothing is sorted: an entry
    stays iff fewer than top_k entries, and less mass than top_p, lie above it."""
    above = z[None, :] > z[:, None]
    kept = tl.sum(above.to(tl.int32), axis=1) < tl.where(top_k > 0, top_k, kCandidates)
    share = tl.exp(z - largest)
    # Mass in integers of 2^-44, which add up in any order.
    weight = tl.where(kept, (share * 17592186044416.0).to(tl.int64), 0)
    mass_above = tl.sum(tl.where(above, weight[None, :], 0), axis=1).to(tl.float64)
    wanted = tl.where(top_p < 1.0, top_p.to(tl.float64) * tl.sum(weight, axis=0).to(tl.float64), float("inf"))
    kept = kept & (mass_above < wanted) & (share >= min_p)
    return tl.min(tl.where((kept | (z == largest)) & (z > float("-inf")), z, float("inf")), axis=0)


@triton.jit
def _noise_at(seed, id_, position, stream, BLOCK: tl.constexpr):
    """Noise of ids [BLOCK]."""
    zeros = tl.zeros([BLOCK], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, id_ >> 2, zeros + position, zeros + stream, zeros)
    low, high = tl.where((id_ & 1) == 0, w0, w1), tl.where((id_ & 1) == 0, w2, w3)
    return gumbel(uniform(tl.where((id_ & 2) == 0, low, high)))


@triton.jit
def _choose(
    gPart,  # fp32 [B, SLICES, 32]
    gValue,  # [B, K, 32]
    gId,  # [B, K, 32]
    gPositions,  # [B]
    gTemperature,  # [B]; so the next four
    gTopK,
    gTopP,
    gMinP,
    gSeed,
    gQLogits,  # [B, K, V]
    gQCut,  # [B, K]
    gQLogNorm,  # [B, K]
    request,
    j,
    num_k,
    stride_q_request,
    stride_q_draft,
    stride_cut,
    stride_log_norm,
    mask_id,
    writes,
    HAS_Q: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
):
    """Draft j of a request from the parts of its scores, the same for every caller; `writes` its law too."""
    c = tl.arange(0, kCandidates)
    place = (request * num_k + j) * kCandidates + c
    s = tl.arange(0, BLOCK_SLICES)[:, None]
    gRequest = gPart + request * SLICES * kCandidates
    gain = tl.sum(tl.load(gRequest + s * kCandidates + c[None, :], mask=s < SLICES, other=0.0), axis=0)
    id_ = tl.load(gId + place)
    x = tl.load(gValue + place) + gain
    if HAS_Q:
        x = x.to(gQLogits.dtype.element_ty).to(tl.float32)  # the law is of what is kept
    x = tl.where(x == x, tl.minimum(x, kLargest), float("-inf"))
    temperature = tl.load(gTemperature + request)
    is_greedy = temperature < kGreedyBelow
    z = tl.div_rn(x, tl.zeros_like(x) + tl.where(is_greedy, 1.0, temperature))
    z = tl.where(x == float("-inf"), x, tl.minimum(tl.maximum(z, -kLargest), kLargest))
    is_empty = tl.max(z, axis=0) == float("-inf")
    largest = tl.where(is_empty, 0.0, tl.max(z, axis=0))
    cut = _cut(z, largest, tl.load(gTopK + request), tl.load(gTopP + request), tl.load(gMinP + request))
    stream = kStreamDraft if HAS_Q else kStreamTarget
    position = tl.load(gPositions + request) + 1 + j
    noise = _noise_at(tl.load(gSeed + request), id_, position, stream, kCandidates)
    score = tl.where(is_greedy, z, tl.where(z >= cut, z + noise, float("-inf")))
    draft = tl.min(tl.where(score == tl.max(score, axis=0), id_, kNoId), axis=0)
    draft = tl.where(is_empty, lowest_id(mask_id), draft)
    if HAS_Q:
        total = tl.sum(tl.where(z >= cut, tl.exp(z - largest), 0.0), axis=0)
        log_norm = largest + log(tl.where(is_empty, 1.0, total))
        if writes:
            tl.store(gQCut + request * stride_cut + j, tl.where(is_empty, 0.0, cut))
            tl.store(gQLogNorm + request * stride_log_norm + j, log_norm)
            gQ = gQLogits + request * stride_q_request + tl.cast(j, tl.int64) * stride_q_draft
            # A point mass where nothing can be chosen; else the finite scores: ids that fill up stand for nothing.
            id_ = tl.where(is_empty, lowest_id(mask_id), id_)
            kept = tl.where(is_empty, c == 0, x > float("-inf"))
            tl.store(gQ + id_, tl.where(is_empty, 0.0, x).to(gQLogits.dtype.element_ty), mask=kept)
    return draft.to(tl.int64)


@triton.jit(
    do_not_specialize=["batch", "j", "num_k", "num_served", "mask_id", "num_tokens", "stride_out"],
    do_not_specialize_on_alignment=[
        "gPrevious",
        "gNumDrafts",
        "gPositions",
        "gTemperature",
        "gTopK",
        "gTopP",
        "gMinP",
        "gSeed",
        "gQCut",
        "gQLogNorm",
        "gOut",
    ],
)
def _state_kernel(
    gPrevious,  # [B]
    gNumDrafts,  # [B]
    gRowPart,  # [B, K, W]
    gEmbedding,  # [ids, H]
    gFromPrevious,  # [W, H]
    gFromState,  # [W, W]
    gState,  # fp32 [K, B, W]
    gPart,  # fp32 [B, SLICES, 32], of draft j - 1; so all that follows
    gValue,
    gId,
    gPositions,
    gTemperature,
    gTopK,
    gTopP,
    gMinP,
    gSeed,
    gQLogits,
    gQCut,
    gQLogNorm,
    gOut,  # int64 [B, K]
    batch,
    j,
    num_k,
    num_served,
    mask_id,
    num_tokens,
    stride_embedding,
    stride_from_previous,
    stride_from_state,
    stride_q_request,
    stride_q_draft,
    stride_cut,
    stride_log_norm,
    stride_out,
    H: tl.constexpr,
    W: tl.constexpr,
    IS_FIRST: tl.constexpr,
    HAS_Q: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    """BLOCK_W entries of s_j of several requests. Every CTA chooses draft j - 1 for itself, the first one writes it."""
    TILES: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    tile = tl.program_id(0) % TILES
    n = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    first = (tl.program_id(0) // TILES * num_served).to(tl.int64)
    for request in range(first, tl.minimum(first + num_served, batch)):
        if tl.load(gNumDrafts + request) > 0:
            if IS_FIRST:
                token = tl.load(gPrevious + request)
            else:
                writes = tile == 0
                token = _choose(
                    gPart,
                    gValue,
                    gId,
                    gPositions,
                    gTemperature,
                    gTopK,
                    gTopP,
                    gMinP,
                    gSeed,
                    gQLogits,
                    gQCut,
                    gQLogNorm,
                    request,
                    j - 1,
                    num_k,
                    stride_q_request,
                    stride_q_draft,
                    stride_cut,
                    stride_log_norm,
                    mask_id,
                    writes,
                    HAS_Q,
                    SLICES,
                    BLOCK_SLICES,
                )
                if writes:
                    tl.store(gOut + request * stride_out + j - 1, token)
            token = tl.minimum(tl.maximum(token, 0), num_tokens - 1)
            gX = gEmbedding + token * stride_embedding
            y, squares = _product(gFromPrevious, gX, n, stride_from_previous, W, H, BLOCK_W, BLOCK_K)
            row_part = tl.load(gRowPart + (request * num_k + j) * W + n, mask=n < W, other=0.0)
            x = row_part + y * _inverse_rms(squares, H)
            gMine = gState + (j * batch + request) * W
            if not IS_FIRST:
                gBefore = gMine - batch.to(tl.int64) * W
                x += _product(gFromState, gBefore, n, stride_from_state, W, W, BLOCK_W, BLOCK_STATE)[0]
            tl.store(gMine + n, silu_times(x, 1.0), mask=n < W)


@triton.jit(do_not_specialize=["batch", "j", "num_k", "num_served"], do_not_specialize_on_alignment=["gNumDrafts"])
def _score_kernel(
    gNumDrafts,  # [B]
    gState,  # [K, B, W]
    gToQuery,  # [H, W]
    gHeadRows,  # [ids, H]
    gId,  # [B, K, 32]
    gPart,  # fp32 [B, SLICES, 32]
    batch,
    j,
    num_k,
    num_served,
    stride_to_query,
    stride_head,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    """BLOCK_H entries of the query u = Q s_j of several requests, and what they add to the scores of the candidates."""
    SLICES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    slice_ = tl.program_id(0) % SLICES
    h = slice_ * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, kCandidates)
    first = (tl.program_id(0) // SLICES * num_served).to(tl.int64)
    for request in range(first, tl.minimum(first + num_served, batch)):
        if tl.load(gNumDrafts + request) > 0:
            id_ = tl.load(gId + (request * num_k + j) * kCandidates + c).to(tl.int64)
            gRows = gHeadRows + id_[:, None] * stride_head + h[None, :]
            direction = tl.load(gRows, mask=(h < H)[None, :], other=0.0).to(tl.float32)
            gX = gState + (j * batch + request) * W
            query, _ = _product(gToQuery, gX, h, stride_to_query, H, W, BLOCK_H, BLOCK_STATE)
            part = tl.sum(direction * query[None, :], axis=1)
            place = request * SLICES + slice_
            tl.store(gPart + place * kCandidates + c, part)


@triton.jit(
    do_not_specialize=["num_k", "mask_id", "stride_drafts", "stride_out"],
    do_not_specialize_on_alignment=[
        "gNumDrafts",
        "gDrafts",
        "gPositions",
        "gTemperature",
        "gTopK",
        "gTopP",
        "gMinP",
        "gSeed",
        "gQCut",
        "gQLogNorm",
        "gOut",
    ],
)
def _last_kernel(
    gNumDrafts,  # [B]
    gDrafts,  # int64 [B, K]
    gPart,  # [B, SLICES, 32]
    gValue,
    gId,
    gPositions,
    gTemperature,
    gTopK,
    gTopP,
    gMinP,
    gSeed,
    gQLogits,
    gQCut,
    gQLogNorm,
    gOut,  # int64 [B, K]
    num_k,
    mask_id,
    stride_drafts,
    stride_q_request,
    stride_q_draft,
    stride_cut,
    stride_log_norm,
    stride_out,
    HAS_Q: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_DRAFTS: tl.constexpr,
):
    """The last draft of a request, or its drafts as they were."""
    request = tl.program_id(0).to(tl.int64)
    gMine = gOut + request * stride_out
    if tl.load(gNumDrafts + request) > 0:
        draft = _choose(
            gPart,
            gValue,
            gId,
            gPositions,
            gTemperature,
            gTopK,
            gTopP,
            gMinP,
            gSeed,
            gQLogits,
            gQCut,
            gQLogNorm,
            request,
            num_k - 1,
            num_k,
            stride_q_request,
            stride_q_draft,
            stride_cut,
            stride_log_norm,
            mask_id,
            True,
            HAS_Q,
            SLICES,
            BLOCK_SLICES,
        )
        tl.store(gMine + num_k - 1, draft)
    else:
        i = tl.arange(0, BLOCK_DRAFTS)
        before = tl.load(gDrafts + request * stride_drafts + i, mask=i < num_k, other=-1)
        tl.store(gMine + i, before, mask=i < num_k)
