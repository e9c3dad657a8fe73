"""What goes wrong around a decode: it ends what it concerns, and nothing else. Each test is named after a cause."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from idlm_kernels.generate import Engine, EngineOptions, Generator, PlanPolicy, Request, SamplingParams, StepPlan
from idlm_kernels.generate import engine as module
from idlm_kernels.generate.output import RequestOutput
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.generate.step import decode_step
from idlm_kernels.model import Adapter, Transformer
from tests.generate.test_requests import SpelledTokenizer
from tests.tiny import TINY, MemoryCheckpoint

MakeGenerator = Callable[..., Generator]


def engine_of(generator: Generator, **options: Any) -> Engine:
    step = options.pop("step", decode_step)
    how = EngineOptions(**{"max_num_seqs": 3, "max_model_len": 60, "page_size": 4, **options})
    return Engine(generator.model, None, PlanPolicy.fixed(StepPlan("quadratic", 3)), how, step=step)


def submitted(engine: Engine, count: int = 8) -> list[Request]:
    rng = random.Random(3)
    each = [
        ([rng.randrange(6) for _ in range(1 + i % 5)], SamplingParams(temperature=1.0, max_tokens=9 + i))
        for i in range(count)
    ]
    return [engine.submit(prompt, params, seed) for seed, (prompt, params) in enumerate(each)]


def alone(generator: Generator, requests: list[Request]) -> list[list[int]]:
    """What each request gets by itself in AR mode."""
    return [
        generator.generate(
            [r.prompt], [SamplingParams(temperature=1.0, max_tokens=r.params.max_tokens, seed=r.seed)], plan="ar"
        )[0].token_ids
        for r in requests
    ]


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("closed", [True, False])
def test_an_iterator_that_is_dropped_loses_no_token(lag: int, closed: bool, make_generator: MakeGenerator) -> None:
    generator = make_generator()
    engine, rng, left = engine_of(generator, lag=lag), random.Random(lag), []
    requests = submitted(engine)
    while engine.busy:
        events = engine.events()
        for _ in range(rng.randrange(1, 6)):
            next(events, None)
        left.append(events)  # left in the middle, and still referred to
        if closed:
            events.close()  # type: ignore[attr-defined]
    assert len(left) > 3
    assert [r.output.token_ids for r in requests] == alone(generator, requests)


def test_a_step_that_was_interrupted_is_not_gone_on_with(make_generator: MakeGenerator) -> None:
    calls = 0

    def step(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return decode_step(*args)

    engine = engine_of(make_generator(), step=step)
    request, *_ = submitted(engine)
    with pytest.raises(KeyboardInterrupt):
        list(engine.events())
    with pytest.raises(RuntimeError, match="was interrupted"):
        list(engine.events())
    engine.cancel(request)
    assert request.output.result("", 0).finish_reason == "cancelled"


def test_a_parameter_that_cannot_be_placed_ends_its_request_alone(
    make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_generator()
    engine = engine_of(generator)
    requests = submitted(engine)
    insert = DecodeState.insert

    def failing(self: DecodeState, b: int, tokens: Any, params: Any, seed: int, *rest: Any) -> None:
        if seed == 4:
            raise RuntimeError("value cannot be converted")
        insert(self, b, tokens, params, seed, *rest)

    monkeypatch.setattr(DecodeState, "insert", failing)
    list(engine.events())
    assert requests[4].output.finish_reason == "error" and "cannot be converted" in str(requests[4].output.error)
    del requests[4]
    assert [r.output.token_ids for r in requests] == alone(generator, requests)
    assert engine.pool.take(engine.pool.num_pages) is not None, "its pages came back"


@pytest.mark.parametrize("temperature", [1e39, 3.5e38, 10**400])
def test_a_temperature_beyond_fp32_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature is"):
        SamplingParams(temperature=temperature)
    assert torch.tensor(SamplingParams(temperature=3.4028234663852886e38).temperature, dtype=torch.float32).isfinite()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None])
def test_a_seed_that_is_no_64_bits_is_refused_when_submitted(seed: Any, make_generator: MakeGenerator) -> None:
    engine = engine_of(make_generator())
    with pytest.raises((ValueError, TypeError), match="seed"):
        engine.submit([1], SamplingParams(), seed)
    assert not engine.busy


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_suffix_drafts_in_a_context_shorter_than_their_match(max_tokens: int, make_generator: MakeGenerator) -> None:
    generator = make_generator()
    params = SamplingParams(max_tokens=max_tokens)
    (strided,) = generator.generate([[1]], params, plan="chain", stride=3, suffix_drafts=True)
    (ar,) = generator.generate([[1]], params, plan="ar")
    assert strided.token_ids == ar.token_ids


def test_a_second_thread_is_refused(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    inside, go_on = threading.Event(), threading.Event()

    def step(*args: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return decode_step(*args)

    engine = engine_of(generator, step=step)
    requests = submitted(engine)
    thread = threading.Thread(target=lambda: list(engine.events()))
    thread.start()
    try:
        assert inside.wait(60)
        for call in (
            lambda: next(iter(engine.events())),
            lambda: engine.cancel(requests[0]),
            lambda: submitted(engine),
        ):
            with pytest.raises(RuntimeError, match="another thread"):
                call()
    finally:
        go_on.set()
        thread.join()
    assert [r.output.token_ids for r in requests] == alone(generator, requests)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_fork_is_told_and_does_not_hang(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    generator.generate([[1]], SamplingParams(max_tokens=2))
    child = os.fork()
    if child == 0:
        try:
            engine_of(generator)
        except RuntimeError as error:
            os._exit(0 if "spawn" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    module._check_process()  # the parent goes on


def test_a_task_that_is_cancelled_loses_no_step(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1)
    (whole,) = generator.generate([[1, 2]], params)
    tokens: list[int] = []

    async def read() -> None:
        stream = generator.stream([1, 2], params)

        async def some() -> None:
            async for event in stream:
                tokens.extend(event.token_ids)

        for _ in range(3):
            task = asyncio.create_task(some())
            await asyncio.sleep(0.002)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await some()

    asyncio.run(read())
    assert tokens == whole.token_ids


def spelled(**params: Any) -> RequestOutput:
    return RequestOutput(5, SamplingParams(**params), 1, SpelledTokenizer(), 3)  # type: ignore[arg-type]


def test_a_held_back_character_that_completes_a_stop_string_is_not_why_a_request_was_cancelled() -> None:
    cancelled, failed = spelled(stop=("\ufffd",)), spelled(stop=("\ufffd",))
    for out in (cancelled, failed):
        out.take([0, 4], 0, 0, 0)  # half of a character
    cancelled.cancel()
    failed.fail("the device is gone")
    assert cancelled.result("", 0).finish_reason == "cancelled" and cancelled.result("", 0).text == "he"
    assert (failed.finish_reason, failed.error) == ("error", "the device is gone")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_num_seqs": 1.5}, TypeError),
        ({"max_num_seqs": True}, TypeError),
        ({"max_num_seqs": 0}, ValueError),
        ({"num_pages": 0}, ValueError),
        ({"lag": -1}, ValueError),
        ({"lag": "1"}, TypeError),
        ({"page_size": 2.0}, TypeError),
        ({"window_steps": None}, TypeError),
    ],
)
def test_options_of_an_engine_out_of_range_are_named(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        EngineOptions(**options)


@pytest.mark.parametrize("row_budget", [0, -1, True, 1.5])
def test_a_row_budget_out_of_range_is_named(row_budget: Any, make_generator: MakeGenerator) -> None:
    with pytest.raises((ValueError, TypeError), match="row_budget"):
        make_generator().generate([[1]], row_budget=row_budget)


def test_a_page_far_larger_than_the_context_takes_no_memory(make_generator: MakeGenerator) -> None:
    small, large = make_generator(), make_generator(page_size=10**9)
    params = SamplingParams(max_tokens=5)
    assert large.generate([[1, 2]], params)[0].token_ids == small.generate([[1, 2]], params)[0].token_ids


@pytest.mark.parametrize("plan", ["chain", "quadratic"])
def test_what_an_adapter_makes_of_its_own_rows_never_reaches_the_text(plan: Any) -> None:
    """Its weights are finite, the V and the logits of its MASK rows are not: clean rows do not see those."""
    checkpoint = MemoryCheckpoint(TINY)
    narrow, wide = checkpoint.tensors["model.layers.0.self_attn.v_proj.weight"].shape
    huge = (torch.full((2, wide), 1e20), torch.full((narrow, 2), 1e20))
    adapter = Adapter("huge", 2, 1.0, torch.ones(TINY.hidden_size), {(0, "v_proj"): huge})
    generator = Generator(Transformer(checkpoint, adapter=adapter))  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=24)
    (ar,) = generator.generate([[1, 2, 3]], params, plan="ar")
    (strided,) = generator.generate([[1, 2, 3]], params, plan=plan, stride=4)
    assert len(ar.token_ids) == 24
    assert (strided.token_ids, strided.error) == (ar.token_ids, None)


def test_a_stop_string_that_spells_a_special_token_is_matched_by_its_id(make_generator: MakeGenerator) -> None:
    """A text never shows the token, so the string alone would never fire."""
    tokenizer: Any = SimpleNamespace(vocab_size=61, eos_ids=(7,), special_id={"<s>": 3}.get)
    policy = PlanPolicy.fixed(StepPlan("chain", 2))
    engine = Engine(make_generator().model, tokenizer, policy, EngineOptions(max_model_len=60))
    assert engine._stop_ids(SamplingParams(stop=("<s>", "x"))) == [3, 7]
