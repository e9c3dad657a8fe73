"""One decode step, and the prefill that leads to it: Request -> rows -> forward -> verify_accept -> advance.

`decode_step` reads no device value on the host and makes no shape from data, so that a whole step, with the next
step's inputs, can be recorded once and replayed. A test holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from idlm_kernels import ops
from idlm_kernels.generate.plan import StepPlan, plan_rows, prefill_rows
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.model.transformer import KVCache, Transformer
from python_ref import QState


@dataclass
class Decoder:
    """What stays fixed while a batch decodes: the model, its cache, the plan and the rule of verification."""

    model: Transformer
    cache: KVCache
    plan: StepPlan
    verify: str  # "match" | "rejection"
    q_state: QState | None  # of the whole batch, for "rejection"


@dataclass
class StepOutcome:
    """What the host may read of a step, on the device: all int64 [B] but tokens [B, N]."""

    num_drafts: Tensor  # n, the drafts that were verified
    num_accepted: Tensor
    num_emitted: Tensor  # tokens committed; fewer than accepted + 1 only at a stop or limit
    finish: Tensor
    tokens: Tensor

    def packed(self) -> Tensor:
        """All of it in one int64 tensor [B, 4 + N], so that one copy brings it to the host."""
        figures = torch.stack([self.num_drafts, self.num_accepted, self.num_emitted, self.finish], dim=1)
        return torch.cat([figures.long(), self.tokens], dim=1)


def decode_step(decoder: Decoder, state: DecodeState) -> StepOutcome:
    """Run one step of every running request of the batch and leave `state` ready for the next."""
    rows = plan_rows(decoder.plan, state, decoder.cache.page_size)
    logits = decoder.model.forward(rows, decoder.cache)
    return _commit(decoder, state, logits, rows.query_start_loc, decoder.q_state)


def prefill(decoder: Decoder, state: DecodeState, first: int, lengths: list[int], chunk_tokens: int) -> StepOutcome:
    """Prefill the requests from `first` on, whose prompts have these lengths, and run their first step.

    A single long prompt runs in chunks. The first step rides on the last chunk. Returns the outcome of these requests.
    """
    last, num_k, page_size = first + len(lengths), decoder.plan.num_drafts, decoder.cache.page_size
    part, start = state.requests(first, last), 0
    while len(lengths) == 1 and lengths[0] - start > chunk_tokens:
        rows = prefill_rows(part, [start], [start + chunk_tokens], 0, page_size)
        decoder.model.forward(rows, decoder.cache, logits_rows=rows.ids[:0])
        start += chunk_tokens
    rows = prefill_rows(part, [start] * len(lengths), lengths, num_k, page_size)
    ends = rows.query_start_loc[1:].long()  # the step of a request is its last N rows: pending and the MASK rows
    step = (ends.unsqueeze(1) + torch.arange(-1 - num_k, 0, device=ends.device)).flatten()
    logits = decoder.model.forward(rows, decoder.cache, logits_rows=step)
    query_start_loc = torch.arange(len(lengths) + 1, dtype=torch.int32, device=ends.device) * (num_k + 1)
    q_state = None if decoder.q_state is None else decoder.q_state.requests(first, last)
    return _commit(decoder, part, logits, query_start_loc, q_state)


def _commit(
    decoder: Decoder, state: DecodeState, logits: Tensor, query_start_loc: Tensor, q_state: QState | None
) -> StepOutcome:
    num_drafts = state.num_drafts.clone()
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
        mode=decoder.verify,
        q_state=q_state,
        status=state.status,
    )
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
    return StepOutcome(num_drafts, num_accepted, emitted, state.finish.clone(), tokens)
