"""Re-ranking of drafts against a loop in fp64 over the vocabulary, and the distribution that `rejection` is told."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from python_ref import DraftDistributions, rerank_drafts, sample_rows
from python_ref.contract import GREEDY_BELOW, NUM_CANDIDATES, STREAM_DRAFT, STREAM_TARGET
from python_ref.rerank import best_candidates
from python_ref.sampling import distribution, sanitise, scale_by_temperature
from tests.ref.distributions import REJECT_BELOW, chi_square_p, counts_of

WEIGHTS = ("embedding", "head_rows", "from_hidden", "from_previous", "from_state", "to_query")
SAMPLERS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "top-k": {"temperature": 0.9, "top_k": 3},
    "top-p": {"temperature": 1.2, "top_p": 0.7},
    "min-p": {"temperature": 1.0, "min_p": 0.2},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
}


def problem(
    batch: int = 4,
    num_spec_tokens: int = 3,
    vocab_size: int = 83,
    hidden: int = 16,
    width: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **sampler: float,
) -> dict[str, Any]:
    """Arguments for a batch whose third request has no drafts to choose; two columns of logits are no ids."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    parameters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **sampler}
    rows = batch * (num_spec_tokens + 2)
    return {
        "logits": normal(rows, vocab_size + 2, scale=3),
        "hidden": normal(rows, hidden),
        "first_mask": (torch.arange(batch) * (num_spec_tokens + 2) + 1).int(),
        "previous": integers(vocab_size, batch),
        "positions": integers(900, batch).int(),
        "drafts": integers(vocab_size, batch, num_spec_tokens),
        "num_drafts": torch.where(torch.arange(batch) == 2, 0, num_spec_tokens).int(),
        **{
            name: torch.full((batch,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
            for name, value in parameters.items()
        },
        "seed": integers(2**62, batch),
        "embedding": normal(vocab_size, hidden),
        "head_rows": normal(vocab_size, hidden),
        "from_hidden": normal(width, hidden, scale=0.3),
        "from_previous": normal(width, hidden, scale=0.3),
        "from_state": normal(width, width, scale=0.4),
        "to_query": normal(hidden, width, scale=0.4),
        "id_limit": vocab_size,
        "mask_id": 7,
    }


def distributions_for(args: dict[str, Any]) -> DraftDistributions:
    """Of what was there before: no distribution at all."""
    logits = args["logits"]
    q = DraftDistributions.empty(*args["drafts"].shape, logits.shape[1], logits.dtype, logits.device)
    q.cut += 77
    return q


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()


def by_hand(args: dict[str, Any], stream: int) -> tuple[Tensor, Tensor]:
    """Drafts [B, K] and re-ranked rows [B, K, V], one request, draft and vocabulary at a time, in fp64."""
    drafts, rows = args["drafts"].clone(), torch.zeros(*args["drafts"].shape, args["logits"].shape[1]).double()
    weights = {name: args[name].double() for name in WEIGHTS}
    for b in range(drafts.shape[0]):
        if args["num_drafts"][b] == 0:
            continue
        previous, state = int(args["previous"][b]), torch.zeros(weights["from_state"].shape[0]).double()
        for j in range(drafts.shape[1]):
            r = int(args["first_mask"][b]) + j
            x = weights["from_hidden"] @ unit(args["hidden"][r].double())
            x = x + weights["from_previous"] @ unit(weights["embedding"][previous]) + weights["from_state"] @ state
            state = x / (1 + torch.exp(-x))
            query = weights["to_query"] @ state
            row = sanitise(args["logits"][r].double(), args["id_limit"], args["mask_id"])[0]
            best = sorted(range(args["id_limit"]), key=lambda id_, row=row: (-float(row[id_]), id_))[:NUM_CANDIDATES]
            scored = torch.full_like(row, -math.inf)
            for id_ in best:
                if row[id_] > -math.inf:
                    scored[id_] = row[id_] + weights["head_rows"][id_] @ query
            rows[b, j] = scored
            one = [args[name][b : b + 1] for name in ("temperature", "top_k", "top_p", "min_p", "seed")]
            position = args["positions"][b : b + 1] + 1 + j
            rest = (args["id_limit"], args["mask_id"])
            previous = int(sample_rows(scored.unsqueeze(0), position, *one, *rest, stream=stream))
            drafts[b, j] = previous
    return drafts, rows


@pytest.mark.parametrize("rejection", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_a_loop(dtype: torch.dtype, sampler: str, rejection: bool) -> None:
    for seed, shape in enumerate(
        [{}, {"batch": 1, "num_spec_tokens": 1}, {"vocab_size": 20, "num_spec_tokens": 2}, {"num_spec_tokens": 7}]
    ):
        args = problem(dtype=dtype, seed=seed, **shape, **SAMPLERS[sampler])
        q = distributions_for(args) if rejection else None
        found = rerank_drafts(**args, draft_dists=q)
        drafts, rows = by_hand(args, STREAM_DRAFT if rejection else STREAM_TARGET)
        assert found.tolist() == drafts.tolist()
        if q is not None:
            chosen = args["num_drafts"] > 0
            torch.testing.assert_close(q.logits[chosen].double(), rows[chosen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_distribution_that_is_kept_is_the_one_sampled_from(sampler: str) -> None:
    """Over 4096 seeds: chi-square of each draft against its own q; q adds up to 1."""
    batch = 4096
    one = problem(batch=1, num_spec_tokens=2, vocab_size=40, dtype=torch.float32, **SAMPLERS[sampler])
    args = dict(one)
    for name in (
        "first_mask",
        "previous",
        "positions",
        "drafts",
        "num_drafts",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
    ):
        args[name] = one[name].expand(batch, *one[name].shape[1:]).contiguous()
    args["seed"] = torch.arange(batch) * 7919 - 5
    q = distributions_for(args)
    drafts = rerank_drafts(**args, draft_dists=q)
    z = scale_by_temperature(q.logits, args["temperature"].unsqueeze(1))
    p = distribution(z, q.cut, q.log_norm, (args["temperature"] < GREEDY_BELOW).unsqueeze(1).expand(batch, 2))
    assert (p.sum(-1) - 1).abs().max() < 1e-5
    assert (p.gather(-1, drafts.unsqueeze(-1)) > 0).all()
    first = p[0, 0].double() / p[0, 0].double().sum()
    assert torch.equal(p[:, 0], p[:1, 0].expand(batch, -1)), "the first draft has one distribution"
    assert chi_square_p(counts_of(drafts[:, 0], 42), first) > REJECT_BELOW
    likely = drafts[:, 0].mode().values
    after = drafts[:, 0] == likely  # one distribution for the second draft too, given the first
    second = p[after][0, 1].double()
    assert chi_square_p(counts_of(drafts[after, 1], 42), second / second.sum()) > REJECT_BELOW


@pytest.mark.parametrize("vocab_size", [1, 5, 31, 64, 65, 1000, 5003])
@pytest.mark.parametrize("mask_id", [-1, 0, 4])
def test_candidates_are_the_best_that_may_be_sampled(vocab_size: int, mask_id: int) -> None:
    """Few distinct values, so that ties are everywhere: the lowest ids stay."""
    generator = torch.Generator().manual_seed(vocab_size)
    for logits in (
        torch.randn(2, 3, vocab_size + 7, generator=generator),
        torch.randint(-3, 3, (2, 3, vocab_size + 7), generator=generator).to(torch.bfloat16),
    ):
        logits[0, 0, 0] = torch.nan
        values, ids = best_candidates(logits, vocab_size, mask_id)
        allowed = logits[..., :vocab_size].float().nan_to_num(nan=-torch.inf)
        if 0 <= mask_id < vocab_size:
            allowed[..., mask_id] = -torch.inf
        ordered, order = allowed.sort(dim=-1, descending=True, stable=True)
        count = min(NUM_CANDIDATES, vocab_size)
        assert values.shape[-1] == count and int(ids.max()) < vocab_size
        assert torch.equal(values.sort(-1, descending=True).values, ordered[..., :count])
        assert torch.equal(allowed.gather(-1, ids), values)
        assert torch.equal(ids.sort(-1).values, order[..., :count].sort(-1).values)


def tied(args: dict[str, Any]) -> dict[str, Any]:
    """Without a say of the head and with few distinct logits."""
    return args | {"logits": args["logits"].round().clamp(-2, 2), "to_query": args["to_query"] * 0}


def test_ties_go_to_the_lowest_id() -> None:
    for seed in range(5):
        args = tied(problem(seed=seed, temperature=0.0))
        assert rerank_drafts(**args).tolist() == by_hand(args, STREAM_TARGET)[0].tolist()


def faulty(args: dict[str, Any]) -> dict[str, Any]:
    logits = args["logits"].clone()
    start = args["first_mask"].long()
    logits[start[0], 3], logits[start[0], 4] = torch.nan, torch.inf
    logits[start[0] + 1] = torch.nan
    logits[start[1]], logits[start[1] + 1, 9:] = -torch.inf, -torch.inf
    logits[start[3] + 2, 5] = torch.inf
    return args | {"logits": logits}


@pytest.mark.parametrize("mask_id", [-1, 0, 7])
@pytest.mark.parametrize("sampler", ["greedy", "plain", "all"])
def test_faults_give_defined_drafts(sampler: str, mask_id: int) -> None:
    args = faulty(problem(**SAMPLERS[sampler])) | {"mask_id": mask_id}
    q = distributions_for(args)
    found = rerank_drafts(**copy.deepcopy(args))
    assert found.tolist() == by_hand(args, STREAM_TARGET)[0].tolist()
    lowest = 1 if mask_id == 0 else 0
    assert (found[0, 1], found[1, 0]) == (lowest, lowest)
    drafts = rerank_drafts(**args, draft_dists=q)
    assert drafts.tolist() == by_hand(args, STREAM_DRAFT)[0].tolist()
    z = scale_by_temperature(sanitise(q.logits, args["id_limit"], mask_id)[0], args["temperature"].unsqueeze(1))
    p = distribution(z, q.cut, q.log_norm, (args["temperature"] < GREEDY_BELOW).unsqueeze(1).expand(4, 3))
    chosen = args["num_drafts"] > 0
    assert (p[chosen].sum(-1) - 1).abs().max() < 1e-6
    assert p[0, 1, lowest] == 1 and p[1, 0, lowest] == 1
    assert (p.gather(-1, drafts.unsqueeze(-1))[chosen] > 0).all()


def test_a_head_of_nan_takes_the_lowest_id() -> None:
    args = problem()
    args["to_query"] = args["to_query"] * torch.nan
    q = distributions_for(args)
    drafts = rerank_drafts(**args, draft_dists=q)
    chosen = args["num_drafts"] > 0
    assert (drafts[chosen] == 0).all()
    assert (q.logits[chosen][..., 0] == 0).all() and (q.logits[chosen][..., 1:] == -math.inf).all()
    assert not q.cut[chosen].any() and not q.log_norm[chosen].any()


def test_requests_without_drafts_are_left_alone() -> None:
    args = problem()
    args["previous"][2], args["first_mask"][2] = -1, 10**6
    q = distributions_for(args)
    before = copy.deepcopy(q)
    drafts = rerank_drafts(**args, draft_dists=q)
    assert drafts[2].tolist() == args["drafts"][2].tolist()
    for part in ("logits", "cut", "log_norm"):
        assert torch.equal(getattr(q, part)[2], getattr(before, part)[2])
        assert not torch.equal(getattr(q, part)[:2], getattr(before, part)[:2])


@pytest.mark.parametrize("change", [lambda a: a, tied, faulty])
def test_the_greedy_hint_changes_nothing(change: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        for seed in range(4):
            args = change(problem(dtype=dtype, seed=seed, temperature=0.0))
            assert torch.equal(rerank_drafts(**args, greedy=True), rerank_drafts(**args))
            distributions = [distributions_for(args) for _ in range(2)]
            drafts = [
                rerank_drafts(**args, draft_dists=q, greedy=g)
                for q, g in zip(distributions, (False, True), strict=True)
            ]
            assert torch.equal(*drafts) and torch.equal(distributions[0].logits, distributions[1].logits)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(weights: torch.dtype) -> None:
    """Weights and hidden states in half precision, logits too: the result is that of their fp32 values."""
    args = problem(dtype=torch.float32)
    half = {name: args[name].to(weights) for name in (*WEIGHTS, "hidden", "logits")}
    widened = {name: x.float() for name, x in half.items()}
    assert torch.equal(rerank_drafts(**args | half), rerank_drafts(**args | widened))
    q = DraftDistributions.empty(4, 3, 85, weights, torch.device("cpu"))
    drafts = rerank_drafts(**args | half, draft_dists=q)
    z = scale_by_temperature(q.logits.float(), args["temperature"].unsqueeze(1))
    p = distribution(z, q.cut, q.log_norm, torch.zeros(4, 3, dtype=torch.bool))
    chosen = args["num_drafts"] > 0
    assert (p[chosen].sum(-1) - 1).abs().max() < 1e-5  # cut and normaliser are of the distribution as it is kept
    assert (p.gather(-1, drafts.unsqueeze(-1))[chosen] > 0).all()
