"""The thread that owns the engine: requests come through a queue, and leave through asynchronous streams.

Everything public but `run` belongs to the event loop. The thread looks at its queue between two steps, so a request
that is cancelled costs at most the step that is under way.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from idlm_kernels.generate.engine import Engine, Request
from idlm_kernels.generate.output import GenerationResult, StreamEvent
from idlm_kernels.generate.params import SamplingParams
from idlm_kernels.serve.metrics import Metrics

_log = logging.getLogger(__name__)
_LONGEST_RETRY = 60  # seconds; OpenAI's client obeys no longer wait


class TooBusy(Exception):
    """There is no room for a request. retry_after: seconds after which there may be."""

    def __init__(self, open_requests: int, retry_after: int):
        super().__init__(f"{open_requests} texts wait or are decoded, and the server takes no more: try again later")
        self.retry_after = retry_after


class ServerStops(Exception):
    """The machine failed, or the server ends: no request is answered any more."""


class RequestFailed(Exception):
    """The model failed on a request, and on no other."""


@dataclass(frozen=True)
class Asked:
    """A prompt, and what to do with it."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    drafts: bool = True


@dataclass(frozen=True)
class Update:
    """What a step gave to a choice; with a result, its last."""

    choice: int
    event: StreamEvent
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[dict[int, float]] = ()
    result: GenerationResult | None = None


@dataclass(eq=False)
class _Choice:
    """One of the texts that a call asks for."""

    call: Call
    index: int
    asked: Asked
    request: Request | None = None
    reported: int = 0  # tokens

    def update(self, event: StreamEvent, result: GenerationResult | None) -> Update:
        assert self.request is not None
        logprobs, listed = self.request.output.logprobs, self.request.output.top_logprobs
        start, self.reported = self.reported, self.reported + len(event.token_ids)
        own = () if logprobs is None else logprobs[start : self.reported]
        others = () if listed is None else listed[start : self.reported]
        return Update(self.index, event, own, others, result)


