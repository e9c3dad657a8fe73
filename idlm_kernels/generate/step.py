"""One decode step, and the prefill that leads to it: state -> rows -> forward -> verify_accept -> advance -> state.

`decode_step` reads no device value on the host and makes no shape from data, so that a whole step, with the next
step's inputs, can be recorded once and replayed. A test holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from idlm_kernels import ops
from idlm_kernels.generate.drafts import (
    FILL_MATCH,
    MASK_DRAFTS,
    NO_DRAFTS,
    OVERRIDE_MATCH,
    SUFFIX_DRAFTS,
    suffix_drafts,
)
from idlm_kernels.generate.plan import StepPlan, plan_rows, prefill_rows
from idlm_kernels.generate.rerank import rerank_drafts
from idlm_kernels.generate.state import FAILED, RUNNING, DecodeState
from idlm_kernels.model.cpu_stack import CpuCache
from idlm_kernels.model.transformer import KVCache, Transformer
from python_ref import STATUS_EMPTY_ROW, STATUS_NAN, QState
from python_ref.noise import uniform


@dataclass
class Decoder:
    """What does not change from step to step.

    rule: "match" or "rejection", which has a q_state with the places of the state. rerank: choose drafts by the
    adapter's re-ranking head, which the model must have. greedy: the host knows that no request samples. suffix: draft
    from the request's own text too (`match` only). logprobs: report those of the emitted tokens.
    synthetic_acceptance: instead of verifying, accept each draft with this probability, to measure speed without an
    adapter; the text is noise.
    """

    model: Transformer
    cache: KVCache | CpuCache
    plan: StepPlan
    rule: str
    q_state: QState | None = None
    rerank: bool = False
    greedy: bool = False
    suffix: bool = False
    logprobs: bool = False
    synthetic_acceptance: float | None = None


@dataclass
class StepOutcome:
    """What the host may read of a step, on the device."""

    num_drafts: Tensor  # [B] n, the drafts that were verified
    num_accepted: Tensor  # [B]
    num_emitted: Tensor  # [B] tokens committed; fewer than accepted + 1 only at a stop or limit
    finish: Tensor  # [B]
    status: Tensor  # [B]
    source: Tensor  # [B] of the drafts that were verified
    tokens: Tensor  # int64 [B, N]
    logprobs: Tensor | None  # fp32 [B, N]

    def packed(self) -> Tensor:
        """All of it in one int64 tensor [B, 6 + N or 6 + 2 N], so that one copy brings it to the host."""
        figures = (self.num_drafts, self.num_accepted, self.num_emitted, self.finish, self.status, self.source)
        parts = [torch.stack(figures, dim=1).long(), self.tokens]
        if self.logprobs is not None:
            parts.append(self.logprobs.double().view(torch.int64))
        return torch.cat(parts, dim=1)


def decode_step(decoder: Decoder, state: DecodeState) -> StepOutcome:
    """Run one step of every running request and leave `state` ready for the next."""
    rows = plan_rows(decoder.plan, state, decoder.cache.page_size)
    logits, hidden = decoder.model.forward(rows, decoder.cache)
    return _commit(decoder, state, logits, hidden, rows.query_start_loc)


def prefill_chunk(decoder: Decoder, state: DecodeState, start: int, stop: int) -> bool:
    """Compute tokens start .. stop - 1 of a state of one request. True once it is done."""
    rows = prefill_rows(state, [start], [stop], 0, decoder.cache.page_size)
    decoder.model.forward(rows, decoder.cache, logits_rows=rows.ids[:0])
    return True


def first_step(decoder: Decoder, state: DecodeState, starts: list[int], lengths: list[int]) -> StepOutcome:
    """Compute the rest of each prompt, from starts[b] to its end, and run the first step on the same forward."""
    num_k = decoder.plan.num_drafts
    rows = prefill_rows(state, starts, lengths, num_k, decoder.cache.page_size)
    ends = rows.query_start_loc[1:].long()  # the step of a request is its last N rows: pending and the MASK rows
    step = (ends.unsqueeze(1) + torch.arange(-1 - num_k, 0, device=ends.device)).flatten()
    logits, hidden = decoder.model.forward(rows, decoder.cache, logits_rows=step)
    query_start_loc = torch.arange(len(lengths) + 1, dtype=torch.int32, device=ends.device) * (num_k + 1)
    return _commit(decoder, state, logits, hidden, query_start_loc)


def _commit(
    decoder: Decoder, state: DecodeState, logits: Tensor, hidden: Tensor, query_start_loc: Tensor
) -> StepOutcome:
    num_drafts, source = state.num_drafts.clone(), state.draft_source.clone()
    num_accepted, tokens, next_drafts, next_num_drafts = ops.verify_accept(
        logits,
        query_start_loc,
        state.num_drafts,
        state.drafts,
        state.lengths - 1,
        state.temperature,
        state.top_k,
        state.top_p,
        state.min_p,
        state.seed,
        state.id_limit,
        state.sampled_mask_id,
        branched=decoder.plan.branched,
        mode=decoder.rule,
        q_state=decoder.q_state,
        status=state.status,
    )
    if decoder.rerank and decoder.plan.num_drafts > 0:
        next_drafts = rerank_drafts(
            decoder.model,
            state,
            logits,
            hidden,
            _first_mask(decoder.plan, state, query_start_loc, num_accepted),
            num_accepted,
            tokens,
            next_drafts,
            next_num_drafts,
            decoder.q_state,
            greedy=decoder.greedy,
        )
    if decoder.synthetic_acceptance is not None:
        num_accepted, tokens, next_num_drafts = _pretend(
            state, tokens, decoder.synthetic_acceptance, decoder.plan.branched
        )
        next_drafts = next_drafts.clamp(min=0)
    # A request with NaN among its logits ends before the token that they would decide.
    failed = (state.status & (STATUS_NAN | STATUS_EMPTY_ROW)) != 0
    tokens = torch.where(failed.unsqueeze(1), -1, tokens)
    emitted = ops.advance(
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
        finish=state.finish,
    )
    state.finish.copy_(torch.where(failed & (state.finish == RUNNING), FAILED, state.finish))
    proposed = torch.where(state.num_drafts > 0, MASK_DRAFTS, NO_DRAFTS)
    state.draft_source.copy_(torch.where(emitted > 0, proposed, state.draft_source))
    if decoder.suffix and decoder.plan.num_drafts > 0:
        _add_suffix_drafts(state)
    torch.minimum(state.num_drafts, state.max_drafts, out=state.num_drafts)
    logprobs = _logprobs(logits, query_start_loc, tokens) if decoder.logprobs else None
    finish, status = state.finish.clone(), state.status.clone()
    return StepOutcome(num_drafts, num_accepted, emitted, finish, status, source, tokens, logprobs)


def _first_mask(plan: StepPlan, state: DecodeState, query_start_loc: Tensor, num_accepted: Tensor) -> Tensor:
    """The row int32 [B] of the first of the MASK rows that propose the next drafts."""
    rows = query_start_loc[:-1] + state.num_drafts + 1
    return torch.add(rows, num_accepted, alpha=plan.num_drafts) if plan.branched else rows


def _add_suffix_drafts(state: DecodeState) -> None:
    """Draft from the request's own text where MASK rows gave nothing, or where much of it repeats."""
    drafts, count, matched = suffix_drafts(state.text, state.lengths, state.drafts.shape[1])
    wanted = torch.where(state.num_drafts > 0, OVERRIDE_MATCH, FILL_MATCH)
    used = (matched >= wanted) & (count > 0) & (state.finish == RUNNING)
    state.drafts.copy_(torch.where(used.unsqueeze(1), drafts, state.drafts))
    state.num_drafts.copy_(torch.where(used, count, state.num_drafts))
    state.draft_source.copy_(torch.where(used, SUFFIX_DRAFTS, state.draft_source))


