"""The training loop: what it trains on, that it learns, and that an interruption leaves no trace."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from idlm_kernels.model.adapter import load_adapter
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.training import train as module
from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.data import Sample
from idlm_kernels.training.dense import DenseModel
from idlm_kernels.training.export import export
from idlm_kernels.training.train import (
    Order,
    Trainee,
    TrainSettings,
    Vocabulary,
    loss_of,
    make_batch,
    save_run,
    train,
)
from python_ref.contract import NUM_CANDIDATES
from tests.tiny import MemoryCheckpoint, tiny_config
from tests.training.conftest import Trained
from tests.training.support import CPU, PROVENANCE, dense, greedy_samples, random_samples

SMALL = TrainSettings(rank=2, steps=6, batch=4, learning_rate=1e-2, warmup=2, rerank_width=8)


@pytest.fixture(scope="module")
def model() -> DenseModel:
    return dense(MemoryCheckpoint(tiny_config(), seed=2, scale=0.1))


@pytest.fixture(scope="module")
def samples(model: DenseModel) -> list[Sample]:
    return greedy_samples(model, 18, 12)


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def values(trainee: Trainee) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainee.parameters()]


def same(one: Trainee, other: Trainee) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


# Batches


@pytest.mark.parametrize("num_spec_tokens", [1, 3])
@pytest.mark.parametrize("spacing", [1, 2, 3, 7])
def test_blocks_and_labels(num_spec_tokens: int, spacing: int) -> None:
    """Each labelled row of each block against the layout, and every label of the answer where blocks are dense."""
    samples = random_samples([(1, 9), (4, 1), (3, 2), (6, 3), (2, 16)])
    batch = make_batch(samples, num_spec_tokens, spacing, noise(), CPU)
    length = max(len(s.prompt) + len(s.answer) for s in samples)
    assert batch.ids.shape == batch.next_ids.shape == (5, length)
    assert batch.labels.shape == (*batch.anchors.shape, num_spec_tokens)
    for b, sample in enumerate(samples):
        text, start = sample.prompt + sample.answer, len(sample.prompt)
        assert batch.ids[b].tolist() == text + [0] * (length - len(text))
        after = [text[t + 1] if start - 1 <= t < len(text) - 1 else -1 for t in range(length)]
        assert batch.next_ids[b].tolist() == after
        trained = []
        for anchor, labels in zip(batch.anchors[b].tolist(), batch.labels[b].tolist(), strict=True):
            if set(labels) == {-1}:
                continue
            trained.append(anchor)
            assert anchor >= start - 1
            want = [text[t] if t < len(text) else -1 for t in range(anchor + 2, anchor + 2 + num_spec_tokens)]
            assert labels == want
        first = range(start - 1, start - 1 + spacing)
        blocks = [list(range(anchor, len(text) - 2, spacing)) for anchor in first]
        assert trained in blocks, "every spacing-th clean row that has a label, from some offset on"


def test_offsets_are_random() -> None:
    samples = random_samples([(2, 20)] * 40)
    batch = make_batch(samples, 3, 3, noise(), CPU)
    assert set(batch.anchors[:, 0].tolist()) == {1, 2, 3}


def test_an_epoch_holds_each_usable_sample_once() -> None:
    lengths = [(1 + i % 5, 1 + i % 7) for i in range(100)]
    samples = random_samples(lengths)
    usable = [i for i, (_, answer) in enumerate(lengths) if answer >= 2]
    size = 3
    order = Order(samples, size, seed=1)
    per_epoch = math.ceil(len(usable) / size)
    epochs = [[order.batch(e * per_epoch + i) for i in range(per_epoch)] for e in range(3)]
    for epoch in epochs:
        assert Counter(i for batch in epoch for i in batch) == Counter(usable)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Order(samples, size, seed=1).batch(2 * per_epoch + 1) == epochs[2][1], "a function of the step alone"
    assert Order(samples, size, seed=2).batch(0) != epochs[0][0]


def test_each_step_has_its_own_noise(
    model: DenseModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def spy(chosen: Any, num_spec_tokens: int, spacing: int, generator: torch.Generator, device: torch.device) -> Any:
        seeds.append(generator.initial_seed())
        return make_batch(chosen, num_spec_tokens, spacing, generator, device)

    monkeypatch.setattr(module, "make_batch", spy)
    train(model, samples, [], SMALL, tmp_path / "run")
    assert len(set(seeds)) == SMALL.steps


def test_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match="no sample has an answer of two tokens"):
        Order(random_samples([(3, 1), (5, 1)]), 4, 0)


@pytest.mark.parametrize("loss_name", ["ce", "tv"])
@pytest.mark.parametrize("answers", [[1, 1], [2, 2], [1, 2, 3], [3]])
def test_the_shortest_answers(answers: list[int], loss_name: Any, model: DenseModel) -> None:
    """At an offset that leaves no label the loss is 0, not NaN, and so is the gradient."""
    samples = random_samples([(3, n) for n in answers])
    settings = dataclasses.replace(SMALL, loss=loss_name)
    trainee, vocabulary = Trainee.new(model, settings), Vocabulary(model, samples)
    unlabelled = 0
    for seed in range(12):
        batch = make_batch(samples, 3, 3, torch.Generator().manual_seed(seed), CPU)
        loss = loss_of(model, trainee, batch, vocabulary, settings)
        trainee.optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainee.parameters())
        unlabelled += bool((batch.labels < 0).all())
        assert (float(loss.detach()) == 0) == bool((batch.labels < 0).all())
    assert unlabelled > 0 or max(answers) > 2


# The loss


def test_the_loss_is_that_of_a_plain_loop(model: DenseModel, samples: list[Sample]) -> None:
    settings = dataclasses.replace(SMALL, rerank_width=0, hard=0.3, soft=0.9, offset_decay=0.6)
    trainee, vocabulary = Trainee.new(model, settings), Vocabulary(model, samples)
    batch = make_batch(samples[:3], 3, 2, noise(), CPU)
    found = float(loss_of(model, trainee, batch, vocabulary, settings).detach())
    known = vocabulary.ids.tolist()
    total = weights = 0.0
    with torch.no_grad():
        for b, sample in enumerate(samples[:3]):
            clean = model.clean(torch.tensor([sample.prompt + sample.answer]))
            for anchor, labels in zip(batch.anchors[b].tolist(), batch.labels[b].tolist(), strict=True):
                if labels[0] < 0:
                    continue
                anchors = torch.tensor([[anchor]])
                rows = model.masked(clean, anchors, 3, trainee.lora.mask_embedding, trainee.lora)[0, 0]
                for j, label in enumerate(labels):
                    if label < 0:
                        continue
                    log_p = F.linear(rows[j], model.head[vocabulary.ids]).log_softmax(0)
                    teacher = F.linear(clean.hidden[0, anchor + 1 + j], model.head[vocabulary.ids]).softmax(0)
                    loss = -0.3 * log_p[known.index(label)] - 0.9 * (teacher * log_p).sum()
                    total, weights = total + 0.6**j * float(loss), weights + 0.6**j
    assert found == pytest.approx(total / weights, rel=1e-4)


def test_noise_takes_the_place_of_the_vector(model: DenseModel, samples: list[Sample]) -> None:
    trainee, vocabulary = Trainee.new(model, SMALL), Vocabulary(model, samples)
    batch = make_batch(samples[:4], 3, 2, noise(), CPU)
    batch.noise = torch.full((4, batch.labels[0].numel()), 7)
    found = loss_of(model, trainee, batch, vocabulary, SMALL)
    found.backward()
    assert trainee.lora.mask_embedding.grad is None
    batch.noise = None
    with torch.no_grad():
        trainee.lora.mask_embedding.copy_(model.embedding[7])
        assert torch.equal(found, loss_of(model, trainee, batch, vocabulary, SMALL)), "one id: its embedding everywhere"


def test_a_run_draws_its_noise(model: DenseModel, samples: list[Sample], tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, noise_below=50)
    one, two = (train(model, samples, samples[:2], settings, tmp_path / name) for name in ("one", "two"))
    assert same(one, two)
    assert not same(one, train(model, samples, [], dataclasses.replace(settings, noise_below=9), tmp_path / "three"))
    assert torch.equal(one.lora.mask_embedding, Trainee.new(model, settings).lora.mask_embedding)


def with_random_head(model: DenseModel) -> Trainee:
    trainee = Trainee.new(model, SMALL)
    assert trainee.rerank is not None
    with torch.no_grad():
        for p in trainee.rerank.parameters():
            p.copy_(torch.randn(p.shape, generator=noise()) * 0.3)
    return trainee


def test_the_loss_of_the_head_is_that_of_a_plain_loop(model: DenseModel, samples: list[Sample]) -> None:
    known_ids = Sample([0], list(range(45)))
    trainee, vocabulary = with_random_head(model), Vocabulary(model, [*samples, known_ids])
    head = trainee.rerank
    assert head is not None and len(vocabulary.ids) > NUM_CANDIDATES, "candidates are a choice"
    batch = make_batch(samples[:5], 3, 2, noise(), CPU)
    together = float(loss_of(model, trainee, batch, vocabulary, SMALL).detach())
    alone = float(loss_of(model, Trainee(trainee.lora, None), batch, vocabulary, SMALL).detach())
    known = vocabulary.ids.tolist()
    losses = []
    skipped = 0
    with torch.no_grad():
        clean = model.clean(batch.ids)
        hidden = model.masked(clean, batch.anchors, 3, trainee.lora.mask_embedding, trainee.lora)
        for b, blocks in enumerate(batch.labels.tolist()):
            for block, labels in enumerate(blocks):
                anchor, state = int(batch.anchors[b, block]), None
                for j, label in enumerate(labels):
                    if label < 0:
                        break
                    before = model.embedding[batch.ids[b, anchor + 1 + j]]
                    query, state = head.query(hidden[b, block, j], before, state)
                    logits = model.head[vocabulary.ids] @ hidden[b, block, j]
                    places = logits.argsort(descending=True)[:NUM_CANDIDATES].tolist()
                    if known.index(label) not in places:
                        skipped += 1
                        continue
                    scores = torch.stack([logits[i] + model.head[known[i]] @ query for i in places])
                    losses.append(-float(scores.log_softmax(0)[places.index(known.index(label))]))
    assert losses and skipped, "both kinds of rows occur"
    assert together - alone == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_head_does_not_teach_the_adapter(model: DenseModel, samples: list[Sample]) -> None:
    vocabulary, batch = Vocabulary(model, samples), make_batch(samples[:4], 3, 2, noise(), CPU)
    gradients = []
    for trainee in (with_random_head(model), Trainee(Trainee.new(model, SMALL).lora, None)):
        loss_of(model, trainee, batch, vocabulary, SMALL).backward()
        gradients.append([p.grad for p in trainee.lora.parameters()])
        for p in [] if trainee.rerank is None else trainee.rerank.parameters():
            assert p.grad is not None and p.grad.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)
    assert all(weight.grad is None for weight in model.weights.values())


def test_total_variation_counts_plain_and_re_ranked_drafts(model: DenseModel, samples: list[Sample]) -> None:
    settings = dataclasses.replace(SMALL, loss="tv", hard=0.25, soft=0.75, offset_decay=0.6)
    trainee, vocabulary = with_random_head(model), Vocabulary(model, samples)
    assert trainee.rerank is not None
    batch = make_batch(samples[:3], 3, 2, noise(), CPU)
    found = float(loss_of(model, trainee, batch, vocabulary, settings).detach())
    head, total, weights = model.head[vocabulary.ids], 0.0, 0.0
    with torch.no_grad():
        clean = model.clean(batch.ids)
        hidden = model.masked(clean, batch.anchors, 3, trainee.lora.mask_embedding, trainee.lora)
        for b, block in itertools.product(range(3), range(batch.anchors.shape[1])):
            anchor, state = int(batch.anchors[b, block]), None
            for j, label in enumerate(batch.labels[b, block].tolist()):
                if label < 0:
                    break
                p = 0.75 * (head @ clean.hidden[b, anchor + 1 + j]).softmax(0)
                p[vocabulary.ids == label] += 0.25
                x = hidden[b, block, j]
                query, state = trainee.rerank.query(x, model.embedding[batch.ids[b, anchor + 1 + j]], state)
                far = [float((p - (head @ y).softmax(0)).abs().sum()) for y in (x, x + query)]
                total, weights = total + 0.6**j * sum(far), weights + 0.6**j
    assert found == pytest.approx(total / weights, rel=1e-4)


# Runs


def test_a_run_may_start_from_an_adapter(model: DenseModel, samples: list[Sample], tmp_path: Path) -> None:
    first = train(model, samples, [], SMALL, tmp_path / "first")
    export(tmp_path / "adapter", first, SMALL, PROVENANCE, 6, None, torch.float32)
    adapter = load_adapter(tmp_path / "adapter", model.config)
    settings = dataclasses.replace(SMALL, loss="tv", start="its hash")
    assert same(Trainee.new(model, settings, adapter), first)
    second = train(model, samples, [], settings, tmp_path / "second", start=adapter)
    assert not same(second, first)
    assert same(second, train(model, samples, [], settings, tmp_path / "again", start=adapter))


def test_total_variation_falls_from_a_start(trained: Trained, tmp_path: Path) -> None:
    """The mean over all steps of a run that begins where cross-entropy ended is below what it began with."""
    settings = dataclasses.replace(trained.settings, loss="tv", steps=20, learning_rate=3e-3, start="its hash")
    export(tmp_path / "adapter", trained.trainee, settings, PROVENANCE, 1, None, torch.float32)
    adapter = load_adapter(tmp_path / "adapter", trained.model.config)
    losses: list[float] = []
    train(
        trained.model,
        trained.samples,
        [],
        settings,
        tmp_path / "run",
        start=adapter,
        report=lambda trainee, step, loss, _: losses.append(loss),
    )
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 3, "alpha": 24.0}, r"its pair of q_proj in layer 0 has shape \[2, 32\], wanted \[3, 32\]"),
        ({"alpha": 4.0}, "14 pairs of scale 8, wanted 14 of scale 2"),
        ({"rerank_width": 4}, r"its re-ranking head has shape \[8, 32\], wanted \[4, 32\]"),
    ],
)
def test_a_start_that_does_not_fit_is_named(
    changes: dict[str, Any], reason: str, model: DenseModel, tmp_path: Path
) -> None:
    export(tmp_path / "adapter", Trainee.new(model, SMALL), SMALL, PROVENANCE, 1, None)
    adapter = load_adapter(tmp_path / "adapter", model.config)
    with pytest.raises(ValueError, match=f"adapter.* {reason}"):
        Trainee.new(model, dataclasses.replace(SMALL, **changes), adapter)


@pytest.mark.parametrize(("stride", "wanted"), [(2, [2]), (3, [2, 3]), (4, [2, 4]), (6, [2, 4, 6]), (8, [2, 4, 8])])
def test_a_curriculum_doubles_the_stride(
    stride: int,
    wanted: list[int],
    model: DenseModel,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In equal shares of the steps, as far as whole steps allow."""
    widths: list[int] = []

    def spy(chosen: Any, width: int, *more: Any) -> Any:
        widths.append(width)
        return make_batch(chosen, width, *more)

    monkeypatch.setattr(module, "make_batch", spy)
    settings = dataclasses.replace(SMALL, stride=stride, curriculum=True)
    train(model, samples, samples[:2], settings, tmp_path / "run")
    share = SMALL.steps // len(wanted)
    assert widths == [n - 1 for n in wanted for _ in range(share)]
    for steps in (1, 2, 7):
        few = dataclasses.replace(settings, steps=steps)
        found = [few.stride_at(step) for step in range(steps)]
        assert found == sorted(found) and set(found) <= set(wanted)


