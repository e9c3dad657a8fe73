"""`advance`: the end of a step. Commits the emitted tokens and leaves the state that the next step starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from python_ref.contract import LENGTH, RUNNING, STOPPED


def advance(
    num_accepted: Tensor,
    tokens: Tensor,
    next_drafts: Tensor,
    next_num_drafts: Tensor,
    *,
    text: Tensor,
    lengths: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    length_limits: Tensor,
    stop_ids: Tensor,
    finish_reason: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Move the state of every running request forward in place; returns num_emitted int32 [B].

    num_accepted, tokens [B, N], next_drafts [B, K], next_num_drafts: of `verify_accept`. text int64 [B, max_len]
    holds the committed tokens, lengths int32 [B] counts them, length_limits int32 [B] bounds them. stop_ids int64
    [B, S] (-1 = none) end a request after their first occurrence, which is committed. finish_reason int32 [B] becomes 1
    (stopped) or 2 (length limit); finished requests no longer change. Nothing after a stop is committed.
    """
    width = tokens.shape[1]
    i = torch.arange(width, device=tokens.device)
    running = (finish_reason == RUNNING) & (tokens[:, 0] >= 0)
    committed = num_accepted.long() + 1
    is_stop = (tokens.unsqueeze(-1) == stop_ids.unsqueeze(1)).any(-1) & (tokens >= 0) & (i < committed.unsqueeze(1))
    until_stop = torch.where(is_stop, i + 1, width + 1).amin(1)
    room = (length_limits - lengths).long().clamp(min=0)
    emitted = torch.where(running, torch.minimum(torch.minimum(committed, until_stop), room), 0)

    slot = lengths.unsqueeze(1).long() + i
    is_emitted = i < emitted.unsqueeze(1)
    # A token that is not emitted rewrites an entry of its own row with what it holds; slot 0 is never emitted to.
    slot = torch.where(is_emitted, slot, 0)
    text.scatter_(1, slot, torch.where(is_emitted, tokens, text[:, :1]))
    lengths += emitted.to(lengths.dtype)

    stopped = running & (until_stop <= emitted)
    full = running & ~stopped & (lengths >= length_limits)
    finish_reason.copy_(torch.where(stopped, STOPPED, torch.where(full, LENGTH, finish_reason)))
    drafts.copy_(torch.where(running.unsqueeze(1), next_drafts, drafts))
    num_drafts.copy_(torch.where(running, next_num_drafts * (finish_reason == RUNNING), num_drafts))
    return emitted.to(torch.int32) if out is None else out.copy_(emitted)
