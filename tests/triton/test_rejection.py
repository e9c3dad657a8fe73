"""verify_accept in rule `rejection` on backend `triton`: ids, distributions and error_flags of the references.

Both sides see the same noise and distributions that differ by rounding, so only a near-tie could tell them apart, and
the fixed seeds here hold none.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import python_ref
from bench.ptx import recorded_launches
from idlm_kernels.testing import check_bits
from idlm_kernels.triton import sampling
from python_ref import DraftDistributions
from tests.softgpu_support import SCHEDULES
from tests.triton.support import DEVICE, INTERPRETED, assert_ieee, caught, mutant
from tests.triton.test_sampling import DTYPES, rows_of

BASE = DTYPES[0]
VOCAB = 61


class Chain:
    """Steps of the same requests, one after the other: what a step proposes the next one verifies.

    Logits of a position are a random table with some noise of the step, so that drafts stand more often than not.
    Of every eight requests the second is absent in odd steps and the third has no MASK rows in the first one.
    """

    def __init__(
        self,
        plan: str = "quadratic",
        num_spec_tokens: int = 3,
        batch: int = 8,
        vocab: int = VOCAB,
        dtype: torch.dtype = BASE,
    ):
        self.quadratic, self.num_spec_tokens, self.batch, self.vocab, self.dtype = (
            plan == "quadratic",
            num_spec_tokens,
            batch,
            vocab,
            dtype,
        )
        options = rows_of(torch.empty(batch, vocab), vocab - 2)
        self.options = {
            k: options[k] for k in ("temperature", "top_k", "top_p", "min_p", "seed", "id_limit", "mask_id")
        }
        self.options["temperature"] = torch.tensor([(0.7, 1.0, 1.3, 0.0)[b % 4] for b in range(batch)])
        self.positions = torch.randint(0, 900, (batch,), dtype=torch.int32)
        self.drafts = torch.full((batch, num_spec_tokens), -1)
        self.num_drafts = torch.zeros(batch, dtype=torch.int32)
        self.q = DraftDistributions.empty(batch, num_spec_tokens, vocab, dtype, DEVICE)
        self.table = torch.randn(batch, 4 * (num_spec_tokens + 1), vocab) * 2
        self.first = self.positions.clone()
        self.steps = 0

    def arguments(self) -> dict[str, Any]:
        k, logits, counts = self.num_spec_tokens, [], []
        for b in range(self.batch):
            n, rows = int(self.num_drafts[b]), []
            if b % 8 != 1 or self.steps % 2 == 0:
                at = int(self.positions[b] - self.first[b])
                rows = list(range(at, at + n + 1))
                if b % 8 != 2 or self.steps:
                    for branch in range(n + 1) if self.quadratic else [n]:
                        rows += range(at + branch + 1, at + branch + 1 + k)
            counts.append(len(rows))
            logits.append(self.table[b, rows] + 0.7 * torch.randn(len(rows), self.vocab))
        start = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        return {
            "logits": torch.cat([*logits, torch.randn(3, self.vocab)]).to(self.dtype),
            "query_start_loc": start,
            "num_drafts": self.num_drafts,
            "drafts": self.drafts,
            "positions": self.positions,
            **self.options,
            "quadratic": self.quadratic,
            "rule": "rejection",
        }

    def follow(self, arguments: dict[str, Any], result: tuple[Tensor, ...], q: DraftDistributions) -> None:
        num_accepted, _, next_drafts, next_num_drafts = result
        is_present = arguments["query_start_loc"].diff() > 0
        self.positions = torch.where(is_present, self.positions + num_accepted + 1, self.positions)
        self.drafts = torch.where(is_present[:, None], next_drafts, self.drafts)
        self.num_drafts = torch.where(is_present, next_num_drafts, self.num_drafts)
        self.q, self.steps = q, self.steps + 1


def compare(
    module: ModuleType, arguments: dict[str, Any], q: DraftDistributions
) -> tuple[tuple[Tensor, ...], DraftDistributions]:
    """Both sides from the same distributions; returns what the reference left behind."""
    batch = arguments["num_drafts"].shape[0]
    error_flags, wanted_flags = (torch.full((batch,), 32, dtype=torch.int32) for _ in range(2))
    mine, theirs = copy.deepcopy(q), copy.deepcopy(q)
    got = module.verify_accept(**arguments, draft_dists=mine, error_flags=error_flags)
    wanted = python_ref.verify_accept(**arguments, draft_dists=theirs, error_flags=wanted_flags)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.tolist() == b.tolist()
    assert error_flags.tolist() == wanted_flags.tolist()
    check_bits(mine.logits, theirs.logits)
    assert torch.equal(mine.cut, theirs.cut), (mine.cut, theirs.cut)
    torch.testing.assert_close(mine.log_norm, theirs.log_norm, rtol=2e-6, atol=2e-6)
    return wanted, mine


def check_chain(module: ModuleType, chain: Chain | None = None, steps: int = 3) -> None:
    chain = Chain() if chain is None else chain
    accepted = refused = 0
    for _ in range(steps):
        arguments = chain.arguments()
        result, q = compare(module, arguments, chain.q)
        accepted += int(result[0].sum())
        refused += int((result[0] < chain.num_drafts).sum())
        chain.follow(arguments, result, q)
    assert chain.num_spec_tokens < 2 or INTERPRETED or (accepted and refused)


def check_many(module: ModuleType) -> None:
    """Whole distributions at temperature 1, where u decides."""
    chain = Chain("chain", batch=48, vocab=21)
    chain.options |= {"temperature": torch.ones(48), "top_k": torch.zeros(48, dtype=torch.int32)}
    chain.options |= {"top_p": torch.ones(48), "min_p": torch.zeros(48)}
    check_chain(module, chain, steps=2)


@pytest.mark.compiled
def test_many_requests() -> None:
    check_many(sampling)


SLOW = pytest.mark.compiled  # these take the interpreter minutes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "plan, num_spec_tokens",
    [pytest.param("quadratic", 1, marks=SLOW), ("quadratic", 3), ("chain", 2), pytest.param("chain", 31, marks=SLOW)],
)
def test_steps(plan: str, num_spec_tokens: int, dtype: torch.dtype) -> None:
    check_chain(
        sampling,
        Chain(plan, num_spec_tokens, dtype=dtype, batch=4 if INTERPRETED else 12),
        steps=2 if INTERPRETED else 3,
    )


@pytest.mark.compiled
def test_without_drafts_or_mask_rows() -> None:
    chain = Chain("chain", 0)
    compare(sampling, chain.arguments(), chain.q)


def check_slices(module: ModuleType) -> None:
    check_chain(module, Chain(vocab=5003, batch=5))


@pytest.mark.compiled
def test_several_slices() -> None:
    check_slices(sampling)


@pytest.mark.compiled
def test_a_full_vocabulary() -> None:
    check_chain(sampling, Chain(vocab=151_936, batch=3, num_spec_tokens=2, dtype=torch.bfloat16), steps=2)


def check_extremes(module: ModuleType) -> None:
    """Distributions that are equal (nothing is left of the residual), disjoint, and points; drafts that nobody drew."""
    chain = Chain(num_spec_tokens=1, batch=8)
    chain.options["temperature"] = torch.tensor([1.0, 1.0, 0.7, 0.0, 1.0, 1.3, 1.0, 0.0])
    chain.options |= {"top_k": torch.tensor([0, 0, 0, 0, 1, 0, 3, 2], dtype=torch.int32), "top_p": torch.ones(8)}
    arguments = chain.arguments()
    result, q = compare(module, arguments, chain.q)
    chain.follow(arguments, result, q)
    chain.num_drafts = torch.ones(8, dtype=torch.int32)
    chain.drafts = chain.drafts.clamp(min=9)
    q.logits[2] = -q.logits[2]
    arguments = chain.arguments()
    start = arguments["query_start_loc"].long()
    arguments["logits"][start[0]] = q.logits[0, 0]  # p = q
    arguments["logits"][start[6]] = q.logits[6, 0]
    chain.drafts[6] = int(q.logits[6, 0].argmin())  # of probability 0 under both: refused, and nothing is left over
    arguments["drafts"] = chain.drafts
    compare(module, arguments, q)


def test_extremes() -> None:
    check_extremes(sampling)


def check_faults(module: ModuleType) -> None:
    """Bad drafts and counts; NaN, Inf and nothing finite in rows of p and of q, where the distribution is a point."""
    chain = Chain(num_spec_tokens=2, batch=8 if INTERPRETED else 24)
    for fault in (False, True):
        arguments = chain.arguments()
        start = arguments["query_start_loc"].long()[:-1]
        if fault:
            arguments["drafts"][::8, 0], arguments["drafts"][3::8, 1] = -1, VOCAB
            arguments["num_drafts"] = arguments["num_drafts"].clone()
            arguments["num_drafts"][4] = 9
            arguments["logits"][start[6]] = torch.nan
            arguments["logits"][start[4], 3], arguments["logits"][start[4] + 1, 4] = torch.inf, torch.nan
        else:
            arguments["logits"][start[5::8] + 1] = -torch.inf  # the first draft's distribution
            arguments["logits"][start[6] + 2, 5] = torch.inf
        result, q = compare(module, arguments, chain.q)
        chain.follow(arguments, result, q)


def test_faults() -> None:
    check_faults(sampling)


def check_bias(module: ModuleType) -> None:
    """Distributions are kept with the bias, in fp32, at free strides."""
    chain = Chain(batch=6)
    wide = DraftDistributions.empty(6, 5, VOCAB + 3, torch.float32, DEVICE)
    chain.q = DraftDistributions(wide.logits[:, :3, :VOCAB], wide.cut[:, :3], wide.log_norm[:, :3])
    for _ in range(2):
        arguments = chain.arguments()
        arguments["logit_bias"] = torch.randn(arguments["logits"].shape)
        result, q = compare(module, arguments, chain.q)
        chain.follow(arguments, result, q)


def test_bias() -> None:
    check_bias(sampling)


# The distribution of what comes out


@pytest.mark.compiled
def test_distribution_of_emitted_tokens() -> None:
    """Of 2048 seeds: the first token's distribution is p, whatever q is; chi-square at 1e-4, 7 degrees of freedom."""
    batch, vocab = 2048, 8
    p, q = (
        torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5, -3.0, 1.5, 0.0]),
        torch.tensor([0.0, 2.0, -1.0, 1.0, 0.5, 3.0, -9, 0.0]),
    )
    ones = torch.ones(batch)
    state = DraftDistributions(
        q.repeat(batch, 1, 1), torch.full((batch, 1), -9.0), q.logsumexp(0).expand(batch, 1).clone()
    )
    seed = torch.arange(batch) * 977 + 5
    off = {"top_k": torch.zeros(batch, dtype=torch.int32), "top_p": ones, "min_p": ones * 0, "seed": seed}
    common = {"temperature": ones, **off, "id_limit": vocab, "mask_id": -1}
    position = torch.full((batch,), 11, dtype=torch.int32)
    drafts = sampling.sample_rows(q.repeat(batch, 1), position + 1, **common, stream=1)
    num_accepted, tokens, _, _ = sampling.verify_accept(
        p.repeat(2 * batch, 1),
        torch.arange(batch + 1, dtype=torch.int32) * 2,
        torch.ones(batch, dtype=torch.int32),
        drafts[:, None],
        position,
        **common,
        quadratic=False,
        rule="rejection",
        draft_dists=state,
    )
    counts = tokens[:, 0].bincount(minlength=vocab).double()
    expected = p.double().softmax(0) * batch
    assert ((counts - expected) ** 2 / expected).sum() < 29.9
    overlap = torch.minimum(p.softmax(0), q.softmax(0)).sum()  # the share of drafts that stand
    assert abs(num_accepted.double().mean() - overlap) < 0.05


