"""The generator: prompts in, text out. Thin; all arithmetic is in the ops, all decisions of a step on the device."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from idlm_kernels import ops
from idlm_kernels.generate.engine import Engine, EngineOptions, Request
from idlm_kernels.generate.output import GenerationResult, StreamEvent
from idlm_kernels.generate.params import SamplingParams, draw_seed, mixed_seed
from idlm_kernels.generate.plan import PlanKind, StepPlan, plans_up_to
from idlm_kernels.generate.policy import CostTable, PlanPolicy
from idlm_kernels.model.adapter import DEFAULT_ADAPTER, load_adapter
from idlm_kernels.model.checkpoint import load_checkpoint
from idlm_kernels.model.random_weights import RandomCheckpoint
from idlm_kernels.model.tokenizer import Tokenizer
from idlm_kernels.model.transformer import Transformer

Plan = PlanKind | Literal["auto"]
Stride = int | Literal["auto"]

# What is expected of the drafts of a model that says nothing of it: one trained with a MASK token, and any other.
_ACCEPTANCE_OF_MASK_MODELS = (0.8,)
_ACCEPTANCE_UNTRAINED = (0.15, 0.05)
_AUTO_STRIDE = 4


class Generator:
    """A model that decodes by introspective strided decoding.

    Args:
        model: the transformer; its backend is the one in force when it was loaded.
        tokenizer: turns ids into text; without one, results carry ids only.
        max_len: the most tokens of a request, prompt included; the model's own limit when None.
        page_size: tokens per KV page. Any size from 1 gives the same output.
        max_batch: the most prompts that are decoded together.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        max_len: int | None = None,
        page_size: int = 64,
        max_batch: int = 64,
    ):
        limit = model.config.max_position_embeddings
        if max_len is not None and not 2 <= max_len <= limit:
            raise ValueError(f"max_len is {max_len}, wanted 2 to {limit} (the model's context)")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}, wanted at least 1")
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}, wanted at least 1")
        self.max_len, self.page_size, self.max_batch = max_len or limit, page_size, max_batch
        self._costs: dict[tuple[object, ...], CostTable] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "default",
        *,
        adapter: str | Path | None = "default",
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        backend: str | None = None,
        max_len: int | None = None,
        page_size: int = 64,
        max_batch: int = 64,
        random_weights: bool = False,
    ) -> Generator:
        """Load a checkpoint (Hugging Face folder, GGUF file, hub id, or "default") and an optional adapter folder.

        The adapter "default" is the one that comes with the default model, and none for any other; None is none.
        dtype is that of the weights: auto, fp32, fp16 or bf16. backend forces one for every op, process-wide.
        random_weights: make the weights up, for measurements; `source` then gives the shape only and may be
        "qwen3-8b" or "qwen3-32b".

        Raises: CheckpointError, FileNotFoundError, ValueError saying what is wrong with which file or argument.
        """
        if backend is not None:
            ops.set_backend(backend)
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no CUDA device here; use device='cpu'")
        checkpoint = RandomCheckpoint.of(source) if random_weights else load_checkpoint(source, revision=revision)
        if adapter == "default":
            adapter = DEFAULT_ADAPTER if source == "default" and not random_weights else None
        loaded = None if adapter is None else load_adapter(adapter, checkpoint.config)
        model = Transformer(checkpoint, device=device, dtype=dtype, adapter=loaded)
        return cls(model, checkpoint.tokenizer, max_len=max_len, page_size=page_size, max_batch=max_batch)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        plan: Plan = "auto",
        stride: Stride = "auto",
        verify: str = "match",
        row_budget: int | None = None,
        rerank: bool = True,
        suffix_drafts: bool = False,
        logprobs: bool = False,
        synthetic_acceptance: float | None = None,
    ) -> list[GenerationResult]:
        """Decode a batch of prompts (token ids) to the end; results in the order of the prompts.

        One SamplingParams for all mixes its seed with the index of the prompt; a list gives each prompt its own.
        plan "auto" measures this device and picks plan and stride by what pays, `stride` being the upper bound; stride
        "auto" goes as far as the adapter was trained for. With a row_budget, a step uses at most so many rows per
        request: plan and stride are then upper bounds. rerank: let the adapter's re-ranking head, if it has one,
        choose the drafts. suffix_drafts: draft from a request's own text too. logprobs: report those of the tokens.
        synthetic_acceptance: to measure speed, let drafts stand with this probability; the text is noise.

        Raises: TypeError, ValueError naming the argument, and the prompt, that cannot run.
        """
        each, seeds = _spread(params, len(prompts))
        if not prompts:
            return []
        policy = self.policy(plan, stride, row_budget, len(prompts))
        engine = self._engine(prompts, each, policy, verify, rerank, suffix_drafts, logprobs, synthetic_acceptance)
        requests = []
        for i, (prompt, p, seed) in enumerate(zip(prompts, each, seeds, strict=True)):
            try:
                requests.append(engine.submit(prompt, p, seed))
            except (TypeError, ValueError) as error:
                raise type(error)(f"prompt {i}: {error}") from None
        for _ in engine.events():
            pass
        return [_result(request, policy) for request in requests]

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        plan: Plan = "auto",
        stride: Stride = "auto",
        verify: str = "match",
        row_budget: int | None = None,
        rerank: bool = True,
        suffix_drafts: bool = False,
        logprobs: bool = False,
        synthetic_acceptance: float | None = None,
    ) -> Stream:
        """Decode one prompt step by step, as `generate` does.

        Iterate (`for` or `async for`) for StreamEvents; `.result` holds text and figures at any time.
        """
        (one,), (seed,) = _spread(params, 1)
        policy = self.policy(plan, stride, row_budget)
        engine = self._engine([prompt], [one], policy, verify, rerank, suffix_drafts, logprobs, synthetic_acceptance)
        return Stream(engine, engine.submit(prompt, one, seed), policy)

    def _engine(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        policy: PlanPolicy,
        verify: str,
        rerank: bool,
        suffix_drafts: bool,
        logprobs: bool,
        synthetic_acceptance: float | None,
    ) -> Engine:
        """An engine with the memory that these prompts need and no more."""
        batch = min(self.max_batch, len(prompts))
        longest = max(len(p) + s.max_tokens for p, s in zip(prompts, params, strict=True))
        options = EngineOptions(
            max_batch=batch,
            max_len=max(2, min(self.max_len, longest)),
            page_size=self.page_size,
            rerank=rerank,
            suffix_drafts=suffix_drafts,
            logprobs=logprobs,
            synthetic_acceptance=synthetic_acceptance,
        )
        return Engine(self.model, self.tokenizer, policy, verify, options)

    def policy(
        self, plan: Plan, stride: Stride = "auto", row_budget: int | None = None, max_batch: int = 1
    ) -> PlanPolicy:
        """The choice among plans that these arguments leave, for up to max_batch requests; see `generate`."""
        if row_budget is not None:
            if isinstance(row_budget, bool) or not isinstance(row_budget, int):
                raise TypeError(f"row_budget must be an int, got {type(row_budget).__name__}")
            if row_budget < 1:
                raise ValueError(f"row_budget is {row_budget}, wanted at least 1 row per request")
        acceptance = self._acceptance()
        longest = stride
        if longest == "auto":
            longest = _AUTO_STRIDE if self.model.acceptance is None else len(acceptance) + 1
        if plan != "auto" and stride != "auto":
            chosen = StepPlan(plan, longest) if row_budget is None else StepPlan.within(row_budget, plan, longest)
            return PlanPolicy.fixed(chosen)
        plans = plans_up_to(plan, StepPlan("chain", longest).stride, row_budget)
        if len(plans) == 1:
            return PlanPolicy.fixed(plans[0])
        return PlanPolicy(tuple(plans), self._cost(plans, min(max_batch, self.max_batch)), list(acceptance))

    def _acceptance(self) -> Sequence[float]:
        if self.model.acceptance is not None:
            return self.model.acceptance
        return _ACCEPTANCE_UNTRAINED if self.config.mask_token_id is None else _ACCEPTANCE_OF_MASK_MODELS

    def _cost(self, plans: Sequence[StepPlan], max_batch: int) -> CostTable:
        if self.model.device.type != "cpu":
            return CostTable.roofline(self.model)
        key = (*plans, max_batch)
        if key not in self._costs:
            self._costs[key] = CostTable.measure(self.model, plans, max_batch)
        return self._costs[key]


