"""verify_accept against a plain Python reading of the contract, one request after the other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from idlm_kernels import DraftDistributions, use_backend, verify_accept
from python_ref import FLAG_BAD_DRAFT, FLAG_NAN, STREAM_DRAFT, gumbel, uniform
from tests.ref.distributions import transformed_distribution
from tests.ref.steps import ID_LIMIT, MASK_ID, VOCAB, Step, parameters_of, verify

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


def match_in_python(step: Step, num_spec_tokens: int, quadratic: bool) -> tuple[int, list[int], list[int], int]:
    """The decision of one request in `match`, sentence by sentence from the design."""
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    m, n, length = len(step.logits), len(step.drafts), step.position + 1
    if m == 0:
        return 0, [-1] * (num_spec_tokens + 1), [-1] * num_spec_tokens, 0
    y = [step.sampled(i, length + i, **limits) for i in range(n + 1)]
    a = 0
    while a < n and y[a] == step.drafts[a]:
        a += 1
    tokens = [*step.drafts[:a], y[a]]
    branches = range(n + 1) if quadratic else [n]
    first_row = {b: 1 + n + k * num_spec_tokens for k, b in enumerate(branches)}
    next_drafts: list[int] = []
    if num_spec_tokens and a in first_row and first_row[a] + num_spec_tokens <= m:
        new_length = length + a + 1
        next_drafts = [step.sampled(first_row[a] + j, new_length + j, **limits) for j in range(num_spec_tokens)]
    padding = [-1] * (num_spec_tokens + 1 - len(tokens))
    return a, tokens + padding, next_drafts or [-1] * num_spec_tokens, len(next_drafts)


def random_steps(generator: np.random.Generator, num_spec_tokens: int, plan: str, dtype: torch.dtype) -> list[Step]:
    """A ragged batch; most drafts are right, so that every number of accepted drafts occurs."""
    steps = []
    for _ in range(generator.integers(1, 6)):
        n = 0 if plan == "ar" else int(generator.integers(0, num_spec_tokens + 1))
        rows = {"ar": 1, "chain": 1 + n + num_spec_tokens, "quadratic": 1 + n + (n + 1) * num_spec_tokens}[plan]
        if generator.random() < 0.15:
            n = rows = 0  # a padded request
        step = Step(
            torch.tensor(generator.normal(size=(rows, VOCAB)) * 3, dtype=dtype),
            [],
            int(generator.integers(0, 5000)),
            float(generator.choice([0.0, 0.5, 1.0, 1.7])),
            int(generator.choice([0, 1, 3, 50])),
            float(generator.choice([1.0, 0.9, 0.3])),
            float(generator.choice([0.0, 0.2])),
            int(generator.integers(-(2**63), 2**63 - 1)),
        )
        for i in range(n):
            right = step.sampled(i, step.position + 1 + i, id_limit=ID_LIMIT, mask_id=MASK_ID)
            wrong = int(generator.integers(0, ID_LIMIT))
            step.drafts.append(right if generator.random() < 0.8 else wrong)
        steps.append(step)
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("plan", "num_spec_tokens"), [("ar", 0), ("ar", 3), ("chain", 1), ("chain", 4), ("quadratic", 3)]
)
def test_match_against_python(plan, num_spec_tokens, dtype):
    generator = np.random.default_rng(num_spec_tokens)
    accepted = set()
    for _ in range(25):
        steps = random_steps(generator, num_spec_tokens, plan, dtype)
        a, tokens, next_drafts, next_n, error_flags = verify(steps, num_spec_tokens, quadratic=plan == "quadratic")
        for b, step in enumerate(steps):
            want = match_in_python(step, num_spec_tokens, plan == "quadratic")
            assert (a[b], tokens[b], next_drafts[b], next_n[b]) == want
            accepted.add(a[b])
        assert error_flags == [0] * len(steps)
    assert accepted == (set(range(num_spec_tokens + 1)) if plan != "ar" else {0})


def test_match_gives_the_ar_token_at_every_position():
    """Row i and the first row of a later step give the same token for the same position."""
    generator = np.random.default_rng(0)
    for step in random_steps(generator, 3, "chain", torch.float32) * 2:
        if not len(step.logits):
            continue
        y = [step.sampled(i, step.position + 1 + i, id_limit=ID_LIMIT, mask_id=MASK_ID) for i in range(4)]
        for i in range(4):
            later = replace(step, logits=step.logits[i : i + 1], drafts=[], position=step.position + i)
            assert verify([later], 3, quadratic=False)[1] == [[y[i], -1, -1, -1]]


def rejection_steps(seed: int, plan: str, num_spec_tokens: int, dtype: torch.dtype = torch.float32) -> list[Step]:
    """A batch whose requests all have rows and K drafts at temperature > 0 or 0."""
    generator = np.random.default_rng(seed)
    rows = 1 + num_spec_tokens + (num_spec_tokens + 1 if plan == "quadratic" else 1) * num_spec_tokens
    return [
        Step(
            torch.tensor(generator.normal(size=(rows, VOCAB)) * 2, dtype=dtype),
            [],
            int(generator.integers(0, 5000)),
            float(generator.choice([0.0, 0.6, 1.0, 1.4])),
            int(generator.choice([0, 4])),
            float(generator.choice([1.0, 0.8])),
            float(generator.choice([0.0, 0.1])),
            int(generator.integers(-(2**63), 2**63 - 1)),
        )
        for _ in range(6)
    ]


@pytest.mark.parametrize("rule", ["match", "rejection"])
@pytest.mark.parametrize("quadratic", [False, True])
def test_requests_do_not_affect_each_other(rule, quadratic):
    """Any request alone, or in another order, decides the same."""
    num_spec_tokens, plan = 3, "quadratic" if quadratic else "chain"
    steps = rejection_steps(5, plan, num_spec_tokens)

    def two_steps(chosen: list[Step]) -> list[tuple]:
        """Drafts proposed by a first step, verified in a second one."""
        draft_dists = DraftDistributions.empty(len(chosen), num_spec_tokens, VOCAB, torch.float32, torch.device("cpu"))
        options = {"quadratic": quadratic, "rule": rule, "draft_dists": draft_dists if rule == "rejection" else None}
        first = [replace(s, logits=s.logits[: 1 + num_spec_tokens]) for s in chosen]
        _, _, drafts, n, _ = verify(first, num_spec_tokens, **options)
        assert n == [num_spec_tokens] * len(chosen)
        second = [replace(s, drafts=d, position=s.position + 1) for s, d in zip(chosen, drafts, strict=True)]
        results = verify(second, num_spec_tokens, **options)
        distributions = (draft_dists.logits.tolist(), draft_dists.cut.tolist(), draft_dists.log_norm.tolist())
        return list(zip(*results, *(distributions if rule == "rejection" else ()), strict=True))

    together = two_steps(steps)
    order = [4, 0, 5, 2]
    assert two_steps([steps[b] for b in order]) == [together[b] for b in order]
    for b, step in enumerate(steps):
        assert two_steps([step]) == [together[b]]


def distribution_in_python(row: Tensor, step: Step) -> list[float]:
    temperature = float(np.float32(step.temperature))
    truncation = (step.top_k, step.top_p, step.min_p)
    return transformed_distribution(row.tolist(), temperature, *truncation, id_limit=ID_LIMIT, mask_id=MASK_ID)


def rejection_in_python(step: Step, q_rows: Tensor) -> tuple[int, list[int]] | None:
    """(a, emitted tokens) by the paper's rule in fp64; None where fp32 may decide otherwise."""
    length, margin, emitted = step.position + 1, 1e-5, []
    for i in range(len(step.drafts) + 1):
        at = torch.tensor([step.seed]), torch.tensor([length + i])
        target = distribution_in_python(step.logits[i], step)
        if i < len(step.drafts):
            p, q, x = target, distribution_in_python(q_rows[i], step), step.drafts[i]
            u = float(uniform(*at))
            if abs(u * q[x] - p[x]) < margin:
                return None
            if u * q[x] < p[x]:
                emitted.append(x)
                continue
            target = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
        noise = gumbel(*at, VOCAB)[0].tolist()
        # At T = 0 the distribution is a point mass, which no noise moves.
        score = [math.log(r) + g if r > 1e-12 else -INF for r, g in zip(target, noise, strict=True)]
        second, first = sorted(score)[-2:]
        return None if first - second < margin else (i, [*emitted, score.index(first)])
    raise AssertionError("every request emits a token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("plan", ["chain", "quadratic"])
def test_rejection_against_python(plan, dtype):
    """Acceptance u q(x) < p(x), the residual max(0, p - q), the bonus token of p, drafts of q with stream 1."""
    num_spec_tokens, accepted, skipped = 3, [], 0
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    for trial in range(12):
        steps = rejection_steps(trial, plan, num_spec_tokens, dtype)
        proposing = rejection_steps(trial + 1000, plan, num_spec_tokens, dtype)
        for step, other in zip(steps, proposing, strict=True):
            other.logits = other.logits[: 1 + num_spec_tokens]
            if trial % 2:  # distributions close to p, so that drafts are often accepted
                other.logits[1:] = step.logits[:num_spec_tokens] + 0.2 * other.logits[1:]
            for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
                setattr(other, name, getattr(step, name))
            other.position = step.position - 1
        draft_dists = DraftDistributions.empty(len(steps), num_spec_tokens, VOCAB, dtype, torch.device("cpu"))
        options = {"quadratic": plan == "quadratic", "rule": "rejection", "draft_dists": draft_dists}
        _, _, drafts, _, _ = verify(proposing, num_spec_tokens, **options)
        for b, (step, other) in enumerate(zip(steps, proposing, strict=True)):
            first = step.position + 1
            assert drafts[b] == [
                other.sampled(1 + j, first + j, STREAM_DRAFT, **limits) for j in range(num_spec_tokens)
            ]
            assert torch.equal(draft_dists.logits[b], other.logits[1:])
            step.drafts = drafts[b]
        a, tokens, next_drafts, next_n, error_flags = verify(steps, num_spec_tokens, **options)
        for b, (step, other) in enumerate(zip(steps, proposing, strict=True)):
            want = rejection_in_python(step, other.logits[1:])
            if want is None:
                skipped += 1
            else:
                assert (a[b], tokens[b]) == (want[0], want[1] + [-1] * (num_spec_tokens - want[0]))
            accepted.append(a[b])
            if plan == "chain" and a[b] < num_spec_tokens:
                assert (next_drafts[b], next_n[b]) == ([-1] * num_spec_tokens, 0)
                assert torch.equal(draft_dists.logits[b], other.logits[1:])
                continue
            row = 1 + num_spec_tokens + (a[b] * num_spec_tokens if plan == "quadratic" else 0)
            first = step.position + a[b] + 2
            assert next_drafts[b] == [
                step.sampled(row + j, first + j, STREAM_DRAFT, **limits) for j in range(num_spec_tokens)
            ]
            assert next_n[b] == num_spec_tokens
            assert torch.equal(draft_dists.logits[b], step.logits[row : row + num_spec_tokens])
        assert error_flags == [0] * len(steps)
    assert set(accepted) == {0, 1, 2, 3}
    assert skipped < len(accepted) / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_draft_dists_keep_the_distribution_as_it_was_sampled(dtype):
    """The kept ids of the stored distribution are those of the row, the last one included; the masses add up to 1."""
    steps = rejection_steps(77, "chain", 3, dtype)
    for step in steps:
        step.temperature, step.top_k, step.top_p, step.min_p, step.logits = 0.7, 5, 0.95, 0.01, step.logits[:4]
    draft_dists = DraftDistributions.empty(len(steps), 3, VOCAB, dtype, torch.device("cpu"))
    verify(steps, 3, quadratic=False, rule="rejection", draft_dists=draft_dists)
    for b, step in enumerate(steps):
        for j in range(3):
            distribution = torch.tensor(distribution_in_python(step.logits[1 + j], step), dtype=torch.float64)
            z = draft_dists.logits[b, j].to(draft_dists.cut.dtype) / torch.tensor(0.7, dtype=torch.float32)
            z[[MASK_ID, *range(ID_LIMIT, VOCAB)]] = -INF
            kept = z >= draft_dists.cut[b, j]
            assert torch.equal(kept, distribution > 0)
            stored = torch.exp(z - draft_dists.log_norm[b, j])[kept].double()
            torch.testing.assert_close(stored, distribution[kept], rtol=1e-5, atol=1e-7)


def test_a_request_without_rows_keeps_its_drafts_distribution():
    """A paused request has drafts that a later step judges: its draft_dists must survive the steps in between."""
    steps = rejection_steps(3, "chain", 2)
    for step in steps:
        step.logits = step.logits[:3]
    draft_dists = DraftDistributions.empty(len(steps), 2, VOCAB, torch.float32, torch.device("cpu"))
    verify(steps, 2, quadratic=False, rule="rejection", draft_dists=draft_dists)
    before = [x.clone() for x in (draft_dists.logits, draft_dists.cut, draft_dists.log_norm)]
    steps[1].logits = steps[1].logits[:0]
    for step in steps:
        step.logits = step.logits * -1
    results = verify(steps, 2, quadratic=False, rule="rejection", draft_dists=draft_dists)
    assert [x[1] for x in results] == [0, [-1, -1, -1], [-1, -1], 0, 0]
    for old, new in zip(before, (draft_dists.logits, draft_dists.cut, draft_dists.log_norm), strict=True):
        assert torch.equal(new[1], old[1])
        assert not torch.equal(new[0], old[0])


def test_rejection_logit_bias_is_part_of_p_and_q():
    """With logits bf16 and draft_dists fp32; equal to biasing the logits beforehand."""
    steps = rejection_steps(8, "quadratic", 2, torch.bfloat16)
    bias = torch.randn(sum(len(s.logits) for s in steps) + 2, VOCAB, generator=torch.Generator().manual_seed(0))
    biased, row = [], 0
    for step in steps:
        step.drafts = [3, 5]
        biased.append(replace(step, logits=step.logits.float() + bias[row : row + len(step.logits)]))
        row += len(step.logits)
    results, states = [], []
    for chosen, options in ((steps, {"logit_bias": bias}), (biased, {})):
        states.append(DraftDistributions.empty(len(steps), 2, VOCAB, torch.float32, torch.device("cpu")))
        results.append(verify(chosen, 2, quadratic=True, rule="rejection", draft_dists=states[-1], **options))
    assert results[0] == results[1]
    assert torch.equal(states[0].logits, states[1].logits)
    match = [verify(c, 2, quadratic=True, **o) for c, o in ((steps, {"logit_bias": bias}), (biased, {}))]
    assert match[0] == match[1]


def plain_distribution(draft_dists: DraftDistributions, logits: Tensor) -> None:
    """Make softmax(logits [K, V]) over the allowed ids the distribution of the drafts of request 0."""
    allowed = logits.clone()
    allowed[:, [MASK_ID, *range(ID_LIMIT, VOCAB)]] = -INF
    draft_dists.logits[0] = logits
    draft_dists.cut.fill_(-INF)
    draft_dists.log_norm[0] = allowed.logsumexp(-1)


@pytest.mark.parametrize("rule", ["match", "rejection"])
@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40, -(2**40)])
def test_bad_draft_ids(rule, bad):
    """A draft id out of range is refused and flagged; its token is the sample of p, and earlier drafts stand."""
    (step, *_) = rejection_steps(1, "quadratic", 3)
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    step.temperature, step.top_k, step.top_p, step.min_p = 1.0, 0, 1.0, 0.0
    y = [step.sampled(i, step.position + 1 + i, **limits) for i in range(4)]
    step.drafts = [y[0], bad, y[2]]
    draft_dists = None
    if rule == "rejection":
        draft_dists = DraftDistributions.empty(1, 3, VOCAB, torch.float32, torch.device("cpu"))
        q = step.logits[:3].clone()  # q = p: a draft that p can give is accepted
        q[1, y[1]] += 20.0  # but the residual of the bad one would never give the sample of p
        plain_distribution(draft_dists, q)
    a, tokens, _, next_n, error_flags = verify([step], 3, quadratic=True, rule=rule, draft_dists=draft_dists)
    assert (a, tokens, next_n, error_flags) == ([1], [[y[0], y[1], -1, -1]], [3], [FLAG_BAD_DRAFT])


