"""Verify and accept: the decision of an introspective strided decoding step (I-DLM, arXiv 2604.11035).

A request has L committed tokens, the last of which is pending, and n drafts d_1 .. d_n for the positions L .. L+n-1.
Its rows of this step, in order:

    clean row i = 0 .. n                  input: pending (i = 0) or d_i.  Predicts position L + i.       p_i
    MASK row j = 0 .. K-1 of branch b     input: MASK.                    Predicts position L + b+1 + j. q

A chain plan has the branch b = n alone, a quadratic plan ("quadratic") all of b = 0 .. n. The decision:

    clean_rows    y_i, the token that ordinary sampling takes from clean row i
    match         d_{i+1} is accepted iff it is y_i
    rejection     d_{i+1} is accepted iff u q(d_{i+1}) < p_i(d_{i+1}); if not, y_i is a sample of max(0, p_i - q)
    verify_accept a = number of drafts accepted before the first that is not; commits d_1 .. d_a, y_a
    propose       the K MASK rows of branch a give the next drafts

All of it for B requests at once, without a branch of the host: what does not apply to a request is masked out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from python_ref.contract import (
    FLAG_BAD_DRAFT,
    GREEDY_BELOW,
    STREAM_ACCEPT,
    STREAM_DRAFT,
    STREAM_TARGET,
    DraftDistributions,
)
from python_ref.noise import gumbel, uniform
from python_ref.sampling import (
    add_bias,
    distribution,
    log_norm_of,
    lowest_argmax,
    perturbed_argmax,
    sanitise,
    scale_by_temperature,
    truncation_cut,
)


class Sampling(NamedTuple):
    """How each request samples; tensors [B]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    id_limit: int
    mask_id: int

    @property
    def greedy(self) -> Tensor:
        """[B, 1]"""
        return (self.temperature < GREEDY_BELOW).unsqueeze(1)


class Step(NamedTuple):
    """The rows of each request, and its drafts."""

    start: Tensor  # [B] its first row in logits
    num_rows: Tensor  # [B] m, its rows; 0 where the request is not in this step
    num_drafts: Tensor  # [B] n, at most as many as there are rows and entries for
    drafts: Tensor  # [B, K] d_1 .. d_n, then anything
    length: Tensor  # [B, 1] L

    @property
    def present(self) -> Tensor:
        """[B]"""
        return self.num_rows > 0

    @property
    def is_draft(self) -> Tensor:
        """[B, K]"""
        i = torch.arange(self.drafts.shape[1], device=self.drafts.device)
        return (i < self.num_drafts.unsqueeze(1)) & self.present.unsqueeze(1)


class Rows(NamedTuple):
    """R rows of logits of each request after the sampling transform."""

    logits: Tensor  # [B, R, V] logit_bias added
    z: Tensor  # [B, R, V] / temperature, -inf where an id is not allowed
    cut: Tensor  # [B, R] an id is kept iff z >= cut
    error_flags: Tensor  # int32 [B] bits of the rows that are there


def verify_accept(
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    quadratic: bool,
    rule: str,
    draft_dists: DraftDistributions | None = None,
    logit_bias: Tensor | None = None,
    error_flags: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Verify the drafts of every request, sample its next token and propose its next drafts.

    logits [T, V]; query_start_loc int32 [B + 1]; drafts int64 [B, K]; all others [B]; positions are those of
    pending. Returns num_accepted int32 [B] (a), tokens int64 [B, K + 1] (d_1..d_a, y_a, then -1), next_drafts
    int64 [B, K] (-1 where there is none) and next_num_drafts int32 [B]. A request without rows yields 0, -1, -1, 0.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, seed, id_limit, mask_id)
    step = step_of(query_start_loc, num_drafts, drafts, positions)
    bad = step.is_draft & ((drafts < 0) | (drafts >= logits.shape[-1]))

    clean, noise, y = clean_rows(step, logits, logit_bias, sampling)
    if rule == "match":
        accepted = match(step, y)
    else:
        assert draft_dists is not None
        accepted, y = rejection(step, clean, noise, y, bad, draft_dists, sampling)
    a = (accepted & step.is_draft & ~bad).long().cumprod(1).sum(1)

    i = torch.arange(y.shape[1], device=y.device)
    tokens = torch.where(i < a.unsqueeze(1), torch.nn.functional.pad(drafts, (0, 1)), y)
    tokens = torch.where((i <= a.unsqueeze(1)) & step.present.unsqueeze(1), tokens, -1)

    stream = STREAM_TARGET if rule == "match" else STREAM_DRAFT
    next_drafts, next_num_drafts, masks = propose(step, a, logits, logit_bias, sampling, quadratic, stream)
    if rule == "rejection" and draft_dists is not None:
        remember(draft_dists, masks, next_num_drafts > 0)

    if error_flags is not None:
        odd = (step.num_drafts != num_drafts) | bad.any(1)
        flags = clean.error_flags | masks.error_flags | torch.where(odd, FLAG_BAD_DRAFT, 0).to(torch.int32)
        error_flags |= torch.where(step.present, flags, 0)
    result = a.to(torch.int32), tokens, next_drafts, next_num_drafts
    if out is None:
        return result
    for target, value in zip(out, result, strict=True):
        target.copy_(value)
    return out


