"""Penalties and biases of a decode: what they do to a text, what they leave alone, and that AR has the same.

That strided decoding gives the tokens of AR with them, in every plan, is held in test_exactness.py and test_engine.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from idlm_kernels import ops
from idlm_kernels.generate import Engine, EngineOptions, Generator, SamplingParams
from idlm_kernels.generate.plan import prefill_rows
from tests.tiny import tiny_state

MakeGenerator = Callable[..., Generator]
PROMPT = [5, 6, 7, 5]


def logits_after(generator: Generator, tokens: list[int]) -> torch.Tensor:
    state = tiny_state([tokens], 8)
    rows = prefill_rows(state, [0], [len(tokens)], 0, 16)
    with torch.inference_mode():
        logits = generator.model.forward(rows, generator.model.new_cache(8, 16))[0][-1]
    return logits.clone().double()


@pytest.mark.parametrize(
    "asked",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"repetition_penalty": 1.7},
        {"presence_penalty": -0.5, "frequency_penalty": 0.4, "repetition_penalty": 0.8, "logit_bias": {3: 4.0, 5: 2.0}},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_a_text_is_that_of_a_plain_loop(asked: dict[str, Any], make_generator: MakeGenerator) -> None:
    """Greedy decoding by hand: a forward for each token, and penalties in Python."""
    generator = make_generator()
    tokens: list[int] = []
    for _ in range(40):
        x = logits_after(generator, PROMPT + tokens)
        for token, bias in asked.get("logit_bias", {}).items():
            x[token] += bias
        for token in {*PROMPT, *tokens}:
            x[token] *= asked.get("repetition_penalty", 1.0) ** (-1 if x[token] > 0 else 1)
        for token, count in Counter(tokens).items():
            x[token] -= asked.get("frequency_penalty", 0.0) * count + asked.get("presence_penalty", 0.0)
        tokens.append(int(x.argmax()))
    plain = generator.generate([PROMPT], SamplingParams(max_tokens=40), plan="ar")[0].token_ids
    assert tokens != plain, "the penalties decide something here"
    for plan in ("ar", "chain", "quadratic"):
        found = generator.generate([PROMPT], SamplingParams(max_tokens=40, **asked), plan=plan)[0]  # type: ignore[arg-type]
        assert found.token_ids == tokens


def test_logprobs_are_of_the_model_and_not_of_what_was_made_of_it(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    params = SamplingParams(max_tokens=8, logit_bias={9: 100.0}, frequency_penalty=2.0)
    for plan in ("ar", "quadratic"):
        found = generator.generate([PROMPT], params, plan=plan, logprobs=True)[0]  # type: ignore[arg-type]
        assert found.token_ids == [9] * 8 and found.logprobs is not None
        for i, logprob in enumerate(found.logprobs):
            x = logits_after(generator, PROMPT + [9] * i)
            assert logprob == pytest.approx(float(x[9] - x.logsumexp(0)), abs=1e-5)


def test_rejection_samples_the_penalised_distribution(make_generator: MakeGenerator) -> None:
    """Of one token after a draft: shares of a banned and of a favoured id."""
    generator = make_generator()
    generator.max_num_seqs = 400
    banned = dict.fromkeys(range(30), -100.0)
    each = [SamplingParams(seed=s, temperature=1.0, max_tokens=4, logit_bias=banned) for s in range(400)]
    counts: dict[str, Counter[int]] = {}
    for plan, rule in (("ar", "match"), ("chain", "rejection")):
        found = generator.generate([PROMPT] * 400, each, plan=plan, rule=rule)  # type: ignore[arg-type]
        counts[plan] = Counter(token for result in found for token in result.token_ids)
        assert min(counts[plan]) >= 30
    assert sum(abs(counts["ar"][t] - counts["chain"][t]) for t in range(61)) / 3200 < 0.1


def test_only_batches_that_ask_pay(make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op is called in windows in which somebody asks, and a preempted request's output is not its prompt."""
    calls = []

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(args[6].prompt_lengths.tolist())
        return apply_penalties(*args, **options)

    apply_penalties = ops.apply_penalties
    monkeypatch.setattr(ops, "apply_penalties", counted)
    generator = make_generator()
    engine = Engine(generator.model, None, None, EngineOptions(plan="ar", max_num_seqs=2, max_model_len=64))
    engine.submit(PROMPT, SamplingParams(max_tokens=20), 1)
    list(engine.window())
    assert not calls
    engine.submit(PROMPT, SamplingParams(max_tokens=4, presence_penalty=1.0), 1)
    list(engine.events())
    assert calls and all(lengths[-1] == len(PROMPT) for lengths in calls)
    before = len(calls)
    engine.submit(PROMPT, SamplingParams(max_tokens=4), 1)
    list(engine.events())
    assert len(calls) == before


def test_a_place_forgets_the_biases_of_the_request_before(make_generator: MakeGenerator) -> None:
    generator = make_generator()
    engine = Engine(generator.model, None, None, EngineOptions(plan="ar", max_num_seqs=1, max_model_len=64))
    many = SamplingParams(max_tokens=3, logit_bias=dict.fromkeys(range(60), 50.0))
    few = SamplingParams(max_tokens=6, logit_bias={3: 2.0})
    requests = [engine.submit(PROMPT, params, 1) for params in (many, few)]
    list(engine.events())
    alone = generator.generate([PROMPT], few, plan="ar")[0]
    assert requests[1].output.token_ids == alone.token_ids