@pytest.mark.parametrize("rule", ["match", "rejection"])
@pytest.mark.parametrize("forbidden", [MASK_ID, ID_LIMIT, VOCAB - 1])
def test_forbidden_drafts_are_never_accepted(rule, forbidden):
    """An id beyond the tokenizer or MASK has p = 0. With q = p the residual is empty: the token is a sample of p."""
    for seed in range(5):
        (step, *_) = rejection_steps(seed, "chain", 1)
        step.temperature, step.top_k, step.top_p, step.min_p = 1.0, 0, 1.0, 0.0
        step.drafts = [forbidden]
        step.logits[:, forbidden] = 40.0
        draft_dists = None
        if rule == "rejection":
            draft_dists = DraftDistributions.empty(1, 1, VOCAB, torch.float32, torch.device("cpu"))
            plain_distribution(draft_dists, step.logits[:1])
        y = step.sampled(0, step.position + 1, id_limit=ID_LIMIT, mask_id=MASK_ID)
        a, tokens, *_ = verify([step], 1, quadratic=False, rule=rule, draft_dists=draft_dists)
        assert (a, tokens) == ([0], [[y, -1]])


@pytest.mark.parametrize(("count", "used"), [(7, 3), (-2, 0), (2**31 - 1, 3)])
def test_bad_draft_counts(count, used):
    """A count beyond K or below 0 is flagged and cut to what there is."""
    (step, *_) = rejection_steps(4, "quadratic", 3)
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    y = [step.sampled(i, step.position + 1 + i, **limits) for i in range(4)]
    step.drafts, step.count = y[:3], count
    a, tokens, _, _, error_flags = verify([step], 3, quadratic=True)
    assert (a, error_flags) == ([used], [FLAG_BAD_DRAFT])
    assert tokens == [y[: used + 1] + [-1] * (3 - used)]


