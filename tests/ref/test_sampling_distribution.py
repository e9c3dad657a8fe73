"""The distributions of sampled and of emitted tokens, by chi-square and total variation with fixed seeds.

Thousands of seeds ride as the rows or requests of one call. A test of exactness that cannot fail proves nothing, so
each kind of test here is also shown to fail for a rule that is biased by a known mistake.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import python_ref.noise
import python_ref.verify
from idlm_kernels import DraftDistributions, sample_rows, use_backend, verify_accept
from python_ref import STREAM_ACCEPT, STREAM_DRAFT, STREAM_TARGET, uniform
from python_ref.noise import noise_words
from tests.ref.distributions import (
    DETECT_BELOW,
    REJECT_BELOW,
    assert_follows,
    cells,
    chi_square_p,
    counts_of,
    excess_p,
    transformed_distribution,
)

INF = math.inf


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def tensors(self, count: int) -> tuple[Tensor, ...]:
        """temperature, top_k, top_p, min_p, each [count]."""
        return (
            torch.full((count,), self.temperature),
            torch.full((count,), self.top_k, dtype=torch.int32),
            torch.full((count,), self.top_p),
            torch.full((count,), self.min_p),
        )

    def distribution(self, row: Tensor) -> Tensor:
        distribution = transformed_distribution(row.tolist(), self.temperature, self.top_k, self.top_p, self.min_p)
        return torch.tensor(distribution, dtype=torch.float64)


def draw(row: Tensor, seed: Tensor, position: Tensor, sampling: Sampling, stream: int = STREAM_TARGET) -> Tensor:
    """One sample of the same logits row per seed and position."""
    count = len(seed)
    logits = row.expand(count, -1).contiguous()
    return sample_rows(logits, position, *sampling.tensors(count), seed, len(row), -1, stream=stream)


# Single rows

SAMPLINGS = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.4),
    "hot": Sampling(temperature=3.0),
    "top_k": Sampling(top_k=4),
    "top_k with ties": Sampling(top_k=2),
    "top_p": Sampling(top_p=0.6),
    "min_p": Sampling(min_p=0.15),
    "all": Sampling(temperature=1.3, top_k=7, top_p=0.85, min_p=0.1),
}
WEIGHTS = torch.tensor([3.0, 9.0, 9.0, 1.0, 0.3, 6.0, 4.0, 2.0, 0.05, 12.0, 5.0])


@pytest.mark.parametrize("varied", ["seed", "position"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_distribution_of_a_sample(name, varied):
    """Over consecutive seeds at one position, and over consecutive positions of one seed."""
    sampling, steps = SAMPLINGS[name], torch.arange(20_000)
    seed, position = (steps, torch.full_like(steps, 5)) if varied == "seed" else (torch.full_like(steps, 5), steps)
    ids = draw(WEIGHTS.log(), seed, position, sampling)
    assert_follows(counts_of(ids, len(WEIGHTS)), sampling.distribution(WEIGHTS.log()), name)


def test_the_distribution_test_sees_a_wrong_truncation():
    """Counts of one truncation against the distribution of another that differs by one rare id."""
    ids = draw(WEIGHTS.log(), torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64), Sampling(min_p=0.1))
    counts = counts_of(ids, len(WEIGHTS))
    assert chi_square_p(counts, Sampling(min_p=0.1).distribution(WEIGHTS.log())) > REJECT_BELOW
    assert chi_square_p(counts, Sampling(min_p=0.05).distribution(WEIGHTS.log())) < DETECT_BELOW
    assert chi_square_p(counts, Sampling(temperature=1.15, min_p=0.1).distribution(WEIGHTS.log())) < DETECT_BELOW


def pair_distribution(first: Tensor, second: Tensor) -> Tensor:
    return torch.outer(first, second).flatten()


def test_consecutive_positions_are_independent():
    seeds, rows = torch.arange(40_000), (WEIGHTS[:6].log(), WEIGHTS[-6:].log())
    ids = [draw(row, seeds, torch.full_like(seeds, 8 + i), Sampling()) for i, row in enumerate(rows)]
    counts = counts_of(cells(*ids, num_ids=6), 36)
    assert_follows(counts, pair_distribution(*(Sampling().distribution(row) for row in rows)))
    same = counts_of(cells(ids[0], ids[0], num_ids=6), 36)
    assert (
        chi_square_p(same, pair_distribution(Sampling().distribution(rows[0]), Sampling().distribution(rows[0])))
        < DETECT_BELOW
    )


def test_consecutive_seeds_are_independent():
    seeds, row = torch.arange(40_000), WEIGHTS[:6].log()
    ids = draw(row, seeds, torch.zeros_like(seeds), Sampling())
    counts = counts_of(cells(ids[:-1], ids[1:], num_ids=6), 36)
    assert_follows(counts, pair_distribution(Sampling().distribution(row), Sampling().distribution(row)))


def test_streams_of_a_position_are_independent():
    """Target sample, draft and acceptance uniform of one position: every pair has the product distribution."""
    seeds, row = torch.arange(40_000), WEIGHTS[:6].log()
    position, distribution = torch.full_like(seeds, 3), Sampling().distribution(row)
    target, draft = (draw(row, seeds, position, Sampling(), stream) for stream in (STREAM_TARGET, STREAM_DRAFT))
    u = (uniform(seeds, position, STREAM_ACCEPT) * 6).long()
    sixth = torch.full((6,), 1 / 6, dtype=torch.float64)
    assert_follows(
        counts_of(cells(target, draft, num_ids=6), 36), pair_distribution(distribution, distribution), "target, draft"
    )
    assert_follows(
        counts_of(cells(target, u, num_ids=6), 36), pair_distribution(distribution, sixth), "target, acceptance"
    )
    assert_follows(
        counts_of(cells(draft, u, num_ids=6), 36), pair_distribution(distribution, sixth), "draft, acceptance"
    )


# A whole vocabulary

VOCAB = 151_936


def zipf_p(ids: Tensor, distribution: Tensor) -> float:
    """The smaller of two p-values: chi-square, and the excess of ids that together have a probability of 1e-4."""
    ordered = distribution.sort().values
    is_rare = distribution < ordered[int((ordered.cumsum(0) < 1e-4).sum())]
    expected = float(distribution[is_rare].sum()) * len(ids)
    return min(
        chi_square_p(counts_of(ids, len(distribution)), distribution),
        excess_p(int(is_rare[ids].sum()), expected),
    )


# (seed, id): at position 99 the word of this id is one of the 128 that (word + 0.5) * 2^-32 rounds to 1
EDGE_WORDS = [
    (520, 22962),
    (1437, 28025),
    (5073, 112318),
    (5224, 49858),
    (8485, 25821),
    (8758, 77701),
    (9215, 25944),
    (9535, 131088),
    (9805, 38352),
    (9953, 87826),
    (10116, 81085),
    (10596, 94959),
]


def unclamped(word: Tensor) -> Tensor:
    return (word.to(torch.float32) + 0.5) * 2.0**-32


def test_edge_words():
    for seed, vocab_id in EDGE_WORDS:
        word = noise_words(torch.tensor([seed]), torch.tensor([99]), vocab_id + 1, STREAM_TARGET)[0, -1:]
        assert unclamped(word) == 1


def test_zipf_distribution_at_the_full_vocabulary(monkeypatch):
    """Also with noise that is infinite at edge words, which the same test detects: such a row goes to a random id.

    That is -log(-log v), the more common form of the Gumbel variable, with v = (word + 0.5) * 2^-32. The exponent 2 (a
    Zipf distribution at T = 1/2) leaves the far half of the vocabulary a mass of 4e-6, so that such a token is
    conspicuous. Edge words are in 0.45 % of all rows; a dozen that have one are among the rows, and only they need a
    biased run.
    """
    logits = -torch.arange(1, VOCAB + 1).float().log()
    sampling, distribution = Sampling(temperature=0.5), torch.softmax(logits.double() * 2, -1)

    def sampled(seeds: Tensor) -> Tensor:
        return torch.cat([draw(logits, seed, torch.full_like(seed, 99), sampling) for seed in seeds.split(1)])

    edge_seeds = torch.tensor([seed for seed, _ in EDGE_WORDS])
    bulk = sampled(torch.arange(400))
    assert zipf_p(torch.cat([bulk, sampled(edge_seeds)]), distribution) > REJECT_BELOW
    monkeypatch.setattr(python_ref.noise, "word_to_uniform", unclamped)
    monkeypatch.setattr(python_ref.noise, "uniform_to_gumbel", lambda v: -torch.log(-torch.log(v)))
    biased = sampled(edge_seeds)
    assert biased.tolist() == [vocab_id for _, vocab_id in EDGE_WORDS]
    assert zipf_p(torch.cat([bulk, biased]), distribution) < DETECT_BELOW


def test_infinite_noise_would_lose_the_only_kept_id(monkeypatch):
    """What v = 1 does to the form in use: noise of -inf, so that the one kept id ties with all those cut off."""
    seed, vocab_id = EDGE_WORDS[0]
    logits = torch.zeros(VOCAB)
    logits[vocab_id] = 30.0

    def sampled() -> int:
        return int(draw(logits, torch.tensor([seed]), torch.tensor([99]), Sampling(top_k=1)))

    assert sampled() == vocab_id
    monkeypatch.setattr(python_ref.noise, "word_to_uniform", unclamped)
    assert sampled() == 0


# Emitted tokens of whole decodes


@dataclass
class Decode:
    """A model whose logits are tables, decoded step after step for many seeds at once.

    p [period, V, V]: logits of the token at position t after the token v, p[t % period, v]. q [K + 1, K, V, V]: logits
    of MASK row j of branch b after the last token v that the branch sees, q[b, j, v].
    """

    p: Tensor
    q: Tensor
    sampling: Sampling = field(default_factory=Sampling)
    quadratic: bool = False
    rule: str = "rejection"
    spoil: Callable[[Tensor, Tensor, DraftDistributions], None] | None = (
        None  # (drafts, their number, draft_dists) after each step
    )

    def rows(self, length: Tensor, pending: Tensor, drafts: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Packed logits rows of one step, and query_start_loc."""
        num_spec_tokens = drafts.shape[1]
        m = 1 + n + (n + 1 if self.quadratic else 1) * num_spec_tokens
        start = torch.nn.functional.pad(m.cumsum(0), (1, 0))
        request = torch.repeat_interleave(torch.arange(len(m)), m)
        r = torch.arange(len(request)) - start[request]
        row_n = n[request]
        known = torch.cat([pending.unsqueeze(1), drafts.clamp(min=0)], dim=1)  # the inputs of clean rows
        clean = r <= row_n
        after = known[request, torch.where(clean, r, 0)]
        logits = self.p[(length[request] + r) % len(self.p), after]
        if num_spec_tokens:
            index = (r - 1 - row_n).clamp(min=0)
            branch = index // num_spec_tokens if self.quadratic else row_n
            proposals = self.q[
                branch.clamp(max=num_spec_tokens),
                index % num_spec_tokens,
                known[request, branch.clamp(max=num_spec_tokens)],
            ]
            logits = torch.where(clean.unsqueeze(1), logits, proposals)
        return logits, start.to(torch.int32)

    def run(self, count: int, num_spec_tokens: int, horizon: int = 4) -> tuple[Tensor, Tensor]:
        """The first `horizon` tokens [count, horizon] after token 0 at position 0, and how often a = 0..K occurred in
        each step [horizon, K + 1]; the first step verifies no drafts."""
        seed = torch.arange(count)
        vocab_size = self.p.shape[-1]
        text = torch.zeros(count, 1 + horizon + num_spec_tokens + 1, dtype=torch.int64)
        length = torch.ones(count, dtype=torch.int64)
        drafts, n = torch.full((count, num_spec_tokens), -1), torch.zeros(count, dtype=torch.int64)
        draft_dists = None
        if self.rule == "rejection":
            draft_dists = DraftDistributions.empty(
                count, num_spec_tokens, vocab_size, torch.float32, torch.device("cpu")
            )
        accepted, every = [], torch.arange(count)
        for _ in range(horizon):
            logits, start = self.rows(length, text[every, length - 1], drafts, n)
            a, tokens, drafts, next_n = verify_accept(
                logits,
                start,
                n.to(torch.int32),
                drafts,
                (length - 1).to(torch.int32),
                *self.sampling.tensors(count),
                seed,
                vocab_size,
                -1,
                quadratic=self.quadratic,
                rule=self.rule,
                draft_dists=draft_dists,
            )
            if self.spoil is not None:
                assert draft_dists is not None
                self.spoil(drafts, next_n, draft_dists)
            for j in range(num_spec_tokens + 1):
                slot = length + j
                write = (j <= a) & (slot <= horizon)
                text[every[write], slot[write]] = tokens[write, j]
            accepted.append(counts_of(a, num_spec_tokens + 1))
            length = (length + a + 1).clamp(max=horizon + 1)
            n = next_n.long()
        return text[:, 1 : 1 + horizon], torch.stack(accepted)

    def ar_distribution(self, horizon: int = 4) -> Tensor:
        """Exact probability of each tuple of tokens, flattened as `cells` does."""
        table = torch.stack([torch.stack([self.sampling.distribution(row) for row in rows]) for rows in self.p])
        vocab_size, period = self.p.shape[-1], len(self.p)
        distribution = []
        for path in itertools.product(range(vocab_size), repeat=horizon):
            probability, before = 1.0, 0
            for t, token in enumerate(path, start=1):
                probability *= float(table[t % period, before, token])
                before = token
            distribution.append(probability)
        return torch.tensor(distribution, dtype=torch.float64)


