"""The host's side of a request: its text as it grows, stop strings, and the figures of the decode."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from idlm_kernels._deprecated import warn_renamed
from idlm_kernels.generate.params import SamplingParams
from idlm_kernels.generate.state import FAILED, LENGTH, RUNNING, STOPPED
from idlm_kernels.model.tokenizer import Detokenizer, Tokenizer
from python_ref.contract import HISTORY_DRAFTS, MASK_DRAFTS, SUFFIX_DRAFTS

SOURCES = {MASK_DRAFTS: "mask", SUFFIX_DRAFTS: "suffix", HISTORY_DRAFTS: "history"}
_REASONS = {STOPPED: "stop", LENGTH: "length", FAILED: "error"}
_LOGPROB = struct.Struct("d")


@dataclass(frozen=True)
class StreamEvent:
    """Text that became certain (possibly empty) and the tokens committed by one step.

    num_drafted: so many of the tokens, the first ones, were drafts that the step accepted. drafted_chars: the length of
    the text, from its start, that is theirs.
    """

    text: str
    token_ids: list[int]
    num_drafted: int = 0
    drafted_chars: int = 0


@dataclass(frozen=True)
class GenerationResult:
    """A finished (or interrupted) request.

    text: without special tokens and without the stop string. token_ids: committed tokens, the end token included.
    tokens: their number. forwards: decode steps that committed them, the one that rode on the prefill included. tpf:
    tokens / forwards. acceptance[j]: share of the verified drafts at index j that were accepted, given that all before
    were; None where none was verified. acceptance_by_source: the same over all indices, for "mask", "suffix" and
    "history" drafts.
    tokens_per_second: prefill time included. finish_reason: "stop" (end token, stop id or stop string), "length",
    "cancelled" or "error" (then `error` says what happened). seed: the 64-bit seed in use. error_flags: bits of
    `verify_accept` seen on the way (0 is clean). logprobs: of the tokens under the model's own distribution (before
    penalties, temperature and truncation), if DecodeOptions.logprobs asks for them. top_logprobs: of each token the
    likeliest ids with theirs, if SamplingParams.logprobs asks for some, and the token itself. prompt_token_ids, prompt:
    what was answered, the text if it was given as text.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    tokens: int
    forwards: int
    tpf: float
    acceptance: list[float | None]
    tokens_per_second: float
    finish_reason: str
    seed: int
    plan: str
    stride: int
    error_flags: int
    acceptance_by_source: dict[str, float]
    logprobs: list[float] | None
    error: str | None
    top_logprobs: list[dict[int, float]] | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt: str | None = None

    @property
    def status(self) -> int:
        """The old name of error_flags."""
        warn_renamed("GenerationResult.", "status", "error_flags")
        return self.error_flags

    @property
    def outputs(self) -> list[GenerationResult]:
        """The completions of the prompt: this one alone. It is where programs written for other engines look."""
        return [self]

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the logprobs, where they were asked for."""
        return None if self.logprobs is None else sum(self.logprobs)

    @property
    def finished(self) -> bool:
        """Whether the text ended by itself or at its limit, and was not cut off."""
        return self.finish_reason in ("stop", "length")


class RequestOutput:
    """Collects the steps of one request. Nothing after a stop is kept or counted."""

    def __init__(
        self,
        prompt_tokens: int,
        params: SamplingParams,
        seed: int,
        tokenizer: Tokenizer | None,
        num_drafts: int,
        logprobs: bool = False,
    ):
        self.params, self.seed, self.prompt_tokens = params, seed, prompt_tokens
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.fault: Exception | None = None  # what ended the request, where that was not the request's own
        self.logprobs: list[float] | None = [] if logprobs else None
        self.top_logprobs: list[dict[int, float]] | None = [] if logprobs and params.logprobs else None
        self.error_flags = 0
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._text: list[str] = []
        self._held = ""  # the end of the text, while it may be the start of a stop string
        self._forwards = 0
        self._verified = [0] * num_drafts
        self._accepted = [0] * num_drafts
        self._by_source = {source: [0, 0] for source in SOURCES}  # verified, accepted
        self._started = self._last = time.perf_counter()

    def read(self, row: Sequence[int], stride: int) -> StreamEvent:
        """Take a row of the outcome of a step."""
        num_drafts, num_accepted, emitted, finish_reason, error_flags, source, *rest = row
        self.error_flags |= error_flags
        event = self.take(rest[:emitted], num_drafts, num_accepted, finish_reason, source)
        if self.logprobs is not None:
            self.logprobs += map(_logprob, rest[stride : stride + len(event.token_ids)])
        if self.top_logprobs is not None:
            self._take_lists(event.token_ids, rest[2 * stride :], stride)
        return event

    def _take_lists(self, tokens: Sequence[int], columns: Sequence[int], stride: int) -> None:
        """Of each token `count` ids, and then of each the bits of their logprobs."""
        assert self.top_logprobs is not None and self.logprobs is not None and self.params.logprobs is not None
        count = len(columns) // (2 * stride)
        for i, (token, own) in enumerate(zip(tokens, self.logprobs[len(self.top_logprobs) :], strict=True)):
            ids, bits = (columns[(part * stride + i) * count :][: min(count, self.params.logprobs)] for part in (0, 1))
            self.top_logprobs.append({**dict(zip(ids, map(_logprob, bits), strict=True)), token: own})

    def take(
        self, tokens: Sequence[int], num_drafts: int, num_accepted: int, finish_reason: int, source: int = 0
    ) -> StreamEvent:
        """Take the tokens that a step committed; returns what can be shown. Sets finish_reason at the end."""
        kept: list[int] = []
        shown, drafted_chars = "", 0
        for token in tokens:
            kept.append(token)
            shown += self._push([token])
            if len(kept) <= num_accepted:
                drafted_chars = len(shown)
            if self.finish_reason is not None:  # a stop string ended with this token
                break
        if self.finish_reason is None and finish_reason != RUNNING:
            shown += self._flush()  # which may complete a stop string
            if len(kept) <= num_accepted:
                drafted_chars = len(shown)
            if self.finish_reason is None or finish_reason == FAILED:
                self.finish_reason = _REASONS[finish_reason]
            if finish_reason == FAILED:
                self.error = "the model gave NaN, or no finite logit"
        self.token_ids += kept
        self._forwards += bool(kept)
        for j in range(min(num_drafts, num_accepted + 1, len(kept))):
            self._verified[j] += 1
            self._accepted[j] += j < num_accepted
            if source in self._by_source:
                self._by_source[source][0] += 1
                self._by_source[source][1] += j < num_accepted
        self._last = time.perf_counter()
        self._text.append(shown)
        return StreamEvent(shown, kept, min(num_accepted, len(kept)), drafted_chars)

    def cancel(self) -> None:
        """End an unfinished request here; text that was held back for a stop string is its text after all."""
        if self.finish_reason is None:
            self._text.append(self._flush())
            self.finish_reason = "cancelled"  # also where what was held back completes a stop string

    def fail(self, error: str, fault: Exception | None = None) -> None:
        """End an unfinished request with an error; its text so far stays. fault: of the machine, not of the request."""
        if self.finish_reason is None:
            self._text.append(self._flush())
            self.finish_reason, self.error, self.fault = "error", error, fault

    def _push(self, tokens: Sequence[int]) -> str:
        return "" if self._detokenizer is None else self._release(self._detokenizer.push(tokens))

    def _flush(self) -> str:
        if self._detokenizer is None:
            return ""
        text = self._release(self._detokenizer.flush())
        text, self._held = text + self._held, ""
        return text

    def _release(self, piece: str) -> str:
        """What of the held text and `piece` no stop string can claim any more."""
        text = self._held + piece
        found = [i for i in (text.find(s) for s in self.params.stop) if i >= 0]
        if found:
            self.finish_reason, self._held = "stop", ""
            return text[: min(found)]
        hold = max((_overlap(text, s) for s in self.params.stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def result(self, plan: str, stride: int) -> GenerationResult:
        count, forwards, seconds = len(self.token_ids), self._forwards, self._last - self._started
        shares = zip(self._accepted, self._verified, strict=True)
        return GenerationResult(
            text="".join(self._text),
            token_ids=list(self.token_ids),
            prompt_tokens=self.prompt_tokens,
            tokens=count,
            forwards=forwards,
            tpf=count / forwards if forwards else 0.0,
            acceptance=[a / v if v else None for a, v in shares],
            tokens_per_second=count / seconds if seconds > 0 else 0.0,
            finish_reason=self.finish_reason or "cancelled",
            seed=self.seed,
            plan=plan,
            stride=stride,
            error_flags=self.error_flags,
            acceptance_by_source={SOURCES[s]: a / v for s, (v, a) in self._by_source.items() if v},
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            error=self.error,
        )


def _logprob(bits: int) -> float:
    """The number whose bits an outcome holds."""
    value: float = _LOGPROB.unpack(bits.to_bytes(8, sys.byteorder, signed=True))[0]
    return value


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a proper start of stop."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
