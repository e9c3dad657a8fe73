"""top_logprobs: one launch, a CTA for each token that a step may have committed.

It walks its row twice, first for the normaliser, as commit_step does and in the same order, then for the best: of each
2,048 ids the 32 largest join the 32 best so far, and the 32 best of the 64 stay. Bytes: the row once, and once more out
of L2. Sorting is what takes the time, 75 blocks of a vocabulary of 151,936; only steps that somebody asks pay for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

import python_ref
from idlm_kernels.triton.common import follow_previous_launch, launch
from idlm_kernels.triton.rerank_candidates import _packed, _unpacked
from idlm_kernels.triton.step import _log_sum_exp

kListed = tl.constexpr(32)
kBlock = tl.constexpr(2048)  # ids at a time


@triton.jit(
    do_not_specialize=[
        *("num_tokens", "num_rows", "count", "id_limit"),
        *("stride_tokens", "stride_ids_request", "stride_ids_token"),
        *("stride_logprobs_request", "stride_logprobs_token"),
    ],
    do_not_specialize_on_alignment=["gQueryStart", "gTokens", "gIds", "gLogprobs"],
)
def _top_kernel(
    gLogits,  # [T, V]
    gQueryStart,  # [B + 1]
    gTokens,  # [B, N]
    gIds,  # [B, N, count]
    gLogprobs,  # [B, N, count]
    num_tokens,
    num_rows,
    vocab_size,
    count,
    id_limit,
    stride_logits,
    stride_tokens,
    stride_ids_request,
    stride_ids_token,
    stride_logprobs_request,
    stride_logprobs_token,
):
    follow_previous_launch()
    b, i = (tl.program_id(0) // num_tokens).to(tl.int64), tl.program_id(0) % num_tokens
    place = tl.arange(0, kListed)
    best_id = tl.full([kListed], -1, tl.int64)
    logprob = tl.zeros([kListed], tl.float32)
    if tl.load(gTokens + b * stride_tokens + i) >= 0:
        row = tl.minimum(tl.load(gQueryStart + b) + i, num_rows - 1).to(tl.int64)
        gRow = gLogits + row * stride_logits
        best = _packed(tl.full([kListed], float("-inf"), tl.float32), id_limit + place)  # behind all that are listed
        for first in range(0, id_limit, kBlock):
            id_ = first + tl.arange(0, kBlock)
            x = tl.load(gRow + id_, mask=id_ < id_limit, other=float("-inf")).to(tl.float32)
            x = tl.where(x == x, tl.where(x == 0.0, 0.0, x), float("-inf"))  # -0.0 and 0.0 tie
            best = tl.topk(tl.cat(best, tl.topk(_packed(x, id_), kListed), can_reorder=True), kListed)
        _, id_ = _unpacked(best)
        is_listed = place < count
        x = tl.load(gRow + id_, mask=is_listed, other=0.0).to(tl.float32)
        logprob = x - _log_sum_exp(gRow, vocab_size)
        best_id = id_.to(tl.int64)
    tl.store(gIds + b * stride_ids_request + i * stride_ids_token + place, best_id, mask=place < count)
    gMine = gLogprobs + b * stride_logprobs_request + i * stride_logprobs_token + place
    tl.store(gMine, logprob, mask=place < count)


def top_logprobs(
    logits: Tensor,
    query_start_loc: Tensor,
    tokens: Tensor,
    count: int,
    id_limit: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `idlm_kernels.top_logprobs`."""
    if tokens.numel() == 0 or logits.dtype == torch.float64:
        return python_ref.top_logprobs(logits, query_start_loc, tokens, count, id_limit, out=out)
    if out is None:
        shape = (*tokens.shape, count)
        out = tokens.new_empty(shape), logits.new_empty(shape, dtype=torch.float32)
    launch(
        _top_kernel,
        (tokens.numel(),),
        logits,
        logits,
        query_start_loc,
        tokens,
        *out,
        tokens.shape[1],
        *logits.shape,
        count,
        id_limit,
        logits.stride(0),
        tokens.stride(0),
        *out[0].stride()[:2],
        *out[1].stride()[:2],
        num_warps=4,
    )
    return out
