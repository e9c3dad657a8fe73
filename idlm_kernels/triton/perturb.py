"""Every row of a call perturbed by its noise: the best (z + g, id) of each slice of ids, and what laws need.

Slices of a row run side by side; each reads its logits once. Blocks of ids of which none is kept draw no noise. What
noise a MASK row takes is known before acceptance is, so one launch samples every row of a step. For `rejection` it also
sums up the kept exp(z), from which the normaliser of a row's law follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idlm_kernels.triton.common import launch, next_power_of_2
from idlm_kernels.triton.noise import noise
from idlm_kernels.triton.rows import (
    draft_count,
    key_of,
    kFinite,
    kGreedyBelow,
    kInf,
    kNan,
    kNoId,
    or_,
    request_of,
    transformed,
)
from idlm_kernels.triton.truncation import _cut_kernel
from python_ref import STREAM_DRAFT

kMaxNear = 8192
kBlockCut = 2048
kBlockPerturb = 1024
kMinSliceIds = 4096
kMaxSlices = 32
kStreamDraft = tl.constexpr(STREAM_DRAFT)


@triton.jit
def add_exp(largest, total, z):
    """(largest, sum of exp(z - largest)) with one more z, elementwise; -inf adds nothing."""
    new = tl.maximum(largest, z)
    finite = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(largest - finite) + tl.exp(z - finite)


@triton.jit(
    do_not_specialize=["batch", "num_k", "id_limit", "mask_id", "slice_ids", "stream"],
    do_not_specialize_on_alignment=["gTemperature", "gMinP", "gSeed", "gPositions", "gQueryStart", "gNumDrafts"],
)
def _perturb_kernel(
    gLogits,  # [T, V]
    gBias,  # [T, V]
    gTemperature,  # by row, or by request with BY_REQUEST; so the next three
    gMinP,
    gSeed,
    gPositions,  # of the predicted tokens; with BY_REQUEST of the pending ones
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gCut,  # [T]
    gLargest,  # [T]
    gScore,  # fp32 [T, slices]
    gId,  # int32 [T, slices]
    gFlags,  # int32 [T, slices]
    gMax,  # fp32 [T, slices]: the largest kept z; this and the next two with LAW
    gTotal,  # fp32 [T, slices]: the sum of exp(z - largest) over what is kept
    gLeast,  # fp32 [T, slices]: the least kept z
    batch,
    num_k,
    stride_logits,
    stride_bias,
    vocab_size,
    id_limit,
    mask_id,
    slice_ids,
    stream,
    BY_REQUEST: tl.constexpr,
    BRANCHED: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    owner = row
    if BY_REQUEST:
        owner = request_of(gQueryStart, row, batch, BLOCK_BATCH).to(tl.int64)
        if owner >= batch:
            return
    position = tl.load(gPositions + owner).to(tl.int32)
    if BY_REQUEST:
        # Clean row i predicts position L + i; MASK row j of branch b predicts L + b + 1 + j (a chain has branch n).
        start = tl.load(gQueryStart + owner)
        n = draft_count(gNumDrafts, owner, tl.load(gQueryStart + owner + 1) - start, num_k)
        i = tl.program_id(0) - start
        k = tl.maximum(num_k, 1)
        ahead = i
        if i > n:
            branch = n
            if BRANCHED:
                branch = (i - n - 1) // k
            ahead = branch + 1 + (i - n - 1) % k
            if LAW:
                stream = kStreamDraft
        position += 1 + ahead
    temperature, min_p = tl.load(gTemperature + owner), tl.load(gMinP + owner)
    is_greedy = temperature < kGreedyBelow
    least_share = min_p
    if not LAW:
        least_share = tl.where(is_greedy, 0.0, min_p)
    seed = tl.load(gSeed + owner)
    cut, largest = tl.load(gCut + row), tl.load(gLargest + row)
    gRow = gLogits + row * stride_logits
    gRowBias = gBias + row * stride_bias if HAS_BIAS else gBias

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], kNoId, tl.int32)
    flags = tl.zeros([BLOCK], tl.int32)
    kept_max = tl.full([BLOCK], float("-inf"), tl.float32)
    kept_total = tl.zeros([BLOCK], tl.float32)
    kept_least = tl.full([BLOCK], float("inf"), tl.float32)
    begin = tl.program_id(1) * slice_ids
    for first in range(begin, tl.minimum(begin + slice_ids, id_limit), BLOCK):
        id_ = first + tl.arange(0, BLOCK)
        z, is_nan, is_inf = transformed(gRow, gRowBias, id_, temperature, vocab_size, id_limit, mask_id, HAS_BIAS)
        flags |= tl.where(is_nan, kNan, 0) | tl.where(is_inf, kInf, 0) | tl.where(z > float("-inf"), kFinite, 0)
        kept = (z > float("-inf")) & (key_of(z) >= cut)
        if least_share > 0.0:
            kept = kept & ((tl.exp(z - largest) >= least_share) | (z == largest))
        if tl.max(kept.to(tl.int32), axis=0) != 0:
            score = z
            if not is_greedy:
                score = z + noise(seed, first // 4 + tl.arange(0, BLOCK // 4), position, stream, BLOCK // 4)
            is_better = kept & (score > best)
            best = tl.where(is_better, score, best)
            best_id = tl.where(is_better, id_, best_id)
            if LAW:
                kept_max, kept_total = add_exp(kept_max, kept_total, tl.where(kept, z, float("-inf")))
                kept_least = tl.minimum(kept_least, tl.where(kept, z, float("inf")))
    score = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == score, best_id, kNoId), axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(gScore + place, score)
    tl.store(gId + place, winner)
    tl.store(gFlags + place, tl.reduce(flags, 0, or_))
    if LAW:
        top = tl.max(kept_max, axis=0)
        tl.store(gMax + place, top)
        tl.store(
            gTotal + place, tl.sum(kept_total * tl.exp(kept_max - tl.where(top == float("-inf"), 0.0, top)), axis=0)
        )
        tl.store(gLeast + place, tl.min(kept_least, axis=0))


@dataclass(frozen=True)
class SampledSlices:
    """What the rows' slices hold, each [T, slices]: the best score, its id, flags; for laws also the largest kept z,
    the sum of exp(z - largest) and the least kept z. A slice has `slice_ids` ids."""

    score: Tensor
    ids: Tensor
    flags: Tensor
    law: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]
    slice_ids: int


def sampled_slices(
    logits: Tensor,
    positions: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    id_limit: int,
    mask_id: int,
    stream: int,
    logit_bias: Tensor | None,
    query_start_loc: Tensor | None = None,
    num_drafts: Tensor | None = None,
    num_k: int = 0,
    branched: bool = False,
    with_law: bool = False,
) -> SampledSlices:
    """Launches 1 and 2. `with_law` is for `rejection`: laws too, and MASK rows are sampled with their own stream.

    Parameters (temperature, top_k, top_p, min_p, seed) and positions are by row, or, with query_start_loc, by request.
    """
    num_rows = logits.shape[0]
    slices = min(triton.cdiv(id_limit, kMinSliceIds), kMaxSlices)
    slice_ids = triton.cdiv(triton.cdiv(id_limit, slices), kBlockPerturb) * kBlockPerturb
    slices = triton.cdiv(id_limit, slice_ids)
    score = logits.new_empty(num_rows, slices, dtype=torch.float32)
    ids, flags = (logits.new_empty(num_rows, slices, dtype=torch.int32) for _ in range(2))
    law: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None)
    if with_law:
        law = torch.empty_like(score), torch.empty_like(score), torch.empty_like(score)
    cut = logits.new_empty(num_rows, dtype=torch.int32)
    largest = logits.new_empty(num_rows, dtype=torch.float32)
    near = logits.new_empty(num_rows, kMaxNear, dtype=torch.float32)
    temperature, top_k, top_p, min_p, seed = parameters
    batch = temperature.shape[0]
    by_request = query_start_loc is not None
    block = min(kBlockCut, max(next_power_of_2(id_limit), 256))
    common = {
        "BY_REQUEST": by_request,
        "LAW": with_law,
        "BLOCK_BATCH": next_power_of_2(batch) if by_request else 1,
        "HAS_BIAS": logit_bias is not None,
    }
    strides = (logits.stride(0), 0 if logit_bias is None else logit_bias.stride(0))
    launch(
        _cut_kernel,
        (num_rows,),
        logits,
        logits,
        logit_bias,
        temperature,
        top_k,
        top_p,
        min_p,
        query_start_loc,
        cut,
        largest,
        near,
        batch,
        *strides,
        logits.shape[1],
        id_limit,
        mask_id,
        MAX_NEAR=kMaxNear,
        BLOCK=block,
        num_warps=block // 256,  # 16 bytes of bf16 per lane, and no lane without any
        **common,
    )
    launch(
        _perturb_kernel,
        (num_rows, slices),
        logits,
        logits,
        logit_bias,
        temperature,
        min_p,
        seed,
        positions,
        query_start_loc,
        num_drafts,
        cut,
        largest,
        score,
        ids,
        flags,
        *law,
        batch,
        num_k,
        *strides,
        logits.shape[1],
        id_limit,
        mask_id,
        slice_ids,
        stream,
        BRANCHED=branched,
        BLOCK=kBlockPerturb,
        num_warps=4,
        **common,
    )
    return SampledSlices(score, ids, flags, law, slice_ids)
