"""The first two launches of rerank_drafts: each MASK row's best candidates, and from_hidden times the rows.

The 32 best entries of a row lie in the 32 chunks of 16 ids with the largest maxima, and those in the 32 groups of 16
chunks with the largest. Bytes: the K logits rows of a request once, and 41 KB of what the first launch found in them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from idlm_kernels.triton.common import follow_previous_launch
from idlm_kernels.triton.rerank_kernel import _inverse_rms, _product, kCandidates
from idlm_kernels.triton.rows import key_of, kLargest, kNoId, value_of

kChunk = tl.constexpr(16)  # ids
kGroup = tl.constexpr(16)  # chunks


@triton.jit
def _values(gRow, id_, vocab_size, id_limit, mask_id):
    """Logits of ids of one row, -inf where it cannot be sampled; never NaN, +inf or -0.0."""
    x = tl.load(gRow + id_, mask=id_ < vocab_size, other=0.0).to(tl.float32)
    x = tl.where((id_ < id_limit) & (id_ != mask_id) & (x == x), tl.minimum(x, kLargest), float("-inf"))
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _packed(x, i):
    """int64 in the order of x, and among equal ones the lower index i first."""
    return (key_of(x).to(tl.int64) << 32) | (i ^ kNoId).to(tl.int64)


@triton.jit
def _unpacked(packed):
    return value_of((packed >> 32).to(tl.int32)), (packed & kNoId).to(tl.int32) ^ kNoId


@triton.jit
def _mask_row(gFirstMask, request, j, num_rows):
    return tl.minimum(tl.maximum(tl.load(gFirstMask + request) + j, 0), num_rows - 1).to(tl.int64)


@triton.jit(
    do_not_specialize=["num_spec_tokens", "num_rows", "id_limit", "mask_id", "num_groups"],
    do_not_specialize_on_alignment=["gFirstMask", "gNumDrafts"],
)
def _maxima_kernel(
    gLogits,  # [T, V]
    gFirstMask,  # [B]
    gNumDrafts,  # [B]
    gChunkMax,  # fp32 [B, K, groups, kGroup]
    gGroupMax,  # fp32 [B, K, groups]
    gQLogits,  # [B, K, V]
    num_spec_tokens,
    num_rows,
    stride_logits,
    stride_q_request,
    stride_q_draft,
    vocab_size,
    id_limit,
    mask_id,
    num_groups,
    HAS_Q: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """The largest logit of every chunk of ids and of every group of chunks; distributions are cleared on the way."""
    follow_previous_launch()
    BLOCK_CHUNKS: tl.constexpr = BLOCK_GROUPS * kGroup
    place = tl.program_id(0).to(tl.int64)
    request, j = place // num_spec_tokens, place % num_spec_tokens
    if tl.load(gNumDrafts + request) <= 0:
        return
    gRow = gLogits + _mask_row(gFirstMask, request, j, num_rows) * stride_logits
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    chunk = tl.program_id(1) * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)
    id_ = chunk[:, None] * kChunk + tl.arange(0, kChunk)[None, :]
    best = tl.max(_values(gRow, id_, vocab_size, id_limit, mask_id), axis=1)
    tl.store(gChunkMax + place * num_groups * kGroup + chunk, best, mask=chunk < num_groups * kGroup)
    best = tl.max(tl.reshape(best, [BLOCK_GROUPS, kGroup]), axis=1)
    tl.store(gGroupMax + place * num_groups + group, best, mask=group < num_groups)
    if HAS_Q:
        gQ = gQLogits + request * stride_q_request + j * stride_q_draft
        nothing = tl.full([BLOCK_CHUNKS, kChunk], float("-inf"), gQLogits.dtype.element_ty)
        tl.store(gQ + id_, nothing, mask=id_ < vocab_size)


@triton.jit
def _best(x, i, COUNT: tl.constexpr):
    """The kCandidates largest of x [.., ..], COUNT in all, and their i: of ties those of the lowest i."""
    return _unpacked(tl.topk(tl.reshape(_packed(x, i), [COUNT]), kCandidates))


@triton.jit(
    do_not_specialize=["batch", "num_spec_tokens", "num_rows", "num_served", "id_limit", "mask_id", "num_groups"],
    do_not_specialize_on_alignment=["gFirstMask", "gNumDrafts"],
)
def _candidates_kernel(
    gLogits,  # [T, V]
    gHidden,  # [T, H]
    gFirstMask,  # [B]
    gNumDrafts,  # [B]
    gFromHidden,  # [W, H]
    gChunkMax,  # [B, K, groups, kGroup]
    gGroupMax,  # [B, K, groups]
    gValue,  # fp32 [B, K, 32]
    gId,  # int32 [B, K, 32]
    gRowPart,  # fp32 [B, K, W]
    batch,
    num_spec_tokens,
    num_rows,
    num_served,
    stride_logits,
    stride_hidden,
    stride_from_hidden,
    vocab_size,
    id_limit,
    mask_id,
    num_groups,
    shape: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """The first B K CTAs: the candidates of a row. Others: BLOCK_W entries of from_hidden unit(x) of several rows."""
    follow_previous_launch()
    W: tl.constexpr = shape.W
    H: tl.constexpr = shape.H
    BLOCK_W: tl.constexpr = shape.BLOCK_W
    num_mask_rows = batch * num_spec_tokens
    if tl.program_id(0) < num_mask_rows:
        place = tl.program_id(0).to(tl.int64)
        request, j = place // num_spec_tokens, place % num_spec_tokens
        if tl.load(gNumDrafts + request) > 0:
            g = tl.arange(0, BLOCK_GROUPS)
            largest = tl.load(gGroupMax + place * num_groups + g, mask=g < num_groups, other=float("-inf"))
            _, group = _best(largest, g, BLOCK_GROUPS)
            chunk = group[:, None] * kGroup + tl.arange(0, kGroup)[None, :]
            gMine = gChunkMax + place * num_groups * kGroup
            largest = tl.load(gMine + chunk, mask=chunk < num_groups * kGroup, other=float("-inf"))
            _, chunk = _best(largest, chunk, kCandidates * kGroup)
            id_ = chunk[:, None] * kChunk + tl.arange(0, kChunk)[None, :]
            gRow = gLogits + _mask_row(gFirstMask, request, j, num_rows) * stride_logits
            value = _values(gRow, id_, vocab_size, id_limit, mask_id)
            value, id_ = _best(value, id_, kCandidates * kChunk)
            i = place * kCandidates + tl.arange(0, kCandidates)
            tl.store(gValue + i, value)
            tl.store(gId + i, tl.minimum(id_, id_limit - 1))
    else:
        tile = tl.program_id(0) - num_mask_rows
        tiles: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
        n = tile % tiles * BLOCK_W + tl.arange(0, BLOCK_W)
        first = (tile // tiles * num_served).to(tl.int64)
        for row in range(first, tl.minimum(first + num_served, num_mask_rows)):
            if tl.load(gNumDrafts + row // num_spec_tokens) > 0:
                gX = (
                    gHidden
                    + _mask_row(gFirstMask, row // num_spec_tokens, row % num_spec_tokens, num_rows) * stride_hidden
                )
                y, squares = _product(gFromHidden, gX, n, stride_from_hidden, W, H, BLOCK_W, shape.BLOCK_K)
                tl.store(gRowPart + row * W + n, y * _inverse_rms(squares, H), mask=n < W)
