"""The learner: an adapter goes on learning from the traces of the texts it has drafted, in rounds.

A round takes what the traffic has left since the last one, trains, and has texts that were never trained on judge. What
is better becomes the next version; what is not is forgotten. A version is written in one piece, so whoever looks at the
folder finds whole ones, and a learner that was killed goes on from the last.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from idlm_kernels.learning.lessons import Lesson, Lessons, weight_of
from idlm_kernels.learning.traces import TraceReader
from idlm_kernels.model.adapter import Adapter, load_adapter
from idlm_kernels.model.mask_input import MaskInput
from idlm_kernels.training.acceptance import Predictions
from idlm_kernels.training.data import Sample
from idlm_kernels.training.dense import DenseModel
from idlm_kernels.training.export import Provenance, export, file_sha256
from idlm_kernels.training.lora import GatedLora
from idlm_kernels.training.train import Trainee, TrainSettings, train

_VERSION = re.compile(r"v(\d{6})")
_WORK = ".learner"  # of the output folder


@dataclass(frozen=True)
class LearnSettings:
    """How a learner learns.

    steps, batch, learning_rate: of the optimiser, in a round. rejected: weight of a token at which a draft was refused,
    where the others weigh 1. share_of_older: of the lessons, so that the traffic of before is not forgotten. recent,
    older: lessons that are kept; judges: held-out texts of each. max_tokens: of a text. min_new: new lessons that make
    a round. better: share by which a version has to commit more tokens per forward than the one before it, on the
    latest traffic; lost: share that it may commit less than the first adapter, on older traffic.
    """

    steps: int = 40
    batch: int = 8
    learning_rate: float = 1e-3
    rejected: float = 2.0
    share_of_older: float = 0.4
    recent: int = 64
    older: int = 512
    judges: int = 12
    max_tokens: int = 192
    min_new: int = 16
    better: float = 0.005
    lost: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "recent", "judges", "min_new"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1")
        if self.max_tokens < 16:
            raise ValueError(f"max_tokens is {self.max_tokens}, wanted at least 16")
        if not 0 <= self.share_of_older < 1:
            raise ValueError(f"share_of_older is {self.share_of_older}, wanted from 0 to below 1")
        if not self.learning_rate > 0 or not self.rejected >= 0:
            raise ValueError("learning_rate must be above 0, and rejected not below it")


@dataclass(frozen=True)
class Round:
    """What became of a round. lessons: new ones; tpf: tokens per forward of the latest held-out texts, with the parent
    and with what was learned; older: the same of older texts, and with the first adapter; version: its name, None where
    it was not better."""

    number: int
    lessons: int
    tpf: tuple[float, float]
    older: tuple[float, float, float] | None
    parent: str
    version: str | None


class Learner:
    """Learns in `output` from the traces in `traces`.

    adapter: the folder of the first one; versions in `output` come after it. base_name, base_sha256: for the record of
    a version. noise_below: of an adapter whose MASK rows embed ids drawn below it and that does not say so.

    Raises CheckpointError, FileNotFoundError as the readers of these folders do, ValueError for an adapter whose MASK
    rows embed neither a vector of its own nor such ids.
    """

    def __init__(
        self,
        base: DenseModel,
        traces: TraceReader,
        adapter: Path,
        output: Path,
        settings: LearnSettings,
        *,
        base_name: str = "",
        base_sha256: str = "",
        noise_below: int | None = None,
    ):
        self.base, self.settings, self._reader, self.output = base, settings, traces, output
        self._base_name, self._base_sha256 = base_name, base_sha256
        output.mkdir(parents=True, exist_ok=True)
        self._first = load_adapter(adapter, base.config)
        self._noise_below = _noise_below(self._first, base, noise_below)
        newest = max(versions(output), default=None)
        self._parent_folder = adapter if newest is None else output / newest
        self.parent = self._first if newest is None else load_adapter(self._parent_folder, base.config)
        self.lessons = Lessons(settings.recent, settings.older, settings.judges, settings.max_tokens)
        self._unlearned = self._rounds = 0

    def look(self) -> int:
        """Read what the traffic has left; the number of lessons that no round has seen yet."""
        self._unlearned += self.lessons.add(self._reader.new())
        return self._unlearned

    def round(self, report: Callable[[int, float], None] = lambda step, loss: None) -> Round | None:
        """Learn from what is there; None where that is too little. report(steps taken, loss) after each step."""
        settings, (latest, older) = self.settings, self.lessons.judges
        lessons = self.lessons.to_train_on(settings.share_of_older)
        if self._unlearned < settings.min_new or not lessons or not latest:
            return None
        new, self._unlearned = self._unlearned, 0
        self._rounds += 1
        training = self._training_settings()
        work = self.output / _WORK
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        trainee = train(
            self.base,
            [one.sample for one in lessons],
            [],
            training,
            work / "round.safetensors",
            start=self.parent,
            weigh=lambda indices, batch: weight_of([lessons[i] for i in indices], batch, settings.rejected),
            report=lambda _, step, loss, __: report(step, loss),
        )
        shutil.rmtree(work, ignore_errors=True)
        learned = self._judged(trainee, latest)
        tpf = self._tpf(self._judged(self.parent, latest)), self._tpf(learned)
        of_older = None
        if older:
            before, after, first = (self._tpf(self._judged(it, older)) for it in (self.parent, trainee, self._first))
            of_older = before, after, first
        parent, name = self._parent_folder.name, None
        is_better = tpf[1] >= tpf[0] * (1 + settings.better)
        if is_better and (of_older is None or of_older[1] >= of_older[2] * (1 - settings.lost)):
            name = self._write(trainee, training, learned, lessons)
        return Round(self._rounds, new, tpf, of_older, parent, name)

    def _training_settings(self) -> TrainSettings:
        parent, settings = self.parent, self.settings
        stride = 4 if parent.acceptance is None else len(parent.acceptance) + 1
        return TrainSettings(
            stride=stride,
            rank=parent.rank,
            alpha=parent.scale * parent.rank,
            steps=settings.steps,
            batch=settings.batch,
            learning_rate=settings.learning_rate,
            warmup=max(1, settings.steps // 10),
            loss="tv",
            kl=0.01,
            rerank_width=0 if parent.rerank_head is None else len(parent.rerank_head.from_hidden),
            noise_below=self._noise_below,
            seed=settings.seed + self._rounds,
            start=file_sha256(self._parent_folder),
        )

    def _judged(self, which: Trainee | Adapter, texts: list[Sample]) -> Predictions:
        training = self._training_settings()
        if isinstance(which, Trainee):
            lora, head = which.lora, which.rerank
        else:
            own = self.base.embedding.float().mean(0) if self.base.config.mask_token_id is None else self.base.own_mask
            lora, head = GatedLora.from_adapter(which, own), which.rerank_head
            if head is not None:
                head = head.to(self.base.device, own.float().dtype)
        return Predictions.of(self.base, lora, head, texts, training.num_spec_tokens, training.noise_below)

    @staticmethod
    def _tpf(predictions: Predictions) -> float:
        return predictions.tpf(quadratic=True, reranked=True)

    def _write(self, trainee: Trainee, training: TrainSettings, judged: Predictions, lessons: list[Lesson]) -> str:
        """The next version, whole or not at all."""
        newest = max(versions(self.output), default="v000000")
        name = f"v{int(newest[1:]) + 1:06d}"
        part = self.output / f".{name}"
        shutil.rmtree(part, ignore_errors=True)
        tokens = sum(len(one.sample.answer) for one in lessons)
        provenance = Provenance(self._base_name, self._base_sha256, len(lessons), tokens)
        history = {"parent": self._parent_folder.name, "learning": dataclasses.asdict(self.settings)}
        export(part, trainee, training, provenance, training.steps, judged, history=history)
        for file in part.iterdir():
            _sync(file)
        _sync(part)
        part.rename(self.output / name)
        _sync(self.output)
        self._parent_folder = self.output / name
        self.parent = load_adapter(self._parent_folder, self.base.config)
        return name


def _noise_below(adapter: Adapter, base: DenseModel, given: int | None) -> int:
    """0 where MASK rows embed a vector that is learned too."""
    said = adapter.mask_input
    if adapter.mask_embedding is not None:
        return 0
    if said is not None and said.kind == "uniform":
        return said.within(base.config).noise_below
    if given is None:
        raise ValueError(
            f"{adapter.name} has no MASK embedding of its own: say with --mask-token-id below which its MASK rows draw"
            " their ids (151669 for Qwen3), or start from an adapter of `idlm train-adapter`"
        )
    return MaskInput("uniform", given).within(base.config).noise_below


def versions(folder: Path) -> list[str]:
    """The versions in a folder, v000001 and so on, oldest first."""
    return sorted(entry.name for entry in folder.iterdir() if _VERSION.fullmatch(entry.name) and entry.is_dir())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
