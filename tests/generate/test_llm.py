"""The front door: prompts of every kind, and programs that were written for vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import idlm_kernels
from idlm_kernels import LLM, DecodeOptions, SamplingParams
from tests.tiny import save_tiny_model

GREEDY = SamplingParams(max_tokens=8)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 0)])  # a text begins with id 0
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, options=DecodeOptions("quadratic", 3), max_num_seqs=3)


def test_a_first_program_for_vllm(folder: Path) -> None:
    """Unchanged but for the import and the model."""
    prompts = ["Hello, my name is", "The president of the United States is", "The capital of France is", "The future"]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=6)
    llm = LLM(model=str(folder), tensor_parallel_size=1, trust_remote_code=True, dtype="float32", enforce_eager=True)
    outputs = llm.generate(prompts, sampling_params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt == prompt and output.finished
        assert output.prompt_token_ids == llm.get_tokenizer().encode(prompt)
        completion = output.outputs[0]
        assert completion.text == output.text != "" and len(completion.token_ids) == 6
        assert completion.finish_reason == "length" and completion.cumulative_logprob is None


def test_a_prompt_may_be_text_or_ids_one_or_many(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("abc")
    (want,) = llm.generate("abc", GREEDY)
    assert want.prompt == "abc" and want.prompt_token_ids == ids and want.tokens == 8
    alike: list[Any] = [["abc"], ids, [ids], {"prompt": "abc"}, {"prompt_token_ids": ids}, [{"prompt_token_ids": ids}]]
    for prompts in alike:
        (found,) = llm.generate(prompts, GREEDY)
        assert found.token_ids == want.token_ids and found.prompt_token_ids == ids
        assert (found.prompt is None) == ("prompt_token_ids" in str(prompts) or "abc" not in str(prompts))
    mixed = llm.generate(["abc", ids, {"prompt": "xyz"}, "abc"], GREEDY)  # more than max_num_seqs
    assert [r.token_ids == want.token_ids for r in mixed] == [True, True, False, True]
    assert llm.generate([]) == []


def test_chats(llm: LLM) -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (answer,) = llm.chat(chat, GREEDY)
    assert answer.prompt == "[system]be brief[user]hi>"
    ids = llm.get_tokenizer().encode(answer.prompt, add_special_tokens=False)
    assert answer.prompt_token_ids == ids != llm.get_tokenizer().encode(answer.prompt)
    assert answer.token_ids == llm.generate({"prompt_token_ids": ids}, GREEDY)[0].token_ids
    several = llm.chat([chat, chat[1:]], GREEDY, add_generation_prompt=False)
    assert [r.prompt for r in several] == ["[system]be brief[user]hi", "[user]hi"]
    with pytest.raises(ValueError, match="conversation 1: messages is empty"):
        llm.chat([chat, []])


def test_logprobs_are_those_of_the_tokens(llm: LLM) -> None:
    (plain,), (found,) = llm.generate("abc", GREEDY), llm.generate("abc", SamplingParams(max_tokens=8, logprobs=0))
    assert found.token_ids == plain.token_ids and found.logprobs is not None and len(found.logprobs) == 8
    assert found.outputs[0].cumulative_logprob == pytest.approx(sum(found.logprobs)) and found.logprobs[0] < 0


def test_the_seed_makes_a_run_reproducible_and_its_requests_different(folder: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12)

    def run(seed: int | None, params: SamplingParams = params) -> list[list[int]]:
        llm = LLM(folder, seed=seed, options=DecodeOptions("chain", 2))
        return [r.token_ids for _ in range(2) for r in llm.generate(["a", "a"], params)]

    first = run(7)
    assert first == run(7) != run(8) and len({tuple(ids) for ids in first}) == 4
    seeded = SamplingParams(temperature=1.0, max_tokens=12, seed=1)
    own = run(7, seeded)
    assert own[:2] == own[2:] == run(8, seeded)[:2], "a request's own seed comes before that of the LLM"
    llm = LLM(folder, seed=7, options=DecodeOptions("chain", 2))
    assert [r.token_ids for r in llm.generate(["a", "a"], [params, params])] == first[:2]


def test_a_bar_of_progress_goes_to_stderr(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    (want,) = llm.generate("abc", GREEDY)
    assert capfd.readouterr() == ("", "")
    assert llm.generate("abc", GREEDY, use_tqdm=True)[0].token_ids == want.token_ids
    out, err = capfd.readouterr()
    assert out == "" and "100%" in err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tensor_parallel_size": 2}, ValueError, "tensor_parallel_size is 2, wanted 1"),
        ({"quantization": "awq"}, ValueError, "quantization is 'awq', wanted None"),
        ({"speculative_config": {"method": "ngram"}}, ValueError, "DecodeOptions"),
        ({"max_seqs": 2}, TypeError, "no argument 'max_seqs'"),
        ({"dtype": "int8"}, ValueError, "dtype"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs is 0"),
        ({"max_model_len": 1}, ValueError, "max_model_len is 1"),
        ({"gpu_memory_utilization": 0}, ValueError, "gpu_memory_utilization is 0"),
        ({"seed": -1}, ValueError, "seed is -1"),
    ],
)
def test_settings_that_are_not_there_are_refused_by_name(
    folder: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM(folder, **arguments)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (["a", []], ValueError, "prompt 1: the prompt is empty"),
        (["a", {"prompt": "a", "multi_modal_data": {}}], ValueError, "prompt 1 holds multi_modal_data"),
        (["a", {}], ValueError, "prompt 1 is empty"),
        (["a", ""], ValueError, "prompt 1 is empty"),
        (["a", [1, 999]], ValueError, "prompt 1: .* 999"),
        (["a", "\ud800"], ValueError, "prompt 1: text holds half"),
        (["a", [b"x"]], TypeError, "prompt 1: the prompt holds a bytes"),
    ],
)
def test_prompts_that_cannot_run_are_named(llm: LLM, prompts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompts, GREEDY)


def test_the_package_stays_light_until_a_name_is_asked_for() -> None:
    code = (
        "import idlm_kernels, sys; assert 'torch' not in sys.modules; idlm_kernels.LLM; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(idlm_kernels, name) is not None for name in idlm_kernels.__all__)


def test_dtypes_go_by_their_names_elsewhere(folder: Path) -> None:
    for name, dtype in (("half", torch.float16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert LLM(folder, dtype=name).generator.model.weight_dtype == dtype
