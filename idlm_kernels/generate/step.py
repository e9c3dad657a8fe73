"""One decode step, and the prefill that leads to it: state -> rows -> forward -> verify_accept -> commit -> state.

`decode_step` reads no device value on the host and makes no shape from data, so that a whole step, with the next
step's inputs, can be recorded once and replayed. A test holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from idlm_kernels import ops
from idlm_kernels.generate.history import draft_from_history
from idlm_kernels.generate.plan import StepPlan, plan_rows, prefill_rows
from idlm_kernels.generate.rerank import rerank_drafts
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.model.cpu_stack import CpuCache
from idlm_kernels.model.transformer import KVCache, Transformer
from python_ref import DraftDistributions


@dataclass
class Decoder:
    """What does not change from step to step.

    rule: "match" or "rejection", which has a draft_dists with the batch of the state. rerank: choose drafts by the
    adapter's re-ranking head, which the model must have. greedy: the host knows that no request samples. suffix: draft
    from the request's own text too (`match` only). logprobs: report those of the emitted tokens. penalties: some
    request has penalties or biases. top_logprobs: list so many of the likeliest ids at each token, with logprobs.
    synthetic_acceptance: instead of verifying, accept each draft with this probability, to measure speed without an
    adapter; the text is noise.
    """

    model: Transformer
    cache: KVCache | CpuCache
    plan: StepPlan
    rule: str
    draft_dists: DraftDistributions | None = None
    rerank: bool = False
    greedy: bool = False
    suffix: bool = False
    logprobs: bool = False
    penalties: bool = False
    top_logprobs: int = 0
    synthetic_acceptance: float | None = None


def decode_step(decoder: Decoder, state: DecodeState) -> Tensor:
    """Run one step of every running request and leave `state` ready for the next.

    Returns the outcome, int64 [B, 6 + N or 6 + 2N], as `commit_step` has it: all that the host reads of a step. Behind
    it lie the columns of `top_logprobs`, N * 2 * count, where they are asked for.
    """
    rows = plan_rows(decoder.plan, state, decoder.cache.page_size)
    logits, hidden = decoder.model.forward(rows, decoder.cache)
    return _commit(decoder, state, logits, hidden, rows.query_start_loc)


def prefill_chunk(decoder: Decoder, state: DecodeState, start: int, stop: int) -> bool:
    """Compute tokens start .. stop - 1 of a state of one request. True once it is done."""
    rows = prefill_rows(state, [start], [stop], 0, decoder.cache.page_size)
    decoder.model.forward(rows, decoder.cache, logits_rows=rows.ids[:0])
    return True


def first_step(decoder: Decoder, state: DecodeState, starts: list[int], lengths: list[int]) -> Tensor:
    """Compute the rest of each prompt, from starts[b] to its end, and run the first step on the same forward."""
    num_spec_tokens = decoder.plan.num_drafts
    rows = prefill_rows(state, starts, lengths, num_spec_tokens, decoder.cache.page_size)
    ends = rows.query_start_loc[1:].long()  # the step of a request is its last N rows: pending and the MASK rows
    step = (ends.unsqueeze(1) + torch.arange(-1 - num_spec_tokens, 0, device=ends.device)).flatten()
    logits, hidden = decoder.model.forward(rows, decoder.cache, logits_rows=step)
    query_start_loc = torch.arange(len(lengths) + 1, dtype=torch.int32, device=ends.device) * (num_spec_tokens + 1)
    return _commit(decoder, state, logits, hidden, query_start_loc)


def _commit(decoder: Decoder, state: DecodeState, logits: Tensor, hidden: Tensor, query_start_loc: Tensor) -> Tensor:
    quadratic = decoder.plan.quadratic
    raw = logits
    if decoder.penalties:
        logits = ops.apply_penalties(
            logits,
            query_start_loc,
            state.num_drafts,
            state.drafts,
            state.text,
            state.lengths,
            state.penalties,
            quadratic=quadratic,
            out=None if decoder.logprobs else logits,  # logprobs are of the model's own logits
        )
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
        quadratic=quadratic,
        rule=decoder.rule,
        draft_dists=decoder.draft_dists,
        error_flags=state.error_flags,
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
            decoder.draft_dists,
            greedy=decoder.greedy,
        )
    listed = None
    if decoder.logprobs and decoder.top_logprobs:
        listed = ops.top_logprobs(raw, query_start_loc, tokens, decoder.top_logprobs, state.id_limit)
    outcome = ops.commit_step(
        num_accepted,
        tokens,
        next_drafts,
        next_num_drafts,
        state,
        quadratic=quadratic,
        suffix=decoder.suffix,
        acceptance=decoder.synthetic_acceptance,
        logits=raw if decoder.logprobs else None,
        query_start_loc=query_start_loc if decoder.logprobs else None,
    )
    if state.history.shape[1] > 0 and decoder.plan.num_drafts > 0:
        draft_from_history(state)
    return outcome if listed is None else torch.cat([outcome, listed[0].flatten(1), _bits(listed[1]).flatten(1)], dim=1)


def _bits(logprobs: Tensor) -> Tensor:
    """As `commit_step` packs them."""
    return logprobs.double().view(torch.int64)


def _first_mask(plan: StepPlan, state: DecodeState, query_start_loc: Tensor, num_accepted: Tensor) -> Tensor:
    """The row int32 [B] of the first of the MASK rows that propose the next drafts."""
    rows = query_start_loc[:-1] + state.num_drafts + 1
    return torch.add(rows, num_accepted, alpha=plan.num_drafts) if plan.quadratic else rows
