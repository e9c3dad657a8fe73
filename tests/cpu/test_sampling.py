"""Sampling of the CPU backend: the very results of the references, computed faster."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import python_ref
from idlm_kernels.cpu import noise, sample_rows, sampling, verify_accept
from python_ref import DraftDistributions
from python_ref.noise import gumbel, noise_words
from python_ref.sampling import log_norm_of, sanitise, scale_by_temperature, truncation_cut

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _nothing_kept():
    noise._kept.clear()


@pytest.fixture(params=["compiled", "numpy"])
def draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are drawn by the compiled kernels, where they are, and without them."""
    if request.param == "numpy":
        monkeypatch.setattr(sampling, "native_draw", lambda *_: None)


# Noise


@pytest.mark.parametrize("position", [0, 7, 1 << 20, (1 << 32) - 1, -1])
@pytest.mark.parametrize("seed", [0, 3, -5, (1 << 63) - 1, -(1 << 63), 0x12345678_9ABCDEF0])
@pytest.mark.parametrize("vocab_size", [1, 4, 1001])
def test_noise_bits(vocab_size: int, seed: int, position: int) -> None:
    at = torch.tensor(seed), torch.tensor(position)
    for stream in (0, 1):
        words = noise._words(np.arange(-(-vocab_size // 4), dtype=np.uint64), seed, position, stream)
        assert np.array_equal(words.ravel()[:vocab_size], noise_words(*at, vocab_size, stream).numpy())
        want = gumbel(*at, vocab_size, stream)
        assert torch.equal(noise.gumbel_row(vocab_size, seed, position, stream), want)
        ids = np.unique([0, vocab_size // 2, vocab_size - 1])
        assert torch.equal(noise.gumbel_at(ids, seed, position, stream), want[ids])


def test_noise_of_edge_words() -> None:
    """The smallest uniforms take the series, and the largest word must stay finite."""
    words = torch.tensor([0, 1, (1 << 27) - 1, 1 << 27, (1 << 32) - 128, (1 << 32) - 1])
    want = python_ref.noise.uniform_to_gumbel(python_ref.noise.word_to_uniform(words))
    assert torch.equal(noise._gumbel(words), want)
    assert want.isfinite().all()


def test_noise_rows_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "KEPT_BYTES", 4000)
    first = noise.gumbel_row(100, 1, 0, 0)
    assert noise.gumbel_row(100, 1, 0, 0) is first
    for position in range(1, 30):
        noise.gumbel_row(100, 1, position, 0)
        noise.gumbel_row(100, 1, 0, 0)  # the row in use stays
        assert sum(row.nbytes for row in noise._kept.values()) <= 4000
    assert noise.gumbel_row(100, 1, 0, 0) is first
    assert noise.gumbel_row(100, 1, 1, 0) is not None


# Truncation


@pytest.mark.parametrize("seed", range(60))
def test_cut(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice([1, 5, 64, 5000])
    z = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * rng.choice([0, 1, 10])
    if rng.random() < 0.5:
        z = z.round()  # ties
    z[torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)) < 0.2] = -INF
    z[rng.randrange(size)] = rng.choice([0.0, 50.0])
    for top_k in (0, 1, 3, size, size + 1):
        for top_p in (1.0, 0.9, 0.5, 1e-6):
            for min_p in (0.0, 0.1, 1.0):
                want = truncation_cut(
                    z.unsqueeze(0), torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p])
                )
                got = sampling.truncation_cut(z.numpy(), top_k, float(torch.tensor(top_p)), float(torch.tensor(min_p)))
                assert got == float(want), (size, top_k, top_p, min_p)


def test_mass_beyond_the_head_of_the_sum() -> None:
    z = torch.zeros(4 * sampling.HEAD)
    z += torch.arange(z.numel()) * 1e-6
    for top_p in (0.25, 0.5, 0.9, 0.999):
        want = truncation_cut(z.unsqueeze(0), torch.tensor([0]), torch.tensor([top_p]), torch.tensor([0.0]))
        assert sampling.truncation_cut(z.numpy(), 0, float(torch.tensor(top_p)), 0.0) == float(want)


# sample_rows and verify_accept on random problems


def pick(rng: random.Random, count: int, values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor([rng.choice(values) for _ in range(count)], dtype=dtype)


def parameters(rng: random.Random, count: int, vocab_size: int) -> list[Tensor]:
    return [
        pick(rng, count, [0.0, 0.7, 1.0, 1.5, 0.01], torch.float32),
        pick(rng, count, [0, 0, 1, 5, vocab_size], torch.int32),
        pick(rng, count, [1.0, 1.0, 0.9, 0.3], torch.float32),
        pick(rng, count, [0.0, 0.0, 0.1], torch.float32),
        torch.tensor([rng.randrange(-(1 << 62), 1 << 62) for _ in range(count)]),
    ]


def random_logits(rng: random.Random, rows: int, vocab_size: int, faults: bool) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    logits = torch.randn(rows, vocab_size, generator=generator) * rng.choice([0.5, 3, 10])
    if rng.random() < 0.3:
        logits = (logits * 2).round() / 2  # ties
    if faults:
        for _ in range(rows):
            logits[rng.randrange(rows), rng.randrange(vocab_size)] = rng.choice([NAN, INF, -INF, 3e38])
        logits[rng.randrange(rows)] = -INF
    return logits.to(rng.choice([torch.float32, torch.bfloat16]))


@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_sample_rows(seed: int, faults: bool, draws: None) -> None:
    rng = random.Random(seed)
    rows, vocab_size = rng.randint(1, 20), rng.choice([7, 50, 1000])
    logits, params = random_logits(rng, rows, vocab_size, faults), parameters(rng, rows, vocab_size)
    limits = rng.choice([vocab_size, vocab_size - 3]), rng.choice([-1, 0, vocab_size // 2, vocab_size - 1])
    positions = torch.tensor([rng.randrange(10_000) for _ in range(rows)])
    bias = None if rng.random() < 0.7 else torch.randn(rows, vocab_size)
    results = []
    for op in (python_ref.sample_rows, sample_rows):
        error_flags, out = torch.full((rows,), 16, dtype=torch.int32), torch.empty(rows, dtype=torch.int64)
        given = op(
            logits, positions, *params, *limits, stream=seed % 2, logit_bias=bias, error_flags=error_flags, out=out
        )
        assert given is out
        results.append((out, error_flags))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)
    if faults:
        assert (results[0][1] != 16).any()


class Problem:
    """Arguments of verify_accept for random requests: some absent, some without MASK rows, drafts good and bad."""

    def __init__(self, seed: int, rule: str, faults: bool):
        rng = random.Random(seed)
        self.rule, self.quadratic = rule, rng.random() < 0.5
        batch, k, vocab_size = rng.randint(1, 4), rng.randint(0, 4), rng.choice([7, 50, 1000])
        counts = [rng.randint(0, k) for _ in range(batch)]
        rows = [1 + n + (k * (n + 1) if self.quadratic else k) for n in counts]
        rows = [rng.choice([m, m, m, 0, 1 + n]) for m, n in zip(rows, counts, strict=True)]
        self.query_start_loc = torch.tensor([0, *rows]).cumsum(0).int()
        self.logits = random_logits(rng, sum(rows) + 2, vocab_size, faults)
        drafts = [[rng.randrange(vocab_size) for _ in range(k)] for _ in range(batch)]
        self.drafts = torch.tensor(drafts, dtype=torch.int64).view(batch, k)
        for b in range(batch):
            if rows[b] and rng.random() < 0.7:  # these drafts will mostly stand
                at = self.query_start_loc[b] + torch.arange(counts[b])
                self.logits[at, self.drafts[b, : counts[b]]] += rng.choice([8, 60])
        self.num_drafts = torch.tensor(counts, dtype=torch.int32)
        if faults:
            if k:
                self.drafts[0, 0] = rng.choice([-1, vocab_size, 1 << 40])
            self.num_drafts[-1] += rng.choice([0, 7, -9])
        self.positions = torch.tensor([rng.randrange(5000) for _ in range(batch)], dtype=torch.int32)
        self.params = parameters(rng, batch, vocab_size)
        self.limits = rng.choice([vocab_size, vocab_size - 3]), rng.choice([-1, 0, vocab_size // 2, vocab_size - 1])
        self.bias = None if rng.random() < 0.7 else torch.randn_like(self.logits.float())
        q_logits = random_logits(rng, batch * k, vocab_size, False).view(batch, k, vocab_size) if k else None
        self.draft_dists = None
        if rule == "rejection":
            self.draft_dists = DraftDistributions.empty(batch, k, vocab_size, self.logits.dtype, torch.device("cpu"))
            if q_logits is not None:
                temperature, *truncation, _ = (p.unsqueeze(1).expand(batch, k) for p in self.params)
                z = scale_by_temperature(sanitise(q_logits, *self.limits)[0], temperature)
                self.draft_dists.logits = q_logits
                self.draft_dists.cut = truncation_cut(z.flatten(0, 1), *(t.flatten() for t in truncation)).view(
                    batch, k
                )
                self.draft_dists.log_norm = log_norm_of(z, self.draft_dists.cut)

    def run(self, op) -> tuple[list[Tensor], DraftDistributions | None]:
        state = self.draft_dists and DraftDistributions(*(x.clone() for x in vars(self.draft_dists).values()))
        error_flags = torch.zeros_like(self.num_drafts)
        result = op(
            self.logits,
            self.query_start_loc,
            self.num_drafts,
            self.drafts,
            self.positions,
            *self.params,
            *self.limits,
            quadratic=self.quadratic,
            rule=self.rule,
            draft_dists=state,
            logit_bias=self.bias,
            error_flags=error_flags,
        )
        return [*result, error_flags], state


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests one by one, as with a large vocabulary."""
    monkeypatch.setattr(sampling, "MANY_BELOW", 0)


@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("rule", ["match", "rejection"])
@pytest.mark.parametrize("seed", range(60))
def test_verify_accept(seed: int, rule: str, faults: bool, one_by_one: None, draws: None) -> None:
    check_verify_accept(Problem(seed, rule, faults))


@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_rejection_of_some_requests_at_a_time(seed: int, faults: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(seed, "rejection", faults)
    monkeypatch.setattr(sampling, "MANY_ELEMENTS", 2 * (problem.drafts.shape[1] + 1) * problem.logits.shape[1])
    check_verify_accept(problem)


def test_rejection_takes_requests_together_where_ids_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_reject", lambda *_: pytest.fail("a Python loop per row"))
    problem = next(p for p in (Problem(seed, "rejection", False) for seed in range(60)) if p.drafts.shape[1])
    problem.run(verify_accept)


def check_verify_accept(problem: Problem) -> None:
    want, want_state = problem.run(python_ref.verify_accept)
    got, state = problem.run(verify_accept)
    names = ("num_accepted", "tokens", "next_drafts", "next_num_drafts", "error_flags")
    for name, x, y in zip(names, want, got, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name
    if state is not None and want_state is not None:
        assert torch.equal(state.logits.nan_to_num(), want_state.logits.nan_to_num())
        assert torch.equal(state.cut, want_state.cut)
        torch.testing.assert_close(state.log_norm, want_state.log_norm, rtol=1e-5, atol=1e-5)


def test_the_random_problems_cover_what_they_should() -> None:
    """All counts of accepted drafts, requests with and without proposals, and every error flag occur above."""
    accepted, proposed, flags = set(), set(), 0
    for seed in range(60):
        for faults in (False, True):
            (a, _, _, n, error_flags), _ = Problem(seed, "match", faults).run(verify_accept)
            accepted |= set(a.tolist())
            proposed |= set(n.tolist())
            flags |= int(np.bitwise_or.reduce(error_flags.numpy()))
    assert accepted == proposed == {0, 1, 2, 3, 4}
    assert flags == 15


def test_large_vocabulary(draws: None) -> None:
    """Dense and sparse noise, long truncation lists."""
    vocab_size = 20_011
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(0)) * 2
    ones = torch.ones(6)
    for top_k, top_p, temperature in ((0, 1.0, 0.8), (50, 0.95, 0.8), (0, 0.95, 0.8), (0, 0.99, 2.0), (5000, 1.0, 1.0)):
        args = (
            logits,
            torch.arange(6),
            ones * temperature,
            torch.full((6,), top_k, dtype=torch.int32),
            ones * top_p,
            0 * ones,
            torch.arange(6),
            vocab_size,
            -1,
        )
        assert torch.equal(sample_rows(*args), python_ref.sample_rows(*args))


def test_arguments_stay_as_they_are() -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    ones = torch.ones(3)
    sample_rows(
        logits, torch.arange(3), ones, torch.zeros(3, dtype=torch.int32), ones, 0 * ones, torch.arange(3), 40, 7
    )
    assert torch.equal(logits, before)


def test_fp64_takes_the_reference() -> None:
    logits, ones = torch.randn(3, 50).double(), torch.ones(3)
    args = (logits, torch.arange(3), ones, torch.zeros(3, dtype=torch.int32), ones, 0 * ones, torch.arange(3), 50, -1)
    assert torch.equal(sample_rows(*args), python_ref.sample_rows(*args))
