"""Drafts re-ranked by a head, each with the token before it in view.

A MASK row proposes the token two places on without knowing the one in between. From the row's hidden state, that
token's embedding and a small state carried from draft to draft, the head makes a query u; each of the row's best
candidates c gains head_c . u, where head_c is its row of the LM head. The sampling transform and the noise are those of
`sample_rows`, on the candidates alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from python_ref.contract import GREEDY_BELOW, NUM_CANDIDATES, STREAM_DRAFT, STREAM_TARGET, DraftDistributions
from python_ref.noise import gumbel_at
from python_ref.sampling import log_norm_of, scale_by_temperature, truncation_cut

_CHUNK = 64


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
    """The drafts int64 [B, K], those of requests with num_drafts > 0 chosen again, one after the other.

    logits [T, V] and hidden [T, H]: of the step; first_mask int32 [B]: the row of the first of a request's K MASK rows;
    previous int64 [B] and positions int32 [B]: the token that the first draft follows and its position. draft_dists is
    given for `rejection`, and then written. greedy: all temperatures are 0; spares the noise, changes nothing else.
    """
    num_spec_tokens = drafts.shape[1]
    acc = torch.promote_types(logits.dtype, torch.float32)
    j = torch.arange(num_spec_tokens, device=logits.device)
    rows = (first_mask.unsqueeze(1) + j).clamp(0, logits.shape[0] - 1)
    values, ids = best_candidates(F.embedding(rows, logits), id_limit, mask_id)
    directions = F.embedding(ids, head_rows).to(acc)  # [B, K, C, H]
    row_parts = F.linear(unit(F.embedding(rows, hidden).to(acc)), from_hidden.to(acc))  # [B, K, W]
    from_previous, from_state, to_query = from_previous.to(acc), from_state.to(acc), to_query.to(acc)
    noise = None
    if draft_dists is not None or not greedy:
        where = positions.unsqueeze(1) + 1 + j
        stream = STREAM_TARGET if draft_dists is None else STREAM_DRAFT
        noise = gumbel_at(seed.unsqueeze(1).expand(where.shape), where, ids, stream, acc)
    chosen = num_drafts > 0
    lowest = 1 if mask_id == 0 else 0

    draft, found = previous.clamp(0, len(embedding) - 1), []
    state: Tensor | None = None
    for i in range(num_spec_tokens):
        before = F.embedding(draft, embedding).to(acc)
        state = next_state(row_parts[:, i], before, state, from_previous, from_state)
        scores = values[:, i] + (directions[:, i] @ F.linear(state, to_query).unsqueeze(2)).squeeze(2)
        if draft_dists is not None:
            scores = scores.to(draft_dists.logits.dtype).to(acc)  # the distribution is of what is kept
        scores = scores.nan_to_num(nan=-math.inf, neginf=-math.inf)
        score = scores
        if noise is not None:
            z = scale_by_temperature(scores, temperature)
            cut = truncation_cut(z, top_k, top_p, min_p)
            noisy = (z + noise[:, i]).masked_fill(z < cut.unsqueeze(1), -math.inf)
            score = torch.where(temperature.unsqueeze(1) < GREEDY_BELOW, z, noisy)
        best = score.max(1, keepdim=True)  # the first of ties, and ids ascend
        is_empty = best.values == -math.inf  # a point mass on the lowest allowed id, as in `sample_rows`
        draft = torch.where(is_empty, lowest, ids[:, i].gather(1, best.indices)).squeeze(1)
        found.append(draft)
        if draft_dists is not None:
            _record(draft_dists, i, chosen, is_empty.squeeze(1), lowest, ids[:, i], scores, cut, log_norm_of(z, cut))
    result = torch.where(chosen.unsqueeze(1), torch.stack(found, dim=1), drafts) if found else drafts.clone()
    return result if out is None else out.copy_(result)


def next_state(
    row_part: Tensor, previous: Tensor, state: Tensor | None, from_previous: Tensor, from_state: Tensor
) -> Tensor:
    """The head's state [..., W] for one more draft.

    row_part [..., W]: from_hidden unit(hidden row); previous [..., H]: embedding of the token before the draft; state
    [..., W]: as the draft before left it, None for the first.
    """
    x = row_part + F.linear(unit(previous), from_previous)
    return F.silu(x if state is None else x + F.linear(state, from_state))


def unit(x: Tensor) -> Tensor:
    """x / rms(x), over the last dimension."""
    return F.rms_norm(x, x.shape[-1:])


def best_candidates(logits: Tensor, id_limit: int, mask_id: int) -> tuple[Tensor, Tensor]:
    """Values and ids [..., C] of the C best entries of logits [..., V] that may be sampled, in the order of ids.

    Of ties the lowest ids. Where fewer may be sampled, the rest has the value -inf. The best C lie in the C chunks with
    the largest maxima.
    """
    acc = torch.promote_types(logits.dtype, torch.float32)
    x = logits[..., :id_limit].to(acc).nan_to_num(nan=-math.inf, neginf=-math.inf)
    if 0 <= mask_id < id_limit:
        x[..., mask_id] = -math.inf
    if id_limit % _CHUNK:
        x = F.pad(x, (0, -id_limit % _CHUNK), value=-math.inf)
    x = x.unflatten(-1, (-1, _CHUNK))
    count = min(NUM_CANDIDATES, id_limit)
    chunks = _first_largest(x.amax(-1), min(count, x.shape[-2]))
    found = x.gather(-2, chunks.unsqueeze(-1).expand(*chunks.shape, _CHUNK)).flatten(-2)
    places = _first_largest(found, count)
    ids = chunks.gather(-1, places // _CHUNK) * _CHUNK + places % _CHUNK
    return found.gather(-1, places), ids.clamp(max=id_limit - 1)


def _first_largest(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest entries of the last dimension are, of ties the first ones; in ascending order."""
    size = x.shape[-1]
    least = x.topk(count, dim=-1).values[..., -1:]
    rank = torch.arange(size, 0, -1, dtype=torch.int32, device=x.device) * (x == least)
    return rank.masked_fill_(x > least, size + 1).topk(count, dim=-1, sorted=False).indices.sort(-1).values


def _record(
    draft_dists: DraftDistributions,
    i: int,
    chosen: Tensor,
    is_empty: Tensor,
    lowest: int,
    ids: Tensor,
    scores: Tensor,
    cut: Tensor,
    log_norm: Tensor,
) -> None:
    """Keep the distribution of draft i where it was chosen: -inf but for the candidates."""
    row = torch.full_like(draft_dists.logits[:, i], -math.inf)
    row.scatter_reduce_(1, ids, scores.to(row.dtype), "amax")  # an id that fills up may stand twice
    row[:, lowest] = row[:, lowest].masked_fill(is_empty, 0.0)
    cut, log_norm = cut.masked_fill(is_empty, 0.0), log_norm.masked_fill(is_empty, 0.0)
    draft_dists.logits[:, i] = torch.where(chosen.unsqueeze(1), row, draft_dists.logits[:, i])
    draft_dists.cut[:, i] = torch.where(chosen, cut, draft_dists.cut[:, i])
    draft_dists.log_norm[:, i] = torch.where(chosen, log_norm, draft_dists.log_norm[:, i])