def test_a_count_beyond_the_rows():
    """More drafts than rows: only drafts that have a clean row are verified."""
    (step, *_) = rejection_steps(4, "chain", 3)
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    y = [step.sampled(i, step.position + 1 + i, **limits) for i in range(4)]
    step.drafts, step.logits = y[:3], step.logits[:2]
    a, tokens, next_drafts, next_n, error_flags = verify([step], 3, quadratic=False)
    assert (a, tokens, error_flags) == ([1], [[y[0], y[1], -1, -1]], [FLAG_BAD_DRAFT])
    assert (next_drafts, next_n) == ([[-1, -1, -1]], [0])


def test_status_covers_the_rows_that_are_used():
    """Clean rows 0..n and the MASK rows of the accepted branch; a bad row elsewhere is no fault. Bits are added."""
    num_spec_tokens = 2
    for row in range(9):  # 3 clean rows, then branches 0, 1, 2
        (step, *_) = rejection_steps(6, "quadratic", num_spec_tokens)
        limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
        y = [step.sampled(i, step.position + 1 + i, **limits) for i in range(3)]
        step.drafts = [y[0], (y[1] + 1) % 4]  # a = 1
        clean = verify([step], num_spec_tokens, quadratic=True)
        assert (clean[0], clean[4]) == ([1], [0])
        step.logits[row, 0] = NAN
        error_flags = torch.tensor([32], dtype=torch.int32)
        verify_accept(
            *parameters_of([step], num_spec_tokens),
            ID_LIMIT,
            MASK_ID,
            quadratic=True,
            rule="match",
            error_flags=error_flags,
        )
        used = row < 3 or row in (5, 6)
        assert error_flags.tolist() == [32 + (FLAG_NAN if used else 0)], f"row {row}"


