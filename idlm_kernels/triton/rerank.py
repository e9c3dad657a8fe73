"""rerank_drafts: 3 + 2 K launches, none of which waits for the host (in torch the same is some 100).

1. The largest logit of every 16 and every 256 ids of the K rows; for `rejection` it also clears the distributions.
2. Each row's 32 best candidates, in the 32 best chunks of the 32 best groups: three sorts of 1024, 512 and 512 (of two
   levels, 4096 and 2048 would be three times the work). Beside it the product of from_hidden with all rows.
3. For each draft: the head's state, whose CTAs first choose the draft before it; then slices of the query and what they
   add to the scores. Each CTA repeats the choice: a few hundred numbers, cheaper than a broadcast.
4. The last choice.

Bytes: the K logits rows once, 32 rows of the LM head and all matrices for each draft: at Qwen3-8B (H 4096, W 256) and
K = 3 0.9 MB of logits, 0.8 MB of the head and 19 MB of matrices, of which 6.4 MB are distinct: the rest comes out of
L2. Of many requests eight share what a CTA reads of a matrix. Counted, not measured.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

import python_ref
from idlm_kernels.triton.common import launch, next_power_of_2
from idlm_kernels.triton.rerank_candidates import _candidates_kernel, _maxima_kernel, kChunk, kGroup
from idlm_kernels.triton.rerank_kernel import (
    Candidates,
    Head,
    Shape,
    _last_kernel,
    _score_kernel,
    _state_kernel,
    kCandidates,
)
from idlm_kernels.triton.structs import DraftLogits
from python_ref import DraftDistributions

kBlockGroups = 16  # of a CTA that looks for maxima: 4096 ids
kBlockW = 4  # entries of the state per CTA: 64 CTAs at W 256
kBlockH = 64  # entries of the query per CTA: 64 CTAs at H 4096
kMinCtas = 264  # 2 for each of the 132 SMs of an H100
kMaxServed = 8


def num_served(count: int, tiles: int) -> int:
    """How many of `count` requests (or rows) a CTA serves, one after the other: the weights it reads stay in its L1 for
    them, but few requests are better served side by side. No result depends on it."""
    return max(min(count * tiles // kMinCtas, kMaxServed), 1)


def rerank_drafts(
    logits: Tensor,
    hidden: Tensor,
    first_mask: Tensor,
    previous: Tensor,
    positions: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    embedding: Tensor,
    head_rows: Tensor,
    from_hidden: Tensor,
    from_previous: Tensor,
    from_state: Tensor,
    to_query: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    draft_dists: DraftDistributions | None = None,
    greedy: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.rerank_drafts`."""
    request = (first_mask, previous, positions, drafts, num_drafts, temperature, top_k, top_p, min_p, seed)
    weights = (embedding, head_rows, from_hidden, from_previous, from_state, to_query)
    (batch, num_spec_tokens), (num_rows, vocab_size), size = drafts.shape, logits.shape, hidden.shape[1]
    if batch == 0 or num_spec_tokens == 0 or torch.float64 in (x.dtype for x in (logits, hidden, *weights)):
        rest = (id_limit, mask_id)
        return python_ref.rerank_drafts(
            logits, hidden, *request, *weights, *rest, draft_dists=draft_dists, greedy=greedy, out=out
        )
    result = torch.empty_like(drafts) if out is None else out
    width, num_groups = from_hidden.shape[0], triton.cdiv(id_limit, kChunk * kGroup)
    slices = triton.cdiv(size, kBlockH)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    chunk_max, group_max = (
        scratch(batch, num_spec_tokens, num_groups, kGroup),
        scratch(batch, num_spec_tokens, num_groups),
    )
    row_part = scratch(batch, num_spec_tokens, width)
    value, ids = (
        scratch(batch, num_spec_tokens, kCandidates),
        scratch(batch, num_spec_tokens, kCandidates, dtype=torch.int32),
    )
    state, part = scratch(num_spec_tokens, batch, width), scratch(batch, slices, kCandidates)
    cut, log_norm = (None, None) if draft_dists is None else (draft_dists.cut, draft_dists.log_norm)
    scored = (Candidates(part, value, ids), positions, temperature, top_k, top_p, min_p, seed)
    q = DraftLogits.of(draft_dists)
    shape = Shape(
        H=size,
        W=width,
        BLOCK_W=kBlockW,
        BLOCK_H=kBlockH,
        BLOCK_K=min(next_power_of_2(size), 1024),
        BLOCK_STATE=min(next_power_of_2(width), 256),
        SLICES=slices,
        BLOCK_SLICES=next_power_of_2(slices),
        HAS_Q=draft_dists is not None,
    )

    groups = num_groups if draft_dists is None else triton.cdiv(vocab_size, kChunk * kGroup)
    launch(
        _maxima_kernel,
        (batch * num_spec_tokens, triton.cdiv(groups, kBlockGroups)),
        logits,
        logits,
        first_mask,
        num_drafts,
        chunk_max,
        group_max,
        q.logits,
        num_spec_tokens,
        num_rows,
        logits.stride(0),
        q.stride_request,
        q.stride_draft,
        vocab_size,
        id_limit,
        mask_id,
        num_groups,
        HAS_Q=draft_dists is not None,
        BLOCK_GROUPS=kBlockGroups,
        num_warps=4,
    )
    w_tiles = triton.cdiv(width, kBlockW)
    served = num_served(batch * num_spec_tokens, w_tiles)
    launch(
        _candidates_kernel,
        (batch * num_spec_tokens + w_tiles * triton.cdiv(batch * num_spec_tokens, served),),
        logits,
        logits,
        hidden,
        first_mask,
        num_drafts,
        from_hidden,
        chunk_max,
        group_max,
        value,
        ids,
        row_part,
        batch,
        num_spec_tokens,
        num_rows,
        served,
        logits.stride(0),
        hidden.stride(0),
        from_hidden.stride(0),
        vocab_size,
        id_limit,
        mask_id,
        num_groups,
        shape=shape,
        BLOCK_GROUPS=max(next_power_of_2(num_groups), kCandidates),
        num_warps=4,
    )
    strides = (embedding.stride(0), from_previous.stride(0), from_state.stride(0))
    head = Head(embedding, from_previous, from_state, *strides)
    by_state, by_query = num_served(batch, w_tiles), num_served(batch, slices)
    for j in range(num_spec_tokens):
        launch(
            _state_kernel,
            (w_tiles * triton.cdiv(batch, by_state),),
            logits,
            previous,
            num_drafts,
            row_part,
            head,
            state,
            *scored,
            q,
            cut,
            log_norm,
            result,
            batch,
            j,
            num_spec_tokens,
            by_state,
            mask_id,
            embedding.shape[0],
            result.stride(0),
            shape=shape,
            IS_FIRST=j == 0,
            num_warps=4,
        )
        launch(
            _score_kernel,
            (slices * triton.cdiv(batch, by_query),),
            logits,
            num_drafts,
            state,
            to_query,
            head_rows,
            ids,
            part,
            batch,
            j,
            num_spec_tokens,
            by_query,
            to_query.stride(0),
            head_rows.stride(0),
            shape=shape,
            num_warps=8,
        )
    launch(
        _last_kernel,
        (batch,),
        logits,
        num_drafts,
        drafts,
        *scored,
        q,
        cut,
        log_norm,
        result,
        num_spec_tokens,
        mask_id,
        drafts.stride(0),
        result.stride(0),
        shape=shape,
        BLOCK_DRAFTS=next_power_of_2(num_spec_tokens),
        num_warps=4,
    )
    return result