# What the compiler made of it


@pytest.mark.compiled
def test_arithmetic_is_ieee(softgpu: ModuleType) -> None:
    with recorded_launches(softgpu) as launches:
        check_chain(sampling)
    assert {launch.name for launch in launches} == {"cut", "perturb", "residual", "conclude"}
    assert_ieee(launches)


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        check_chain(sampling, Chain(batch=5), steps=2)


MUTANTS = {
    "residual of p": (
        check_many,
        "p_cut, mask_id) - q_of_id",
        "p_cut, mask_id) - 0.0 * q_of_id",
    ),
    "u < p / 2q": (check_many, "u * q < p)", "u * q * 2.0 < p)"),
    "the uniform of another stream": (check_many, "i, kStreamAccept,", "i, kStreamTarget,"),
    "the uniform of the step": (check_many, "first_position + i, kStream", "first_position + i * 0, kStream"),
    "drafts from the target's stream": (check_chain, "stream = kStreamDraft\n", "stream = stream * 1\n"),
    "residual noise of the next position": (
        check_many,
        "first_position + a, kStream",
        "first_position + a + 1, kStream",
    ),
    "distributions kept where nothing is proposed": (check_chain, "is_new = i < num_proposed", "is_new = i < K"),
    "distribution of branch 0": (check_chain, "row = (start + first_mask + j)", "row = (start + 1 + n + j)"),
    "normaliser of one slice": (
        check_slices,
        "inside = has_row[:, None] & (s < shape.SLICES)\n    slice_max",
        "inside = has_row[:, None] & (s < 1)\n    slice_max",
    ),
    "greedy by the distribution": (
        check_extremes,
        "tl.where(is_greedy, draft ==",
        "tl.where(temperature < -1.0, draft ==",
    ),
    "an empty residual yields nothing": (
        check_extremes,
        'tl.where(best > float("-inf"), a, -1)',
        "tl.where(a < n, a, -1)",
    ),
    "residual of a bad draft": (check_faults, "& (bad_at_a == 0)", ""),
    "point masses forgotten": (check_faults, "tl.where(is_empty, kPointMass, log", "tl.where(is_empty, 0, log"),
    "bias left out of the distribution": (
        check_bias,
        "raw = raw.to(tl.float32) + tl.load(",
        "raw = raw.to(tl.float32) + 0.0 * tl.load(",
    ),
}


@pytest.mark.compiled
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    check, old, new = MUTANTS[name]
    assert caught(check, mutant(sampling, old, new, tmp_path))
