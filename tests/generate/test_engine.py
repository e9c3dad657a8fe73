"""The engine: whatever the schedule, a request gets what it gets alone in AR mode."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from idlm_kernels.generate import (
    CostTable,
    Engine,
    EngineOptions,
    Generator,
    PlanPolicy,
    Request,
    SamplingParams,
    StepPlan,
)
from idlm_kernels.generate.plan import plans_up_to
from idlm_kernels.generate.state import RUNNING, DecodeState
from idlm_kernels.generate.step import Decoder, decode_step
from tests.tiny import oracle_checkpoint

MakeGenerator = Callable[..., Generator]
VOCAB = 61
PLANS = [StepPlan("ar", 1), *(StepPlan("chain", n) for n in (2, 4, 7)), *(StepPlan("quadratic", n) for n in (2, 3, 5))]


@pytest.fixture(scope="module")
def models(make_generator: MakeGenerator) -> list[Generator]:
    return [make_generator(), make_generator(oracle_checkpoint())]


class RandomPolicy(PlanPolicy):
    """Another plan in every window."""

    def __init__(self, rng: random.Random):
        super().__init__(tuple(PLANS), CostTable({1: 1.0}))
        self.rng = rng

    def choose(self, batch: int) -> StepPlan:
        return self.rng.choice(PLANS)


def random_request(rng: random.Random, max_len: int = 48) -> tuple[list[int], SamplingParams, int]:
    # Few ids and repeats, so that suffixes match and prompts share pages.
    start = rng.choice(([], [5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 10, 11, 12, 13]))
    prompt = [*start, *(rng.randrange(6) for _ in range(rng.randrange(0 if start else 1, 12)))]
    prompt = prompt[: rng.randrange(1, max_len) if max_len < 48 else None]
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.7, 1.3)),
        top_k=rng.choice((0, 0, 8)),
        top_p=rng.choice((1.0, 0.9)),
        presence_penalty=rng.choice((0.0, 0.0, 0.0, 1.0)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.0, 0.5)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.5)),
        logit_bias=rng.choice((None, None, None, {2: 3.0, 17: 4.0})),
        max_tokens=min(rng.randrange(1, 24), max_len - len(prompt)),
        stop_token_ids=rng.choice(((), (3,), (1, 2, 40))),
    )
    return prompt, params, rng.randrange(2**64)


def alone(generator: Generator, prompt: list[int], params: SamplingParams, seed: int) -> tuple[list[int], str]:
    seeded = SamplingParams(**{**params.__dict__, "seed": seed})
    result = generator.generate([prompt], [seeded], plan="ar")[0]
    return result.token_ids, result.finish_reason


REFUSED: list[tuple[Any, ...]] = [
    ([], SamplingParams(), 1),
    ([VOCAB], SamplingParams(), 1),
    ([1] * 48, SamplingParams(), 1),
    ([1], SamplingParams(stop="x"), 1),
    ([1], SamplingParams(logit_bias={VOCAB: 1.0}), 1),
    ([1], SamplingParams(), 2**64),
    ([1], SamplingParams(), "seed"),
]


def poison(monkeypatch: pytest.MonkeyPatch, seeds: set[int]) -> None:
    """Requests with these seeds cannot be placed, neither at first nor after a preemption."""
    insert = DecodeState.insert

    def failing(self: DecodeState, b: int, tokens: Any, params: Any, seed: int, *rest: Any) -> None:
        if seed in seeds:
            raise RuntimeError("poisoned")
        insert(self, b, tokens, params, seed, *rest)

    monkeypatch.setattr(DecodeState, "insert", failing)


def assert_nothing_leaks(engine: Engine) -> None:
    assert not engine.busy
    assert engine.pool.free_pages == engine.pool.num_pages
    assert not engine.pool._page_of and not engine.pool._key_of and not any(engine.pool._holders)
    assert sorted(engine._free_indices) == list(range(engine.options.max_num_seqs))


@pytest.mark.parametrize("seed", [*range(60), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(60, 600))])
def test_any_schedule_gives_the_same_tokens(
    seed: int, models: list[Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do short contexts, dropped iterators, or requests that cannot be submitted or placed concern another one."""
    rng = random.Random(seed)
    poisoned: set[int] = set()
    poison(monkeypatch, poisoned)
    max_len = rng.choice((48, 48, 48, 3, 6, 9))
    generator = models[seed % 2]
    page_size = rng.choice((1, 2, 5, 16))
    options = EngineOptions(
        max_num_seqs=rng.randrange(1, 7),
        max_model_len=max_len,
        page_size=page_size,
        # From barely enough for one request, which preempts constantly, to plenty.
        num_pages=-(-(47 + 25) // page_size) + rng.choice((0, 1, 3, 40)),
        max_num_batched_tokens=rng.choice((1, 4, 9, 64)),
        window_steps=rng.randrange(1, 9),
        lag=rng.choice((0, 1, 3)),
        suffix_drafts=rng.random() < (0.5 if max_len == 48 else 0.8),
        logprobs=rng.random() < 0.3,
        history_tokens=rng.choice((0, 0, 30, 1000)),
    )
    recorder = EagerRecorder() if rng.random() < 0.3 else None
    engine = Engine(generator.model, None, RandomPolicy(rng), options, recorder=recorder)
    asked: list[tuple[Request, tuple[Any, ...]]] = []
    cancelled: set[int] = set()
    to_come = rng.randrange(3, 10)
    while to_come or engine.busy:
        for _ in range(rng.randrange(0, 1 + min(3, to_come)) if engine.busy else min(1, to_come)):
            what = random_request(rng, max_len)
            asked.append((engine.submit(*what, drafts=rng.random() < 0.8), what))
            to_come -= 1
            if rng.random() < 0.05:
                poisoned.add(what[2])
            if rng.random() < 0.1:
                with pytest.raises((TypeError, ValueError)):
                    engine.submit(*rng.choice(REFUSED))
        if rng.random() < 0.2:  # left in the middle
            events = engine.events()
            for _ in range(rng.randrange(1, 6)):
                next(events, None)
            continue
        window = engine.window()  # which reads what a dropped one has left, without events
        seen = {id(request): len(request.output.token_ids) for request, _ in asked}
        for request, event in window:
            seen[id(request)] += len(event.token_ids)
            assert seen[id(request)] == len(request.output.token_ids), "events tell all tokens, once"
            if rng.random() < 0.01:
                engine.cancel(request)
                cancelled.add(request.arrival)
    for request, what in asked:
        tokens, reason = alone(generator, *what)
        if what[2] in poisoned and request.output.finish_reason == "error":
            assert "poisoned" in str(request.output.error)
        elif request.arrival in cancelled and request.output.finish_reason == "cancelled":
            assert request.output.token_ids == tokens[: len(request.output.token_ids)]
        else:
            assert (request.output.token_ids, request.output.finish_reason) == (tokens, reason)
        if options.logprobs:
            assert len(request.output.logprobs or []) == len(request.output.token_ids)
        assert request.drafts or not any(request.output._verified)
    engine._retire()
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("rule", ["match", "rejection"])
def test_a_request_without_drafts_is_decoded_the_ordinary_way(models: list[Generator], rule: str) -> None:
    """A token per step beside one that has drafts, and steps of one row by itself."""
    plans: list[StepPlan] = []

    def step(decoder: Decoder, state: DecodeState) -> Tensor:
        plans.append(decoder.plan)
        return decode_step(decoder, state)

    chain = StepPlan("chain", 4)
    options = EngineOptions(rule=rule, max_num_seqs=2, max_model_len=64, window_steps=2)
    engine = Engine(models[1].model, None, PlanPolicy.fixed(chain), options, step=step)
    params = SamplingParams(temperature=1.0, max_tokens=24)
    plain = engine.submit([1, 2, 3], params, 5, drafts=False)
    drafted = engine.submit([1, 2, 3], params, 5)
    for _ in engine.events():
        pass
    results = [request.output.result("", 0) for request in (plain, drafted)]
    assert results[0].forwards == 24 and results[0].acceptance == [None] * 3
    assert results[1].forwards < 12
    shared = plans.count(chain)
    assert plans == [chain] * shared + [StepPlan("ar", 1)] * (len(plans) - shared) and 0 < shared < len(plans)
    if rule == "match":
        assert results[0].token_ids == results[1].token_ids
    assert plain.output.token_ids == alone(models[1], [1, 2, 3], params, 5)[0]


def test_requests_are_preempted_and_come_back(models: list[Generator]) -> None:
    """Two requests that fit a page pool only one after the other."""
    options = EngineOptions(max_num_seqs=2, max_model_len=40, page_size=4, num_pages=14, window_steps=2)
    engine = Engine(models[0].model, None, PlanPolicy.fixed(StepPlan("quadratic", 3)), options)
    params = SamplingParams(temperature=0.8, max_tokens=30)
    requests = [engine.submit([1, 2, 3, 4], params, seed) for seed in (1, 2)]
    preempted = 0
    while engine.busy:
        before = [request.batch_index for request in requests]
        for _ in engine.window():
            pass
        preempted += before[1] is not None and requests[1].batch_index is None and not requests[1].ended
        assert requests[0].batch_index is not None or requests[0].ended, "the oldest is never preempted"
    assert preempted > 0
    for request in requests:
        assert request.output.token_ids == alone(models[0], request.prompt, params, request.seed)[0]
    assert_nothing_leaks(engine)


def test_equal_prompts_share_pages(models: list[Generator]) -> None:
    prompt = [random.Random(1).randrange(VOCAB) for _ in range(33)]
    options = EngineOptions(max_num_seqs=4, max_model_len=64, page_size=8, window_steps=2)
    engine = Engine(models[0].model, None, PlanPolicy.fixed(StepPlan("chain", 4)), options)
    params = SamplingParams(temperature=1.0, max_tokens=12)
    first = engine.submit(prompt, params, 1)
    list(engine.window())
    others = [engine.submit(prompt[:n], params, n) for n in (33, 32, 20)]
    list(engine.window())
    assert [len(set(first.pages) & set(other.pages)) for other in others] == [4, 3, 2]
    for _ in engine.events():
        pass
    for request in (first, *others):
        assert request.output.token_ids == alone(models[0], request.prompt, params, request.seed)[0]
    assert_nothing_leaks(engine)


def test_nobody_starves(models: list[Generator]) -> None:
    """Requests start in order of arrival, however short those behind are."""
    options = EngineOptions(max_num_seqs=2, max_model_len=40, page_size=4, num_pages=20, window_steps=3)
    engine = Engine(models[0].model, None, PlanPolicy.fixed(StepPlan("ar", 1)), options)
    requests = [engine.submit([1] * (30 if i == 1 else 2), SamplingParams(max_tokens=6), i) for i in range(8)]
    starts: list[int] = []
    for request, _ in engine.events():
        if request.arrival not in starts:
            starts.append(request.arrival)
    assert starts == list(range(8)) and all(r.output.finish_reason == "length" for r in requests)


def test_a_long_prompt_does_not_stall_the_others(models: list[Generator]) -> None:
    options = EngineOptions(max_num_seqs=2, max_model_len=120, page_size=8, max_num_batched_tokens=8, window_steps=2)
    engine = Engine(models[0].model, None, PlanPolicy.fixed(StepPlan("ar", 1)), options)
    short = engine.submit([1, 2], SamplingParams(max_tokens=20, temperature=1.0), 1)
    list(engine.window())
    long = engine.submit([i % VOCAB for i in range(80)], SamplingParams(max_tokens=3, temperature=1.0), 2)
    while not long.output.token_ids:
        before = len(short.output.token_ids)
        list(engine.window())
        assert short.ended or len(short.output.token_ids) > before
    for _ in engine.events():
        pass
    assert long.output.token_ids == alone(models[0], long.prompt, long.params, 2)[0]


class EagerRecorder:
    """Stands in for CUDA graphs: a recording refers to the memory that it was made with and overwrites one outcome."""

    def __init__(self, memory: int = 1000) -> None:
        self.memory, self.made = memory, 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.made == self.memory:
            raise torch.cuda.OutOfMemoryError("no memory left to record")
        self.made += 1
        outcome = step()

        def replay() -> None:
            outcome.copy_(step())

        return replay, outcome


@pytest.mark.parametrize("memory", [0, 2, 1000])
@pytest.mark.parametrize("rule", ["match", "rejection"])
def test_recorded_steps_and_running_out_of_memory(rule: str, memory: int, models: list[Generator]) -> None:
    options = EngineOptions(
        rule=rule, max_num_seqs=5, max_model_len=40, page_size=4, lag=2, window_steps=3, num_pages=40
    )
    params = SamplingParams(temperature=1.0, max_tokens=15)
    outputs = []
    for recorder in (None, EagerRecorder(memory)):
        policy = PlanPolicy.fixed(StepPlan("quadratic", 3))
        engine = Engine(models[0].model, None, policy, options, recorder=recorder)
        requests = [engine.submit([1 + seed, 2, 3], params, seed) for seed in range(9)]
        for _ in engine.events():
            pass
        outputs.append([(request.output.token_ids, request.output.finish_reason) for request in requests])
        assert_nothing_leaks(engine)
    assert outputs[0] == outputs[1]
    assert recorder is not None and recorder.made == min(memory, 4), "batches of 1, 2, 4 and 5, the largest first"


def failing(at: int, error: Exception) -> Callable[[Decoder, DecodeState], Tensor]:
    calls = 0

    def step(decoder: Decoder, state: DecodeState) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return decode_step(decoder, state)

    return step


@pytest.mark.parametrize("lag", [0, 1])
def test_a_forward_that_raises_ends_its_batch_only(lag: int, models: list[Generator]) -> None:
    options = EngineOptions(max_num_seqs=2, max_model_len=40, page_size=4, lag=lag)
    step = failing(3, RuntimeError("device lost"))
    engine = Engine(models[0].model, None, PlanPolicy.fixed(StepPlan("chain", 3)), options, step=step)
    params = SamplingParams(temperature=1.0, max_tokens=20)
    requests = [engine.submit([1, 2, 3], params, seed) for seed in range(4)]
    for _ in engine.events():
        pass
    for request in requests[:2]:
        assert request.output.finish_reason == "error" and "device lost" in str(request.output.error)
        want = alone(models[0], request.prompt, params, request.seed)[0]
        assert request.output.token_ids == want[: len(request.output.token_ids)]
    for request in requests[2:]:
        assert request.output.token_ids == alone(models[0], request.prompt, params, request.seed)[0]
    assert_nothing_leaks(engine)


def test_nan_in_one_request_leaves_the_others_alone(models: list[Generator]) -> None:
    def step(decoder: Decoder, state: DecodeState) -> Tensor:
        for page in state.page_table[(state.seed == 7) & (state.finish_reason == RUNNING), 0].tolist():
            decoder.cache.v[0][page, 0] = float("nan")
        return decode_step(decoder, state)

    options = EngineOptions(max_num_seqs=3, max_model_len=40, page_size=4)
    engine = Engine(models[0].model, None, PlanPolicy.fixed(StepPlan("quadratic", 3)), options, step=step)
    params = SamplingParams(temperature=1.0, max_tokens=15)
    requests = [engine.submit([1 + seed, 2, 3], params, seed) for seed in (6, 7, 8)]
    for _ in engine.events():
        pass
    assert [r.output.finish_reason for r in requests] == ["length", "error", "length"]
    assert "NaN" in str(requests[1].output.error)
    for request in (requests[0], requests[2]):
        assert request.output.token_ids == alone(models[0], request.prompt, params, request.seed)[0]


def test_suffix_drafts_are_taken_and_told_apart(models: list[Generator]) -> None:
    generator = models[0]
    loop = [7, 8, 9, 10, 11, 12] * 6
    plain = generator.generate([loop], SamplingParams(max_tokens=60), plan="chain", stride=5)[0]
    found = generator.generate([loop], SamplingParams(max_tokens=60), plan="chain", stride=5, suffix_drafts=True)[0]
    assert found.token_ids == plain.token_ids
    assert "suffix" in found.acceptance_by_source and "suffix" not in plain.acceptance_by_source
    with pytest.raises(ValueError, match="suffix"):
        generator.generate([loop], rule="rejection", suffix_drafts=True)


def test_lists_of_the_likeliest(models: list[Generator]) -> None:
    """The same in every plan, each token among its list or behind it; and only for requests that ask."""
    each = [SamplingParams(temperature=1.2, seed=3, max_tokens=12, logprobs=n) for n in (3, 0, 20)]
    ar, strided = (
        models[0].generate([[1, 2, 3]] * 3, each, plan=plan, logprobs=True)  # type: ignore[arg-type]
        for plan in ("ar", "quadratic")
    )
    assert [r.top_logprobs for r in ar] == [r.top_logprobs for r in strided] and ar[1].top_logprobs is None
    for result, count in ((ar[0], 3), (ar[2], 20)):
        assert result.top_logprobs is not None and len(result.top_logprobs) == len(result.token_ids)
        for token, own, listed in zip(result.token_ids, result.logprobs or [], result.top_logprobs, strict=True):
            assert listed[token] == own and count <= len(listed) <= count + 1
            best = list(listed.values())[:count]
            assert best == sorted(best, reverse=True) and (own <= best[-1] or len(listed) == count)


def test_logprobs_are_those_of_the_model(models: list[Generator]) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=12)
    ar = models[0].generate([[1, 2, 3]], params, plan="ar", logprobs=True)[0]
    strided = models[0].generate([[1, 2, 3]], params, plan="quadratic", logprobs=True)[0]
    assert ar.logprobs == strided.logprobs and len(ar.logprobs or []) == 12
    assert all(value < 0 for value in ar.logprobs or [])
    greedy = models[0].generate([[1, 2, 3]], SamplingParams(max_tokens=4), logprobs=True)[0]
    assert greedy.logprobs and all(value > torch.tensor(1 / VOCAB).log() for value in greedy.logprobs)


