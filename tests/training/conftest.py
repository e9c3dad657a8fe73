"""A tiny model that is converted from nothing, and an adapter that is trained on it as a frozen base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.convert import ConvertLoss, ConvertSettings, convert
from idlm_kernels.training.data import Sample
from idlm_kernels.training.dense import DenseModel
from idlm_kernels.training.train import Trainee, TrainSettings, train
from tests.tiny import MemoryCheckpoint, tiny_config
from tests.training.support import dense, greedy_samples, progressions


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Products of this size are slower on two threads, and their bits may depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Converted:
    """start: random weights. report: (step, stride, loss) of every step."""

    start: DenseModel
    model: DenseModel
    report: list[tuple[int, int, ConvertLoss]]


@pytest.fixture(scope="session")
def converted() -> Converted:
    start = dense(MemoryCheckpoint(tiny_config(vocab_size=48, mask_token_id=47), scale=0.1))
    settings = ConvertSettings(steps=100, batch=16, learning_rate=1e-2, warmup=5)
    report: list[tuple[int, int, ConvertLoss]] = []
    model = convert(start, progressions(1000, 0), settings, report=lambda _, *figures: report.append(figures))
    return Converted(start, model, report)


@dataclass
class Trained:
    """A base without a MASK token, and a training run on its greedy texts that was never interrupted."""

    checkpoint: MemoryCheckpoint
    model: DenseModel
    samples: list[Sample]
    held_out: list[Sample]
    settings: TrainSettings
    trainee: Trainee = field(init=False)
    losses: list[float] = field(default_factory=list)
    predictions: list[Predictions] = field(default_factory=list)


@pytest.fixture(scope="session")
def trained(converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    checkpoint = MemoryCheckpoint(dataclasses.replace(converted.model.config, mask_token_id=None))
    checkpoint.tensors = dict(converted.model.weights)
    model = dense(checkpoint)
    samples = greedy_samples(model, 120, 24)
    settings = TrainSettings(rank=4, alpha=4.0, steps=40, batch=12, learning_rate=1e-2, warmup=3, rerank_width=16)
    run = Trained(checkpoint, model, samples[20:], samples[:20], settings)

    def report(trainee: Trainee, step: int, loss: float, predictions: Predictions | None) -> None:
        run.losses.append(loss)
        run.predictions += [predictions] if predictions else []

    path = tmp_path_factory.mktemp("run") / "checkpoint"
    run.trainee = train(model, run.samples, run.held_out, settings, path, evaluate_every=20, report=report)
    return run
