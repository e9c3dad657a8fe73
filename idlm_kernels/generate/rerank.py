"""The next drafts, chosen again by the adapter's re-ranking head. No effect on output in `match`."""

from __future__ import annotations

import torch
from torch import Tensor

from idlm_kernels import ops
from idlm_kernels.cpu.step import Sampling, rerank
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.model.transformer import Transformer
from python_ref import DraftDistributions


def rerank_drafts(
    model: Transformer,
    state: DecodeState,
    logits: Tensor,
    hidden: Tensor,
    first_mask: Tensor,
    num_accepted: Tensor,
    tokens: Tensor,
    next_drafts: Tensor,
    next_num_drafts: Tensor,
    draft_dists: DraftDistributions | None,
    *,
    greedy: bool = False,
) -> Tensor:
    """`ops.rerank_drafts` with the model's head, after verification.

    logits [T, V], hidden [T, H]: of the step; first_mask int32 [B]: the row of the first of a request's K MASK rows;
    num_accepted, tokens, next_drafts, next_num_drafts: of verification; `state` as it was then.
    """
    head = model.rerank_head
    assert head is not None
    previous = tokens.gather(1, num_accepted.long().unsqueeze(1)).squeeze(1)
    positions = torch.add(state.lengths, num_accepted)
    if model.stack is not None and draft_dists is None:  # on the weights as they are packed
        small = (head.from_hidden, head.from_previous, head.from_state, head.to_query)
        found = rerank(
            *(logits, hidden, first_mask, previous, positions, next_drafts, next_num_drafts),
            Sampling(state.temperature, state.top_k, state.top_p, state.min_p, state.seed),
            *(model.stack.embedding, model.stack.head, small, state.id_limit, state.sampled_mask_id),
        )
        if found is not None:
            return found
    return ops.rerank_drafts(
        logits,
        hidden,
        first_mask,
        previous,
        positions,
        next_drafts,
        next_num_drafts,
        state.temperature,
        state.top_k,
        state.top_p,
        state.min_p,
        state.seed,
        model.embedding,
        model.head_rows,
        head.from_hidden,
        head.from_previous,
        head.from_state,
        head.to_query,
        state.id_limit,
        state.sampled_mask_id,
        draft_dists=draft_dists,
        greedy=greedy,
    )