def test_synthetic_acceptance_sets_the_pace(models: list[Generator]) -> None:
    for kind in ("chain", "quadratic"):
        plan = StepPlan(kind, 4)  # type: ignore[arg-type]
        options = EngineOptions(max_num_seqs=4, max_model_len=500, synthetic_acceptance=0.8)
        engine = Engine(models[0].model, None, PlanPolicy.fixed(plan), options)
        requests = [engine.submit([1, 2], SamplingParams(max_tokens=400), seed) for seed in range(4)]
        for _ in engine.events():
            pass
        results = [request.output.result(kind, 4) for request in requests]
        assert sum(r.tpf for r in results) / 4 == pytest.approx(plan.expected_tpf(0.8), rel=0.08)
        assert all(r.tokens == 400 for r in results)


def test_auto_plan_follows_acceptance_and_cost(models: list[Generator]) -> None:
    plans = tuple(plans_up_to("auto", 6))
    flat = PlanPolicy(plans, CostTable({1: 1.0, 64: 1.0}))
    flat.observe([1000] * 5, [950] * 5)
    assert flat.choose(1) == StepPlan("quadratic", 6)
    steep = PlanPolicy(plans, CostTable({1: 1.0, 64: 64.0}))
    assert steep.choose(1) == StepPlan("ar", 1)
    bad = PlanPolicy(plans, CostTable({1: 1.0, 16: 1.5}))
    bad.observe([1000, 0, 0], [0, 0, 0])
    assert bad.choose(1) == StepPlan("ar", 1)
    uneven = PlanPolicy(plans, CostTable({1: 1.0, 4: 1.1, 9: 2.0}), [0.9, 0.0])
    assert uneven.choose(1) == StepPlan("quadratic", 2)
    assert max(plan.max_rows for plan in plans_up_to("auto", 6, row_budget=7)) <= 7
    results = models[1].generate([[1, 2]], SamplingParams(max_tokens=30, seed=1, temperature=1.0), plan="auto")
    assert results[0].token_ids == alone(models[1], [1, 2], SamplingParams(max_tokens=30, temperature=1.0), 1)[0]
    assert results[0].plan == "auto"
    table = CostTable({1: 1.0, 2: 2.0, 4: 3.0})
    assert [table.of(rows) for rows in (1, 2, 3, 4, 8)] == [1.0, 2.0, 2.5, 3.0, 6.0]