class Stream:
    """The steps of one request, as an iterator and as an asynchronous iterator."""

    def __init__(self, engine: Engine, request: Request, policy: PlanPolicy):
        self._engine, self._request, self._policy = engine, request, policy
        self._events = engine.events()
        self._ready: deque[StreamEvent] = deque()
        self._lock = threading.Lock()  # a task that is cancelled leaves its thread in a step

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        self._fill()
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def _fill(self) -> None:
        """Run a step, unless the event of an earlier one was not fetched."""
        with self._lock:
            if not self._ready:
                self._ready.extend(event for _, event in islice(self._events, 1))

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return self._steps_in_a_thread()

    async def _steps_in_a_thread(self) -> AsyncIterator[StreamEvent]:
        while True:
            await asyncio.to_thread(self._fill)
            if not self._ready:
                return
            yield self._ready.popleft()

    def cancel(self) -> None:
        """End the request here; no further step is run."""
        with self._lock:
            self._engine.cancel(self._request)

    @property
    def result(self) -> GenerationResult:
        """Text and figures so far; asked for before the end, it ends the request ("cancelled")."""
        self.cancel()
        return _result(self._request, self._policy)


def _result(request: Request, policy: PlanPolicy) -> GenerationResult:
    if len(policy.plans) == 1:
        return request.output.result(policy.plans[0].kind, policy.plans[0].stride)
    return request.output.result("auto", max(plan.stride for plan in policy.plans))


def _spread(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> tuple[list[SamplingParams], list[int]]:
    """Parameters and seed of each prompt. One seed for all is mixed with the index; a missing one is drawn."""
    if params is None or isinstance(params, SamplingParams):
        one = params or SamplingParams()
        base = draw_seed() if one.seed is None else one.seed
        return [one] * count, [mixed_seed(base, i) for i in range(count)]
    each = list(params)
    if len(each) != count:
        raise ValueError(f"{len(each)} SamplingParams for {count} prompts, wanted one for all or one for each")
    return each, [draw_seed() if p.seed is None else p.seed for p in each]
