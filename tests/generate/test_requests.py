"""What a request may ask for, how its text comes out, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from idlm_kernels.generate import (
    DecodeOptions,
    Engine,
    EngineOptions,
    Generator,
    PlanPolicy,
    SamplingParams,
    StepPlan,
    memory,
)
from idlm_kernels.generate.output import RequestOutput
from idlm_kernels.generate.params import mixed_seed, signed_seed
from idlm_kernels.generate.state import LENGTH, RUNNING, STOPPED

MakeGenerator = Callable[..., Generator]


class SpelledTokenizer:
    """One token is one given piece of bytes; enough of a tokenizer for a Detokenizer."""

    is_byte_level = True
    vocab_size = 8
    eos_ids = (7,)
    special_ids = frozenset({7})
    pieces = (b"he", b"llo", b" wor", b"ld", b"\xf0\x9f", b"\x98\x80", b"!", b"")

    def token_bytes(self, token: int, *, skip_special_tokens: bool) -> bytes:
        return self.pieces[token]


def output(num_drafts: int = 3, **params: Any) -> RequestOutput:
    return RequestOutput(5, SamplingParams(**params), 1, SpelledTokenizer(), num_drafts)  # type: ignore[arg-type]


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    out = output()
    assert out.take([0], 0, 0, RUNNING).text == "he"
    assert out.take([1, 4], 3, 1, RUNNING).text == "llo", "half of a character waits"
    assert out.take([5, 6], 3, 1, RUNNING).text == "😀!"
    assert out.take([4], 3, 0, LENGTH).text == "\ufffd", "the end of the text shows what is left"
    result = out.result("chain", 4)
    assert (result.text, result.finish_reason) == ("hello😀!\ufffd", "length")
    assert (result.tokens, result.forwards, result.tpf) == (6, 4, 1.5)
    assert result.acceptance == [2 / 3, 0.0, None]
    assert result.prompt_tokens == 5 and result.tokens_per_second > 0


@pytest.mark.parametrize(
    ("stop", "steps", "text", "kept"),
    [
        (("lo w",), [[0, 1], [2, 3]], "hel", 3),  # completed by the first token of the second step
        (("o",), [[0], [1, 2, 3]], "hell", 2),
        (("world", "he"), [[0, 1, 2]], "", 1),
        (("world", "ld", "wo"), [[0, 1, 2, 3]], "hello ", 3),
        (("😀",), [[0, 4], [5, 6]], "he", 3),
        (("hex", "ldx"), [[0, 1], [2, 3]], "hello world", 4),  # held back, then given out at the end
        (("xyz",), [[0, 7]], "he", 2),
    ],
)
def test_stop_strings(stop: tuple[str, ...], steps: list[list[int]], text: str, kept: int) -> None:
    out = output(stop=stop)
    shown = ""
    for i, step in enumerate(steps):
        finish_reason = STOPPED if i == len(steps) - 1 else RUNNING
        event = out.take(step, 3, len(step) - 1, finish_reason)
        shown += event.text
        if out.finish_reason is not None:
            break
    result = out.result("chain", 4)
    assert shown == result.text == text
    assert result.token_ids == [t for step in steps for t in step][:kept] and result.finish_reason == "stop"
    assert not any(s in result.text for s in stop)


def test_figures_stop_at_a_stop_string() -> None:
    out = output(stop=("llo",))
    out.take([0, 1, 2, 3], 3, 3, RUNNING)  # all drafts stood, but the text ended with the second token
    result = out.result("chain", 4)
    assert (result.tokens, result.forwards, result.acceptance) == (2, 1, [1.0, 1.0, None])


def test_a_cancelled_request_keeps_its_text() -> None:
    out = output(stop=("hex",))
    assert out.take([0], 0, 0, RUNNING).text == ""
    out.cancel()
    result = out.result("chain", 4)
    assert (result.text, result.token_ids, result.finish_reason) == ("he", [0], "cancelled")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"temperature": -0.1}, ValueError),
        ({"temperature": math.nan}, ValueError),
        ({"temperature": math.inf}, ValueError),
        ({"temperature": "1"}, TypeError),
        ({"top_p": 0.0}, ValueError),
        ({"top_p": 1.01}, ValueError),
        ({"top_p": True}, TypeError),
        ({"min_p": -0.1}, ValueError),
        ({"min_p": 1.5}, ValueError),
        ({"top_k": -2}, ValueError),
        ({"top_k": 1.5}, TypeError),
        ({"max_tokens": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**64}, ValueError),
        ({"seed": 1.0}, TypeError),
        ({"stop": ("",)}, ValueError),
        ({"stop": (3,)}, ValueError),
        ({"stop_token_ids": (-1,)}, ValueError),
        ({"top_p": 1e-50}, ValueError),  # 0 in fp32
        ({"temperature": 10**5000}, ValueError),  # which Python does not spell
        ({"max_tokens": 10**5000}, ValueError),
        ({"seed": 10**5000}, ValueError),
        ({"ignore_eos": "no"}, TypeError),
        ({"ignore_eos": 1}, TypeError),
        ({"presence_penalty": 2.1}, ValueError),
        ({"presence_penalty": None}, TypeError),
        ({"frequency_penalty": -2.1}, ValueError),
        ({"frequency_penalty": math.nan}, ValueError),
        ({"repetition_penalty": 0.0}, ValueError),
        ({"repetition_penalty": 1e-50}, ValueError),  # 0 in fp32
        ({"repetition_penalty": True}, TypeError),
        ({"logit_bias": [1]}, TypeError),
        ({"logit_bias": {-1: 1.0}}, ValueError),
        ({"logit_bias": {"x": 1.0}}, ValueError),
        ({"logit_bias": {"9" * 99: 1.0}}, ValueError),
        ({"logit_bias": {1.5: 1.0}}, TypeError),
        ({"logit_bias": {True: 1.0}}, TypeError),
        ({"logit_bias": {1: 1.0, "1": 2.0}}, ValueError),
        ({"logit_bias": {1: "2"}}, TypeError),
        ({"logit_bias": {1: math.nan}}, ValueError),
        ({"logit_bias": {1: 101}}, ValueError),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, ValueError),
        ({"stop": 3}, TypeError),
        ({"stop_token_ids": 5}, TypeError),
    ],
)
def test_parameters_out_of_range_are_named(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(changes))):
        SamplingParams(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 2},
        {"min_tokens": 1},
        {"skip_special_tokens": False},
        {"logprobs": 21},
    ],
)
def test_what_a_decode_lacks_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        SamplingParams(**changes)


def test_parameters_that_ask_for_nothing_are_taken_in_every_spelling() -> None:
    nothing: Any = None
    spelled = SamplingParams(top_k=-1, stop=nothing, stop_token_ids=nothing, n=1, repetition_penalty=1, min_tokens=0)
    assert spelled == SamplingParams()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"synthetic_acceptance": True}, TypeError),
        ({"synthetic_acceptance": "0.5"}, TypeError),
        ({"synthetic_acceptance": math.nan}, ValueError),
        ({"synthetic_acceptance": 10**5000}, ValueError),
        ({"rerank": None}, TypeError),
        ({"suffix_drafts": "no"}, TypeError),
        ({"logprobs": 3}, TypeError),
        ({"num_pages": -(10**5000)}, ValueError),
    ],
)
def test_options_out_of_range_are_named(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(changes))):
        EngineOptions(**changes)


def test_one_stop_string_needs_no_list() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


def test_without_max_tokens_the_context_ends_a_request(make_generator: MakeGenerator) -> None:
    params = SamplingParams(max_tokens=None)  # type: ignore[arg-type]
    (result,) = make_generator(max_model_len=40).generate([[1, 2, 3]], params, plan="chain", stride=2)
    assert result.tokens == 37 and result.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "prompt 0: the prompt is empty"),
        ([1] * 64, ValueError, "has 64 tokens, but the context is 64"),
        ([61], ValueError, "id 61, outside the vocabulary of 61"),
        ([-1], ValueError, "id -1, outside"),
        (["a"], TypeError, "holds a str"),
        ("text", TypeError, "prompt 0: the prompt is text.*idlm_kernels.LLM"),
    ],
)
def test_prompts_that_cannot_run(
    prompt: list[Any], error: type[Exception], message: str, make_generator: MakeGenerator
) -> None:
    with pytest.raises(error, match=message):
        make_generator(max_model_len=64).generate([prompt])


def test_arguments_that_cannot_run(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    for arguments, message in (
        ({"rule": "hope"}, "rule is 'hope'"),
        ({"plan": "tree"}, "plan is 'tree'"),
        ({"stride": 1}, "stride is 1"),
        ({"params": [SamplingParams()] * 2}, "2 SamplingParams for 1 prompts"),
        ({"params": SamplingParams(stop="x")}, "need a tokenizer"),
        ({"params": SamplingParams(stop_token_ids=(99,))}, "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.generate([[1]], **arguments)  # type: ignore[arg-type]
    for arguments, message in (
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"max_model_len": 999}, "2 to 256"),
        ({"page_size": 0}, "page"),
    ):
        with pytest.raises(ValueError, match=message):
            make_generator(**arguments)  # type: ignore[arg-type]
    assert generator.generate([]) == []


def test_old_names_of_keywords_work_with_a_warning(make_generator: MakeGenerator) -> None:
    generator, params = make_generator(), SamplingParams(max_tokens=9)
    want = generator.generate([[1, 2]], params, plan="quadratic", stride=2, rule="rejection")[0]
    with pytest.warns(DeprecationWarning, match="verify is now rule"):
        found = generator.generate([[1, 2]], params, plan="quadratic", stride=2, verify="rejection")[0]
    assert found.token_ids == want.token_ids
    with pytest.warns(DeprecationWarning, match="'branched' is now 'quadratic'"):
        assert generator.generate([[1, 2]], params, plan="branched", stride=2)[0].plan == "quadratic"
    with pytest.warns(DeprecationWarning, match="'branched' is now 'quadratic'"):
        assert StepPlan("branched", 4) == StepPlan("quadratic", 4)  # type: ignore[arg-type]
    with pytest.warns(DeprecationWarning, match="Generator: max_len is now max_model_len"):
        assert Generator(generator.model, max_len=20).max_model_len == 20  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="EngineOptions: prefill_tokens is now max_num_batched_tokens"):
        old = EngineOptions(max_batch=3, max_len=20, prefill_tokens=5)  # type: ignore[call-arg]
    assert old == EngineOptions(max_num_seqs=3, max_model_len=20, max_num_batched_tokens=5)
    for rest, named in (("rejection", old), {}), ((), {"verify": "rejection", "options": old}):
        with pytest.warns(DeprecationWarning, match="Engine: verify is now options.rule"):
            engine = Engine(generator.model, None, PlanPolicy.fixed(StepPlan("chain", 2)), *rest, **named)  # type: ignore[arg-type]
        assert engine.options == dataclasses.replace(old, rule="rejection", page_size=engine.options.page_size)
    with pytest.warns(DeprecationWarning, match="Engine.epoch is now Engine.window"):
        assert list(engine.epoch()) == []
    with pytest.warns(DeprecationWarning, match="EngineOptions: epoch_steps is now window_steps"):
        assert EngineOptions(epoch_steps=3).window_steps == 3  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_model_len and max_len, its old name"):
        EngineOptions(max_len=20, max_model_len=20)  # type: ignore[call-arg]


def test_an_engine_makes_its_own_policy_of_the_options(make_generator: MakeGenerator) -> None:
    model = make_generator().model
    engine = Engine(model, None, options=EngineOptions("chain", 5, row_budget=7, max_model_len=40))
    assert engine.policy.plans == (StepPlan("chain", 4),)
    with pytest.raises(TypeError, match="DecodeOptions has no strides"):
        DecodeOptions().changed(strides=3)


def test_an_engine_that_is_kept_serves_what_it_is_large_enough_for(
    make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it holds recorded steps. The tokens are those of an engine for each batch."""
    fresh, keeping = make_generator(), make_generator()
    keeping._keeps_engine = True
    made: list[tuple[int, int]] = []
    engine_of = Generator._engine

    def counted(self: Generator, *args: Any, **how: Any) -> Engine:
        engine = engine_of(self, *args, **how)
        if self is keeping:
            made.append((engine.options.max_num_seqs, engine.options.max_model_len))
        return engine

    monkeypatch.setattr(Generator, "_engine", counted)
    prompts = [[i, i + 1] for i in range(1, 6)]
    for count, max_tokens, changes, engines in (
        (3, 30, {}, 1),
        (4, 30, {}, 1),  # room for twice as many
        (2, 9, {}, 1),
        (5, 30, {}, 2),  # too many
        (1, 90, {}, 3),  # too long
        (1, 90, {"rule": "rejection"}, 4),
        (1, 90, {"rule": "rejection"}, 4),
    ):
        params = SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=5)
        want, found = (g.generate(prompts[:count], params, plan="chain", stride=3, **changes) for g in (fresh, keeping))
        assert [r.token_ids for r in found] == [r.token_ids for r in want]
        assert len(made) == engines
    assert made[0] == (4, 32) and made[1] == (8, 32)
    with pytest.raises(ValueError, match="prompt 1"):  # prompt 0 waits in the engine by then
        keeping.generate([[1], [99]], params, plan="chain", stride=3, rule="rejection")
    assert len(keeping.generate([[1]], params, plan="chain", stride=3, rule="rejection")) == 1
    assert len(made) == 6, "an engine with a fault behind it is not used again"
    slots = 2 * 2 * 2 * 8 * 4  # bytes of K and V of a token
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 150 * slots)
    keeping.generate([[1]], SamplingParams(max_tokens=130), plan="chain", stride=3)
    assert made[-1] == (1, 131), "too little memory for one twice as large"