IDS = 4
SEEDS = 20_000


def path_counts(text: Tensor) -> Tensor:
    return counts_of(cells(*text.unbind(1), num_ids=IDS), IDS ** text.shape[1])


def tables(seed: int, num_spec_tokens: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Random p (period 2) and q: q differs between branches, draft indices and last tokens."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(2, IDS, IDS, generator=generator) * spread
    q = torch.randn(num_spec_tokens + 1, num_spec_tokens, IDS, IDS, generator=generator) * spread
    return p, q


def constant(p: list[float], q: list[float], num_spec_tokens: int) -> tuple[Tensor, Tensor]:
    """The same weights everywhere."""
    p_row, q_row = torch.tensor(p).log(), torch.tensor(q).log()
    return p_row.expand(1, IDS, IDS), q_row.expand(num_spec_tokens + 1, num_spec_tokens, IDS, IDS)


# name -> (weights of p, weights of q, the acceptance probability sum min(p, q))
ADVERSARIES = {
    "equal": ([5, 3, 2, 1], [5, 3, 2, 1], 1.0),
    "reversed": ([8, 4, 2, 1], [1, 2, 4, 8], 0.4),
    "disjoint": ([3, 1, 0, 0], [0, 0, 2, 1], 0.0),
    "p inside q": ([3, 1, 0, 0], [1, 1, 1, 1], 0.5),
    "q inside p": ([1, 1, 1, 1], [0, 3, 1, 0], 0.5),
    "q a point": ([4, 3, 2, 1], [0, 0, 1, 0], 0.2),
    "p a point": ([0, 0, 1, 0], [4, 3, 2, 1], 0.2),
    "the same point": ([0, 0, 1, 0], [0, 0, 1, 0], 1.0),
    "a rare draft": ([1000, 500, 1, 1], [1, 1, 500, 1000], 4 / 1502),
}


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("name", ADVERSARIES)
def test_rejection_with_adversarial_distributions(name, quadratic):
    """Four tokens have the AR distribution, and a first draft is accepted with probability sum min(p, q)."""
    p, q, acceptance = ADVERSARIES[name]
    decode = Decode(*constant(p, q, 2), quadratic=quadratic)
    text, accepted = decode.run(SEEDS, 2)
    assert_follows(path_counts(text), decode.ar_distribution(), name)
    stood = SEEDS - int(accepted[1, 0])  # the second step is the first one that verifies drafts
    assert stood / SEEDS == pytest.approx(acceptance, abs=0.02)
    if acceptance == 1:
        assert stood == SEEDS


TRUNCATIONS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.6),
    "top_k": Sampling(top_k=2),
    "top_p": Sampling(top_p=0.7),
    "min_p": Sampling(min_p=0.3),
    "all": Sampling(temperature=1.4, top_k=3, top_p=0.9, min_p=0.1),
}


