"""The re-ranking head changes what is drafted and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from idlm_kernels import use_backend
from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.model.rerank import RerankHead
from tests.generate.test_exactness import SAMPLERS, decode, prompts_of
from tests.generate.test_rejection import PROMPT, REQUESTS, TOKENS, VOCAB, exact_distribution, p_value
from tests.tiny import MemoryCheckpoint, oracle_checkpoint, tiny_config

MakeGenerator = Callable[..., Generator]
WIDTH = 12


def random_head(hidden: int, seed: int = 0, scale: float = 3.0) -> RerankHead:
    generator = torch.Generator().manual_seed(seed)
    shapes = (WIDTH, hidden), (WIDTH, hidden), (WIDTH, WIDTH), (hidden, WIDTH)
    weights = (torch.randn(*shape, generator=generator, device="cpu") / shape[1] ** 0.5 for shape in shapes)
    return RerankHead(*(weight * scale for weight in weights))


def with_head(generator: Generator, head: RerankHead | None = None) -> Generator:
    model = generator.model
    model.rerank_head = (head or random_head(model.config.hidden_size)).to(model.device, model.dtype)
    model.head_rows = model.embedding
    return generator


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("plan", ["chain", "quadratic"])
@pytest.mark.parametrize("stride", [2, 3, 4, 7])
def test_equals_ar(stride: int, plan: str, sampler: str, make_generator: MakeGenerator) -> None:
    generator = with_head(make_generator(oracle_checkpoint()))
    prompts = prompts_of(1, 2 * stride - 1, 5, 23)
    ar = decode(generator, prompts, "ar", 1, **SAMPLERS[sampler])
    assert decode(generator, prompts, plan, stride, **SAMPLERS[sampler]) == ar


def test_the_head_decides_the_drafts_and_can_be_turned_off(make_generator: MakeGenerator) -> None:
    """An oracle's drafts all stand; a wild head spoils them, and only while it is on."""
    generator = with_head(make_generator(oracle_checkpoint()), random_head(32, scale=30.0))
    params = SamplingParams(max_tokens=60, seed=3, temperature=1.0)
    on, off = (generator.generate([[1, 2, 3]], params, plan="quadratic", stride=4, rerank=r)[0] for r in (True, False))
    assert on.token_ids == off.token_ids
    assert off.forwards < on.forwards
    assert off.acceptance == [1.0] * 3


def test_nan_drafts_nothing_that_harms(make_generator: MakeGenerator) -> None:
    generator = with_head(make_generator())
    want = generator.generate([[5, 6]], SamplingParams(max_tokens=20), plan="ar")[0]
    generator.model.rerank_head = dataclasses.replace(
        generator.model.rerank_head, to_query=torch.full((32, WIDTH), torch.nan)
    )
    found = generator.generate([[5, 6]], SamplingParams(max_tokens=20), plan="quadratic", stride=4)[0]
    assert found.token_ids == want.token_ids and found.error_flags == 0 and found.error is None


@pytest.mark.parametrize(("plan", "stride"), [("chain", 3), ("quadratic", 3), ("quadratic", 4)])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0}, {"temperature": 1.4, "top_k": 4, "top_p": 0.9}], ids=["plain", "truncated"]
)
def test_distribution_of_rejection(
    plan: str, stride: int, sampling: dict[str, float], make_generator: MakeGenerator
) -> None:
    """With q the distribution after re-ranking, four tokens keep the joint distribution of AR sampling."""
    with use_backend("torch"):
        generator = make_generator(MemoryCheckpoint(tiny_config(vocab_size=VOCAB), seed=4, scale=0.3))
        with_head(generator, random_head(32, scale=1.0))
        generator.max_num_seqs = REQUESTS
        each = [SamplingParams(seed=2000 + s, max_tokens=TOKENS, **sampling) for s in range(REQUESTS)]  # type: ignore[arg-type]
        found = generator.generate([PROMPT] * REQUESTS, each, plan=plan, stride=stride, rule="rejection")  # type: ignore[arg-type]
        want = exact_distribution(generator, each[0])
    tokens = torch.tensor([r.token_ids for r in found])
    cells = (tokens * VOCAB ** torch.arange(TOKENS - 1, -1, -1)).sum(1)
    counts = torch.bincount(cells, minlength=VOCAB**TOKENS).double()
    assert p_value(counts, want) > 1e-3
    accepted = [r.acceptance[0] for r in found if r.acceptance[0] is not None]
    assert 0.05 < sum(accepted) / len(accepted) < 0.98
