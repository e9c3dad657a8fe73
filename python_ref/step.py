"""What a step does besides the model: `plan_rows` before it, `commit_step` after verification.

Words and layout of the rows: design section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from python_ref.contract import (
    FAILED,
    FILL_MATCH,
    FLAG_EMPTY_ROW,
    FLAG_NAN,
    MASK_DRAFTS,
    NO_DRAFTS,
    OVERRIDE_MATCH,
    RUNNING,
    SUFFIX_DRAFTS,
)
from python_ref.noise import noise_ids, uniform
from python_ref.state import advance

LONGEST_MATCH = 8  # tokens that are compared with those before

# The first columns of what `commit_step` returns; the tokens follow, and then the bits of their logprobs as fp64.
OUTCOME = ("num_drafts", "num_accepted", "num_emitted", "finish_reason", "error_flags", "draft_source")


@dataclass(frozen=True, eq=False)
class StepState:
    """The requests of a batch, as a step finds and leaves them. Its tensors are written in place and never replaced.

    text int64 [B, max_len]; lengths int32 [B], L: pending is text[b, L - 1]; drafts int64 [B, K]; num_drafts,
    max_drafts (of the next step), draft_source, length_limits, finish_reason, error_flags int32 [B]; stop_ids int64 [B,
    S], padded with -1; page_table int32 [B, max_pages]; seed int64 [B].
    """

    text: Tensor
    lengths: Tensor
    drafts: Tensor
    num_drafts: Tensor
    max_drafts: Tensor
    draft_source: Tensor
    length_limits: Tensor
    stop_ids: Tensor
    finish_reason: Tensor
    error_flags: Tensor
    page_table: Tensor
    seed: Tensor


Planned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def plan_rows(
    state: StepState, mask_id: int, page_size: int, *, quadratic: bool, noise_below: int = 0, out: Planned | None = None
) -> Planned:
    """The rows of the next step of every running request, packed; T = B * R rows, padding last.

    Returns ids int64 [T] (mask_id on MASK rows), is_mask bool [T], positions int64 [T], slot_mapping int64 [T],
    tree_mask int64 [T], seq_lens int32 [B], query_start_loc int32 [B + 1]. R is (K + 1)^2 if quadratic, else 2K + 1.
    Padding has slot -1 and zeros. noise_below: if not 0, MASK rows have ids drawn from 1 .. noise_below - 1
    (`noise_ids`).
    """
    (batch, num_spec_tokens), device = state.drafts.shape, state.lengths.device
    most = (num_spec_tokens + 1) ** 2 if quadratic else 2 * num_spec_tokens + 1
    running = state.finish_reason == RUNNING
    length, n = state.lengths.long(), state.num_drafts.long().clamp(0, num_spec_tokens)
    num_branches = n + 1 if quadratic else torch.ones_like(n)
    m = (1 + n + num_branches * num_spec_tokens) * running
    query_start_loc = torch.nn.functional.pad(m.cumsum(0), (1, 0))
    seq_lens = torch.where(running, length - 1 + m, 0)

    t = torch.arange(batch * most, device=device)
    request = torch.searchsorted(query_start_loc[1:], t, right=True).clamp(max=max(batch - 1, 0))
    is_row = t < query_start_loc[-1]
    r = torch.where(is_row, t - query_start_loc[request], 0)  # index of the row in its request
    row_n, row_length = n[request], length[request]

    is_clean = r <= row_n
    mask_index = (r - 1 - row_n).clamp(min=0)
    branch = mask_index // max(num_spec_tokens, 1) if quadratic else row_n
    j = mask_index - (branch * num_spec_tokens if quadratic else 0)
    position = row_length - 1 + torch.where(is_clean, r, 1 + branch + j)

    clean_id = state.text[request, row_length - 1]
    if num_spec_tokens:
        clean_id = torch.where(r == 0, clean_id, state.drafts[request, (r - 1).clamp(0, num_spec_tokens - 1)])
    is_mask = is_row & ~is_clean
    index = row_length - 1 + r
    mask_ids = noise_ids(state.seed[request], index, position, noise_below) if noise_below else mask_id
    ids = torch.where(is_mask, mask_ids, clean_id)

    tree_mask = (2 << r) - 1  # the rows before it, and itself
    if quadratic:
        own = ((2 << j) - 1) << (1 + row_n + branch * num_spec_tokens).clamp(max=63)
        tree_mask = torch.where(is_clean, tree_mask, ((2 << branch) - 1) | own)

    page, max_pages = index // page_size, state.page_table.shape[1]
    slot = state.page_table[request, page.clamp(max=max_pages - 1)].long() * page_size + index % page_size
    planned = (
        torch.where(is_row, ids, 0),
        is_mask,
        torch.where(is_row, position, 0),
        torch.where(is_row & (page < max_pages), slot, -1),  # beyond its pages nothing is kept
        torch.where(is_row, tree_mask, 0),
        seq_lens.to(torch.int32),
        query_start_loc.to(torch.int32),
    )
    if out is None:
        return planned
    for target, value in zip(out, planned, strict=True):
        target.copy_(value)
    return out


def commit_step(
    num_accepted: Tensor,
    tokens: Tensor,
    next_drafts: Tensor,
    next_num_drafts: Tensor,
    state: StepState,
    *,
    quadratic: bool = False,
    suffix: bool = False,
    acceptance: float | None = None,
    logits: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Move the state of every running request forward in place; returns all that the host reads of a step.

    num_accepted, tokens [B, N], next_drafts [B, K], next_num_drafts: of `verify_accept`. int64 [B, 6 + N]: num_drafts
    that were verified, num_accepted, num_emitted, finish_reason, error_flags, draft_source of those drafts, tokens. A
    request whose error_flags say NaN, or no finite logit, ends as FAILED before the token that they would decide.
    suffix: draft from the request's own text where MASK rows gave nothing, or where much of it repeats. acceptance:
    pretend that each draft is accepted with this probability. logits [T, V], with query_start_loc: report logprobs too,
    fp32 of the model's own logits at the tokens, in N more columns that hold their bits as fp64.
    """
    num_drafts, source = state.num_drafts.clone(), state.draft_source.clone()
    if acceptance is not None:
        num_accepted, tokens, next_num_drafts = _pretend(state, tokens, acceptance, quadratic)
        next_drafts = next_drafts.clamp(min=0)
    failed = (state.error_flags & (FLAG_NAN | FLAG_EMPTY_ROW)) != 0
    tokens = torch.where(failed.unsqueeze(1), -1, tokens)
    emitted = advance(
        num_accepted,
        tokens,
        next_drafts,
        next_num_drafts,
        text=state.text,
        lengths=state.lengths,
        drafts=state.drafts,
        num_drafts=state.num_drafts,
        length_limits=state.length_limits,
        stop_ids=state.stop_ids,
        finish_reason=state.finish_reason,
    )
    state.finish_reason.copy_(torch.where(failed & (state.finish_reason == RUNNING), FAILED, state.finish_reason))
    torch.minimum(state.num_drafts, state.max_drafts, out=state.num_drafts)
    proposed = torch.where(state.num_drafts > 0, MASK_DRAFTS, NO_DRAFTS)
    state.draft_source.copy_(torch.where(emitted > 0, proposed, state.draft_source))
    if suffix and state.drafts.shape[1] > 0:
        _add_suffix_drafts(state)
    figures = (num_drafts, num_accepted, emitted, state.finish_reason, state.error_flags, source)
    parts = [torch.stack(figures, dim=1).long(), tokens]
    if logits is not None and query_start_loc is not None:
        parts.append(token_logprobs(logits, query_start_loc, tokens).double().view(torch.int64))
    outcome = torch.cat(parts, dim=1)
    return outcome if out is None else out.copy_(outcome)


