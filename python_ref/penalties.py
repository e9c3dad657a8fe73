"""Penalties on tokens that occurred before, and biases of single tokens: what is added to logits before the transform.

A clean row i of a step predicts the token after the text and d_1 .. d_i. Ordinary decoding gets to that row with just
these tokens as its text, so penalties counted over them make the row what it is there, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Penalties:
    """What each request asks for; off values are 0, 0, 1 and ids of -1.

    prompt_lengths int32 [B]: so many tokens of the text, the first ones, are the prompt; those after them are output.
    presence, frequency, repetition fp32 [B]. bias_ids int64 [B, S], padded with -1; bias fp32 [B, S].
    """

    prompt_lengths: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    bias_ids: Tensor
    bias: Tensor


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
    """Logits [T, V] with the bias added, and then the penalties of the tokens that each row has before it.

    Before a row lie text[b, :lengths[b]] and drafts: d_1 .. d_i before clean row i, d_1 .. d_b before the MASK rows of
    branch b. With x the biased logit of a token and c its count in the output: if it occurs at all, x becomes
    x / repetition where x > 0, else x * repetition; then x - frequency * c - presence * (c > 0).
    """
    (num_rows, vocab_size), (batch, num_spec_tokens) = logits.shape, drafts.shape
    if batch == 0:
        return logits.clone() if out is None else out.copy_(logits)
    t = torch.arange(num_rows, device=logits.device)
    request = torch.searchsorted(query_start_loc[1:].contiguous(), t, right=True).clamp(max=batch - 1)
    is_row = (t < query_start_loc[-1]).unsqueeze(1)
    visible = _visible_drafts(query_start_loc, num_drafts, num_spec_tokens, quadratic, request, t)

    place = torch.arange(text.shape[1], device=text.device)
    in_text, in_prompt = (place < x.unsqueeze(1) for x in (lengths, penalties.prompt_lengths))
    j = torch.arange(num_spec_tokens, device=text.device)
    in_output = _counts(text, in_text & ~in_prompt, vocab_size)[request]
    in_output += _counts(drafts[request], j < visible.unsqueeze(1), vocab_size)
    is_seen = (in_output > 0) | (_counts(text, in_text & in_prompt, vocab_size) > 0)[request]

    ids = penalties.bias_ids
    earlier = (ids.unsqueeze(2) == ids.unsqueeze(1)).tril(-1).any(2)  # of equal ids the first one counts
    is_biased = _counts(ids, ~earlier, vocab_size) > 0
    acc = torch.promote_types(logits.dtype, torch.float32)
    bias = _sums(ids, ~earlier, penalties.bias.to(acc), vocab_size)

    presence, frequency, repetition = (
        x[request].unsqueeze(1) for x in (penalties.presence, penalties.frequency, penalties.repetition)
    )
    asks = (presence != 0) | (frequency != 0) | (repetition != 1) | is_biased.any(1)[request].unsqueeze(1)
    x = logits.to(acc)
    x = torch.where(is_biased[request], x + bias[request], x)
    x = penalised(x, is_seen, in_output, presence.to(acc), frequency.to(acc), repetition.to(acc))
    result = torch.where(is_row & asks & (is_seen | is_biased[request]), x.to(logits.dtype), logits)
    return result if out is None else out.copy_(result)


def penalised(
    x: Tensor, is_seen: Tensor, count: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> Tensor:
    """Biased logits with the penalties of tokens that occurred, `count` times in the output."""
    x = torch.where(is_seen, torch.where(x > 0, x / repetition, x * repetition), x)
    return x - frequency * count.to(x.dtype) - presence * (count > 0).to(x.dtype)


def _visible_drafts(
    query_start_loc: Tensor, num_drafts: Tensor, num_spec_tokens: int, quadratic: bool, request: Tensor, t: Tensor
) -> Tensor:
    """How many drafts lie before each row [T]."""
    start, num_rows = query_start_loc[:-1].long(), query_start_loc.diff().long()
    n = num_drafts.long().clamp(min=0).minimum((num_rows - 1).clamp(0, num_spec_tokens))[request]
    r = t - start[request]
    branch = ((r - 1 - n) // max(num_spec_tokens, 1)).minimum(n) if quadratic else n
    return torch.where(r <= n, r, branch)


def _counts(ids: Tensor, counted: Tensor, vocab_size: int) -> Tensor:
    """How often each id of a vocabulary is among those of ids [B, n] that are counted, int32 [B, V]."""
    return _sums(ids, counted, torch.ones_like(ids, dtype=torch.int32), vocab_size)


def _sums(ids: Tensor, counted: Tensor, values: Tensor, vocab_size: int) -> Tensor:
    counted = counted & (ids >= 0) & (ids < vocab_size)
    sums = values.new_zeros(ids.shape[0], vocab_size)
    return sums.scatter_add(1, ids.clamp(0, vocab_size - 1), torch.where(counted, values, 0))
