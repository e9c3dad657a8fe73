"""`match` is token for token what AR decoding gives, whatever is drafted."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from idlm_kernels.generate import GenerationResult, Generator, SamplingParams
from tests.tiny import MemoryCheckpoint, oracle_checkpoint, tiny_config

MakeGenerator = Callable[..., Generator]
SAMPLERS = {
    "greedy": {},
    "temperature": {"temperature": 0.9},
    "top_k": {"temperature": 1.3, "top_k": 5},
    "top_p": {"temperature": 1.1, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "penalties": {"temperature": 0.9, "presence_penalty": 0.6, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "encouraged": {"presence_penalty": -1.0, "frequency_penalty": 1.5},
    "bias": {"logit_bias": {7: 5.0, 8: -100.0, 9: 5.5}, "frequency_penalty": 0.7},
    "all": {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}


def prompts_of(*lengths: int, vocab_size: int = 61, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]


def decode(generator: Generator, prompts: list[list[int]], plan: str, stride: int, **sampling: Any) -> list[list[int]]:
    return [r.token_ids for r in results(generator, prompts, plan, stride, **sampling)]


def results(
    generator: Generator, prompts: list[list[int]], plan: str, stride: int, **sampling: Any
) -> list[GenerationResult]:
    params = SamplingParams(**{"seed": 11, "max_tokens": 17, **sampling})
    return generator.generate(prompts, params, plan=plan, stride=stride)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bad_drafter(make_generator: MakeGenerator) -> Generator:
    return make_generator()


@pytest.fixture(scope="module")
def oracle(make_generator: MakeGenerator) -> Generator:
    return make_generator(oracle_checkpoint())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("plan", ["chain", "quadratic"])
@pytest.mark.parametrize("stride", range(2, 9))
@pytest.mark.parametrize("drafter", ["bad_drafter", "oracle"])
def test_equals_ar(drafter: str, stride: int, plan: str, sampler: str, request: pytest.FixtureRequest) -> None:
    generator = request.getfixturevalue(drafter)
    prompts = prompts_of(1, 2 * stride - 1, 5, 23)
    ar = decode(generator, prompts, "ar", 1, **SAMPLERS[sampler])
    assert decode(generator, prompts, plan, stride, **SAMPLERS[sampler]) == ar


def test_the_drafters_do_what_they_are_here_for(bad_drafter: Generator, oracle: Generator) -> None:
    for plan in ("chain", "quadratic"):
        good = results(oracle, prompts_of(4, 9), plan, 4, temperature=0.9, max_tokens=60)
        bad = results(bad_drafter, prompts_of(4, 9), plan, 4, temperature=0.9, max_tokens=60)
        assert all(r.acceptance == [1.0, 1.0, 1.0] and r.tpf > 3.5 for r in good)
        assert all(r.tpf < 2 and r.acceptance[0] is not None and r.acceptance[0] < 0.5 for r in bad)


@pytest.mark.parametrize("stride", [12, 32])
def test_long_chains_equal_ar(stride: int, oracle: Generator, bad_drafter: Generator) -> None:
    for generator in (oracle, bad_drafter):
        ar = decode(generator, prompts_of(3), "ar", 1, temperature=0.7, max_tokens=80)
        assert decode(generator, prompts_of(3), "chain", stride, temperature=0.7, max_tokens=80) == ar


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("plan", ["ar", "chain", "quadratic"])
def test_page_size_does_not_matter(page_size: int, plan: str, make_generator: MakeGenerator) -> None:
    prompts = prompts_of(1, 7, 30)
    want = decode(make_generator(page_size=16), prompts, "ar", 1, temperature=1.0)
    assert decode(make_generator(page_size=page_size), prompts, plan, 4, temperature=1.0) == want


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "qwen3", "qk_norm": True},
        {"architecture": "sdar", "qk_norm": True, "mask_token_id": 60},
        {"tie_word_embeddings": True, "num_kv_heads": 1},
        {"num_kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    ],
    ids=["qwen3", "sdar", "tied-mqa", "mha-bias"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_architecture(changes: dict[str, Any], dtype: torch.dtype, make_generator: MakeGenerator) -> None:
    generator = make_generator(dtype=dtype, **changes)
    prompts = prompts_of(1, 8, 13)
    for sampler in ("greedy", "all"):
        ar = decode(generator, prompts, "ar", 1, **SAMPLERS[sampler])
        assert decode(generator, prompts, "chain", 5, **SAMPLERS[sampler]) == ar
        assert decode(generator, prompts, "quadratic", 4, **SAMPLERS[sampler]) == ar
        if changes.get("mask_token_id") is not None:
            assert all(60 not in tokens for tokens in ar), "MASK is never sampled"


def test_a_request_does_not_depend_on_its_batch(bad_drafter: Generator) -> None:
    prompts = prompts_of(1, 3, 9, 31)
    each = [
        SamplingParams(temperature=t, seed=s, max_tokens=m) for t, s, m in [(0, 1, 5), (1, 2, 20), (2, 3, 9), (1, 4, 1)]
    ]
    together = bad_drafter.generate(prompts, each, plan="quadratic", stride=4)
    for prompt, params, result in zip(prompts, each, together, strict=True):
        alone = bad_drafter.generate([prompt], [params], plan="ar")[0]
        assert (result.token_ids, result.finish_reason) == (alone.token_ids, alone.finish_reason)
        assert result.tokens == params.max_tokens


@pytest.mark.parametrize("drafter", ["bad_drafter", "oracle"])
@pytest.mark.parametrize("plan", ["ar", "chain", "quadratic"])
def test_contexts_filled_to_the_last_slot(drafter: str, plan: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(drafter).model
    for max_model_len in (24, 25, 26, 27):
        generator = Generator(model, max_model_len=max_model_len, page_size=5)
        prompts = prompts_of(1, 8, max_model_len - 1)
        found = results(generator, prompts, plan, 4, temperature=1.0, max_tokens=1000)
        assert [len(p) + r.tokens for p, r in zip(prompts, found, strict=True)] == [max_model_len] * 3
        assert all(r.finish_reason == "length" for r in found)
        want = decode(generator, prompts, "ar", 1, temperature=1.0, max_tokens=1000)
        assert [r.token_ids for r in found] == want


@pytest.mark.parametrize("drafter", ["bad_drafter", "oracle"])
@pytest.mark.parametrize("plan", ["chain", "quadratic"])
def test_stops_and_limits_inside_a_step(drafter: str, plan: str, request: pytest.FixtureRequest) -> None:
    generator = request.getfixturevalue(drafter)
    prompts = prompts_of(4, 9)
    free = decode(generator, prompts, "ar", 1, temperature=0.9, max_tokens=40)
    for position in range(12):
        stop = free[0][position]
        found = results(generator, prompts, plan, 4, temperature=0.9, max_tokens=40, stop_token_ids=(stop,))
        for tokens, result in zip(free, found, strict=True):
            end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
            assert result.token_ids == tokens[:end]
            assert result.finish_reason == ("stop" if stop in tokens else "length")
            assert result.tokens == len(result.token_ids) <= result.forwards * 4
    for limit in range(1, 12):
        assert decode(generator, prompts, plan, 4, temperature=0.9, max_tokens=limit) == [t[:limit] for t in free]


def test_row_budget_changes_speed_only(oracle: Generator) -> None:
    params = SamplingParams(temperature=0.9, seed=2, max_tokens=20)
    prompts = prompts_of(3, 8)
    found = [
        oracle.generate(prompts, params, plan="quadratic", stride=4, row_budget=budget)
        for budget in (1, 3, 4, 7, 9, 16)
    ]
    assert len({tuple(tuple(r.token_ids) for r in results) for results in found}) == 1
    assert found[0][0].plan == "ar" and (found[-1][0].plan, found[-1][0].stride) == ("quadratic", 4)
    assert found[0][0].forwards > found[-1][0].forwards


def test_mixed_seeds_and_drawn_seeds(bad_drafter: Generator) -> None:
    prompt = prompts_of(6)[0]
    same = bad_drafter.generate([prompt] * 3, SamplingParams(temperature=1.5, seed=5, max_tokens=12))
    assert len({tuple(r.token_ids) for r in same}) == 3, "no two requests share their noise"
    assert same[0].seed == 5 and len({r.seed for r in same}) == 3
    again = bad_drafter.generate([prompt], SamplingParams(temperature=1.5, seed=same[2].seed, max_tokens=12))[0]
    assert again.token_ids == same[2].token_ids, "the reported seed reproduces the request alone"
    drawn = [bad_drafter.generate([prompt], SamplingParams(temperature=1.5, max_tokens=12))[0] for _ in range(2)]
    assert drawn[0].seed != drawn[1].seed
    replay = bad_drafter.generate([prompt], SamplingParams(temperature=1.5, seed=drawn[0].seed, max_tokens=12))[0]
    assert replay.token_ids == drawn[0].token_ids
    huge = bad_drafter.generate([prompt], SamplingParams(temperature=1.5, seed=2**64 - 1, max_tokens=3))[0]
    assert huge.seed == 2**64 - 1


def test_acceptance_is_counted_as_defined(make_generator: MakeGenerator) -> None:
    """Figures of a decode against those worked out from its AR text and the drafts seen on the way."""
    checkpoint = MemoryCheckpoint(
        tiny_config(), seed=2, scale=0.1
    )  # flat distributions under shared noise: drafts often match
    generator = make_generator(checkpoint)
    result = results(generator, prompts_of(5), "quadratic", 3, temperature=0.5, max_tokens=64)[0]
    params = SamplingParams(temperature=0.5, seed=11, max_tokens=64)
    steps = list(generator.stream(prompts_of(5)[0], params, plan="quadratic", stride=3))
    sizes = [len(step.token_ids) for step in steps]
    assert sum(sizes) == result.tokens == 64 and len(sizes) == result.forwards
    assert result.tpf == pytest.approx(64 / len(sizes))
    later = sizes[1:-1]  # the first step verifies nothing; the last may be cut by the limit
    assert len(later) > 10 and {1, 2, 3} <= set(sizes), "all kinds of steps occur"
    first = sum(s >= 2 for s in later) / len(later)
    assert result.acceptance[0] == pytest.approx(first, abs=1.5 / len(later))
    reached = [s for s in later if s >= 2]
    assert result.acceptance[1] == pytest.approx(sum(s == 3 for s in reached) / len(reached), abs=1.5 / len(reached))