@pytest.mark.parametrize(("quadratic", "num_spec_tokens"), [(False, 2), (False, 3), (True, 2), (True, 3)])
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_rejection_emits_the_ar_distribution(name, quadratic, num_spec_tokens):
    """A Markov model, proposals that differ between branches, and every truncation on p and q alike."""
    decode = Decode(*tables(num_spec_tokens + 20, num_spec_tokens), sampling=TRUNCATIONS[name], quadratic=quadratic)
    text, accepted = decode.run(SEEDS, num_spec_tokens)
    assert (accepted.sum(0)[:2] > 0).all()
    assert_follows(path_counts(text), decode.ar_distribution(), f"{name}, K = {num_spec_tokens}")


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("rule", ["match", "rejection"])
def test_greedy_emits_the_greedy_sequence(rule, quadratic):
    decode = Decode(*tables(5, 3), sampling=Sampling(temperature=0.0), quadratic=quadratic, rule=rule)
    text, _ = decode.run(50, 3)
    want, before = [], 0
    for t in range(1, 5):
        before = int(decode.p[t % 2, before].argmax())
        want.append(before)
    assert text.tolist() == [want] * 50


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_match_emits_the_ar_sequence(name, quadratic):
    """Token for token what AR gives with the same seeds; and AR has the AR distribution."""
    decode = Decode(*tables(9, 3), sampling=TRUNCATIONS[name], quadratic=quadratic, rule="match")
    text, accepted = decode.run(SEEDS, 3)
    ar, _ = decode.run(SEEDS, 0)
    assert (accepted.sum(0) > 0).all()
    assert torch.equal(text, ar)
    assert_follows(path_counts(ar), decode.ar_distribution(), name)


