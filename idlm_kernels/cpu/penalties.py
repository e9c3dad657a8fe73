"""Penalties on a CPU: of each request the tokens that it has, and no row of the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

import python_ref
from python_ref import Penalties
from python_ref.penalties import penalised


def apply_penalties(
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    text: Tensor,
    lengths: Tensor,
    penalties: Penalties,
    *,
    quadratic: bool,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.apply_penalties`; the bits are those of the reference."""
    if logits.dtype == torch.float64:
        return python_ref.apply_penalties(
            *(logits, query_start_loc, num_drafts, drafts, text, lengths, penalties), quadratic=quadratic, out=out
        )
    if out is None:
        out = logits.clone()
    elif out.data_ptr() != logits.data_ptr():
        out.copy_(logits)
    presence, frequency, repetition = penalties.presence, penalties.frequency, penalties.repetition
    asks = (presence != 0) | (frequency != 0) | (repetition != 1) | (penalties.bias_ids >= 0).any(1)
    (num_rows, vocab_size), num_spec_tokens = logits.shape, drafts.shape[1]
    starts = query_start_loc.clamp(max=num_rows).tolist()
    for b in asks.nonzero().flatten().tolist():
        rows = out[starts[b] : starts[b + 1]]
        n = min(max(int(num_drafts[b]), 0), num_spec_tokens, max(len(rows) - 1, 0))
        length, prompt_length = int(lengths[b]), int(penalties.prompt_lengths[b])
        prompt, output = text[b, : min(prompt_length, length)], text[b, min(prompt_length, length) : length]
        bias_ids = penalties.bias_ids[b]
        ids = torch.cat([prompt, output, drafts[b, :n], bias_ids]).unique()
        ids = ids[(ids >= 0) & (ids < vocab_size)]
        if not len(rows) or not len(ids):
            continue
        r = torch.arange(len(rows))
        visible = r
        if n < len(rows) - 1:
            branch = ((r - 1 - n) // max(num_spec_tokens, 1)).clamp(max=n) if quadratic else torch.full_like(r, n)
            visible = torch.where(r <= n, r, branch)
        before = torch.nn.functional.pad((drafts[b, :n, None] == ids).long().cumsum(0), (0, 0, 1, 0))
        count = _counts(ids, output) + before[visible]
        is_seen = (count > 0) | (_counts(ids, prompt) > 0)
        x = rows[:, ids].float()
        equal = bias_ids == ids[:, None]
        if equal.any():
            first = equal.long().argmax(1)  # the first of equal ones
            x = torch.where(equal.any(1), x + penalties.bias[b, first], x)
        x = penalised(x, is_seen, count, presence[b], frequency[b], repetition[b])
        rows[:, ids] = x.to(logits.dtype)
    return out


def _counts(ids: Tensor, tokens: Tensor) -> Tensor:
    """How often each of the sorted ids is among the tokens."""
    place = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
    return torch.zeros_like(ids).scatter_add(0, place, (ids[place] == tokens).long())
