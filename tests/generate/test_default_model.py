"""The default model, end to end: what it says by strided decoding is what it says token by token."""

from __future__ import annotations

from typing import Any

import pytest

from idlm_kernels.generate import Generator, SamplingParams

pytestmark = pytest.mark.default_model

CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("Explain in two sentences why the sky is blue.", "quadratic", 4, {}),
    ("List five fruits.", "chain", 4, {}),
    ("List five fruits.", "quadratic", 4, {"temperature": 0.8, "seed": 7}),
    ("Write a haiku about autumn rain.", "chain", 8, {"temperature": 1.0, "seed": 1}),
    ("def fibonacci(n):", "quadratic", 3, {"temperature": 0.7, "top_k": 40, "seed": 2}),
    ("Translate to French: good morning", "quadratic", 8, {"temperature": 0.9, "top_p": 0.9, "seed": 3}),
    ("你好，请介绍一下你自己。", "chain", 2, {"temperature": 1.2, "min_p": 0.05, "seed": 2**64 - 1}),
    ("Hi", "quadratic", 2, {"temperature": 1.5, "top_k": 200, "top_p": 0.95, "min_p": 0.02, "seed": 5}),
]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.from_pretrained("default")


@pytest.mark.parametrize(("prompt", "plan", "stride", "sampling"), CASES)
def test_equals_ar(generator: Generator, prompt: str, plan: str, stride: int, sampling: dict[str, Any]) -> None:
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    ids = tokenizer.encode(chat, add_special_tokens=False)
    params = SamplingParams(max_tokens=20, **sampling)
    strided = generator.generate([ids], params, plan=plan, stride=stride)[0]  # type: ignore[arg-type]
    ar = generator.generate([ids], params, plan="ar")[0]
    assert strided.token_ids == ar.token_ids and strided.text == ar.text
    assert strided.forwards <= ar.forwards == ar.tokens
    assert strided.error_flags == 0 and len(strided.text) > 0


def test_a_batch_of_all_cases(generator: Generator) -> None:
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode(prompt) for prompt, *_ in CASES]
    each = [SamplingParams(max_tokens=6 + i, **sampling) for i, (*_, sampling) in enumerate(CASES)]
    together = generator.generate(prompts, each, plan="chain", stride=3)
    for prompt, params, result in zip(prompts, each, together, strict=True):
        assert result.token_ids == generator.generate([prompt], params, plan="ar")[0].token_ids


def test_greedy_text_is_sensible(generator: Generator) -> None:
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    ids = tokenizer.encode(chat, add_special_tokens=False)
    result = generator.generate([ids], SamplingParams(max_tokens=40))[0]
    assert "Paris" in result.text and result.finish_reason == "stop"