def test_status_is_that_of_the_request():
    """A bad row of the first request, whose row 0 stands in for rows that others lack, marks the first alone."""
    first, second, third = rejection_steps(6, "chain", 2)[:3]
    first.logits[0, 0], second.logits = NAN, second.logits[:1]
    third.logits = third.logits[:0]
    assert verify([first, second, third], 2, quadratic=False)[4] == [FLAG_NAN, 0, 0]


def test_padded_requests_change_nothing_and_have_no_status():
    (step, other, *_) = rejection_steps(9, "chain", 2)
    for s in (step, other):
        s.logits = s.logits[:3]
    empty = Step(step.logits[:0], [], 0, 0.0, 0, 1.0, 0.0, 0, count=5)
    alone = verify([step, other], 2, quadratic=False)
    a, tokens, next_drafts, next_n, error_flags = verify([empty, step, empty, other, empty], 2, quadratic=False)
    for b in (0, 2, 4):
        assert (a[b], tokens[b], next_drafts[b], next_n[b], error_flags[b]) == (0, [-1, -1, -1], [-1, -1], 0, 0)
    picked = tuple([x[1], x[3]] for x in (a, tokens, next_drafts, next_n, error_flags))
    assert picked == alone


def test_greedy_rejection_equals_greedy_match():
    """At T = 0 both rules accept a draft iff it is the argmax, and commit the argmax otherwise."""
    for trial in range(20):
        steps = rejection_steps(trial, "quadratic", 3)
        for step in steps:
            step.temperature = 0.0
            best = [step.sampled(i, 0, id_limit=ID_LIMIT, mask_id=MASK_ID) for i in range(3)]
            wrong = int(torch.randint(0, 4, (1,), generator=torch.Generator().manual_seed(trial)))
            step.drafts = [best[0], wrong, best[2]] if trial % 3 else best
        draft_dists = DraftDistributions.empty(len(steps), 3, VOCAB, torch.float32, torch.device("cpu"))
        for b, step in enumerate(steps):
            draft_dists.logits[b] = torch.nn.functional.one_hot(torch.tensor(step.drafts), VOCAB)
        rejection = verify(steps, 3, quadratic=True, rule="rejection", draft_dists=draft_dists)
        assert rejection == verify(steps, 3, quadratic=True)
