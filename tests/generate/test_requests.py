"""What a request may ask for, how its text comes out, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from idlm_kernels.generate import EngineOptions, Generator, SamplingParams
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
        finish = STOPPED if i == len(steps) - 1 else RUNNING
        event = out.take(step, 3, len(step) - 1, finish)
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
        ({"top_k": -1}, ValueError),
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
        ({"stop": None}, TypeError),
        ({"stop": 3}, TypeError),
        ({"stop_token_ids": 5}, TypeError),
        ({"stop_token_ids": None}, TypeError),
    ],
)
def test_parameters_out_of_range_are_named(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(changes))):
        SamplingParams(**changes)


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


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "prompt 0: the prompt is empty"),
        ([1] * 64, ValueError, "has 64 tokens, but the context is 64"),
        ([61], ValueError, "id 61, outside the vocabulary of 61"),
        ([-1], ValueError, "id -1, outside"),
        (["a"], TypeError, "holds a str"),
    ],
)
def test_prompts_that_cannot_run(
    prompt: list[Any], error: type[Exception], message: str, make_generator: MakeGenerator
) -> None:
    with pytest.raises(error, match=message):
        make_generator(max_len=64).generate([prompt])


def test_arguments_that_cannot_run(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    for arguments, message in (
        ({"verify": "hope"}, "verify is 'hope'"),
        ({"plan": "tree"}, "plan is 'tree'"),
        ({"stride": 1}, "stride is 1"),
        ({"params": [SamplingParams()] * 2}, "2 SamplingParams for 1 prompts"),
        ({"params": SamplingParams(stop="x")}, "need a tokenizer"),
        ({"params": SamplingParams(stop_token_ids=(99,))}, "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.generate([[1]], **arguments)  # type: ignore[arg-type]
    for arguments, message in (
        ({"max_len": 1}, "max_len is 1"),
        ({"max_len": 999}, "2 to 256"),
        ({"page_size": 0}, "page"),
    ):
        with pytest.raises(ValueError, match=message):
            make_generator(**arguments)  # type: ignore[arg-type]
    assert generator.generate([]) == []


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
    assert (clean.status, clean.error) == (0, None)
    assert dirty.status & 5 == 5 and dirty.finish_reason == "error" and "NaN" in str(dirty.error)
    assert dirty.token_ids == []
