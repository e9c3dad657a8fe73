"""Every row of a call perturbed by its noise: the best (z + g, id) of each slice of ids, and what distributions need.

Slices of a row run side by side; each reads its logits once. Blocks of ids of which none is kept draw no noise. What
noise a MASK row takes is known before acceptance is, so one launch samples every row of a step. For `rejection` it also
sums up the kept exp(z), from which the normaliser of a row's distribution follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from idlm_kernels.triton.common import follow_previous_launch, launch, next_power_of_2
from idlm_kernels.triton.noise import noise
from idlm_kernels.triton.rows import (
    key_of,
    kFinite,
    kGreedyBelow,
    kInf,
    kNan,
    kNoId,
    or_,
    request_of,
    span_of,
    transformed,
)
from idlm_kernels.triton.structs import Logits, LogitsRow, SamplingParameters, Slices
from idlm_kernels.triton.truncation import SampleShape, _cut_kernel
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
    do_not_specialize=["batch", "num_spec_tokens", "id_limit", "mask_id", "slice_ids", "stream"],
    do_not_specialize_on_alignment=["gTemperature", "gMinP", "gSeed", "gPositions", "gQueryStart", "gNumDrafts"],
)
def _perturb_kernel(
    logits,  # Logits
    gTemperature,  # by row, or by request with BY_REQUEST; so the next three
    gMinP,
    gSeed,
    gPositions,  # of the predicted tokens; with BY_REQUEST of the pending ones
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gCut,  # [T]
    gLargest,  # [T]
    slices,  # Slices
    batch,
    num_spec_tokens,
    id_limit,
    mask_id,
    slice_ids,
    stream,
    shape: tl.constexpr,
    QUADRATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    follow_previous_launch()
    t = tl.program_id(0).to(tl.int64)
    owner = t
    if shape.BY_REQUEST:
        owner = request_of(gQueryStart, t, batch, shape.BLOCK_BATCH).to(tl.int64)
        if owner >= batch:
            return
    position = tl.load(gPositions + owner).to(tl.int32)
    if shape.BY_REQUEST:
        # Clean row i predicts position L + i; MASK row j of branch b predicts L + b + 1 + j (a chain has branch n).
        span = span_of(gQueryStart, gNumDrafts, owner, num_spec_tokens)
        n = span.n
        i = tl.program_id(0) - span.start
        k = tl.maximum(num_spec_tokens, 1)
        ahead = i
        if i > n:
            branch = n
            if QUADRATIC:
                branch = (i - n - 1) // k
            ahead = branch + 1 + (i - n - 1) % k
            if shape.WITH_DISTRIBUTION:
                stream = kStreamDraft
        position += 1 + ahead
    temperature, min_p = tl.load(gTemperature + owner), tl.load(gMinP + owner)
    is_greedy = temperature < kGreedyBelow
    least_share = min_p
    if not shape.WITH_DISTRIBUTION:
        least_share = tl.where(is_greedy, 0.0, min_p)
    seed = tl.load(gSeed + owner)
    cut, largest = tl.load(gCut + t), tl.load(gLargest + t)
    row = LogitsRow(logits=logits, row=t, temperature=temperature, id_limit=id_limit, mask_id=mask_id)

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], kNoId, tl.int32)
    flags = tl.zeros([BLOCK], tl.int32)
    kept_max = tl.full([BLOCK], float("-inf"), tl.float32)
    kept_total = tl.zeros([BLOCK], tl.float32)
    kept_least = tl.full([BLOCK], float("inf"), tl.float32)
    begin = tl.program_id(1) * slice_ids
    for first in range(begin, tl.minimum(begin + slice_ids, id_limit), BLOCK):
        id_ = first + tl.arange(0, BLOCK)
        z, is_nan, is_inf = transformed(row, id_)
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
            if shape.WITH_DISTRIBUTION:
                kept_max, kept_total = add_exp(kept_max, kept_total, tl.where(kept, z, float("-inf")))
                kept_least = tl.minimum(kept_least, tl.where(kept, z, float("inf")))
    score = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == score, best_id, kNoId), axis=0)
    place = t * tl.num_programs(1) + tl.program_id(1)
    tl.store(slices.score + place, score)
    tl.store(slices.ids + place, winner)
    tl.store(slices.flags + place, tl.reduce(flags, 0, or_))
    if shape.WITH_DISTRIBUTION:
        top = tl.max(kept_max, axis=0)
        tl.store(slices.max + place, top)
        tl.store(
            slices.total + place,
            tl.sum(kept_total * tl.exp(kept_max - tl.where(top == float("-inf"), 0.0, top)), axis=0),
        )
        tl.store(slices.least + place, tl.min(kept_least, axis=0))


@dataclass(frozen=True)
class SampledSlices:
    """Rows of which every slice is sampled: the slices, and how many ids each has."""

    slices: Slices
    slice_ids: int

    @property
    def count(self) -> int:
        return self.slices.score.shape[1]


def sampled_slices(
    logits: Logits,
    positions: Tensor,
    parameters: SamplingParameters,
    id_limit: int,
    mask_id: int,
    stream: int,
    query_start_loc: Tensor | None = None,
    num_drafts: Tensor | None = None,
    num_spec_tokens: int = 0,
    quadratic: bool = False,
    with_distribution: bool = False,
) -> SampledSlices:
    """Launches 1 and 2. `with_distribution` is for `rejection`: distributions too, and MASK rows are sampled with their
    own stream.

    Parameters and positions are by row, or, with query_start_loc, by request.
    """
    rows, num_rows = logits.data, logits.data.shape[0]
    count = min(triton.cdiv(id_limit, kMinSliceIds), kMaxSlices)
    slice_ids = triton.cdiv(triton.cdiv(id_limit, count), kBlockPerturb) * kBlockPerturb
    count = triton.cdiv(id_limit, slice_ids)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return rows.new_empty(*shape, dtype=dtype)

    score = scratch(num_rows, count)
    ids, flags = (scratch(num_rows, count, dtype=torch.int32) for _ in range(2))
    distribution = [scratch(num_rows, count) if with_distribution else None for _ in range(3)]
    slices = Slices(score, ids, flags, *distribution)
    cut, largest = scratch(num_rows, dtype=torch.int32), scratch(num_rows)
    near = scratch(num_rows, kMaxNear)
    batch, by_request = parameters.temperature.shape[0], query_start_loc is not None
    block = min(kBlockCut, max(next_power_of_2(id_limit), 256))
    shape = SampleShape(
        BY_REQUEST=by_request,
        WITH_DISTRIBUTION=with_distribution,
        BLOCK_BATCH=next_power_of_2(batch) if by_request else 1,
    )
    launch(
        _cut_kernel,
        (num_rows,),
        rows,
        logits,
        *parameters[:4],
        query_start_loc,
        cut,
        largest,
        near,
        batch,
        id_limit,
        mask_id,
        shape=shape,
        MAX_NEAR=kMaxNear,
        BLOCK=block,
        num_warps=block // 256,  # 16 bytes of bf16 per lane, and no lane without any
    )
    launch(
        _perturb_kernel,
        (num_rows, count),
        rows,
        logits,
        parameters.temperature,
        parameters.min_p,
        parameters.seed,
        positions,
        query_start_loc,
        num_drafts,
        cut,
        largest,
        slices,
        batch,
        num_spec_tokens,
        id_limit,
        mask_id,
        slice_ids,
        stream,
        shape=shape,
        QUADRATIC=quadratic,
        BLOCK=kBlockPerturb,
        num_warps=4,
    )
    return SampledSlices(slices, slice_ids)
