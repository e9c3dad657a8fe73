"""`rejection` end to end: the distribution of what a model emits is the distribution of AR sampling."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from idlm_kernels import use_backend
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.generate.plan import prefill_rows
from python_ref.sampling import distribution, log_norm_of, truncation_cut
from tests.tiny import MemoryCheckpoint, tiny_config, tiny_state

MakeGenerator = Callable[..., Generator]
VOCAB, TOKENS, REQUESTS = 5, 4, 4000
PROMPT = [1, 3, 2]


def exact_distribution(generator: Generator, params: SamplingParams) -> torch.Tensor:
    """Probability of every sequence of TOKENS tokens after PROMPT under AR sampling, fp64 [VOCAB ** TOKENS]."""
    tails = list(itertools.product(range(VOCAB), repeat=TOKENS))
    p = torch.ones(len(tails), dtype=torch.float64)
    memo: dict[tuple[int, ...], torch.Tensor] = {}
    for index, tail in enumerate(tails):
        for i in range(TOKENS):
            prefix = (*PROMPT, *tail[:i])
            if prefix not in memo:
                state = tiny_state([list(prefix)], 4, vocab_size=VOCAB)
                rows = prefill_rows(state, [0], [len(prefix)], 0, 16)
                z = generator.model.forward(rows, generator.model.new_cache(4, 16))[0][-1:] / params.temperature
                cut = truncation_cut(
                    z, torch.tensor([params.top_k]), torch.tensor([params.top_p]), torch.tensor([params.min_p])
                )
                memo[prefix] = distribution(z, cut, log_norm_of(z, cut), torch.tensor([False]))[0].double()
            p[index] *= memo[prefix][tail[i]]
    return p / p.sum()


def p_value(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Chi-square test; cells of fewer than 5 expected counts are merged into one."""
    expected = p * counts.sum()
    big = expected >= 5
    found = torch.cat([counts[big], counts[~big].sum().view(1)])
    wanted = torch.cat([expected[big], expected[~big].sum().view(1)])
    if wanted[-1] < 1e-9:
        assert found[-1] == 0, "a sequence of probability zero was emitted"
        found, wanted = found[:-1], wanted[:-1]
    statistic = ((found - wanted).square() / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize(("plan", "stride"), [("chain", 3), ("quadratic", 3), ("quadratic", 4), ("ar", 1)])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0}, {"temperature": 1.4, "top_k": 4, "top_p": 0.9}], ids=["plain", "truncated"]
)
def test_distribution_of_four_tokens(
    plan: str, stride: int, sampling: dict[str, float], make_generator: MakeGenerator
) -> None:
    with use_backend("torch"):  # the references take the whole batch at once
        generator = make_generator(MemoryCheckpoint(tiny_config(vocab_size=VOCAB), seed=4, scale=0.3))
    generator.max_num_seqs = REQUESTS
    each = [SamplingParams(seed=1000 + s, max_tokens=TOKENS, **sampling) for s in range(REQUESTS)]  # type: ignore[arg-type]
    with use_backend("torch"):
        found = generator.generate([PROMPT] * REQUESTS, each, plan=plan, stride=stride, rule="rejection")  # type: ignore[arg-type]
    tokens = torch.tensor([r.token_ids for r in found])
    cells = (tokens * VOCAB ** torch.arange(TOKENS - 1, -1, -1)).sum(1)
    counts = torch.bincount(cells, minlength=VOCAB**TOKENS).double()
    with use_backend("torch"):
        want = exact_distribution(generator, each[0])
    assert p_value(counts, want) > 1e-3
    assert (counts / REQUESTS - want).abs().sum() / 2 < 0.1
    if plan != "ar":
        assert sum(r.tpf for r in found) / REQUESTS > 1.05, "drafts were accepted, so the rule was at work"
        accepted = [r.acceptance[0] for r in found if r.acceptance[0] is not None]
        assert 0.05 < sum(accepted) / len(accepted) < 0.98


def test_rejection_is_greedy_at_temperature_zero(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    prompts = [[5, 6, 7], [8]]
    want = [r.token_ids for r in generator.generate(prompts, SamplingParams(max_tokens=20), plan="ar")]
    for plan in ("chain", "quadratic"):
        found = generator.generate(prompts, SamplingParams(max_tokens=20), plan=plan, rule="rejection")  # type: ignore[arg-type]
        assert [r.token_ids for r in found] == want