# Biased rules fail the same test


def argmax_drafts(drafts: Tensor, n: Tensor, draft_dists: DraftDistributions) -> None:
    """Drafts by argmax, judged as if they had been drawn from the full softmax q."""
    drafts.copy_(torch.where((n > 0).unsqueeze(1), draft_dists.logits.argmax(-1), -1))


def misjudged_q(drafts: Tensor, n: Tensor, draft_dists: DraftDistributions) -> None:
    """A normaliser that is 10 % off, as that of a truncated distribution judged by the full one."""
    draft_dists.log_norm += 0.1


def shared_distribution(drafts: Tensor, n: Tensor, draft_dists: DraftDistributions) -> None:
    """Every draft judged by the distribution of the first draft index."""
    for x in (draft_dists.logits, draft_dists.cut, draft_dists.log_norm):
        x[:, 1:] = x[:, :1].clone()


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("rule", [argmax_drafts, misjudged_q, shared_distribution])
def test_a_biased_rule_is_detected(rule, quadratic):
    decode = Decode(*tables(3, 3), quadratic=quadratic, spoil=rule)
    text, _ = decode.run(SEEDS, 3)
    assert chi_square_p(path_counts(text), decode.ar_distribution()) < DETECT_BELOW


@pytest.mark.parametrize("stream", ["STREAM_DRAFT", "STREAM_ACCEPT"])
def test_shared_noise_is_detected(monkeypatch, stream):
    """Drafts, or acceptances, that share the noise of the residual samples."""
    monkeypatch.setattr(python_ref.verify, stream, STREAM_TARGET)
    decode = Decode(*tables(3, 3), quadratic=True)
    text, _ = decode.run(SEEDS, 3)
    assert chi_square_p(path_counts(text), decode.ar_distribution()) < DETECT_BELOW


