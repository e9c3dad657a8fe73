"""What OpenAI's own client gets: the texts of lone AR runs, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from idlm_kernels import __version__
from idlm_kernels.generate import Engine, EngineOptions, GenerationResult, Generator, SamplingParams
from idlm_kernels.generate.params import mixed_seed
from tests.serve.conftest import Running, running

HELLO = [{"role": "user", "content": "héllo"}]
AS_TEXT = "user: héllo\nassistant: "


def lone(generator: Generator, prompt: str, **params: Any) -> GenerationResult:
    """The request by itself, decoded in AR."""
    assert generator.tokenizer is not None
    wanted = SamplingParams(**{"temperature": 1.0, "max_tokens": 16, **params})
    return generator.generate([generator.tokenizer.encode(prompt)], [wanted], plan="ar", logprobs=True)[0]


@pytest.mark.parametrize(
    "params",
    [
        {"seed": 1, "max_tokens": 40},
        {"seed": 2**64 - 1, "temperature": 0.7, "top_p": 0.9},
        {"temperature": 0, "seed": 0},
    ],
    ids=["sampled", "truncated", "greedy"],
)
def test_a_completion_is_a_lone_ar_run(served: Running, generator: Generator, params: dict[str, Any]) -> None:
    answer = served.client().completions.create(model="tiny", prompt="Once", **params)
    wanted = lone(generator, "Once", **params)
    (choice,) = answer.choices
    assert choice.text == wanted.text and choice.finish_reason == wanted.finish_reason
    assert answer.usage is not None and answer.usage.model_extra is not None
    assert answer.usage.prompt_tokens == 4 and answer.usage.completion_tokens == wanted.tokens
    assert answer.usage.model_extra["tokens_per_forward"] == wanted.tokens / answer.usage.model_extra["forwards"]
    assert len(answer.usage.model_extra["acceptance"][0]) == 2, "of the drafts of stride 3"
    assert answer.model_extra == {"seed": params["seed"]}


def test_further_parameters_reach_the_engine(served: Running, generator: Generator) -> None:
    further = {"top_k": 5, "min_p": 0.01, "ignore_eos": True, "stop_token_ids": [40, 41, 42]}
    answer = served.client().completions.create(model="tiny", prompt="a", seed=4, max_tokens=60, extra_body=further)
    wanted = lone(generator, "a", seed=4, max_tokens=60, **further)
    assert answer.choices[0].text == wanted.text
    plain = lone(generator, "a", seed=4, max_tokens=60)
    assert wanted.text != plain.text


def test_penalties_and_biases_reach_the_engine(served: Running, generator: Generator) -> None:
    asked: dict[str, Any] = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    further = {"repetition_penalty": 1.4}
    bias = {"40": 3, "41": -100.0}
    answer = served.client().completions.create(
        model="tiny", prompt="abcabc", seed=4, max_tokens=60, logit_bias=bias, **asked, extra_body=further
    )
    wanted = lone(generator, "abcabc", seed=4, max_tokens=60, logit_bias={40: 3.0, 41: -100.0}, **asked, **further)
    assert answer.choices[0].text == wanted.text and 41 not in wanted.token_ids
    for one in ("presence_penalty", "frequency_penalty"):
        other = lone(generator, "abcabc", seed=4, max_tokens=60, logit_bias={40: 3.0}, **asked | {one: 0.0}, **further)
        assert other.text != wanted.text


def test_a_seed_is_drawn_and_reported(served: Running, generator: Generator) -> None:
    answer = served.client().completions.create(model="tiny", prompt="Once")
    assert answer.model_extra is not None
    assert answer.choices[0].text == lone(generator, "Once", seed=answer.model_extra["seed"]).text
    again = served.client().completions.create(model="tiny", prompt="Once")
    assert again.choices[0].text != answer.choices[0].text


def test_a_chat_uses_the_template_and_all_of_the_context(served: Running, generator: Generator) -> None:
    answer = served.client().chat.completions.create(
        model="tiny", messages=HELLO, seed=3, extra_body={"ignore_eos": True}
    )
    wanted = lone(generator, AS_TEXT, seed=3, max_tokens=256 - len(AS_TEXT.encode()), ignore_eos=True)
    assert answer.choices[0].message.content == wanted.text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length" and answer.usage is not None
    assert answer.usage.total_tokens == 256


def test_parts_of_text_and_the_developer_are_what_templates_know(served: Running) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    told = served.web.post("/tokenize", json={"messages": messages}).json()
    assert bytes_of(served, told["tokens"]) == "system: be brief\nuser: ab\nassistant: "


def bytes_of(served: Running, tokens: list[int]) -> str:
    text: str = served.web.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    return text


@pytest.mark.parametrize("copies", [1, 3])
def test_a_stream_joins_to_the_whole_answer(served: Running, copies: int) -> None:
    client = served.client()
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 9, "max_completion_tokens": 50, "n": copies}
    whole = client.chat.completions.create(**asked)
    texts, reasons, usage, roles = [""] * copies, [""] * copies, None, 0
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert usage is None, "the usage comes last"
        usage = chunk.usage
        assert bool(chunk.choices) == (usage is None)
        for choice in chunk.choices:
            assert not reasons[choice.index], "nothing follows the end of a text"
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or ""
            roles += choice.delta.role == "assistant"
    assert texts == [choice.message.content for choice in whole.choices] and roles == copies
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None and whole.usage is not None
    assert usage.prompt_tokens == len(AS_TEXT.encode()), "a prompt counts once, whatever n is"
    assert (usage.completion_tokens, usage.total_tokens) == (whole.usage.completion_tokens, whole.usage.total_tokens)


def test_a_stream_without_include_usage_has_none(served: Running) -> None:
    chunks = list(served.client().completions.create(model="tiny", prompt="a", max_tokens=3, seed=1, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_n_and_prompts_mix_the_seed(served: Running, generator: Generator) -> None:
    answer = served.client().completions.create(model="tiny", prompt=["ab", "cde"], n=2, seed=5)
    wanted = [
        lone(generator, prompt, seed=mixed_seed(5, i)).text for i, prompt in enumerate(["ab", "ab", "cde", "cde"])
    ]
    assert [choice.text for choice in answer.choices] == wanted and len(set(wanted)) == 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.prompt_tokens == 5


@pytest.mark.parametrize("prompt", [[79, 110], [[79, 110]]])
def test_a_prompt_may_be_token_ids(served: Running, generator: Generator, prompt: Any) -> None:
    answer = served.client().completions.create(model="tiny", prompt=prompt, seed=1)
    wanted = generator.generate([[79, 110]], [SamplingParams(temperature=1.0, seed=1, max_tokens=16)], plan="ar")
    assert answer.choices[0].text == wanted[0].text


def test_a_stop_string_ends_the_text_before_it(served: Running, generator: Generator) -> None:
    free = lone(generator, "Once", seed=1, max_tokens=60, ignore_eos=True).text
    stop = next(free[i : i + 2] for i in range(20, 50) if "\ufffd" not in free[i : i + 2] and free[i] != free[i + 1])
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Once", "seed": 1, "max_tokens": 60, "stop": [stop, "never"]}
    asked["extra_body"] = {"ignore_eos": True}
    answer = served.client().completions.create(**asked)
    assert answer.choices[0].text == free[: free.index(stop)] and answer.choices[0].finish_reason == "stop"
    stream = served.client().completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_logprobs_belong_to_the_tokens(served: Running, generator: Generator) -> None:
    wanted = lone(generator, "Once", seed=1)
    answer = served.client().completions.create(model="tiny", prompt="Once", seed=1, logprobs=0)
    told = answer.choices[0].logprobs
    assert told is not None and told.tokens is not None and told.text_offset is not None
    assert told.token_logprobs == pytest.approx(wanted.logprobs)
    assert len(told.tokens) == len(told.text_offset) == wanted.tokens
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if "\ufffd" not in token:
            assert wanted.text[offset:].startswith(token)
    lone_chat = lone(generator, AS_TEXT, seed=1)
    chat: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 1, "logprobs": True, "max_tokens": 16}
    entries = [
        entry
        for chunk in served.client().chat.completions.create(**chat, stream=True)
        for choice in chunk.choices
        for entry in (choice.logprobs.content if choice.logprobs and choice.logprobs.content else [])
    ]
    assert [entry.logprob for entry in entries] == pytest.approx(lone_chat.logprobs)
    assert generator.tokenizer is not None
    spelled = b"".join(bytes(entry.bytes or []) for entry in entries)
    ends = set(generator.tokenizer.eos_ids)
    assert (
        spelled.removesuffix(b"~" if lone_chat.token_ids[-1] in ends else b"").decode("utf-8", "replace")
        == lone_chat.text
    )


def test_text_and_tokens_there_and_back(served: Running) -> None:
    told = served.web.post("/tokenize", json={"prompt": "a😀"}).json()
    assert told["count"] == len(told["tokens"]) == 5 and told["max_model_len"] == 256
    assert bytes_of(served, told["tokens"]) == "a😀"


def test_what_the_server_says_of_itself(served: Running) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").model_extra == {"max_model_len": 256, "rule": "match"}
    assert served.web.get("/version").json() == {"version": __version__}
    assert served.web.get("/health").json() == {"status": "ok"}
    before = metric(served, "idlm_generated_tokens_total")
    client.completions.create(model="tiny", prompt="a", max_tokens=7, seed=1, extra_body={"ignore_eos": True})
    assert metric(served, "idlm_generated_tokens_total") == before + 7
    assert metric(served, "idlm_free_pages") == metric(served, "idlm_pages") > 0 == metric(served, "idlm_running")


def test_the_description_says_what_is_sent_and_taken(served: Running) -> None:
    """Tools that try a server by its description had 422, JSON from every path, and numbers without a range."""
    described = served.web.get("/openapi.json").json()
    paths, bodies = described["paths"], described["components"]["schemas"]
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/health"} <= set(paths)
    answers = {path: what["responses"] for methods in paths.values() for path, what in methods.items()}
    assert all(set(responses) == {"200", "4XX", "5XX"} for responses in answers.values())
    for path, kinds in {
        "/": {"text/html"},
        "/metrics": {"text/plain"},
        "/version": {"application/json"},
    }.items():
        assert set(paths[path]["get"]["responses"]["200"]["content"]) == kinds
        assert served.web.get(path).headers["content-type"].split(";")[0] in kinds
    streamed = paths["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(streamed) == {"application/json", "text/event-stream"}
    assert bodies["ErrorBody"]["properties"].keys() == {"error"}
    ranges = bodies["CompletionRequest"]["properties"]
    assert ranges["max_tokens"]["minimum"] == 1 and ranges["top_p"]["maximum"] == 1


def metric(served: Running, name: str) -> float:
    served.wait_until_idle()
    lines = served.web.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


TEXT = "né😀 "


@pytest.fixture(scope="module")
def spelling(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """A model without attention that spells one text over and over: each byte leads to the one after it."""
    made = tmp_path_factory.mktemp("spelling")
    for file in folder.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    config = json.loads((made / "config.json").read_text())
    config.update(hidden_size=256, head_dim=64, num_hidden_layers=1)
    (made / "config.json").write_text(json.dumps(config))
    tokenizer = Generator.from_pretrained(folder).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT)
    assert len(set(ids)) == len(ids) == 8
    from idlm_kernels.model import ModelConfig

    weights = {name: torch.zeros(shape) for name, shape in ModelConfig.from_hf(config).tensor_shapes().items()}
    weights["model.embed_tokens.weight"] = torch.eye(256)
    for before, after in zip(ids, ids[1:] + ids[:1], strict=True):
        weights["lm_head.weight"][after, before] = 1.0
    for name in weights:
        if "norm" in name:
            weights[name] += 1
    save_file(weights, made / "model.safetensors")
    assert load_file(made / "model.safetensors").keys() == weights.keys()
    return Generator.from_pretrained(made)


def test_no_delta_splits_a_character(spelling: Generator) -> None:
    options = EngineOptions(plan="chain", stride=3, max_num_seqs=2, max_model_len=128)
    with running(Engine(spelling.model, spelling.tokenizer, options=options)) as server:
        asked: dict[str, Any] = {"model": "tiny", "prompt": TEXT, "temperature": 0, "max_tokens": 64}
        deltas = [c.choices[0].text for c in server.client().completions.create(**asked, stream=True)]
        assert "".join(deltas) == TEXT * 8
        assert all("\ufffd" not in delta for delta in deltas) and len(deltas) > 8
        cut = list(server.client().completions.create(**{**asked, "max_tokens": 6}, stream=True))
        assert "".join(c.choices[0].text for c in cut) == "né\ufffd", "a text may end within a character, and says so"
        stopped = server.client().completions.create(**asked, stop="😀")
        assert stopped.choices[0].text == "né"


@pytest.mark.parametrize("stream", [False, True])
def test_top_logprobs_belong_to_the_tokens(served: Running, generator: Generator, stream: bool) -> None:
    """They are the model's own, sorted, and every token has its list, whole or in pieces, beside others without."""
    assert generator.tokenizer is not None
    prompt = generator.tokenizer.encode(AS_TEXT)
    bias = {"40": 5}
    wanted = generator.generate(
        [prompt], SamplingParams(1.0, seed=1, logprobs=4, logit_bias={40: 5.0}, max_tokens=16), plan="ar", logprobs=True
    )[0]
    chat: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 1, "logprobs": True, "max_tokens": 16}
    asked = {**chat, "top_logprobs": 4, "logit_bias": bias, "stream": stream}
    answer = served.client().chat.completions.create(**asked)
    parts = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    entries = [e for part in parts if part.logprobs for e in part.logprobs.content or []]
    assert len(entries) == wanted.tokens and wanted.top_logprobs is not None
    for entry, listed, own in zip(entries, wanted.top_logprobs, wanted.logprobs or [], strict=True):
        values = [one.logprob for one in entry.top_logprobs]
        assert len(values) == 4 and values == sorted(values, reverse=True) and entry.logprob == pytest.approx(own)
        assert values == pytest.approx(list(listed.values())[:4])
        assert [one.bytes for one in entry.top_logprobs] == [
            list(generator.tokenizer.token_bytes(token, skip_special_tokens=False) or b"") for token in list(listed)[:4]
        ]


