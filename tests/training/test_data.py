"""Self-distillation files: the base model's own text, and a file that any interruption leaves whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.model import Transformer
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.ops import use_backend
from idlm_kernels.training.data import (
    SAMPLED_TEMPERATURE,
    DataSettings,
    Sample,
    continue_batch,
    generate_samples,
    read_samples,
)
from idlm_kernels.training.dense import DenseModel
from tests.tiny import MemoryCheckpoint, tiny_config
from tests.training.support import dense, random_prompts

SETTINGS = DataSettings("a hash", max_tokens=9, batch=4, seed=5, sampled_share=0.5)
PROMPTS = [(prompt, f"domain {i % 3}") for i, prompt in enumerate(random_prompts(43))]
Prompts = list[tuple[list[int], str]]


@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return MemoryCheckpoint(tiny_config(eos_token_ids=(7, 21)), seed=2, scale=0.2)


@pytest.fixture(scope="module")
def model(checkpoint: MemoryCheckpoint) -> DenseModel:
    return dense(checkpoint)


@pytest.fixture(scope="module")
def whole(model: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an undisturbed run."""
    return generated(model, PROMPTS, tmp_path_factory.mktemp("whole") / "data.jsonl")


def generated(model: DenseModel, prompts: Prompts, path: Path, settings: DataSettings = SETTINGS) -> bytes:
    generate_samples(model, prompts, path, settings)
    return path.read_bytes()


def test_every_prompt_is_continued_once(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(whole)
    samples = read_samples(tmp_path / "data.jsonl")
    assert sorted((s.prompt, s.domain) for s in samples) == sorted(PROMPTS)
    assert all(1 <= len(s.answer) <= 9 for s in samples)
    assert json.loads(whole.splitlines()[0]) == {"format": "idlm-self-distillation-1", **dataclasses.asdict(SETTINGS)}


def test_answers_end_with_eos_or_at_the_limit(whole: bytes) -> None:
    ends = set()
    for line in whole.splitlines()[1:]:
        answer = json.loads(line)["answer"]
        assert not {7, 21} & set(answer[:-1])
        assert len(answer) == 9 or answer[-1] in (7, 21)
        ends.add(answer[-1] in (7, 21))
    assert ends == {True, False}, "both kinds occur"


# Interruptions


def cuts(data: bytes) -> list[int]:
    """Places to cut a file: in the first line, and between, in and just before the end of others."""
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    inside = [ends[i] + 20 for i in (0, 7, 8, 30)]
    return [0, 1, ends[0] - 1, *(ends[i] for i in (0, 1, 4, 9, 10, 40, 43)), *inside, ends[12] - 1, ends[-1] - 1]


@pytest.mark.parametrize("index", range(16))
def test_an_interruption_leaves_no_trace(index: int, whole: bytes, model: DenseModel, tmp_path: Path) -> None:
    places = cuts(whole)
    assert len(places) == 16
    path = tmp_path / "data.jsonl"
    path.write_bytes(whole[: places[index]])
    assert generated(model, PROMPTS, path) == whole


def test_whole_batches_are_not_made_again(whole: bytes, model: DenseModel, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[: 1 + 35]))
    seen: list[int] = []
    generate_samples(model, PROMPTS, path, SETTINGS, report=lambda samples, tokens: seen.append(samples))
    assert seen == [36, 40, 43]
    generate_samples(model, PROMPTS, path, SETTINGS, report=lambda *_: pytest.fail("nothing is left to do"))
    assert path.read_bytes() == whole


def test_a_line_that_is_being_written_is_not_read(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(whole[:-1])
    assert len(read_samples(path)) == len(PROMPTS) - 1


# What is refused


@pytest.mark.parametrize(
    "changes", [{"base": "another"}, {"max_tokens": 8}, {"batch": 5}, {"seed": 6, "sampled_share": 0.4}]
)
def test_other_settings_are_refused(changes: dict[str, Any], whole: bytes, model: DenseModel, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"data.jsonl: made with other settings \\({', '.join(changes)}\\)"):
        generated(model, PROMPTS, path, dataclasses.replace(SETTINGS, **changes))
    assert path.read_bytes() == whole


def test_other_prompts_are_refused(whole: bytes, model: DenseModel, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:10]))
    with pytest.raises(CheckpointError, match="data.jsonl, line 2: made of other prompts"):
        generated(model, [([1, 2, 3], ""), *PROMPTS[:4]], path)
    other: Prompts = [([*prompt, 1], domain) for prompt, domain in PROMPTS]
    with pytest.raises(CheckpointError, match="made of other prompts"):
        generated(model, other, path)


