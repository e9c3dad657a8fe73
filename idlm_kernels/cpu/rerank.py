"""Re-ranking on a CPU: the compiled kernels where there are some and the rule is `match`, the reference elsewhere."""

from __future__ import annotations

from torch import Tensor

import python_ref
from idlm_kernels.cpu.step import Sampling, rerank
from python_ref import DraftDistributions


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
    """The drafts of requests with num_drafts > 0 chosen again, one after the other; see the reference."""
    weights = (embedding, head_rows, from_hidden, from_previous, from_state, to_query)
    if draft_dists is None:
        found = rerank(
            *(logits, hidden, first_mask, previous, positions, drafts, num_drafts),
            Sampling(temperature, top_k, top_p, min_p, seed),
            *(embedding, head_rows, (from_hidden, from_previous, from_state, to_query), id_limit, mask_id),
        )
        if found is not None:
            return found if out is None else out.copy_(found)
    request = (first_mask, previous, positions, drafts, num_drafts, temperature, top_k, top_p, min_p, seed)
    return python_ref.rerank_drafts(
        logits, hidden, *request, *weights, id_limit, mask_id, draft_dists=draft_dists, greedy=greedy, out=out
    )
