"""The model of lm-evaluation-harness, held against the harness's own model for transformers on the same weights.

The harness brings half a gigabyte along, so it is in no other extra: without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from idlm_kernels.generate import Generator, SamplingParams
from tests.tiny import save_tiny_model

if TYPE_CHECKING:
    from idlm_kernels.evaluation import IntrospectiveLM

ROOT = Path(__file__).resolve().parents[2]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'idlm_kernels[eval]'",
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}()){% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 96, "eos_token_id": 188}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"eos_token": "Ā", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def lm(folder: Path) -> IntrospectiveLM:
    from idlm_kernels.evaluation import IntrospectiveLM

    return IntrospectiveLM(str(folder), max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture(scope="module")
def of_transformers(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]  # type: ignore[arg-type]


TEXTS = [
    ("The sky is", " blue"),
    ("The sky is", " b"),
    ("The sky is", " red, they say"),
    ("", "no context"),
    ("ends in a blank ", "word"),
    ("naïve café ", "日本"),
    ("x" * 300, "a context that is longer than the model's"),
]


@needs_harness
def test_log_probabilities_are_those_of_transformers(lm: IntrospectiveLM, of_transformers: Any) -> None:
    mine = lm.loglikelihood(asked("loglikelihood", *TEXTS), disable_tqdm=True)
    theirs = of_transformers.loglikelihood(asked("loglikelihood", *TEXTS), disable_tqdm=True)
    for (total, greedy), (expected, is_greedy) in zip(mine, theirs, strict=True):
        assert math.isclose(total, expected, abs_tol=2e-3) and greedy == is_greedy


@needs_harness
@pytest.mark.parametrize("length", [0, 1, 95, 96, 97, 300])
def test_rolling_log_probabilities_are_those_of_transformers(
    lm: IntrospectiveLM, of_transformers: Any, length: int
) -> None:
    text = ("Each token is predicted once, with as much before it as there is room for. " * 5)[:length]
    mine = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    if length:
        theirs = of_transformers.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert math.isclose(mine[0], theirs[0] if length else 0.0, abs_tol=1e-2)


@needs_harness
def test_greedy_answers_are_those_of_transformers(lm: IntrospectiveLM, of_transformers: Any) -> None:
    requests = [
        ("The sky is", {"until": ["\n\n"], "max_gen_toks": 12}),
        ("The sky is", {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}),
        ("A list:", {"max_gen_toks": 7}),
    ]
    mine = lm.generate_until(asked("generate_until", *requests), disable_tqdm=True)
    assert mine == of_transformers.generate_until(asked("generate_until", *requests), disable_tqdm=True)
    stop = mine[1][5]
    until = ("The sky is", {"until": stop, "max_gen_toks": 20})
    assert lm.generate_until(asked("generate_until", until), disable_tqdm=True) == [mine[1].split(stop)[0]]


@needs_harness
def test_a_sampled_answer_depends_on_its_prompt_and_not_on_the_run(lm: IntrospectiveLM) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 50, "max_gen_toks": 12}
    requests = [(f"prompt {i}", settings) for i in range(9)] + [("prompt 3", settings)]
    answers = lm.generate_until(asked("generate_until", *requests), disable_tqdm=True)
    assert lm.generate_until(asked("generate_until", requests[3]), disable_tqdm=True) == [answers[3]]
    assert answers[9] != answers[3], "the second answer to a prompt draws noise of its own"


@needs_harness
def test_an_answer_longer_than_the_context_is_cut_and_not_its_prompt(lm: IntrospectiveLM, folder: Path) -> None:
    """A task may ask for 32768 tokens of a model that has 96; the harness's rule would leave nothing of the prompt."""
    answer = lm.generate_until(asked("generate_until", ("The sky is", {"max_gen_toks": 32768})), disable_tqdm=True)[0]
    generator = Generator.from_pretrained(folder)
    assert generator.tokenizer is not None
    prompt = generator.tokenizer.encode("The sky is")
    expected = generator.generate([prompt], SamplingParams(max_tokens=96 - len(prompt)), plan="ar")[0]
    assert answer == expected.text


@needs_harness
def test_what_a_decode_does_not_have_is_refused_by_name(lm: IntrospectiveLM) -> None:
    for settings, word in (
        ({"num_beams": 4}, "num_beams"),
        ({"length_penalty": 1.1}, "length_penalty"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 2.0}, "top_p"),
    ):
        with pytest.raises(ValueError, match=word):
            lm.generate_until(asked("generate_until", ("a", settings)), disable_tqdm=True)
    with pytest.raises(ValueError, match="plan is 'fast'"):
        type(lm)("nowhere", plan="fast")