def test_top_logprobs_of_a_completion(served: Running) -> None:
    answer = served.client().completions.create(model="tiny", prompt="Once", seed=1, logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None and told.tokens and told.top_logprobs and len(told.top_logprobs) == len(told.tokens)
    for token, own, listed in zip(told.tokens, told.token_logprobs or [], told.top_logprobs, strict=True):
        assert 1 <= len(listed) <= 3 and listed[token] >= own - 1e-6
    body = {"messages": HELLO, "top_logprobs": 2}
    refused = served.web.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400 and "top_logprobs" in refused.json()["error"]["message"]


def test_logprobs_of_a_server_without_them(make_engine: Callable[..., Engine]) -> None:
    with running(make_engine(logprobs=False)) as server:
        refused = server.web.post("/v1/completions", json={"prompt": "a", "logprobs": 0})
        assert refused.status_code == 400 and "--logprobs" in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == "logprobs"


@pytest.mark.default_model
def test_the_default_model_streams_what_a_lone_run_gives() -> None:
    generator = Generator.from_pretrained("default")
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    messages = [{"role": "user", "content": "Write three greetings with an emoji each."}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(list(messages)), add_special_tokens=False)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=32)
    wanted = generator.generate([ids], [params], plan="ar")[0]
    engine = Engine(generator.model, tokenizer, options=EngineOptions(plan="quadratic", stride=3, max_model_len=256))
    with running(engine) as server:
        asked: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0.8, "seed": 5, "max_tokens": 32}
        stream = server.client().chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted.text