def test_total_variation_after_cross_entropy(
    model: DenseModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps: eight by the one, two by the other, each part with its own warm-up and fall."""
    settings = dataclasses.replace(SMALL, steps=10, loss="ce-tv", kl=0.01)
    rows: list[int] = []
    distance = module.total_variation
    monkeypatch.setattr(module, "total_variation", lambda *a: rows.append(len(rows)) or distance(*a))
    seen: list[int] = []
    train(model, samples, [], settings, tmp_path / "run", report=lambda trainee, step, *_: seen.append(len(rows)))
    assert seen == [0] * 8 + [2, 4], "adapter and head, on the last two steps"
    rates = [settings.rate(step) for step in range(10)]
    alone = dataclasses.replace(settings, loss="ce", steps=8)
    assert rates[:8] == [alone.rate(step) for step in range(8)]
    assert rates[8:] == [0.5e-2 * 1 / 2, 0.5e-2]
    assert [dataclasses.replace(settings, steps=n).first_tv_step for n in (1, 4, 10, 930)] == [0, 3, 8, 744]


def test_it_learns(trained: Trained) -> None:
    assert sum(trained.losses[-5:]) < 0.8 * sum(trained.losses[:5])
    untrained = Trainee.new(trained.model, trained.settings)
    before = Predictions.of(trained.model, untrained.lora, untrained.rerank, trained.held_out, 3)
    after = trained.predictions[-1]
    assert len(trained.predictions) == 2
    assert after.acceptance()[0] > before.acceptance()[0] + 0.2
    assert after.tpf(quadratic=True) > before.tpf(quadratic=True) + 0.2
    assert after.acceptance(reranked=True)[2] > after.acceptance()[2] + 0.1, "the head knows the token before"
    assert after.tpf(quadratic=True, reranked=True) > after.tpf(quadratic=True)


def test_the_same_seed_gives_the_same_adapter(model: DenseModel, samples: list[Sample], tmp_path: Path) -> None:
    one, two = (train(model, samples, [], SMALL, tmp_path / name) for name in ("one", "two"))
    assert same(one, two)
    other = train(model, samples, [], dataclasses.replace(SMALL, seed=1), tmp_path / "three")
    assert not same(one, other)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interruption_leaves_no_trace(stop: int, model: DenseModel, samples: list[Sample], tmp_path: Path) -> None:
    """Also one between two checkpoints, whose last steps are taken again."""
    calm = train(model, samples, [], SMALL, tmp_path / "calm")

    def interrupt(trainee: Trainee, step: int, loss: float, predictions: Predictions | None) -> None:
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, samples, [], SMALL, tmp_path / "cut", save_every=2, report=interrupt)
    assert (tmp_path / "cut").exists() == (stop >= 2)
    steps: list[int] = []
    again = train(model, samples, [], SMALL, tmp_path / "cut", report=lambda trainee, step, *_: steps.append(step))
    assert steps == list(range(stop // 2 * 2 + 1, 7))
    assert same(calm, again)
    calm_state, again_state = (load_file(tmp_path / name) for name in ("calm", "cut"))
    assert calm_state.keys() == again_state.keys()
    assert all(torch.equal(calm_state[name], again_state[name]) for name in calm_state)


def test_a_run_may_be_told_where_to_stop(model: DenseModel, samples: list[Sample], tmp_path: Path) -> None:
    calm = train(model, samples, [], SMALL, tmp_path / "calm")
    part = train(model, samples, [], SMALL, tmp_path / "run", until=4)
    assert not same(part, calm)
    assert same(part, train(model, samples, [], SMALL, tmp_path / "run", until=4)), "it is only loaded"
    assert same(calm, train(model, samples, [], SMALL, tmp_path / "run"))


def test_a_finished_run_is_only_loaded(model: DenseModel, samples: list[Sample], tmp_path: Path) -> None:
    done = train(model, samples, [], SMALL, tmp_path / "run")
    assert same(done, train(model, samples, [], SMALL, tmp_path / "run", report=lambda *_: pytest.fail("a step")))


def test_stride_two_has_no_state_to_carry(model: DenseModel, samples: list[Sample], tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, stride=2)
    calm = train(model, samples, [], settings, tmp_path / "calm")
    assert same(calm, train(model, samples, [], settings, tmp_path / "calm"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 3}, "rank 2 and not 3"),
        ({"seed": 9, "hard": 0.25}, "hard 0.5 and not 0.25, seed 0 and not 9"),
        ({"steps": 7}, "steps 6 and not 7"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], reason: str, model: DenseModel, samples: list[Sample], tmp_path: Path
) -> None:
    train(model, samples, [], SMALL, tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"run: from a run with other settings \\({reason}\\)"):
        train(model, samples, [], dataclasses.replace(SMALL, **changes), tmp_path / "run")


def test_other_data_and_models_are_refused(model: DenseModel, samples: list[Sample], tmp_path: Path) -> None:
    train(model, samples, [], SMALL, tmp_path / "run")
    with pytest.raises(CheckpointError, match="samples 18 and not 17"):
        train(model, samples[1:], [], SMALL, tmp_path / "run")
    wider = dense(MemoryCheckpoint(tiny_config(hidden_size=40)))
    with pytest.raises(CheckpointError, match=r"tensor 0 has shape \[32\], this model asks for \[40\]"):
        train(wider, samples, [], SMALL, tmp_path / "run")


def test_a_checkpoint_is_never_half_written(
    model: DenseModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, samples, [], SMALL, tmp_path / "run")
    before = (tmp_path / "run").read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", full)
    trainee = Trainee.new(model, SMALL)
    with pytest.raises(OSError, match="no space"):
        save_run(tmp_path / "run", 7, {}, trainee.parameters(), trainee.optimizer)
    assert (tmp_path / "run").read_bytes() == before


def test_a_model_with_a_mask_token_starts_from_it() -> None:
    model = dense(MemoryCheckpoint(tiny_config(mask_token_id=60)))
    assert torch.equal(Trainee.new(model, SMALL).lora.mask_embedding, model.embedding[60])
    model = dense(MemoryCheckpoint(tiny_config()))
    torch.testing.assert_close(Trainee.new(model, SMALL).lora.mask_embedding.detach(), model.embedding.mean(0))


# Settings


def test_rate() -> None:
    settings = TrainSettings(steps=100, warmup=10, learning_rate=2e-3)
    rates = [settings.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([2e-4 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2e-3) and rates[55] == pytest.approx(2e-3 * 0.505)
    assert rates[100] == pytest.approx(2e-5)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert TrainSettings(steps=1, warmup=0).rate(0) == 2e-3
    assert TrainSettings(steps=5, warmup=20).rate(4) == pytest.approx(2e-3 * 5 / 20)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 1), ("rank", 0), ("steps", 0), ("batch", 0), ("spacing", 0), ("warmup", -1), ("kl", -0.1)],
)
def test_settings_out_of_range(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, wanted at least"):
        TrainSettings(**{name: value})


def test_losses_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="loss is 'mse', wanted 'ce', 'tv' or 'ce-tv'"):
        TrainSettings(loss="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hard \+ soft is 1.25, wanted 1: total variation"):
        TrainSettings(loss="tv", hard=0.75)
    with pytest.raises(ValueError, match="noise_below is 1, wanted 0 or at least 2"):
        TrainSettings(noise_below=1)