def test_files_of_something_else_are_not_touched(model: DenseModel, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for content, message in ((b"a letter", "line 1: no JSON"), (b"[1]\n", "line 1: wanted an object, got list")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            generated(model, PROMPTS, path)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("\xff", "no JSON"),
        ("[1, 2]", "wanted an object, got list"),
        ('{"answer": [1]}', "prompt must be a list of token ids"),
        ('{"prompt": [1], "answer": []}', "answer must be a list of token ids"),
        ('{"prompt": [1], "answer": [1, -1]}', "answer must be"),
        ('{"prompt": [1], "answer": [1, 2.0]}', "answer must be"),
        ('{"prompt": [true], "answer": [1]}', "prompt must be"),
        ('{"prompt": "1", "answer": [1]}', "prompt must be"),
    ],
)
def test_a_damaged_line_is_named(line: str, reason: str, whole: bytes, model: DenseModel, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = whole.splitlines()
    lines[12] = line.encode("latin-1")
    path.write_bytes(b"\n".join(lines) + b"\n")
    for use in (read_samples, lambda path: generated(model, PROMPTS, path)):
        with pytest.raises(CheckpointError, match=f"data.jsonl, line 13: {reason}"):
            use(path)


# What the model says


def test_greedy_answers_are_what_the_generator_decodes() -> None:
    checkpoint = MemoryCheckpoint(tiny_config(eos_token_ids=tuple(range(5))), seed=2, scale=0.3)
    prompts = random_prompts(40, seed=1, longest=12)
    found = continue_batch(dense(checkpoint), prompts, DataSettings("", 30, sampled_share=0.0), 0)
    with use_backend("torch"):
        generator = Generator(Transformer(checkpoint, dtype=torch.float32), max_model_len=64)  # type: ignore[arg-type]
        results = generator.generate(prompts, SamplingParams(max_tokens=30), plan="ar")
    assert found == [r.token_ids for r in results]
    assert {r.finish_reason for r in results} == {"stop", "length"}
    assert len({len(answer) for answer in found}) > 5, "rows leave the batch at different times"


def test_sampled_answers_follow_the_distribution_of_the_model(model: DenseModel) -> None:
    count = 6000
    with torch.no_grad():
        distribution = F.linear(model.clean(torch.tensor([[3, 1, 4]])).hidden[0, -1], model.head).div(
            SAMPLED_TEMPERATURE
        )
    answers = continue_batch(model, [[3, 1, 4]] * count, DataSettings("", 1, sampled_share=1.0), 0)
    found = torch.tensor([answer[0] for answer in answers]).bincount(minlength=61) / count
    distance = 0.5 * (found - distribution.softmax(0)).abs().sum()
    assert distance < 0.05  # 61 ids: about 0.03 is expected of a true distribution


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.3, 210, 390), (1.0, 800, 1000)])
def test_the_share_that_is_sampled(share: float, low: int, high: int, model: DenseModel) -> None:
    prompt = [[3, 1, 4]]
    (greedy,) = continue_batch(model, prompt, DataSettings("", 6, sampled_share=0.0), 0)
    answers = continue_batch(model, prompt * 1000, DataSettings("", 6, sampled_share=share), 1)
    assert low <= sum(answer != greedy for answer in answers) <= high


def test_greedy_rows_stay_greedy_when_others_end() -> None:
    checkpoint = MemoryCheckpoint(tiny_config(eos_token_ids=tuple(range(5))), seed=2, scale=0.3)
    model, prompts = dense(checkpoint), random_prompts(200, longest=12)
    greedy, mixed = (continue_batch(model, prompts, DataSettings("", 30, sampled_share=s), 0) for s in (0.0, 0.5))
    assert sum(a == b for a, b in zip(greedy, mixed, strict=True)) >= 80


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_mask_is_never_sampled(share: float) -> None:
    checkpoint = MemoryCheckpoint(tiny_config(mask_token_id=60), seed=2, scale=0.2)
    checkpoint.tensors["lm_head.weight"][60] *= 20
    prompts, settings = random_prompts(30), DataSettings("", 12, sampled_share=share)
    answers = continue_batch(dense(checkpoint), prompts, settings, 0)
    assert not any(60 in answer for answer in answers)
    checkpoint.config = tiny_config()
    answers = continue_batch(dense(checkpoint), prompts, settings, 0)
    assert any(60 in answer for answer in answers), "it would be, were it no MASK"


def test_the_noise_of_a_batch_is_its_own(model: DenseModel, tmp_path: Path) -> None:
    """Other prompts in the batches before and after change nothing; another seed does."""
    settings = dataclasses.replace(SETTINGS, sampled_share=1.0)
    prompts: Prompts = [([i, i + 1, i + 2], "") for i in range(12)]
    others: Prompts = [([50, 40, 30], "")] * 4

    def middle(prompts: Prompts, name: str, seed: int = 5) -> list[Sample]:
        path = tmp_path / name
        generate_samples(model, prompts, path, dataclasses.replace(settings, seed=seed))
        return read_samples(path)[4:8]

    alone = middle(prompts, "one")
    assert middle([*others, *prompts[4:8], *others], "two") == alone
    assert middle(prompts, "three", seed=6) != alone
    generate_samples(model, others * 2, tmp_path / "four", settings)
    twice = [sample.answer for sample in read_samples(tmp_path / "four")]
    assert twice[:4] != twice[4:], "nor do two batches share it"