def test_a_rejection_without_its_residual_is_detected(monkeypatch):
    """After a refusal a sample of p instead of max(0, p - q)."""
    true_distribution = python_ref.verify.distribution
    decode = Decode(*tables(3, 1), quadratic=True)

    def run() -> Tensor:
        text, _ = decode.run(SEEDS, 1, horizon=2)
        return path_counts(text)

    assert chi_square_p(run(), decode.ar_distribution(2)) > REJECT_BELOW
    calls = itertools.count()

    def half_of_q(*args: Tensor) -> Tensor:
        distribution = true_distribution(*args)
        return distribution if next(calls) % 2 == 0 else distribution / 2  # p, then q, of each step

    monkeypatch.setattr(python_ref.verify, "distribution", half_of_q)
    assert chi_square_p(run(), decode.ar_distribution(2)) < DETECT_BELOW


def test_rejection_of_one_token_at_the_full_vocabulary():
    """p a Zipf distribution at T = 1/2, q another with its ids pushed back: one verified draft per seed.

    One request at a time keeps the memory small. Acceptance is sum min(p, q).
    """
    rank = torch.arange(1, VOCAB + 1).float()
    p_row, q_row = -rank.log(), -(rank + 2).log()
    sampling, count = Sampling(temperature=0.5), 160
    p, q = (torch.softmax(row.double() * 2, -1) for row in (p_row, q_row))
    log_norm = torch.logsumexp(q_row / 0.5, -1)
    emitted, accepted = [], 0
    for seed in torch.arange(count).split(1):
        size = len(seed)
        draft = draw(q_row, seed, torch.full_like(seed, 50), sampling, STREAM_DRAFT)
        draft_dists = DraftDistributions(
            q_row.expand(size, 1, VOCAB).clone(), torch.full((size, 1), -INF), log_norm.expand(size, 1).clone()
        )
        a, tokens, _, _ = verify_accept(
            p_row.expand(2 * size, VOCAB).contiguous(),
            torch.arange(0, 2 * size + 1, 2, dtype=torch.int32),
            torch.ones(size, dtype=torch.int32),
            draft.unsqueeze(1),
            torch.full((size,), 49, dtype=torch.int32),
            *sampling.tensors(size),
            seed,
            VOCAB,
            -1,
            quadratic=False,
            rule="rejection",
            draft_dists=draft_dists,
        )
        emitted.append(tokens[:, 0])
        accepted += int(a.sum())
    ids = torch.cat(emitted)
    assert zipf_p(ids, p) > REJECT_BELOW
    share = float(torch.minimum(p, q).sum())
    assert accepted / count == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))
    assert chi_square_p(counts_of(ids, VOCAB), q) < DETECT_BELOW  # the drafts' own distribution is told from p