def test_a_batch_that_memory_cannot_hold_at_once_is_decoded_all_the_same(
    make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, prompts = make_generator(), [[i] for i in range(1, 9)]
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3)
    want = [r.token_ids for r in generator.generate(prompts, params, plan="chain", stride=3)]
    page = 2 * 2 * 2 * 8 * 4 * 16  # bytes: K and V, layers, heads, width, fp32, tokens
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 5 * page)
    made: list[Engine] = []
    monkeypatch.setattr(Engine, "submit", lambda self, *a, _do=Engine.submit: (made.append(self), _do(self, *a))[1])
    assert [r.token_ids for r in generator.generate(prompts, params, plan="chain", stride=3)] == want
    assert made[0].pool.num_pages == 5
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 2 * page)
    with pytest.raises(ValueError, match="holds 2 pages.*lower max_model_len or max_tokens"):
        generator.generate(prompts, params, plan="chain", stride=3)
    wide = Generator(generator.model, page_size=1000)  # a page is no larger than the longest request
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 4 * page)
    assert [r.token_ids for r in wide.generate(prompts, params, plan="chain", stride=3)] == want
    monkeypatch.undo()
    assert memory.free_memory(torch.device("cpu")) > 1 << 20


def test_seeds_of_a_batch_are_distinct_and_reproducible() -> None:
    seeds = [mixed_seed(s, i) for s in (0, 1, 2**64 - 1) for i in range(200)]
    assert len(set(seeds)) == 600 and all(0 <= s < 2**64 for s in seeds)
    assert [mixed_seed(s, 0) for s in (0, 9)] == [0, 9]
    assert [signed_seed(s) for s in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 2**63 - 1, -(2**63), -1]


def test_a_stream_can_be_left_and_asked(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    whole = generator.generate([[1, 2]], SamplingParams(max_tokens=30, seed=4))[0]
    stream = generator.stream([1, 2], SamplingParams(max_tokens=30, seed=4))
    tokens: list[int] = []
    for event in stream:
        tokens += event.token_ids
        if len(tokens) > 10:
            break
    left = stream.result
    assert left.finish_reason == "cancelled" and left.token_ids == tokens == whole.token_ids[: len(tokens)]
    assert list(stream) == [], "nothing comes after the end"
    assert generator.stream([1], SamplingParams(max_tokens=3)).result.tokens == 0


def test_nan_logits_end_the_request(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    clean = generator.generate([[1, 2]], SamplingParams(max_tokens=4))[0]
    generator.model.norm.fill_(float("nan"))
    dirty = generator.generate([[1, 2]], SamplingParams(max_tokens=4))[0]
    assert (clean.error_flags, clean.error) == (0, None)
    assert dirty.error_flags & 5 == 5 and dirty.finish_reason == "error" and "NaN" in str(dirty.error)
    assert dirty.token_ids == []
