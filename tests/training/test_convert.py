"""The paper's full conversion, on a model of two layers that is trained from nothing."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from idlm_kernels.generate import Generator, SamplingParams
from idlm_kernels.model import ModelConfig, RopeScaling, Transformer, load_checkpoint
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.training import convert as module
from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.convert import ConvertLoss, ConvertSettings, convert, loss_of, save_checkpoint
from idlm_kernels.training.dense import DenseModel
from idlm_kernels.training.train import make_batch
from tests.tiny import MemoryCheckpoint, tiny_config
from tests.training.conftest import Converted
from tests.training.support import CPU, dense, progressions, random_samples

UNSEEN = progressions(25, seed=1)
BRIEF = ConvertSettings(strides=(2, 3), steps=2, batch=4, learning_rate=1e-3, warmup=1)


def noise(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# A whole run


def test_drafts_stand_and_ordinary_rows_learn(converted: Converted) -> None:
    """The noise before a progression makes every unseen sequence a new one."""
    batch = make_batch(UNSEEN, 3, 3, noise(), CPU)
    with torch.no_grad():
        before, after = (loss_of(model, batch) for model in (converted.start, converted.model))
    assert before.clean > 3.5 and after.clean < 0.1
    assert before.masked > 3.5 and after.masked < 1
    untrained, trained = (Predictions.of(m, None, None, UNSEEN, 3) for m in (converted.start, converted.model))
    assert max(untrained.acceptance()) < 0.2
    assert min(trained.acceptance()) > 0.8


def test_the_stride_grows(converted: Converted) -> None:
    assert [stride for _, stride, _ in converted.report] == [2] * 100 + [3] * 100 + [4] * 100
    assert [step for step, _, _ in converted.report] == list(range(1, 301))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checkpoint_is_loaded_and_decodes(dtype: torch.dtype, converted: Converted, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, converted.model, dtype)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config == converted.model.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for name, weight in converted.model.weights.items():
        assert torch.equal(checkpoint.tensor(name), weight.to(dtype))
    generator = Generator(Transformer(checkpoint, dtype=torch.float32), max_model_len=64)
    prompts = [sample.prompt for sample in UNSEEN[:6]]
    params = SamplingParams(max_tokens=12)
    ar = generator.generate(prompts, params, plan="ar")
    assert [r.token_ids for r in ar] == [sample.answer for sample in UNSEEN[:6]]
    for plan in ("chain", "quadratic"):
        found = generator.generate(prompts, params, plan=plan, stride=4)  # type: ignore[arg-type]
        assert [r.token_ids for r in found] == [r.token_ids for r in ar]
        assert sum(r.tokens for r in found) > 2 * sum(r.forwards for r in found)
    sampled = SamplingParams(max_tokens=20, temperature=2.0, seed=1)
    texts = [
        [r.token_ids for r in generator.generate(prompts, sampled, plan=plan, stride=4)]  # type: ignore[arg-type]
        for plan in ("ar", "quadratic")
    ]
    assert texts[0] == texts[1] and not any(47 in text for text in texts[0]), "MASK is never sampled"


# What a step does


def test_blocks_tile_the_answer() -> None:
    """From a random offset on, each token is the label of one MASK row and each position holds one MASK."""
    samples = random_samples([(3, 11), (2, 8), (5, 20)])
    for num_spec_tokens in (1, 2, 3):
        batch = make_batch(samples, num_spec_tokens, num_spec_tokens, noise(), CPU)
        for b, sample in enumerate(samples):
            start, end = len(sample.prompt), len(sample.prompt) + len(sample.answer)
            positions = Counter(
                int(anchor) + 1 + j
                for anchor, labels in zip(batch.anchors[b], batch.labels[b].tolist(), strict=True)
                for j, label in enumerate(labels)
                if label >= 0
            )
            first = min(positions)
            assert start <= first < start + num_spec_tokens
            assert positions == Counter(range(first, end - 1)), "the last token is predicted by the row before it"


def test_every_step_tiles_with_the_blocks_of_its_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[tuple[int, int]] = []

    def spy(chosen: Any, num_spec_tokens: int, spacing: int, generator: torch.Generator, device: torch.device) -> Any:
        tiles.append((num_spec_tokens, spacing))
        return make_batch(chosen, num_spec_tokens, spacing, generator, device)

    monkeypatch.setattr(module, "make_batch", spy)
    start = dense(MemoryCheckpoint(tiny_config(vocab_size=48, mask_token_id=47), scale=0.1))
    convert(start, progressions(8, 0), BRIEF)
    assert tiles == [(1, 1), (1, 1), (2, 2), (2, 2)]


def test_both_halves_are_those_of_plain_loops() -> None:
    model = dense(MemoryCheckpoint(tiny_config(mask_token_id=60), seed=1, scale=0.2))
    samples = random_samples([(2, 7), (4, 3)])
    batch = make_batch(samples, 2, 2, noise(), CPU)
    masked, clean = [], []
    with torch.no_grad():
        for b, sample in enumerate(samples):
            text, start = sample.prompt + sample.answer, len(sample.prompt)
            rows = model.clean(torch.tensor([text]))
            for t in range(start - 1, len(text) - 1):
                clean.append(-float(F.linear(rows.hidden[0, t], model.head).log_softmax(0)[text[t + 1]]))
            for anchor in batch.anchors[b].tolist():
                block = model.masked(rows, torch.tensor([[anchor]]), 2, model.embedding[60], None)[0, 0]
                for j in range(2):
                    if start <= anchor + 2 + j < len(text) and anchor >= start - 1:
                        masked.append(-float(F.linear(block[j], model.head).log_softmax(0)[text[anchor + 2 + j]]))
        found = loss_of(model, batch)
    assert float(found.clean) == pytest.approx(sum(clean) / len(clean), rel=1e-5)
    assert float(found.masked) == pytest.approx(sum(masked) / len(masked), rel=1e-5)


@pytest.mark.parametrize(("bound", "factor"), [(8.0, 6.0), (4.0, 4.0)])
def test_the_halves_weigh_the_same_up_to_the_bound(bound: float, factor: float) -> None:
    masked, clean = torch.tensor(3.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    total = ConvertLoss(masked, clean).total(bound)
    total.backward()
    assert float(total.detach()) == 3.0 + factor * 0.5
    assert (float(masked.grad), float(clean.grad)) == (1.0, factor), "the balance is a constant"  # type: ignore[arg-type]


def test_the_papers_recipe_balances_in_the_last_stage_alone() -> None:
    settings = ConvertSettings(strides=(2, 3, 4), recipe="paper", clean_weight=0.2)
    loss = ConvertLoss(torch.tensor(3.0), torch.tensor(0.5))
    assert [float(settings.total(loss, stage)) for stage in range(3)] == pytest.approx([3.1, 3.1, 6.0])
    balanced = ConvertSettings(strides=(2, 3, 4), max_balance=2.0)
    assert [float(balanced.total(loss, stage)) for stage in range(3)] == [4.0] * 3


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interruption_leaves_no_trace(stop: int, tmp_path: Path) -> None:
    start = dense(MemoryCheckpoint(tiny_config(vocab_size=48, mask_token_id=47), scale=0.1))
    samples = progressions(12, 0)
    calm = convert(start, samples, BRIEF)

    def interrupt(trained: DenseModel, step: int, stride: int, loss: ConvertLoss) -> None:
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(start, samples, BRIEF, tmp_path / "run", save_every=1, report=interrupt)
    taken: list[int] = []
    again = convert(start, samples, BRIEF, tmp_path / "run", report=lambda _, step, *rest: taken.append(step))
    assert taken == list(range(stop + 1, 5))
    assert all(torch.equal(weight, again.weights[name]) for name, weight in calm.weights.items())
    other = dataclasses.replace(BRIEF, recipe="paper")
    with pytest.raises(CheckpointError, match="recipe 'balanced' and not 'paper'"):
        convert(start, samples, other, tmp_path / "run")


def test_the_gradient_reaches_every_weight_and_the_keys_of_clean_rows() -> None:
    config = tiny_config(architecture="qwen3", qk_norm=True, attention_bias=True, mask_token_id=60)
    model = dense(MemoryCheckpoint(config, seed=1, scale=0.2))
    for weight in model.weights.values():
        weight.requires_grad_()
    batch = make_batch(random_samples([(2, 9)], vocab_size=50), 2, 2, noise(), CPU)
    clean = model.clean(batch.ids)
    for part in (*clean.k, *clean.v):
        part.retain_grad()
    model.masked(clean, batch.anchors, 2, model.own_mask, None).square().sum().backward()
    for part in (*clean.k, *clean.v):
        assert part.grad is not None and part.grad.abs().max() > 0
    loss_of(model, batch).total(4.0).backward()
    for name, weight in model.weights.items():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    assert model.embedding.grad is not None and model.embedding.grad[60].abs().max() > 0, "MASK is trained"


def test_answers_without_a_label_leave_no_nan() -> None:
    model = dense(MemoryCheckpoint(tiny_config(mask_token_id=60), scale=0.1))
    loss = loss_of(model, make_batch(random_samples([(3, 1)]), 2, 2, noise(), CPU))
    assert float(loss.masked) == 0 and 0 < float(loss.clean) < 10 and float(loss.total(4.0)) == 0


def test_deterministic_and_the_start_is_left_alone() -> None:
    checkpoint = MemoryCheckpoint(tiny_config(vocab_size=48, mask_token_id=47), scale=0.1)
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    start, samples = dense(checkpoint), progressions(12, 0)
    one, two = (convert(start, samples, BRIEF) for _ in range(2))
    other = convert(start, samples, dataclasses.replace(BRIEF, seed=1))
    for name, weight in start.weights.items():
        assert torch.equal(weight, before[name]) and not weight.requires_grad
        assert torch.equal(one.weights[name], two.weights[name]) and not one.weights[name].requires_grad
        assert not torch.equal(one.weights[name], weight), f"{name} is not trained"
    assert any(not torch.equal(one.weights[name], other.weights[name]) for name in before)


# What is refused


def test_models_that_cannot_be_converted() -> None:
    with pytest.raises(ValueError, match="no mask_token_id, wanted the id of a token that no text uses"):
        convert(dense(MemoryCheckpoint(tiny_config())), progressions(3, 0), BRIEF)
    model = dense(MemoryCheckpoint(tiny_config(mask_token_id=60)))
    half = type(model)(model.config, {name: weight.bfloat16() for name, weight in model.weights.items()})
    with pytest.raises(ValueError, match="weights are torch.bfloat16, wanted torch.float32"):
        convert(half, progressions(3, 0), BRIEF)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": ()}, r"strides is \(\)"),
        ({"strides": (2, 1)}, r"strides is \(2, 1\), wanted one or more of at least 2"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"max_balance": -1.0}, "max_balance is -1.0"),
        ({"clean_weight": -1.0}, "clean_weight is -1.0"),
        ({"recipe": "ours"}, "recipe is 'ours', wanted 'balanced' or 'paper'"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvertSettings(**changes)


# The config file


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "eos_token_ids": (3, 5), "bos_token_id": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"architecture": "qwen3", "qk_norm": True, "attention_bias": True},
        {"architecture": "sdar", "qk_norm": True},
        {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64), "rope_theta": 5e5},
    ],
    ids=["tied", "bias", "qwen3", "sdar", "llama3-rope"],
)
def test_every_config_is_read_back(changes: dict[str, Any], tmp_path: Path) -> None:
    model = dense(MemoryCheckpoint(tiny_config(mask_token_id=60, **changes)))
    save_checkpoint(tmp_path, model)
    assert load_checkpoint(tmp_path).config == model.config
    transformers = pytest.importorskip("transformers")
    if model.config.architecture != "sdar":
        names = json.loads((tmp_path / "config.json").read_text())["architectures"]
        read = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        assert ModelConfig.from_hf(read | {"architectures": names}) == model.config


def test_rope_factors_of_a_gguf_are_refused(tmp_path: Path) -> None:
    model = dense(MemoryCheckpoint(tiny_config(mask_token_id=60, rope_freq_factors=(1.0, 1.0, 2.0, 4.0))))
    with pytest.raises(ValueError, match="rope_freq_factors of a GGUF have no place in a config.json"):
        save_checkpoint(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()
