"""The distributions of what the CUDA sampler emits, by chi-square, apart from its equality with the reference.

64 ids and at most 4,096 rows a case; seeds ride as the rows or requests of one call. Each test also shows that a known
mistake would be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

import python_ref
from idlm_kernels.native import backend
from idlm_kernels.testing.decided import Mix, parameters
from python_ref import STREAM_DRAFT, STREAM_TARGET, DraftDistributions
from tests.ref.distributions import (
    DETECT_BELOW,
    assert_follows,
    cells,
    chi_square_p,
    counts_of,
    transformed_distribution,
)

VOCAB = 64
ROWS = 4096
MASK_ID = 5
ID_LIMIT = 62

MIXES = {
    "plain": Mix(),
    "cold": Mix(temperature=0.5),
    "top-k with ties": Mix(temperature=2.0, top_k=6),
    "top-p": Mix(top_p=0.8),
    "min-p": Mix(temperature=1.5, min_p=0.1),
}


@pytest.fixture(autouse=True)
def built(module: ModuleType) -> None:
    """Every test here launches kernels."""


def logits_row(seed: int, spread: float = 1.2) -> Tensor:
    """On a grid of eighths, so that there are ties."""
    return (8 * spread * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))).round() / 8


def distribution_of(row: Tensor, mix: Mix) -> Tensor:
    distribution = transformed_distribution(
        row.tolist(), mix.temperature, mix.top_k, mix.top_p, mix.min_p, ID_LIMIT, MASK_ID
    )
    return torch.tensor(distribution, dtype=torch.float64)


def seeds(count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", MIXES)
def test_rows_follow_the_transformed_distribution(name: str, device: torch.device) -> None:
    mix, row = MIXES[name], logits_row(1)
    args = (row.bfloat16().expand(ROWS, -1).contiguous(), torch.arange(ROWS), *parameters(ROWS, (mix,)), seeds(ROWS))
    ids = backend.sample_rows(*(x.to(device) for x in args), ID_LIMIT, MASK_ID).cpu()
    assert_follows(counts_of(ids, VOCAB), distribution_of(row, mix), name)
    warmer = Mix(1.2 * mix.temperature)
    assert chi_square_p(counts_of(ids, VOCAB), distribution_of(row, warmer)) < DETECT_BELOW


@dataclass(frozen=True)
class Steps:
    """Steps of a chain plan with one draft: 2 clean rows and a MASK row per request, the same logits in all of them."""

    mix: Mix
    clean: tuple[Tensor, Tensor]  # logits of the clean rows
    mask: Tensor  # of the MASK row
    draft: Tensor  # that the current drafts were drawn from

    def run(self, rule: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Which drafts stood, the tokens [B, 2] and the next drafts of those requests."""
        batch = ROWS // 3
        seed, positions = seeds(batch), torch.arange(batch, dtype=torch.int32)
        each = parameters(batch, (self.mix,))
        stream = STREAM_TARGET if rule == "match" else STREAM_DRAFT
        distribution_logits = self.draft.expand(batch, -1).contiguous()
        drafts = python_ref.sample_rows(
            distribution_logits, positions + 1, *each, seed, ID_LIMIT, MASK_ID, stream=stream
        )
        draft_dists = None
        if rule == "rejection":
            z = distribution_logits / each[0].unsqueeze(1)
            z[:, ID_LIMIT:] = z[:, MASK_ID] = -torch.inf
            cut = python_ref.sampling.truncation_cut(z, *each[1:])
            norm = python_ref.sampling.log_norm_of(z, cut)
            draft_dists = DraftDistributions(*(x.unsqueeze(1).to(device) for x in (distribution_logits, cut, norm)))
        num_accepted, tokens, next_drafts, next_num_drafts = backend.verify_accept(
            torch.stack((*self.clean, self.mask)).repeat(batch, 1).to(device),
            (3 * torch.arange(batch + 1, dtype=torch.int32)).to(device),
            torch.ones(batch, dtype=torch.int32, device=device),
            drafts.unsqueeze(1).to(device),
            positions.to(device),
            *(x.to(device) for x in each),
            seed.to(device),
            ID_LIMIT,
            MASK_ID,
            quadratic=False,
            rule=rule,
            draft_dists=draft_dists,
        )
        stood = num_accepted.cpu() == 1
        assert torch.equal(next_num_drafts.cpu() == 1, stood)
        return stood, tokens.cpu(), next_drafts.cpu()[stood, 0]


@pytest.mark.parametrize("name", ["plain", "top-p"])
@pytest.mark.parametrize("rule", ["match", "rejection"])
def test_steps_follow_the_target_distribution_whatever_the_drafts(rule: str, name: str, device: torch.device) -> None:
    mix = MIXES[name]
    first, second, mask = logits_row(2), logits_row(3), logits_row(4)
    draft = first + logits_row(5, 0.7)
    stood, tokens, next_drafts = Steps(mix, (first, second), mask, draft).run(rule, device)
    p, p_second, q, q_next = (distribution_of(row, mix) for row in (first, second, draft, mask))
    if rule == "match":
        # Gumbel coupling: P(y = d = i) = 1 / sum_j max(p_j / p_i, q_j / q_i).
        both = torch.maximum(p.unsqueeze(0) / p.unsqueeze(1), q.unsqueeze(0) / q.unsqueeze(1))
        accepted = torch.where((p > 0) & (q > 0), 1 / both.sum(1), 0.0)
    else:
        accepted = torch.minimum(p, q)
    rate = accepted.sum()
    assert_follows(counts_of(tokens[:, 0], VOCAB), p, "first token")
    assert_follows(torch.tensor([int(stood.sum()), int((~stood).sum())]), torch.stack((rate, 1 - rate)), "acceptance")
    pairs = counts_of(cells(*tokens[stood].T, num_ids=VOCAB), VOCAB**2)
    assert_follows(pairs, torch.outer(accepted / rate, p_second).flatten(), "both tokens of an accepted draft")
    assert_follows(counts_of(next_drafts, VOCAB), q_next, "next drafts")
    # Drafts taken as they are, and, in `rejection`, a refused one replaced by a sample of p instead of the residual.
    assert chi_square_p(counts_of(tokens[:, 0], VOCAB), q) < DETECT_BELOW
    if rule == "rejection":
        assert chi_square_p(counts_of(tokens[:, 0], VOCAB), accepted + (1 - rate) * p) < DETECT_BELOW
