"""The engine: a stationary batch that decodes many requests, with the host beside the steps and not inside them.

Time runs in scheduling windows. At a boundary between two the host retires what has ended, chooses the plan, finds
pages for the steps ahead (preempting the youngest requests where there are too few), admits waiting requests and
prefills within a budget. Then the batch runs a number of steps unchanged; their results are read one step late on a
GPU, so that no step waits for the host. In `match` the output of a request is a function of (model, prompt,
parameters, seed) alone: nothing that is decided here can change it.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from idlm_kernels._deprecated import warn_renamed
from idlm_kernels.generate.costs import LearnedCosts
from idlm_kernels.generate.graphs import CudaRecorder, RecordedSteps, Recorder, StepFunction
from idlm_kernels.generate.history import HANDED_OVER, History
from idlm_kernels.generate.options import EngineOptions
from idlm_kernels.generate.output import RequestOutput, StreamEvent
from idlm_kernels.generate.pages import PagePool, page_size_for
from idlm_kernels.generate.params import MAX_TOP_LOGPROBS, SamplingParams, checked_seed
from idlm_kernels.generate.plan import StepPlan
from idlm_kernels.generate.policy import PlanPolicy
from idlm_kernels.generate.state import IDLE, RUNNING, STOPPED, DecodeState
from idlm_kernels.generate.step import Decoder, decode_step, first_step, prefill_chunk
from idlm_kernels.learning.adapters import DraftCounts, Replaced
from idlm_kernels.learning.traces import Cycle, Trace
from idlm_kernels.model.adapter import Adapter
from idlm_kernels.model.tokenizer import Tokenizer
from idlm_kernels.model.transformer import PreparedAdapter, Transformer
from python_ref import DraftDistributions
from python_ref.contract import GREEDY_BELOW, MASK_DRAFTS

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., None])
MAX_STOP_IDS = 64  # of a request
_TRIAL_STEPS = 4  # of a window that learns what a plan costs


@dataclass(eq=False)
class Request:
    """A request as the host knows it. Its text and figures are in `output`, with a finish_reason once it has ended."""

    arrival: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    stop_ids: list[int]
    limit: int  # largest L
    output: RequestOutput
    drafts: bool = True
    batch_index: int | None = None  # in the state, while it holds pages
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose KV is known to be in the cache; meaningful until the first step
    decoding: bool = False  # its prefill has ended
    tag: object = None  # the caller's
    cycles: list[Cycle] = field(default_factory=list)  # where traces are kept
    adapters: list[str] = field(default_factory=list)  # of the cycles

    @property
    def tokens(self) -> list[int]:
        """Committed text: what a prefill has to compute, after a preemption too."""
        return self.prompt + self.output.token_ids

    @property
    def ended(self) -> bool:
        return self.output.finish_reason is not None

    def trace(self) -> Trace:
        """What it leaves behind, once it has ended."""
        reason = self.output.finish_reason or "cancelled"
        return Trace(tuple(self.prompt), tuple(self.output.token_ids), tuple(self.cycles), tuple(self.adapters), reason)


_state_of_process = {"has decoded": False, "forked since": False}


def _in_child() -> None:
    _state_of_process["forked since"] = _state_of_process["has decoded"]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _old_signature(init: _F) -> _F:
    """Take the rule as the fourth argument or as `verify` too, for one release."""

    @wraps(init)
    def wrapper(
        self: Engine,
        model: Transformer,
        tokenizer: Tokenizer | None,
        policy: PlanPolicy | None = None,
        *rest: Any,
        **how: Any,
    ) -> None:
        rule = how.pop("verify", None)
        if rest and isinstance(rest[0], str):
            rule, rest = rest[0], rest[1:]
        if rule is not None:
            warn_renamed("Engine: ", "verify", "options.rule")
            options = rest[0] if rest else how.pop("options", EngineOptions())
            rest = (options.changed(rule=rule),)
        init(self, model, tokenizer, policy, *rest, **how)

    return cast(_F, wrapper)


class Engine:
    """Decodes requests; see the module. One thread at a time: a second one gets a RuntimeError, and no wrong token.

    policy: the choice among plans; made of the plan, stride and row_budget of the options when None. step, recorder:
    for tests. on_trace: is given each request that has ended, from the thread that runs the windows, and has steps keep
    what they verified in `Request.cycles`. draft_counts: of the adapter in use; replaced: the adapter before it.

    It does not survive a fork: torch's threads are not copied, so a child would wait for them for good. A child of a
    process that has decoded gets a RuntimeError; start processes with "spawn", or fork before the first decode.
    """

    @_old_signature
    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        policy: PlanPolicy | None = None,
        options: EngineOptions | None = None,
        *,
        step: StepFunction = decode_step,
        recorder: Recorder | None = None,
        on_trace: Callable[[Request], None] | None = None,
    ):
        _check_process()
        options = options or EngineOptions()
        if policy is None:
            policy = PlanPolicy.of(model, options)
        num_slots = options.max_model_len - 1 + policy.widest.max_rows
        options = dataclasses.replace(options, page_size=page_size_for(options.page_size, num_slots))
        self.model, self.tokenizer, self.policy, self.options = model, tokenizer, policy, options
        self._lag = (1 if model.device.type == "cuda" else 0) if options.lag is None else options.lag
        self._id_limit = model.config.vocab_size
        if tokenizer is not None:
            self._id_limit = min(self._id_limit, tokenizer.vocab_size)
        model.reserve_positions(num_slots)
        per_request = -(-num_slots // options.page_size)
        self.pool = PagePool(options.num_pages or options.max_num_seqs * per_request, options.page_size)
        self._state = DecodeState.empty(
            options.max_num_seqs,
            options.max_model_len,
            per_request,
            policy.num_drafts,
            MAX_STOP_IDS,
            mask_token_id=model.config.mask_token_id,
            mask_input=model.mask_input,
            id_limit=self._id_limit,
            device=model.device,
            handed_over=HANDED_OVER if options.history_tokens else 0,
        )
        self._history = History(options.history_tokens) if options.history_tokens else None
        draft_dists = None
        if options.rule == "rejection":
            vocab_size = model.config.vocab_size
            draft_dists = DraftDistributions.empty(
                options.max_num_seqs, policy.num_drafts, vocab_size, model.dtype, model.device
            )
        self._decoder = Decoder(
            model,
            model.new_cache(self.pool.num_pages, options.page_size),
            policy.widest,
            options.rule,
            draft_dists,
            rerank=options.rerank and model.rerank_head is not None,
            suffix=options.suffix_drafts,
            logprobs=options.logprobs,
            synthetic_acceptance=options.synthetic_acceptance,
        )
        if recorder is None and model.device.type == "cuda":
            recorder = CudaRecorder()
        self._buckets = _buckets(options.max_num_seqs, few=recorder is not None)
        self._steps, self._recorded = RecordedSteps(step, recorder), recorder is not None
        if len(policy.plans) == 1:
            for bucket in reversed(self._buckets):  # the largest first: the others fit into its memory
                self._steps.record(*self._batch(bucket))
        self._waiting: list[Request] = []
        self._active: list[Request] = []  # those in the batch, by arrival
        self._free_indices = list(range(options.max_num_seqs))  # a heap
        self._arrivals = 0
        self._thread = threading.Lock()  # held by the thread that is inside
        self._window: Generator[tuple[Request, StreamEvent], None, None] | None = None  # the latest
        self._interrupted = False  # in the middle of a step
        self._plan_of_last_step: StepPlan | None = None
        self.on_trace = on_trace
        self.draft_counts = DraftCounts.none(policy.num_drafts)
        self.replaced: Replaced | None = None
        self._next_adapter: PreparedAdapter | None = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one thread at a time gets in, and none in a child of fork."""
        _check_process()
        if not self._thread.acquire(blocking=False):
            raise RuntimeError("another thread is using this Engine: use one thread, or an Engine for each")
        try:
            yield
        finally:
            self._thread.release()

    # Requests

    def submit(self, prompt: Sequence[int], params: SamplingParams, seed: int, *, drafts: bool = True) -> Request:
        """Queue a request. seed: 0 .. 2^64 - 1. ValueError or TypeError if it cannot run; nothing is queued then.

        drafts: False decodes it the ordinary way (AR), a token per step, whatever the requests beside it do.
        """
        with self._alone():
            return self._submit(prompt, params, seed, drafts)

    def _submit(self, prompt: Sequence[int], params: SamplingParams, seed: int, drafts: bool) -> Request:
        prompt, seed = self._checked_prompt(prompt), checked_seed(seed)
        limit = min(self.options.max_model_len, len(prompt) + params.max_tokens)
        needed = self.pool.pages_for(limit - 1 + self.policy.widest.max_rows)
        if needed > self.pool.num_pages:
            raise ValueError(
                f"the request may need {needed} pages of {self.options.page_size} tokens, but the cache has "
                f"{self.pool.num_pages}: lower max_tokens or give the engine more pages"
            )
        stop_ids = self._stop_ids(params)
        output = RequestOutput(len(prompt), params, seed, self.tokenizer, self.policy.num_drafts, self.options.logprobs)
        request = Request(self._arrivals, prompt, params, seed, stop_ids, limit, output, drafts)
        self._arrivals += 1
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request here, with the text so far. Its batch index is free from the next boundary on."""
        with self._alone():
            request.output.cancel()
            if request.batch_index is not None:
                self._state.finish_reason[request.batch_index].fill_(STOPPED)
            elif request in self._waiting:
                self._waiting.remove(request)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._active)

    @property
    def num_running(self) -> int:
        """Requests in the batch. Any thread may ask."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the batch. Any thread may ask."""
        return len(self._waiting)

    # The adapter

    def swap_adapter(self, adapter: Adapter | PreparedAdapter) -> None:
        """Have the model use another adapter of the same form from the next window on. Any thread may call it.

        Requests go on as they are, with the same text (`match`): pages hold K and V of clean rows alone, which no
        adapter touches, and drafts of the one before are verified like any others. The adapter is the model's: other
        engines of the same model draft with it too. Raises ValueError and CheckpointError as
        `Transformer.prepare_adapter` does; the one in use stays then.
        """
        self._next_adapter = self.model.prepare_adapter(adapter) if isinstance(adapter, Adapter) else adapter

    @property
    def adapter_name(self) -> str | None:
        """Of the adapter in use."""
        return None if self.model.adapter is None else self.model.adapter.name

    def _swap(self) -> None:
        prepared, self._next_adapter = self._next_adapter, None
        if prepared is None:
            return
        with torch.inference_mode():
            before = self.model.install_adapter(prepared)
        self.replaced = Replaced(before, self.draft_counts)
        self.draft_counts = DraftCounts.none(self.policy.num_drafts)
        if prepared.acceptance is not None:
            self.policy.acceptance = list(prepared.acceptance)

    # Time

    def events(self) -> Iterator[tuple[Request, StreamEvent]]:
        """Run until nothing waits and nothing runs, yielding what each step gave to each request."""
        while self.busy:
            yield from self.window()

    def window(self) -> Iterator[tuple[Request, StreamEvent]]:
        """One boundary and the steps of the window after it.

        An iterator that is left before its end costs events and no tokens: each step is given to all of its requests
        before the first event is handed out, and the next call of `window` or `events` reads what is still unread.

        Raises: RuntimeError where a step was interrupted (Ctrl-C): what the device holds is not known then.
        """
        with self._alone():
            if self._interrupted:
                raise RuntimeError("a step of this Engine was interrupted: make a new one and submit its requests")
            if self._window is not None:
                self._window.close()
            self._window = self._run_window()
        return _Events(self._alone, self._window)

    def epoch(self) -> Iterator[tuple[Request, StreamEvent]]:
        """The old name of `window`."""
        warn_renamed("Engine.", "epoch", "Engine.window")
        return self.window()

    def _run_window(self) -> Generator[tuple[Request, StreamEvent], None, None]:
        try:
            yield from self._boundary_and_steps()
        except GeneratorExit:
            raise
        except BaseException:
            self._interrupted = True
            raise

    def _boundary_and_steps(self) -> Iterator[tuple[Request, StreamEvent]]:
        _state_of_process["has decoded"] = True
        self._retire()
        self._swap()
        plan = self._plan()
        # A recorded step serves any requests, so it must not depend on what these ask for.
        greedy = not self._recorded and all(
            r.params.temperature < GREEDY_BELOW for r in (*self._active, *self._waiting)
        )
        penalties = any(r.params.penalises for r in (*self._active, *self._waiting))
        lists = any(r.params.logprobs for r in (*self._active, *self._waiting))
        self._decoder = dataclasses.replace(
            self._decoder,
            plan=plan,
            greedy=greedy,
            penalties=penalties,
            top_logprobs=min(MAX_TOP_LOGPROBS, self._id_limit) if lists else 0,
        )
        steps = self._window_length()
        self._reserve(steps)
        self._admit(steps)
        self._compact()
        self._write_tables()
        yield from self._prefill()
        yield from self._run_steps(steps)
        self._retire()

    def _plan(self) -> StepPlan:
        """The plan of the window: AR where nobody wants drafts."""
        requests = (*self._active, *self._waiting)
        if requests and not any(request.drafts for request in requests):
            self.policy.trial = False
            return StepPlan("ar", 1)
        return self.policy.choose(max(1, min(self.options.max_num_seqs, len(requests))))

    def _window_length(self) -> int:
        """Many steps in a steady state; while requests wait, so few that the batch has no gap for long."""
        if self.policy.trial:
            return min(self.options.window_steps, _TRIAL_STEPS)
        if not self._waiting:
            return self.options.window_steps
        soonest = min((r.limit - len(r.tokens) for r in self._active), default=1)
        return max(1, min(self.options.window_steps // 4, soonest))

    # The boundary between two windows

    def _retire(self) -> None:
        for request in [r for r in self._active if r.ended]:
            self._leave(request)
            if self._history is not None and request.output.finish_reason in ("stop", "length"):
                self._history.add(request.prompt, request.output.token_ids)
            if self.on_trace is not None and request.output.finish_reason != "error":
                self.on_trace(request)

    def _leave(self, request: Request) -> None:
        """Take a request out of the batch and give its pages back."""
        assert request.batch_index is not None
        self._state.finish_reason[request.batch_index] = IDLE
        heapq.heappush(self._free_indices, request.batch_index)
        self.pool.release(request.pages)
        request.batch_index, request.pages, request.decoding, request.cached = None, [], False, 0
        self._active.remove(request)

    def _pages_ahead(self, request: Request, steps: int) -> int:
        """Pages that a request may touch in the steps ahead, and one of slack for the step that is read late."""
        plan = self._decoder.plan
        reach = min(request.limit, len(request.tokens) + (steps + 1) * plan.stride)
        return self.pool.pages_for(reach - 1 + plan.max_rows)

    def _reserve(self, steps: int) -> None:
        """Pages for the window ahead, oldest request first; the youngest ones make room where there are too few."""
        for request in list(self._active):
            while request.batch_index is not None:
                pages = self.pool.take(self._pages_ahead(request, steps) - len(request.pages))
                if pages is not None:
                    request.pages += pages
                    break
                self._preempt(self._active[-1])

    def _preempt(self, request: Request) -> None:
        """Back to the queue, in order of arrival; its prompt is then all that it has committed."""
        self._leave(request)
        self._waiting.append(request)
        self._waiting.sort(key=lambda r: r.arrival)

    def _admit(self, steps: int) -> None:
        """Give waiting requests a batch index and pages, strictly in order of arrival."""
        while self._waiting and len(self._active) < self.options.max_num_seqs:
            request = self._waiting[0]
            tokens = request.tokens
            shared = self.pool.share(tokens)
            pages = self.pool.take(max(0, self._pages_ahead(request, steps) - len(shared)))
            if pages is None:
                self.pool.release(shared)
                return
            self._waiting.pop(0)
            request.pages = shared + pages
            request.cached = len(shared) * self.pool.page_size
            request.batch_index = heapq.heappop(self._free_indices)
            self._active.append(request)
            self._active.sort(key=lambda r: r.arrival)
            where = request.batch_index
            try:
                self._state.insert(
                    where,
                    tokens,
                    request.params,
                    request.seed,
                    request.limit,
                    request.stop_ids,
                    request.drafts,
                    len(request.prompt),
                )
            except Exception as error:  # whatever a parameter makes torch raise: the others go on
                request.output.fail(f"{type(error).__name__}: {error}", error)
                self._leave(request)

    def _compact(self) -> None:
        """Move requests down to the first indices, so that a step runs no more of them than there are requests."""
        for request in [r for r in self._active if r.batch_index is not None and r.batch_index >= len(self._active)]:
            assert request.batch_index is not None
            free = heapq.heappushpop(self._free_indices, request.batch_index)
            self._state.move(request.batch_index, free)
            if self._decoder.draft_dists is not None:
                q = self._decoder.draft_dists
                for x in (q.logits, q.cut, q.log_norm):
                    x[free] = x[request.batch_index]
            request.batch_index = free

    def _write_tables(self) -> None:
        """Page tables, drafts within the plan of the window, and what finished outputs have for each request."""
        width = self._state.page_table.shape[1]
        tables = [[0] * width for _ in range(len(self._active))]
        passages: list[list[int]] = [[] for _ in tables]
        for request in self._active:
            assert request.batch_index is not None
            tables[request.batch_index] = (request.pages + [0] * width)[:width]
            if self._history is not None:
                passages[request.batch_index] = self._history.passages(request.tokens)
        if tables:
            self._state.page_table[: len(tables)] = torch.tensor(tables, dtype=torch.int32)
            self._state.history[: len(tables)] = torch.tensor(passages, dtype=torch.int64)
        self._state.num_drafts.clamp_(max=self._decoder.plan.num_drafts)

    # Prefill

    def _prefill(self) -> Iterator[tuple[Request, StreamEvent]]:
        """Prefill within the budget, oldest first. The first step of a request rides on its last chunk."""
        budget = self.options.max_num_batched_tokens
        ready: list[Request] = []
        for request in self._active:
            if request.decoding or request.ended:
                continue
            length = len(request.tokens)
            assert request.batch_index is not None
            if length - request.cached <= budget:
                budget -= length - request.cached
                ready.append(request)
            elif budget > 0:
                state = self._state.requests(request.batch_index, request.batch_index + 1)
                stop = request.cached + budget
                if self._guarded([request], partial(prefill_chunk, self._decoder, state, request.cached, stop)):
                    request.cached, budget = stop, 0
        for group in _neighbours(ready):
            yield from self._first_step(group)

    def _first_step(self, group: list[Request]) -> Iterator[tuple[Request, StreamEvent]]:
        first, last = group[0].batch_index, group[-1].batch_index
        assert first is not None and last is not None
        state = self._state.requests(first, last + 1)
        draft_dists = self._decoder.draft_dists
        decoder = self._narrowed(first, last + 1) if draft_dists is not None else self._decoder
        state.finish_reason.fill_(RUNNING)
        starts, lengths = [r.cached for r in group], [len(r.tokens) for r in group]
        view = state.with_drafts(decoder.plan.num_drafts)
        outcome = self._guarded(group, partial(first_step, decoder, view, starts, lengths))
        if outcome is not None:
            for request in group:
                request.decoding = True
                self.pool.publish(request.tokens, request.pages)
            yield from self._taken(outcome.tolist(), dict(enumerate(group)))

    def _narrowed(self, first: int, last: int) -> Decoder:
        """The decoder with the draft_dists of some requests and of the drafts of the plan."""
        q, num_spec_tokens = self._decoder.draft_dists, self._decoder.plan.num_drafts
        assert q is not None
        part = DraftDistributions(
            q.logits[first:last, :num_spec_tokens],
            q.cut[first:last, :num_spec_tokens],
            q.log_norm[first:last, :num_spec_tokens],
        )
        return dataclasses.replace(self._decoder, draft_dists=part)

    # Steps

    def _batch(self, bucket: int) -> tuple[Decoder, DecodeState]:
        """The first requests of the state, and the decoder that goes with them."""
        decoder = self._decoder if self._decoder.draft_dists is None else self._narrowed(0, bucket)
        return decoder, self._state.requests(0, bucket).with_drafts(decoder.plan.num_drafts)

    def _run_steps(self, steps: int) -> Iterator[tuple[Request, StreamEvent]]:
        """Run the batch, unchanged; read each result `lag` steps late."""
        decoding = {r.batch_index: r for r in self._active if r.decoding and r.batch_index is not None}
        if not decoding:
            return
        decoder, state = self._batch(self._buckets[bisect_left(self._buckets, max(decoding) + 1)])
        unread: deque[tuple[_Readback, _Readback | None]] = deque()  # outcomes, and the drafts that were verified
        # The first step of a plan has no drafts to verify, and so fewer rows than the others.
        is_new, self._plan_of_last_step = decoder.plan != self._plan_of_last_step, decoder.plan
        try:
            for number in range(steps):
                if all(request.ended for request in decoding.values()):
                    break
                running = [r for r in decoding.values() if not r.ended]
                drafts = _Readback(state.drafts) if self.on_trace is not None else None
                start = time.perf_counter()
                outcome = self._guarded(running, partial(self._steps.run, decoder, state))
                if outcome is None:
                    break
                unread.append((_Readback(outcome), drafts))
                if isinstance(self.policy.cost, LearnedCosts) and not (is_new and number == 0):
                    seconds = time.perf_counter() - start
                    self.policy.cost.observe(len(running), decoder.plan.max_rows, seconds)
                if len(unread) > self._lag:
                    yield from self._read(unread.popleft(), decoding)
            while unread:
                yield from self._read(unread.popleft(), decoding)
        finally:
            while unread:  # the iterator was left here
                self._read(unread.popleft(), decoding)

    def _guarded(self, requests: list[Request], run: Callable[[], _T]) -> _T | None:
        """Run something on the device; an exception ends the requests that it was for, and no others: None then."""
        try:
            # A step makes some 2,000 small calls on a CPU: without autograd's bookkeeping it is a tenth faster.
            with torch.inference_mode():
                return run()
        except Exception as error:  # whatever a backend may raise: the other requests go on
            for request in requests:
                request.output.fail(f"{type(error).__name__}: {error}", error)
                if request.batch_index is not None:
                    self._state.finish_reason[request.batch_index].fill_(STOPPED)
            return None

    def _read(
        self, unread: tuple[_Readback, _Readback | None], requests: dict[int, Request]
    ) -> list[tuple[Request, StreamEvent]]:
        """Wait for a step's results and hand them to its requests. In a run of steps the host waits nowhere else."""
        outcome, drafts = unread
        return self._taken(outcome.wait(), requests, None if drafts is None else drafts.wait())

    def _taken(
        self, rows: list[list[int]], requests: dict[int, Request], drafts: list[list[int]] | None = None
    ) -> list[tuple[Request, StreamEvent]]:
        num_spec_tokens = self._decoder.plan.num_drafts
        verified, accepted = [0] * num_spec_tokens, [0] * num_spec_tokens
        of_adapter = DraftCounts.none(num_spec_tokens)
        events = []
        for b, request in requests.items():
            if request.ended:
                continue
            num_drafts, num_accepted, _, _, _, source, *_ = rows[b]
            at = len(request.output.token_ids)
            event = request.output.read(rows[b], self._decoder.plan.stride)
            if drafts is not None and num_drafts and event.token_ids:
                self._keep_cycle(request, at, drafts[b][:num_drafts], rows[b], len(event.token_ids))
            for j in range(min(num_drafts, num_accepted + 1)):
                verified[j] += 1
                accepted[j] += j < num_accepted
                of_adapter.verified[j] += source == MASK_DRAFTS
                of_adapter.accepted[j] += source == MASK_DRAFTS and j < num_accepted
            if request.ended and request.batch_index is not None:
                self._state.finish_reason[request.batch_index].clamp_(
                    min=STOPPED
                )  # a stop string is known to the host alone
            events.append((request, event))
        self.policy.observe(verified, accepted)
        self.draft_counts.add(of_adapter.verified, of_adapter.accepted)
        return events

    def _keep_cycle(self, request: Request, at: int, drafts: list[int], row: list[int], kept: int) -> None:
        """Note what a step verified, of which `kept` tokens became text."""
        _, num_accepted, _, _, _, source, *_ = row
        name = self.adapter_name or "none"
        if name not in request.adapters:
            request.adapters.append(name)
        accepted = min(num_accepted, kept)
        request.cycles.append(Cycle(at, tuple(drafts), accepted, source, request.adapters.index(name)))

    # Checks

    def _checked_prompt(self, prompt: Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            raise TypeError(
                "the prompt is text, wanted token ids: encode it with the tokenizer, or use idlm_kernels.LLM, which "
                "takes text"
            )
        ids, vocab_size, max_len = list(prompt), self.model.config.vocab_size, self.options.max_model_len
        if not ids:
            raise ValueError("the prompt is empty, wanted at least one token")
        if len(ids) >= max_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but the context is {max_len}: wanted at most {max_len - 1}, so "
                "that one can be added"
            )
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"the prompt holds a {type(token).__name__}, wanted token ids (int)")
            if not 0 <= token < vocab_size:
                raise ValueError(f"the prompt holds the id {token}, outside the vocabulary of {vocab_size}")
        return ids

    def _stop_ids(self, params: SamplingParams) -> list[int]:
        vocab_size = self.model.config.vocab_size
        for token in params.stop_token_ids:
            if token >= vocab_size:
                raise ValueError(f"stop_token_ids holds {token}, outside the vocabulary of {vocab_size}")
        for token in params.logit_bias or ():
            if token >= vocab_size:
                raise ValueError(f"logit_bias holds the id {token}, outside the vocabulary of {vocab_size}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and there is none")
        ends: set[int] = set()
        if not params.ignore_eos:
            ends = set(self.model.config.eos_token_ids) | set(self.tokenizer.eos_ids if self.tokenizer else ())
        ends |= set(params.stop_token_ids)
        if self.tokenizer is not None:  # no text shows a special token, so a stop that spells one is matched by its id
            spelled = (self.tokenizer.special_id(stop) for stop in params.stop)
            ends |= {end for end in spelled if end is not None}
        if len(ends) > MAX_STOP_IDS:
            raise ValueError(f"{len(ends)} stop ids with the end tokens, wanted at most {MAX_STOP_IDS}")
        return sorted(ends)


def _check_process() -> None:
    if _state_of_process["forked since"]:
        raise RuntimeError(
            "this process was forked from one that has decoded, and torch's threads do not survive that: start "
            'processes with multiprocessing\'s "spawn", or fork before the first decode'
        )


class _Events:
    """A window, each step of which keeps other threads out."""

    def __init__(self, alone: Callable[[], Any], events: Generator[tuple[Request, StreamEvent], None, None]):
        self._alone, self._events = alone, events

    def __iter__(self) -> Iterator[tuple[Request, StreamEvent]]:
        return self

    def __next__(self) -> tuple[Request, StreamEvent]:
        with self._alone():
            return next(self._events)

    def close(self) -> None:
        with self._alone():
            self._events.close()


class _Readback:
    """The outcome of a step on its way to the host; on a GPU through pinned memory, without stopping the device.

    It is read before the next step, which may overwrite it, begins: on a GPU in the order of the stream.
    """

    def __init__(self, outcome: Tensor):
        self._event: torch.cuda.Event | None = None
        if outcome.device.type == "cuda":
            self._host: Tensor = torch.empty(outcome.shape, dtype=outcome.dtype, pin_memory=True)
            self._host.copy_(outcome, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._rows: list[list[int]] = outcome.tolist()

    def wait(self) -> list[list[int]]:
        if self._event is not None:
            self._event.synchronize()
            self._rows = self._host.tolist()
        return self._rows


def _buckets(max_num_seqs: int, few: bool) -> list[int]:
    """Batch sizes that a step may run: all, or powers of two where each costs a recording."""
    if not few:
        return list(range(1, max_num_seqs + 1))
    return [*(1 << i for i in range((max_num_seqs - 1).bit_length())), max_num_seqs]


def _neighbours(requests: list[Request]) -> Iterator[list[Request]]:
    """Groups of requests with consecutive batch indices: one forward, and one view of the state, serves a group."""
    group: list[Request] = []
    for request in sorted(requests, key=lambda r: r.batch_index or 0):
        if group and request.batch_index != (group[-1].batch_index or 0) + 1:
            yield group
            group = []
        group.append(request)
    if group:
        yield group