def clean_rows(
    step: Step, logits: Tensor, logit_bias: Tensor | None, sampling: Sampling
) -> tuple[Rows, Tensor, Tensor]:
    """The clean rows, their noise [B, K + 1, V], and y [B, K + 1]: y_i is what ordinary sampling takes from row i."""
    count = step.drafts.shape[1] + 1
    i = torch.arange(count, device=logits.device)
    is_clean = (i <= step.num_drafts.unsqueeze(1)) & step.present.unsqueeze(1)
    rows = transform(torch.where(is_clean, step.start.unsqueeze(1) + i, 0), is_clean, logits, logit_bias, sampling)
    noise = noise_from(step.length, count, sampling.seed, STREAM_TARGET, rows.z)
    return rows, noise, perturbed_argmax(rows.z, rows.cut, sampling.greedy.expand(is_clean.shape), noise)


def match(step: Step, y: Tensor) -> Tensor:
    """Whether each draft [B, K] is the very token that ordinary sampling takes. Where it came from does not matter."""
    return step.drafts == y[:, :-1]


def rejection(
    step: Step, clean: Rows, noise: Tensor, y: Tensor, bad: Tensor, draft_dists: DraftDistributions, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """The paper's rule: whether each draft [B, K] is accepted, and y with samples of the residuals.

    A draft x drawn from q is accepted iff u q(x) < p(x), u uniform. The token in its place is else a sample of
    max(0, p - q), renormalised; of p where that is empty or where q is unknown (a bad draft). The result has
    distribution p.
    """
    num_spec_tokens, vocab_size = step.drafts.shape[1], clean.z.shape[-1]
    greedy = sampling.greedy
    p = distribution(clean.z, clean.cut, log_norm_of(clean.z, clean.cut), greedy)[:, :num_spec_tokens]
    allowed = sanitise(draft_dists.logits, sampling.id_limit, sampling.mask_id)[0]
    q_z = scale_by_temperature(allowed, sampling.temperature.unsqueeze(1))
    q = distribution(q_z, draft_dists.cut.to(q_z.dtype), draft_dists.log_norm.to(q_z.dtype), greedy)

    x = step.drafts.clamp(0, vocab_size - 1).unsqueeze(-1)
    position = step.length + torch.arange(num_spec_tokens, device=x.device)
    u = uniform(sampling.seed.unsqueeze(1).expand(position.shape), position, STREAM_ACCEPT).to(p.dtype)
    accepted = u * q.gather(-1, x).squeeze(-1) < p.gather(-1, x).squeeze(-1)

    residual = (p - q).clamp(min=0)
    residual = torch.where((bad | (residual.sum(-1) == 0)).unsqueeze(-1), p, residual)
    corrected = lowest_argmax(torch.where(greedy.unsqueeze(-1), residual, residual.log() + noise[:, :num_spec_tokens]))
    corrected = torch.where(
        step.is_draft, corrected, y[:, :num_spec_tokens]
    )  # beyond the drafts y is a sample of p already
    return accepted, torch.cat([corrected, y[:, num_spec_tokens:]], dim=1)


def propose(
    step: Step,
    a: Tensor,
    logits: Tensor,
    logit_bias: Tensor | None,
    sampling: Sampling,
    quadratic: bool,
    stream: int,
) -> tuple[Tensor, Tensor, Rows]:
    """The next drafts int64 [B, K], how many int32 [B], and the MASK rows of branch a that they were drawn from.

    MASK row j of branch a predicts position L + a + 1 + j: of the new L, the j-th draft's. A chain has branch n only,
    so that it proposes where all drafts were accepted.
    """
    num_spec_tokens = step.drafts.shape[1]
    j = torch.arange(num_spec_tokens, device=logits.device)
    branch = a if quadratic else torch.zeros_like(a)
    first = 1 + step.num_drafts + branch * num_spec_tokens
    proposed = step.present & (first + num_spec_tokens <= step.num_rows) & (num_spec_tokens > 0)
    if not quadratic:
        proposed = proposed & (a == step.num_drafts)
    has_row = proposed.unsqueeze(1).expand(step.drafts.shape)
    rows = transform(
        torch.where(has_row, (step.start + first).unsqueeze(1) + j, 0), has_row, logits, logit_bias, sampling
    )
    noise = noise_from(step.length + a.unsqueeze(1) + 1, num_spec_tokens, sampling.seed, stream, rows.z)
    sampled = perturbed_argmax(rows.z, rows.cut, sampling.greedy.expand(has_row.shape), noise)
    return torch.where(has_row, sampled, -1), torch.where(proposed, num_spec_tokens, 0).to(torch.int32), rows


def remember(draft_dists: DraftDistributions, masks: Rows, proposed: Tensor) -> None:
    """Keep the distributions that the next drafts were drawn from, exactly as they were sampled.

    Where nothing is proposed nothing is written: a request without rows in this step keeps its drafts, and a later step
    will need their distributions.
    """
    has_row = proposed.unsqueeze(1)
    draft_dists.logits.copy_(
        torch.where(has_row.unsqueeze(2), masks.logits.to(draft_dists.logits.dtype), draft_dists.logits)
    )
    draft_dists.cut.copy_(torch.where(has_row, masks.cut.to(draft_dists.cut.dtype), draft_dists.cut))
    log_norm = log_norm_of(masks.z, masks.cut).to(draft_dists.log_norm.dtype)
    draft_dists.log_norm.copy_(torch.where(has_row, log_norm, draft_dists.log_norm))


def step_of(query_start_loc: Tensor, num_drafts: Tensor, drafts: Tensor, positions: Tensor) -> Step:
    num_rows = query_start_loc.diff().long()
    n = num_drafts.long().clamp(min=0).minimum((num_rows - 1).clamp(0, drafts.shape[1]))
    return Step(query_start_loc[:-1].long(), num_rows, n, drafts, positions.long().unsqueeze(1) + 1)


def transform(rows: Tensor, valid: Tensor, logits: Tensor, logit_bias: Tensor | None, sampling: Sampling) -> Rows:
    """The rows [B, R] of logits after the sampling transform, and the error flags of those that are valid [B, R]."""
    raw = add_bias(logits[rows], None if logit_bias is None else logit_bias[rows])
    x, bits = sanitise(raw, sampling.id_limit, sampling.mask_id)
    temperature, top_k, top_p, min_p = (p.unsqueeze(1).expand(rows.shape) for p in sampling[:4])
    z = scale_by_temperature(x, temperature)
    cut = truncation_cut(z.flatten(0, 1), top_k.flatten(), top_p.flatten(), min_p.flatten()).view(rows.shape)
    error_flags = torch.zeros_like(sampling.top_k, dtype=torch.int32)
    for r in range(rows.shape[1]):
        error_flags = error_flags | torch.where(valid[:, r], bits[:, r], 0)
    return Rows(raw, z, cut, error_flags)


def noise_from(first: Tensor, count: int, seed: Tensor, stream: int, z: Tensor) -> Tensor:
    """Gumbel noise [B, count, V] of the positions first, first + 1, ..."""
    position = first + torch.arange(count, device=z.device)
    return gumbel(seed.unsqueeze(1).expand(position.shape), position, z.shape[-1], stream, z.dtype)