@dataclass(eq=False)
class Call:
    """The texts that one HTTP request asks for, as one stream of updates."""

    choices: list[_Choice] = field(default_factory=list)
    unfinished: int = 0
    has_tokens: bool = False
    started: float = field(default_factory=time.perf_counter)
    is_submitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    updates: asyncio.Queue[Update | Exception] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Until all choices have ended. Raises RequestFailed, ServerStops."""
        left = len(self.choices)
        while left:
            update = await self.updates.get()
            if isinstance(update, Exception):
                raise update
            left -= update.result is not None
            yield update


class Worker:
    """An engine and its thread.

    max_waiting: requests that may wait beside those that are decoded. on_fault is called in the event loop, once, when
    the machine has failed; `fault` says how.
    """

    def __init__(self, engine: Engine, max_waiting: int, metrics: Metrics):
        self.engine, self.metrics = engine, metrics
        self.max_open = engine.options.max_num_seqs + max_waiting
        self.fault: BaseException | None = None
        self.on_fault: Callable[[], None] = lambda: None
        self._open: set[Call] = set()
        self._mean_seconds = 1.0  # of a finished request, the latest ones above all
        # Between the two threads. A deque's and a SimpleQueue's operations are atomic.
        self._inbox: queue.SimpleQueue[tuple[str, Call] | None] = queue.SimpleQueue()
        self._outbox: deque[Callable[[], None]] = deque()
        self._is_woken = False
        self._running: list[_Choice] = []  # the thread's own
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="idlm-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    # The event loop's side

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self.fault is None and not self._closing and self._thread.is_alive()

    @property
    def open_requests(self) -> int:
        """Texts that wait or are decoded."""
        return sum(call.unfinished for call in self._open)

    def check_room(self, count: int) -> None:
        """Whether so many texts may be asked for now; asked before a prompt is encoded too. Raises as `submit` does."""
        if self.fault is not None:
            raise ServerStops("the machine has failed, and the server ends; its log says why")
        if self._closing:
            raise ServerStops("the server ends")
        if count > self.max_open:
            raise ValueError(f"n is too large: {count} texts are asked for, and the server takes {self.max_open}")
        busy = self.open_requests
        if busy + count > self.max_open:
            batches = math.ceil(busy / self.engine.options.max_num_seqs)
            raise TooBusy(busy, min(_LONGEST_RETRY, max(1, math.ceil(self._mean_seconds * batches / 2))))

    async def submit(self, asked: Sequence[Asked]) -> Call:
        """Queue requests, all or none. Raises ValueError, TypeError, TooBusy, ServerStops."""
        self.check_room(len(asked))
        call = Call()
        call.choices, call.unfinished = [_Choice(call, i, one) for i, one in enumerate(asked)], len(asked)
        self._open.add(call)
        self._inbox.put(("submit", call))
        try:
            await call.is_submitted
        except BaseException:
            self.end(call)
            raise
        return call

    def end(self, call: Call) -> None:
        """Forget a call, and cancel what of it is not finished."""
        if call in self._open:
            self._open.discard(call)
            self.metrics.cancelled(call.unfinished)
            self._inbox.put(("cancel", call))

    def fail(self, fault: BaseException) -> None:
        """The machine has failed: end every call, and have the server end."""
        if self.fault is not None:
            return
        self.fault = fault
        _log.critical("the machine failed, and the server ends", exc_info=fault)
        for call in list(self._open):
            self._give_up(call)
        self._inbox.put(None)
        self.on_fault()

    async def close(self) -> None:
        """End the thread, and with it what is not finished."""
        self._closing = True
        for call in list(self._open):
            self._give_up(call)
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _give_up(self, call: Call) -> None:
        error = ServerStops("the server ends" if self.fault is None else "the machine has failed, and the server ends")
        if not call.is_submitted.done():
            call.is_submitted.set_exception(error)
        call.updates.put_nowait(error)
        self.end(call)

    def _deliver(self) -> None:
        self._is_woken = False  # before the deque is looked at: what comes later wakes again
        while self._outbox:
            self._outbox.popleft()()

    def _accepted(self, call: Call, error: Exception | None) -> None:
        if call.is_submitted.done():
            return
        if error is None:
            call.is_submitted.set_result(None)
        else:
            call.unfinished = 0
            call.is_submitted.set_exception(error)

    def _updated(self, call: Call, update: Update | Exception) -> None:
        if call not in self._open:
            return
        seconds = time.perf_counter() - call.started
        if isinstance(update, Update) and update.event.token_ids and not call.has_tokens:
            call.has_tokens = True
            self.metrics.first_token(seconds)
        if isinstance(update, Update) and update.result is not None:
            self._mean_seconds += (seconds - self._mean_seconds) / 8
            call.unfinished -= 1
            self.metrics.finished(update.result, seconds)
        elif isinstance(update, RequestFailed):
            call.unfinished -= 1
            self.metrics.failed()
        call.updates.put_nowait(update)

    # The thread's side

    def _tell(self, deliver: Callable[[], None]) -> None:
        """Have the event loop run something; many in one go where it has much to do."""
        self._outbox.append(deliver)
        if not self._is_woken:
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self._closing = True

    def _run(self) -> None:
        device = self.engine.model.device
        try:
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)  # of this thread
            while self._take_from_inbox(wait=not self.engine.busy):
                if self.engine.busy and not self._run_window():
                    break
        except BaseException as error:  # whatever it is, no request can be trusted to be answered any more
            self._tell(partial(self.fail, error))

    def _run_window(self) -> bool:
        """Whether to go on after it."""
        for request, event in self.engine.window():
            choice = request.tag
            assert isinstance(choice, _Choice)
            if request.output.fault is None:
                self._report(choice, event)
            if not self._take_from_inbox(wait=False):
                return False
        for choice in self._running:
            if choice.request is not None and choice.request.output.fault is not None:
                raise choice.request.output.fault
        return True

    def _report(self, choice: _Choice, event: StreamEvent) -> None:
        request = choice.request
        assert request is not None
        if request.output.finish_reason == "error":
            self._running.remove(choice)
            self._tell(partial(self._updated, choice.call, RequestFailed(request.output.error or "the decode failed")))
            return
        result = None
        if request.ended and choice in self._running:
            self._running.remove(choice)
            result = request.output.result(self.engine.options.plan, 0)
        self._tell(partial(self._updated, choice.call, choice.update(event, result)))

    def _take_from_inbox(self, wait: bool) -> bool:
        """Do what the event loop asks for; whether to go on."""
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if message is None:
                return False
            wait = False
            what, call = message
            if what == "submit":
                self._submit(call)
            else:
                self._cancel(call)

    def _submit(self, call: Call) -> None:
        try:
            for choice in call.choices:
                asked = choice.asked
                choice.request = self.engine.submit(asked.prompt, asked.params, asked.seed, drafts=asked.drafts)
                choice.request.tag = choice
                self._running.append(choice)
        except (ValueError, TypeError) as error:
            self._cancel(call)
            self._tell(partial(self._accepted, call, error))
        else:
            self._tell(partial(self._accepted, call, None))

    def _cancel(self, call: Call) -> None:
        for choice in call.choices:
            if choice in self._running:
                assert choice.request is not None
                self._running.remove(choice)
                self.engine.cancel(choice.request)