def _pretend(state: StepState, tokens: Tensor, acceptance: float, quadratic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outcome of a step that accepts each draft with a given probability, drawn from the request's own noise."""
    num_spec_tokens, present = state.drafts.shape[1], tokens[:, 0] >= 0
    i = torch.arange(num_spec_tokens, device=tokens.device)
    where = state.lengths.unsqueeze(1) + i
    u = uniform(state.seed.unsqueeze(1).expand(where.shape), where)
    accepted = (u < acceptance) & (i < state.num_drafts.unsqueeze(1))
    a = accepted.long().cumprod(1).sum(1) * present
    sampled = tokens.amax(1, keepdim=True)  # some token that was sampled
    pretended = torch.cat([state.drafts, sampled], dim=1)
    index = torch.arange(num_spec_tokens + 1, device=tokens.device)
    pretended = torch.where(index == a.unsqueeze(1), sampled, pretended).clamp(min=0)
    pretended = torch.where((index <= a.unsqueeze(1)) & present.unsqueeze(1), pretended, -1)
    # A chain drafts again only where it kept all of its drafts.
    keeps = present if quadratic else present & (a == state.num_drafts)
    return a.to(torch.int32), pretended, torch.where(keeps, num_spec_tokens, 0).to(torch.int32)


def _add_suffix_drafts(state: StepState) -> None:
    drafts, count, matched = suffix_drafts(state.text, state.lengths, state.drafts.shape[1])
    wanted = torch.where(state.num_drafts > 0, OVERRIDE_MATCH, FILL_MATCH)
    count = torch.minimum(count, state.max_drafts)
    used = (matched >= wanted) & (count > 0) & (state.finish_reason == RUNNING)
    state.drafts.copy_(torch.where(used.unsqueeze(1), drafts, state.drafts))
    state.num_drafts.copy_(torch.where(used, count, state.num_drafts))
    state.draft_source.copy_(torch.where(used, SUFFIX_DRAFTS, state.draft_source))


def suffix_drafts(text: Tensor, lengths: Tensor, num_drafts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What followed the last earlier occurrence of the end of each text, on the device and without a search loop.

    text int64 [B, max_len], lengths int32 [B] -> drafts int64 [B, num_drafts], their number int32 [B] (fewer where
    the earlier occurrence lies near the end) and the length of the match int32 [B], at most LONGEST_MATCH tokens.
    """
    max_len = text.shape[1]
    index = torch.arange(max_len, device=text.device)
    length = lengths.long().unsqueeze(1)
    earlier = index < length - 1  # places where an earlier occurrence may end
    run = torch.ones_like(earlier)
    match = torch.zeros_like(text)
    for back in range(min(LONGEST_MATCH, max_len)):
        end = text.gather(1, (length - 1 - back).clamp(min=0))
        same = (text[:, : max_len - back] == end) & (length - 1 - back >= 0)
        run = run & torch.nn.functional.pad(same, (back, 0))
        match = match + run
    # The longest match, the latest of equals.
    best = torch.where(earlier, match * max_len + index, -1).amax(1).clamp(min=0)
    matched, end_of_match = best // max_len, best % max_len
    offset = torch.arange(num_drafts, device=text.device)
    source = end_of_match.unsqueeze(1) + 1 + offset
    drafts = text.gather(1, source.clamp(max=max_len - 1))
    count = (length.squeeze(1) - 1 - end_of_match).clamp(0, num_drafts)
    count = torch.where((matched > 0) & (length.squeeze(1) > 1), count, 0)
    return drafts, count.to(torch.int32), torch.where(count > 0, matched, 0).to(torch.int32)


def token_logprobs(logits: Tensor, query_start_loc: Tensor, tokens: Tensor) -> Tensor:
    """log softmax of the model's own logits (before temperature and truncation) at the tokens [B, N]; fp32, or fp64."""
    width = tokens.shape[1]
    rows = query_start_loc[:-1].long().unsqueeze(1) + torch.arange(width, device=tokens.device)
    chosen = logits[rows.clamp(max=logits.shape[0] - 1)]  # clean row i predicted token i
    chosen = chosen.to(torch.promote_types(logits.dtype, torch.float32))
    value = chosen.gather(2, tokens.clamp(min=0).unsqueeze(2)).squeeze(2) - chosen.logsumexp(2)
    return torch.where(tokens >= 0, value, 0.0)
