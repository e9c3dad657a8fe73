"""A conversation with a model: what was said, and one answer after the other from one engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from idlm_kernels.generate import Engine, GenerationResult, SamplingParams, StreamEvent
from idlm_kernels.generate.engine import Request
from idlm_kernels.generate.params import draw_seed, mixed_seed
from idlm_kernels.model import Tokenizer


@dataclass
class Totals:
    """Of all answers."""

    answers: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0

    def add(self, result: GenerationResult) -> None:
        self.answers += 1
        self.tokens += result.tokens
        self.forwards += result.forwards
        self.seconds += result.tokens / result.tokens_per_second if result.tokens_per_second else 0.0


@dataclass
class Conversation:
    """Messages, and the engine that answers them.

    params: of each answer. With a seed, answer i has it mixed with i, so that the same messages get the same answers;
    without one each answer draws its own. dropped: messages that had to be left out for want of context, so far.
    """

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    dropped: int = 0
    last: GenerationResult | None = None
    totals: Totals = field(default_factory=Totals)
    _answers: int = 0  # since the conversation began
    _request: Request | None = None

    def reset(self) -> None:
        """Forget what was said; the system message and the totals stay."""
        self.messages.clear()
        self.dropped = self._answers = 0

    def ask(self, message: str) -> None:
        """Have a message answered. ValueError, with nothing said, where it is too long or the template refuses it."""
        messages = [*self.messages, {"role": "user", "content": message}]
        context = self.engine.options.max_model_len
        room = min(self.params.max_tokens, context // 4)
        ids = self._encoded(messages)
        while len(ids) > context - room and len(messages) > 2:
            messages = messages[2:]  # a message and its answer
            ids = self._encoded(messages)
        seed = draw_seed() if self.params.seed is None else mixed_seed(self.params.seed, self._answers)
        self._request = self.engine.submit(ids, self.params, seed)
        self.dropped += len(self.messages) + 1 - len(messages)
        self.messages = messages

    def steps(self) -> Iterator[StreamEvent | None]:
        """Run what was asked. None stands for a part of a long prompt, so that a caller can stop between two."""
        assert self._request is not None
        while not self._request.ended:
            for _, event in self.engine.window():
                yield event
            yield None

    def finish(self) -> str:
        """End the answer, here where it has not ended, and keep it. Returns the text that no event had: what was held
        back as the possible start of a stop string or of a character."""
        request, self._request = self._request, None
        assert request is not None
        shown = len(request.output.result("", 0).text)
        self.engine.cancel(request)
        result = request.output.result(self.engine.options.plan, 0)
        if result.text and result.error is None:
            self.messages.append({"role": "assistant", "content": result.text})
        else:
            self.messages.pop()  # as if it had not been asked
        self._answers += 1
        self.last = result
        self.totals.add(result)
        return result.text[shown:]

    def _encoded(self, messages: list[dict[str, str]]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = self.tokenizer.apply_chat_template([*system, *messages])
        return self.tokenizer.encode(text, add_special_tokens=False)
