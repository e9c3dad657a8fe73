"""The launches of rerank_drafts that follow one another draft by draft; rerank.py says which bytes they read.

For draft j of a request, with x the hidden row, e the embedding of the token before it and unit(x) = x / rms(x):

    s_j = silu(A unit(x) + P unit(e) + S s_{j-1});    u = Q s_j;    score_c = logit_c + head_c . u  of 32 candidates c

A, P and S are [W, H], [W, H] and [W, W], Q is [H, W]. Products are sums of fp32 multiply-adds in one fixed order: what
is small here (one row per request) is bound by the bytes of the matrices, and the state stays in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from idlm_kernels.triton.common import follow_previous_launch, silu_times
from idlm_kernels.triton.noise import gumbel, log, uniform
from idlm_kernels.triton.rows import kGreedyBelow, kLargest, kNoId, lowest_id
from idlm_kernels.triton.structs import DraftDistributionArgs, SamplingParameters
from python_ref import STREAM_DRAFT, STREAM_TARGET
from python_ref.contract import NUM_CANDIDATES

kCandidates = tl.constexpr(NUM_CANDIDATES)
kStreamTarget, kStreamDraft = tl.constexpr(STREAM_TARGET), tl.constexpr(STREAM_DRAFT)
kUnitEps = tl.constexpr(2.0**-23)  # as torch's rms_norm of fp32


class Head(NamedTuple):
    """What the state of a draft is made of, less the product with the hidden row."""

    embedding: Any  # [ids, H]
    from_previous: Any  # [W, H]
    from_state: Any  # [W, W]
    stride_embedding: Any
    stride_from_previous: Any
    stride_from_state: Any


class Candidates(NamedTuple):
    part: Any  # fp32 [B, SLICES, 32]: what slices of the query add to the scores of the draft at hand
    value: Any  # fp32 [B, K, 32]: logits
    ids: Any  # int32 [B, K, 32]


class Shape(NamedTuple):
    H: int
    W: int
    BLOCK_W: int  # entries of the state per CTA
    BLOCK_H: int  # entries of the query per CTA
    BLOCK_K: int  # depth of the products with rows of H entries
    BLOCK_STATE: int  # and of W entries
    SLICES: int  # CTAs of a query
    BLOCK_SLICES: int
    HAS_Q: bool


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
    candidates,
    gPositions,  # [B]
    parameters,  # SamplingParameters
    q,  # DraftDistributionArgs
    request,
    j,
    num_spec_tokens,
    mask_id,
    writes,
    shape: tl.constexpr,
):
    """Draft j of a request from the parts of its scores, the same for every caller; `writes` its distribution too."""
    c = tl.arange(0, kCandidates)
    place = (request * num_spec_tokens + j) * kCandidates + c
    s = tl.arange(0, shape.BLOCK_SLICES)[:, None]
    gRequest = candidates.part + request * shape.SLICES * kCandidates
    gain = tl.sum(tl.load(gRequest + s * kCandidates + c[None, :], mask=s < shape.SLICES, other=0.0), axis=0)
    id_ = tl.load(candidates.ids + place)
    x = tl.load(candidates.value + place) + gain
    if shape.HAS_Q:
        x = x.to(q.of.logits.dtype.element_ty).to(tl.float32)  # the distribution is of what is kept
    x = tl.where(x == x, tl.minimum(x, kLargest), float("-inf"))
    temperature = tl.load(parameters.temperature + request)
    is_greedy = temperature < kGreedyBelow
    z = tl.div_rn(x, tl.zeros_like(x) + tl.where(is_greedy, 1.0, temperature))
    z = tl.where(x == float("-inf"), x, tl.minimum(tl.maximum(z, -kLargest), kLargest))
    is_empty = tl.max(z, axis=0) == float("-inf")
    largest = tl.where(is_empty, 0.0, tl.max(z, axis=0))
    top_k, top_p = tl.load(parameters.top_k + request), tl.load(parameters.top_p + request)
    cut = _cut(z, largest, top_k, top_p, tl.load(parameters.min_p + request))
    stream = kStreamDraft if shape.HAS_Q else kStreamTarget
    position = tl.load(gPositions + request) + 1 + j
    noise = _noise_at(tl.load(parameters.seed + request), id_, position, stream, kCandidates)
    score = tl.where(is_greedy, z, tl.where(z >= cut, z + noise, float("-inf")))
    draft = tl.min(tl.where(score == tl.max(score, axis=0), id_, kNoId), axis=0)
    draft = tl.where(is_empty, lowest_id(mask_id), draft)
    if shape.HAS_Q:
        total = tl.sum(tl.where(z >= cut, tl.exp(z - largest), 0.0), axis=0)
        log_norm = largest + log(tl.where(is_empty, 1.0, total))
        if writes:
            tl.store(q.cut + request * q.of.stride_cut + j, tl.where(is_empty, 0.0, cut))
            tl.store(q.log_norm + request * q.of.stride_log_norm + j, log_norm)
            gQ = q.of.logits + request * q.of.stride_request + tl.cast(j, tl.int64) * q.of.stride_draft
            # A point mass where nothing can be chosen; else the finite scores: ids that fill up stand for nothing.
            id_ = tl.where(is_empty, lowest_id(mask_id), id_)
            kept = tl.where(is_empty, c == 0, x > float("-inf"))
            tl.store(gQ + id_, tl.where(is_empty, 0.0, x).to(q.of.logits.dtype.element_ty), mask=kept)
    return draft.to(tl.int64)


@triton.jit(
    do_not_specialize=["batch", "j", "num_spec_tokens", "num_served", "mask_id", "num_tokens", "stride_out"],
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
    gRowPart,  # fp32 [B, K, W]
    head,  # Head
    gState,  # fp32 [K, B, W]
    candidates,  # Candidates, the part that of draft j - 1
    gPositions,  # [B]
    gTemperature,  # [B]; so the next four
    gTopK,
    gTopP,
    gMinP,
    gSeed,
    q_logits,  # DraftLogits
    gQCut,  # [B, K]
    gQLogNorm,  # [B, K]
    gOut,  # int64 [B, K]
    batch,
    j,
    num_spec_tokens,
    num_served,
    mask_id,
    num_tokens,
    stride_out,
    shape: tl.constexpr,
    IS_FIRST: tl.constexpr,
):
    """BLOCK_W entries of s_j of several requests. Every CTA chooses draft j - 1 for itself, the first one writes it."""
    follow_previous_launch()
    W: tl.constexpr = shape.W
    H: tl.constexpr = shape.H
    BLOCK_W: tl.constexpr = shape.BLOCK_W
    TILES: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    parameters = SamplingParameters(temperature=gTemperature, top_k=gTopK, top_p=gTopP, min_p=gMinP, seed=gSeed)
    q = DraftDistributionArgs(of=q_logits, cut=gQCut, log_norm=gQLogNorm)
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
                    candidates, gPositions, parameters, q, request, j - 1, num_spec_tokens, mask_id, writes, shape
                )
                if writes:
                    tl.store(gOut + request * stride_out + j - 1, token)
            token = tl.minimum(tl.maximum(token, 0), num_tokens - 1)
            gX = head.embedding + token * head.stride_embedding
            y, squares = _product(head.from_previous, gX, n, head.stride_from_previous, W, H, BLOCK_W, shape.BLOCK_K)
            row_part = tl.load(gRowPart + (request * num_spec_tokens + j) * W + n, mask=n < W, other=0.0)
            x = row_part + y * _inverse_rms(squares, H)
            gMine = gState + (j * batch + request) * W
            if not IS_FIRST:
                gBefore = gMine - batch.to(tl.int64) * W
                carried, _ = _product(
                    head.from_state, gBefore, n, head.stride_from_state, W, W, BLOCK_W, shape.BLOCK_STATE
                )
                x += carried
            tl.store(gMine + n, silu_times(x, 1.0), mask=n < W)


@triton.jit(
    do_not_specialize=["batch", "j", "num_spec_tokens", "num_served"], do_not_specialize_on_alignment=["gNumDrafts"]
)
def _score_kernel(
    gNumDrafts,  # [B]
    gState,  # [K, B, W]
    gToQuery,  # [H, W]
    gHeadRows,  # [ids, H]
    gId,  # [B, K, 32]
    gPart,  # fp32 [B, SLICES, 32]
    batch,
    j,
    num_spec_tokens,
    num_served,
    stride_to_query,
    stride_head,
    shape: tl.constexpr,
):
    """BLOCK_H entries of the query u = Q s_j of several requests, and what they add to the scores of the candidates."""
    follow_previous_launch()
    W: tl.constexpr = shape.W
    H: tl.constexpr = shape.H
    BLOCK_H: tl.constexpr = shape.BLOCK_H
    SLICES: tl.constexpr = shape.SLICES
    slice_ = tl.program_id(0) % SLICES
    h = slice_ * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, kCandidates)
    first = (tl.program_id(0) // SLICES * num_served).to(tl.int64)
    for request in range(first, tl.minimum(first + num_served, batch)):
        if tl.load(gNumDrafts + request) > 0:
            id_ = tl.load(gId + (request * num_spec_tokens + j) * kCandidates + c).to(tl.int64)
            gRows = gHeadRows + id_[:, None] * stride_head + h[None, :]
            direction = tl.load(gRows, mask=(h < H)[None, :], other=0.0).to(tl.float32)
            gX = gState + (j * batch + request) * W
            query, _ = _product(gToQuery, gX, h, stride_to_query, H, W, BLOCK_H, shape.BLOCK_STATE)
            part = tl.sum(direction * query[None, :], axis=1)
            place = request * SLICES + slice_
            tl.store(gPart + place * kCandidates + c, part)


@triton.jit(
    do_not_specialize=["num_spec_tokens", "mask_id", "stride_drafts", "stride_out"],
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
    candidates,  # Candidates
    gPositions,  # [B]
    gTemperature,  # [B]; so the next four
    gTopK,
    gTopP,
    gMinP,
    gSeed,
    q_logits,  # DraftLogits
    gQCut,  # [B, K]
    gQLogNorm,  # [B, K]
    gOut,  # int64 [B, K]
    num_spec_tokens,
    mask_id,
    stride_drafts,
    stride_out,
    shape: tl.constexpr,
    BLOCK_DRAFTS: tl.constexpr,
):
    """The last draft of a request, or its drafts as they were."""
    follow_previous_launch()
    parameters = SamplingParameters(temperature=gTemperature, top_k=gTopK, top_p=gTopP, min_p=gMinP, seed=gSeed)
    q = DraftDistributionArgs(of=q_logits, cut=gQCut, log_norm=gQLogNorm)
    request = tl.program_id(0).to(tl.int64)
    gMine = gOut + request * stride_out
    if tl.load(gNumDrafts + request) > 0:
        draft = _choose(
            candidates, gPositions, parameters, q, request, num_spec_tokens - 1, num_spec_tokens, mask_id, True, shape
        )
        tl.store(gMine + num_spec_tokens - 1, draft)
    else:
        i = tl.arange(0, BLOCK_DRAFTS)
        before = tl.load(gDrafts + request * stride_drafts + i, mask=i < num_spec_tokens, other=-1)
        tl.store(gMine + i, before, mask=i < num_spec_tokens)
