"""Updates of a call as OpenAI's objects: whole answers, and the chunks of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

import anyio
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from idlm_kernels.generate.output import GenerationResult, StreamEvent
from idlm_kernels.model.tokenizer import Detokenizer, Tokenizer
from idlm_kernels.serve.errors import error_body, response_to
from idlm_kernels.serve.protocol import StreamOptions
from idlm_kernels.serve.worker import Call, RequestFailed, ServerStops, Update, Worker

Kind = Literal["text_completion", "chat.completion"]
_PREFIX = {"text_completion": "cmpl-", "chat.completion": "chatcmpl-"}
_SEND_SECONDS = 60.0  # in which a client takes a chunk; one that reads nothing for so long is as good as gone


@dataclass
class _Text:
    """A choice as it grows."""

    parts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    result: GenerationResult | None = None


class Answer:
    """Makes the objects that answer a call.

    seed: the one in use; choice i mixes it with i. logprobs: report those of the tokens, and of so
    many of the likeliest. stream: what chunks hold
    besides. copies: how many choices each prompt has, whose tokens are counted once in `usage`.
    """

    def __init__(
        self,
        kind: Kind,
        model: str,
        call: Call,
        tokenizer: Tokenizer,
        *,
        seed: int,
        logprobs: int | None,
        stream: StreamOptions | None = None,
        copies: int = 1,
    ):
        self.call, self._kind, self._tokenizer, self._wants_logprobs = call, kind, tokenizer, logprobs is not None
        self._num_listed = logprobs or 0
        self._stream, self._copies = stream or StreamOptions(), copies
        self._head = {"id": _PREFIX[kind] + uuid4().hex, "created": int(time.time()), "model": model, "seed": seed}
        self._results: dict[int, GenerationResult] = {}
        self._shown = [Detokenizer(tokenizer) for _ in call.choices]  # for the offsets of tokens
        self._offsets = [0] * len(call.choices)

    async def whole(self) -> dict[str, Any]:
        """The answer once all of it is there."""
        texts = [_Text() for _ in self.call.choices]
        async for update in self.call:
            text = texts[update.choice]
            text.parts.append(update.event.text)
            if self._wants_logprobs:
                text.logprobs += self._logprobs(update)
            if update.result is not None:
                self._results[update.choice] = text.result = update.result
        choices = []
        for index, text in enumerate(texts):
            assert text.result is not None
            joined = "".join(text.parts)
            choice: dict[str, Any] = {"index": index, "finish_reason": text.result.finish_reason}
            if self._kind == "chat.completion":
                choice["message"] = {"role": "assistant", "content": joined, "refusal": None}
            else:
                choice["text"] = joined
            choice["logprobs"] = self._logprobs_object(text.logprobs) if self._wants_logprobs else None
            choices.append(choice)
        return {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[str]:
        """The same as server-sent events. A fault in the middle is an event of its own, and then nothing follows."""
        is_chat = self._kind == "chat.completion"
        if is_chat:
            for index in range(len(self.call.choices)):
                yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)
        try:
            async for update in self.call:
                logprobs = self._logprobs(update) if self._wants_logprobs else []
                reason = None
                if update.result is not None:
                    self._results[update.choice], reason = update.result, update.result.finish_reason
                event = update.event
                forward = _forward(event) if self._stream.include_forwards and event.token_ids else None
                if not (event.text or logprobs or reason or forward):
                    continue
                delta = {"content": event.text} if event.text or not is_chat else {}
                yield self._chunk(update.choice, delta, logprobs or None, reason, forward)
        except (RequestFailed, ServerStops) as error:
            status = response_to(error).status_code
            code = "server_stops" if isinstance(error, ServerStops) else "decode_failed"
            yield _event(error_body(status, str(error), code=code))
            return
        if self._stream.include_usage:
            yield _event({**self._stream_head(), "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _stream_head(self) -> dict[str, Any]:
        suffix = ".chunk" if self._kind == "chat.completion" else ""
        return {**self._head, "object": self._kind + suffix}

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: Sequence[dict[str, Any]] | None,
        reason: str | None,
        forward: dict[str, Any] | None = None,
    ) -> str:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason}
        choice["logprobs"] = None if logprobs is None else self._logprobs_object(logprobs)
        if self._kind == "chat.completion":
            choice["delta"] = delta
        else:
            choice["text"] = delta["content"]
        chunk = {**self._stream_head(), "choices": [choice]}
        if self._stream.include_usage:
            chunk["usage"] = None
        if forward is not None:
            chunk["forward"] = forward
        return _event(chunk)

    def _logprobs(self, update: Update) -> list[dict[str, Any]]:
        """One entry for each token of an update."""
        entries = []
        for i, (token, logprob) in enumerate(zip(update.event.token_ids, update.logprobs, strict=True)):
            entry = self._spelled(token, logprob)
            text = entry["token"]
            before = self._offsets[update.choice]
            after = before + len(self._shown[update.choice].push([token]))
            self._offsets[update.choice] = after
            # What a token makes certain may begin with characters that earlier tokens left open.
            offset = max(before, after - len(text))
            listed = [self._spelled(*one) for one in list(update.top_logprobs[i].items())] if self._num_listed else []
            entries.append({**entry, "offset": offset, "listed": listed})
        return entries

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        """A token as OpenAI's clients know it."""
        text, spelled = "", None
        if not self._tokenizer.is_byte_level:
            text = self._tokenizer.decode([token], skip_special_tokens=False)
        elif (spelled := self._tokenizer.token_bytes(token, skip_special_tokens=False)) is not None:
            text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": None if spelled is None else list(spelled)}

    def _logprobs_object(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self._kind == "chat.completion":
            fields = ("token", "logprob", "bytes")
            return {
                "content": [
                    {**{name: entry[name] for name in fields}, "top_logprobs": entry["listed"][: self._num_listed]}
                    for entry in entries
                ],
                "refusal": None,
            }
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": _by_text(entries) if self._num_listed else None,
            "text_offset": [entry["offset"] for entry in entries],
        }

    def _usage(self) -> dict[str, Any]:
        results = [self._results[i] for i in sorted(self._results)]
        prompt = sum(result.prompt_tokens for result in results[:: self._copies])
        tokens = sum(result.tokens for result in results)
        forwards = sum(result.forwards for result in results)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "forwards": forwards,
            "tokens_per_forward": tokens / forwards if forwards else None,
            "acceptance": [result.acceptance for result in results],
        }


def _by_text(entries: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Logprobs by the text of their tokens; of tokens with one text, as halves of a character are, the likeliest."""
    return [{one["token"]: one["logprob"] for one in reversed(entry["listed"])} for entry in entries]


def _forward(event: StreamEvent) -> dict[str, Any]:
    return {
        "token_ids": event.token_ids,
        "drafted_tokens": event.num_drafted,
        "drafted_characters": event.drafted_chars,
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of an answer, whose call ends with the response, however that ends.

    Starlette leaves a generator open where it is cancelled while it sends, so nothing may rest on the generator's end.
    """

    def __init__(self, answer: Answer, worker: Worker):
        super().__init__(answer.chunks(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._call, self._worker = answer.call, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            with anyio.fail_after(_SEND_SECONDS):
                await send(message)

        try:
            async with aclosing(self.body_iterator):  # type: ignore[type-var]
                await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            pass  # uvicorn closes a connection whose response is not complete
        finally:
            self._worker.end(self._call)