@needs_harness
def test_chats(lm: IntrospectiveLM, folder: Path) -> None:
    chat = [{"role": "user", "content": "Hi "}]
    assert lm.apply_chat_template(chat) == "<user>Hi \n<assistant>"
    begun = [*chat, {"role": "assistant", "content": "Hello, "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "<user>Hi \n<assistant>Hello,"
    assert lm.chat_template(True) == TEMPLATE and lm.chat_template(False) is None
    quick = type(lm)(str(folder), enable_thinking=False, generator=lm.generator)
    assert quick.apply_chat_template(chat) == "<user>Hi \n<assistant>())"


@needs_harness
def test_what_comes_before_the_end_of_the_reasoning_is_no_answer(lm: IntrospectiveLM) -> None:
    request = ("The sky is", {"max_gen_toks": 20})
    text = lm.generate_until(asked("generate_until", request), disable_tqdm=True)[0]
    mark, stop = text[8], text[2]
    thinking = type(lm)(generator=lm.generator, think_end_token=mark)
    answer = thinking.generate_until(
        asked("generate_until", ("The sky is", {"max_gen_toks": 20, "until": [stop]})), disable_tqdm=True
    )[0]
    assert answer == text.split(mark)[-1].lstrip().split(stop)[0]


@needs_harness
def test_bos_is_written_once(folder: Path, lm: IntrospectiveLM) -> None:
    with_bos = type(lm)(generator=lm.generator, add_bos_token=True)
    lm.tokenizer.bos_id = 200  # a character of the alphabet
    try:
        character = lm.tokenizer.token_text(200)
        assert character is not None
        plain = lm.tok_encode("abc")
        assert with_bos.tok_encode("abc") == [200, *plain] and len(plain) == 3
        assert with_bos.tok_encode(character + "abc") == lm.tokenizer.encode(character + "abc")
        assert with_bos.tok_encode("abc", add_special_tokens=False) == plain
    finally:
        lm.tokenizer.bos_id = None


TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "tiny_text": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@needs_harness
def test_the_command_runs_tasks_of_a_folder_without_a_network(folder: Path, tmp_path: Path) -> None:
    """What the harness reports is what the generator gives, with strides and through the chat template."""
    lines = [{"question": f"Why {i}?", "choices": [" a", " bb"], "answer": i % 2} for i in range(5)]
    generator = Generator.from_pretrained(folder)
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    pairs, texts = [], []
    for line in lines:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": line["question"]}])
        pairs += [(tokenizer.encode(chat), tokenizer.encode(choice)) for choice in line["choices"]]  # type: ignore[attr-defined]
        text = generator.generate([tokenizer.encode(chat)], SamplingParams(max_tokens=8, stop="\n"), plan="ar")[0].text
        texts.append(text)
        line["text"] = text if len(texts) < 4 else "something else"
    totals = [score.total for score in generator.score(pairs)]
    right = [(totals[2 * i + 1] > totals[2 * i]) == bool(line["answer"]) for i, line in enumerate(lines)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, body in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
            f"test_split: test\n{body}"
        )
    command = [
        sys.executable,
        "-m",
        "idlm_kernels",
        "eval",
        "--tasks",
        ",".join(TASKS),
        "--include_path",
        str(tmp_path),
    ]
    command += ["--model_args", f"pretrained={folder},plan=quadratic,stride=3,dtype=float32", "--apply_chat_template"]
    command += ["--output_path", str(tmp_path / "out")]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    (report,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(report.read_text())["results"]
    assert results["tiny_choice"]["acc,none"] == sum(right) / 5
    assert results["tiny_text"]["exact_match,none"] == 0.6
    assert results["tiny_rolling"]["bits_per_byte,none"] > 0


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_command_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "idlm_kernels", "eval", "--tasks", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.search(r"needs the package lm_eval: pip install 'idlm_kernels\[eval\]'", done.stderr)


@needs_harness
def test_the_tasks_of_the_page_exist() -> None:
    from lm_eval.tasks import TaskManager

    named = re.findall(r"--tasks ([\w,]+)", (ROOT / "docs" / "evaluation.md").read_text())
    names = {name for one in named for name in one.split(",")}
    assert len(names) > 12 and names <= set(TaskManager().all_tasks)
