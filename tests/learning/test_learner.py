"""The learner: what it learns from, that it learns, and that only what is better becomes a version."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from idlm_kernels.learning.learner import Learner, LearnSettings, versions
from idlm_kernels.learning.lessons import HELD_OUT, Lesson, Lessons, weight_of
from idlm_kernels.learning.traces import Cycle, Trace, TraceReader, TraceWriter
from idlm_kernels.model import load_adapter
from idlm_kernels.model.errors import CheckpointError
from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.data import Sample
from idlm_kernels.training.dense import DenseModel
from idlm_kernels.training.export import export
from idlm_kernels.training.train import Batch, Trainee, TrainSettings, Vocabulary, loss_of, make_batch
from tests.tiny import MemoryCheckpoint, tiny_config
from tests.training.support import CPU, PROVENANCE, dense, greedy_samples

SETTINGS = LearnSettings(steps=60, batch=8, learning_rate=1e-2, min_new=8, max_tokens=32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base() -> DenseModel:
    return dense(MemoryCheckpoint(tiny_config(), seed=2, scale=0.1))


@pytest.fixture(scope="module")
def texts(base: DenseModel) -> list[Trace]:
    """Greedy answers of the base, as a server would have left them: every first draft was refused."""
    return [trace_of(sample) for sample in greedy_samples(base, 80, 14)]


def trace_of(sample: Sample) -> Trace:
    cycles = [Cycle(i, (0, 0, 0), 0, 1) for i in range(1, len(sample.answer))]
    return Trace(tuple(sample.prompt), tuple(sample.answer), tuple(cycles), ("first",), "length")


@pytest.fixture
def first(tmp_path: Path, base: DenseModel) -> Path:
    """An adapter of random numbers, which drafts badly."""
    settings = TrainSettings(rank=2, alpha=2.0, rerank_width=8)
    trainee = Trainee.new(base, settings)
    with torch.no_grad():
        for _, b in trainee.lora.pairs.values():
            b.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
    predictions = Predictions.of(base, trainee.lora, trainee.rerank, greedy_samples(base, 2, 8), 3)
    export(tmp_path / "first", trainee, settings, PROVENANCE, 0, predictions)
    return tmp_path / "first"


def learner(base: DenseModel, first: Path, settings: LearnSettings = SETTINGS) -> Learner:
    folder = first.parent
    reader = TraceReader(folder / "traces", "model", base.config.vocab_size)
    return Learner(base, reader, first, folder / "out", settings)


def leave(first: Path, traces: list[Trace]) -> None:
    with TraceWriter(first.parent / "traces", "model", 61) as writer:
        for trace in traces:
            writer.write(trace)


# Lessons


def test_a_lesson_is_the_text_and_where_drafts_failed() -> None:
    cycles = (Cycle(1, (6, 0, 0), 1, 1), Cycle(3, (8, 9, 4), 3, 1), Cycle(6, (0,), 0, 1))
    trace = Trace((1, 2), (5, 6, 7, 8, 9, 4, 3), cycles, ("a",), "stop")
    lesson = Lesson.of(trace, 32)
    assert lesson is not None and lesson.sample == Sample([1, 2], [5, 6, 7, 8, 9, 4, 3]) and lesson.rejected == (2, 6)
    redacted = Lesson.of(Trace((), trace.answer, cycles, ("a",), "stop"), 32)
    assert redacted is not None and redacted.sample == Sample([5], [6, 7, 8, 9, 4, 3]) and redacted.rejected == (1, 5)
    assert Lesson.of(Trace((1,), (5, 6, 7), (), (), "stop"), 32) is None
    long = Lesson.of(
        Trace(tuple(range(50)), tuple(range(50)), (Cycle(3, (9,), 0, 1), Cycle(30, (9,), 0, 1)), ("a",), "stop"), 20
    )
    assert long is not None and long.sample == Sample(list(range(40, 50)), list(range(10))) and long.rejected == (3,)


def test_memory_is_bounded_and_what_judges_is_never_trained_on() -> None:
    rng = random.Random(0)
    traces = [Trace((i % 60, i // 60), tuple(rng.randrange(60) for _ in range(8)), (), (), "stop") for i in range(900)]
    lessons = Lessons(20, 30, 5, 32)
    assert lessons.add(traces) == lessons.count == 900
    trained, (latest, older) = lessons.to_train_on(0.5), lessons.judges
    assert (len(trained), len(latest), len(older)) == (40, 5, 5)
    assert not any(one.is_held_out for one in trained)
    texts = [Lesson.of(trace, 32) for trace in traces]
    judges = [one.sample for one in texts if one is not None and one.is_held_out]
    assert latest == judges[-5:] and all(one in judges[:-5] for one in older)
    assert 900 / HELD_OUT * 0.7 < len(judges) < 900 / HELD_OUT * 1.4
    again = Lessons(20, 30, 5, 32)
    for trace in traces:  # one by one, as another process may read them
        again.add([trace])
    assert again.to_train_on(0.5) == trained and again.judges == (latest, older)
    assert len(lessons.to_train_on(0.0)) == 20


def test_refused_tokens_weigh_more(base: DenseModel) -> None:
    lessons = [
        Lesson(Sample([1, 2, 3], list(range(10, 20))), (2, 5), 1),
        Lesson(Sample([4], list(range(20, 26))), (), 2),
    ]
    batch = make_batch([one.sample for one in lessons], 3, 1, torch.Generator().manual_seed(0), CPU)
    weight = weight_of(lessons, batch, 4.0)
    assert weight.shape == batch.labels.shape
    heavy = {int(token) for token in batch.labels[weight == 4.0]}
    assert heavy == {12, 15} and set(weight.unique().tolist()) == {1.0, 4.0}
    assert bool((weight[1] == 1.0).all())


@pytest.mark.parametrize("loss", ["ce", "tv"])
def test_weights_count_in_the_loss(base: DenseModel, loss: str) -> None:
    """A weight of nothing takes a label out; equal weights change nothing, to the bit."""
    settings = TrainSettings(rank=2, rerank_width=0, loss=loss)  # type: ignore[arg-type]
    samples = greedy_samples(base, 4, 10)
    trainee, vocabulary = Trainee.new(base, settings), Vocabulary(base, samples)

    def value(change: object) -> float:
        batch = make_batch(samples, 3, 2, torch.Generator().manual_seed(0), CPU)
        if callable(change):
            change(batch)
        return float(loss_of(base, trainee, batch, vocabulary, settings).detach())

    def equal(batch: Batch) -> None:
        batch.weight = torch.ones(batch.labels.shape)

    def without_the_last(batch: Batch) -> None:
        batch.weight = torch.ones(batch.labels.shape)
        batch.weight[:, :, 2] = 0.0

    def cut(batch: Batch) -> None:
        batch.labels[:, :, 2] = -1

    assert value(None) == value(equal)
    assert value(without_the_last) == pytest.approx(value(cut), rel=1e-5) != pytest.approx(value(None), rel=1e-5)


# Rounds


def test_it_learns_and_the_server_takes_what_it_writes(base: DenseModel, first: Path, texts: list[Trace]) -> None:
    leave(first, texts)
    it = learner(base, first)
    assert it.look() == len(texts) == 80
    steps: list[int] = []
    done = it.round(lambda step, loss: steps.append(step))
    assert done is not None and steps == list(range(1, 61))
    assert done.version == "v000001" and done.parent == "first" and done.lessons == 80
    assert done.tpf[1] > done.tpf[0] * 1.05
    out = first.parent / "out"
    assert versions(out) == ["v000001"] and sorted(p.name for p in out.iterdir()) == ["v000001"]
    record = json.loads((out / "v000001" / "idlm_training.json").read_text())
    assert record["parent"] == "first" and record["learning"]["steps"] == 60 and len(record["acceptance"]) == 3
    old, new = load_adapter(first, base.config), load_adapter(out / "v000001", base.config)
    assert (new.rank, new.scale, new.pairs.keys()) == (old.rank, old.scale, old.pairs.keys())
    assert it.round() is None  # nothing new
    leave(first, texts[:40])
    assert learner(base, first).parent.name == "v000001"  # who comes after goes on from there


def test_what_is_not_better_is_forgotten(base: DenseModel, first: Path, texts: list[Trace]) -> None:
    leave(first, texts)
    it = learner(base, first, LearnSettings(steps=1, learning_rate=1e-12, min_new=1, max_tokens=32))
    it.look()
    done = it.round()
    assert done is not None and done.version is None and versions(first.parent / "out") == []
    assert it.parent.name == "first"


def test_what_loses_older_traffic_is_forgotten(base: DenseModel, first: Path, texts: list[Trace]) -> None:
    """However good it is on the latest: with a bound that nothing keeps, nothing is written."""
    leave(first, texts)
    strict = LearnSettings(steps=60, batch=8, learning_rate=1e-2, min_new=1, max_tokens=32, judges=3, lost=-9.0)
    it = learner(base, first, strict)
    it.look()
    done = it.round()
    assert done is not None and done.older is not None and done.version is None


def test_a_round_that_was_killed_leaves_no_version(
    base: DenseModel, first: Path, texts: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    from idlm_kernels.learning import learner as module

    leave(first, texts)
    it = learner(base, first)
    it.look()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_sync", killed)  # between writing and naming
        with pytest.raises(KeyboardInterrupt):
            it.round()
    assert versions(first.parent / "out") == []
    after = learner(base, first)
    after.look()
    done = after.round()
    assert done is not None and done.version == "v000001"
    assert [p.name for p in (first.parent / "out").iterdir()] == ["v000001"]


def test_foreign_traces_are_refused(base: DenseModel, first: Path) -> None:
    with TraceWriter(first.parent / "traces", "another model", 61) as writer:
        writer.write(Trace((1,), (2, 3, 4, 5, 6), (), (), "stop"))
    with pytest.raises(CheckpointError, match="another model"):
        learner(base, first).look()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"steps": 0}, "steps is 0"), ({"max_tokens": 3}, "max_tokens is 3"), ({"share_of_older": 1.0}, "share_of_older")],
)
def test_settings_that_make_no_sense(change: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LearnSettings(**change)  # type: ignore[arg-type]
