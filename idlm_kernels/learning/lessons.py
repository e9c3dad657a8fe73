"""What a learner keeps of the traffic: the latest texts, a fair sample of older ones, and a slice that judges."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from idlm_kernels.learning.traces import Trace
from idlm_kernels.training.data import Sample
from idlm_kernels.training.train import Batch

HELD_OUT = 8  # one text of so many judges and is never trained on
_MIN_ANSWER = 4  # tokens: shorter ones hold nothing to draft
_ROOM = 0.5  # of a lesson's tokens that its answer has at least


@dataclass(frozen=True)
class Lesson:
    """A text and the indices in its answer at which a draft was refused."""

    sample: Sample
    rejected: tuple[int, ...]
    order: int  # a hash of the text: the same in every process

    @classmethod
    def of(cls, trace: Trace, max_tokens: int) -> Lesson | None:
        """None for a text that is too short. Of a long one the end of the prompt and the start of the answer, at most
        max_tokens. A redacted prompt is replaced by the answer's first token."""
        prompt, answer, rejected = list(trace.prompt), list(trace.answer), trace.rejected()
        if not prompt:
            prompt, answer, rejected = answer[:1], answer[1:], [i - 1 for i in rejected if i > 0]
        if len(answer) < _MIN_ANSWER:
            return None
        answer = answer[: max(int(max_tokens * _ROOM), max_tokens - len(prompt))]
        prompt = prompt[-max(1, max_tokens - len(answer)) :]
        text = ",".join(map(str, (*trace.prompt, -1, *trace.answer))).encode()
        order = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        return cls(Sample(prompt, answer), tuple(i for i in rejected if i < len(answer)), order)

    @property
    def is_held_out(self) -> bool:
        return self.order % HELD_OUT == 0


@dataclass
class _Pool:
    """The latest lessons, and of those before them the ones of least hash: a sample that any reader of the same
    traces draws again."""

    num_recent: int
    num_older: int
    recent: deque[Lesson] = field(default_factory=deque)
    older: list[Lesson] = field(default_factory=list)

    def add(self, lesson: Lesson) -> None:
        self.recent.append(lesson)
        if len(self.recent) > self.num_recent:
            self.older.append(self.recent.popleft())
            if len(self.older) > self.num_older:
                self.older.remove(max(self.older, key=lambda one: one.order))


class Lessons:
    """The traffic as a learner remembers it, in bounded memory.

    num_recent, num_older: lessons to train on; num_judges: texts of the held-out slice, of the latest and of the older
    traffic each. max_tokens: of a lesson, prompt and answer together.
    """

    def __init__(self, num_recent: int, num_older: int, num_judges: int, max_tokens: int):
        self._max_tokens = max_tokens
        self._train, self._judges = _Pool(num_recent, num_older), _Pool(num_judges, num_judges)
        self.count = 0  # lessons that were ever added

    def add(self, traces: Iterable[Trace]) -> int:
        """How many of the traces are lessons."""
        before = self.count
        for trace in traces:
            if (lesson := Lesson.of(trace, self._max_tokens)) is not None:
                (self._judges if lesson.is_held_out else self._train).add(lesson)
                self.count += 1
        return self.count - before

    def to_train_on(self, share_of_older: float) -> list[Lesson]:
        """The latest ones, and older ones up to a share of all."""
        recent, older = list(self._train.recent), self._train.older
        wanted = round(len(recent) * share_of_older / (1 - share_of_older))
        return recent + sorted(older, key=lambda one: one.order)[:wanted]

    @property
    def judges(self) -> tuple[list[Sample], list[Sample]]:
        """Held-out texts: the latest, and older ones."""
        return [one.sample for one in self._judges.recent], [one.sample for one in self._judges.older]


def weight_of(lessons: Sequence[Lesson], batch: Batch, rejected: float) -> Tensor:
    """The weight fp32 [B, A, K] of what MASK rows predict: `rejected` where a draft was refused, else 1."""
    count, width = batch.labels.shape[2], batch.ids.shape[1] + batch.labels.shape[2] + 2
    flags = torch.zeros(len(lessons), width, device=batch.ids.device)
    for row, lesson in zip(flags, lessons, strict=True):
        row[[len(lesson.sample.prompt) + i for i in lesson.rejected]] = 1.0
    at = batch.anchors.unsqueeze(2) + 2 + torch.arange(count, device=batch.ids.device)
    refused = flags.gather(1, at.flatten(1)).view(batch.labels.shape)
    return 1.0 + (rejected - 1.0) * refused