def _logprobs(logits: Tensor, query_start_loc: Tensor, tokens: Tensor) -> Tensor:
    """log softmax of the model's own logits (before temperature and truncation) at the tokens [B, N], fp32."""
    width = tokens.shape[1]
    rows = query_start_loc[:-1].long().unsqueeze(1) + torch.arange(width, device=tokens.device)
    chosen = logits[rows.clamp(max=logits.shape[0] - 1)].float()  # clean row i predicted token i
    value = chosen.gather(2, tokens.clamp(min=0).unsqueeze(2)).squeeze(2) - chosen.logsumexp(2)
    return torch.where(tokens >= 0, value, 0.0)


def _pretend(state: DecodeState, tokens: Tensor, acceptance: float, branched: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outcome of a step that accepts each draft with a given probability, drawn from the request's own noise."""
    num_k, present = state.drafts.shape[1], tokens[:, 0] >= 0
    i = torch.arange(num_k, device=tokens.device)
    where = state.lengths.unsqueeze(1) + i
    u = uniform(state.seed.unsqueeze(1).expand(where.shape), where)
    accepted = (u < acceptance) & (i < state.num_drafts.unsqueeze(1))
    a = accepted.long().cumprod(1).sum(1) * present
    sampled = tokens.amax(1, keepdim=True)  # some token that was sampled
    pretended = torch.cat([state.drafts, sampled], dim=1)
    index = torch.arange(num_k + 1, device=tokens.device)
    pretended = torch.where(index == a.unsqueeze(1), sampled, pretended).clamp(min=0)
    pretended = torch.where((index <= a.unsqueeze(1)) & present.unsqueeze(1), pretended, -1)
    # A chain drafts again only where it kept all of its drafts.
    keeps = present if branched else present & (a == state.num_drafts)
    return a.to(torch.int32), pretended, torch.where(keeps, num_k, 0).to(torch.int32)