def test_requests_that_can_never_run_are_refused(models: list[Generator]) -> None:
    options = EngineOptions(max_num_seqs=2, max_model_len=40, page_size=4, num_pages=6)
    engine = Engine(models[0].model, None, PlanPolicy.fixed(StepPlan("chain", 3)), options)
    with pytest.raises(ValueError, match="11 pages of 4 tokens, but the cache has 6"):
        engine.submit([1] * 10, SamplingParams(max_tokens=100), 0)
    assert not engine.busy
    for wrong in ({"max_num_seqs": 0}, {"window_steps": 0}, {"max_model_len": 1}, {"synthetic_acceptance": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EngineOptions(**wrong)  # type: ignore[arg-type]


def test_short_requests_share_few_sizes_of_pages(models: list[Generator]) -> None:
    """A GPU kernel is compiled for each."""
    generator = models[0]
    sizes = set()
    for max_model_len in range(2, 60):
        options = EngineOptions(max_num_seqs=1, max_model_len=max_model_len, page_size=64)
        engine = Engine(generator.model, None, generator.policy("ar", 2), "match", options)
        sizes.add(engine.options.page_size)
        assert engine.options.page_size >= min(64, max_model_len) and engine.pool.num_pages == 1
    assert sizes == {2, 4, 8, 16, 32, 64}


def test_asynchronous_stream(models: list[Generator]) -> None:
    params = SamplingParams(max_tokens=9, seed=2, temperature=1.0)

    async def collect() -> list[int]:
        return [t async for event in models[0].stream([4, 5], params) for t in event.token_ids]

    assert asyncio.run(collect()) == alone(models[0], [4, 5], params, 2)[0]
