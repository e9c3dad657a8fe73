"""The generator: prompts in, text out. Thin; all arithmetic is in the ops, all decisions of a step on the device."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from idlm_kernels import ops
from idlm_kernels._deprecated import renamed
from idlm_kernels.generate.costs import LearnedCosts
from idlm_kernels.generate.engine import Engine, Request
from idlm_kernels.generate.kept_costs import costs_of
from idlm_kernels.generate.memory import pages_in_memory
from idlm_kernels.generate.options import DecodeOptions, EngineOptions, Plan, Stride
from idlm_kernels.generate.output import GenerationResult, StreamEvent
from idlm_kernels.generate.pages import page_size_for
from idlm_kernels.generate.params import SamplingParams, draw_seed, mixed_seed
from idlm_kernels.generate.policy import PlanPolicy
from idlm_kernels.generate.score import Score, Scorer
from idlm_kernels.model.bundle import adapter_folder, load_with_input
from idlm_kernels.model.checkpoint import load_checkpoint
from idlm_kernels.model.mask_input import MaskInputKind
from idlm_kernels.model.random_weights import RandomCheckpoint
from idlm_kernels.model.tokenizer import Tokenizer
from idlm_kernels.model.transformer import Transformer


class Generator:
    """A model that decodes by introspective strided decoding.

    Args:
        model: the transformer; its backend is the one in force when it was loaded.
        tokenizer: turns ids into text; without one, results carry ids only.
        max_model_len: the most tokens of a request, prompt included; the model's own limit when None. No memory is
            taken for it before a request needs it.
        page_size: tokens per KV page. Any size from 1 gives the same output.
        max_num_seqs: the most prompts that are decoded together.
        max_num_batched_tokens: the most prompt tokens of one forward.
        gpu_memory_utilization: the most of the memory that is free, on a CPU too, that the KV cache may take. Where
            it is too little for all prompts at once, some wait for others.
    """

    @renamed(max_len="max_model_len", max_batch="max_num_seqs")
    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        max_model_len: int | None = None,
        page_size: int = 64,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        gpu_memory_utilization: float = 0.5,
    ):
        limit = model.config.max_position_embeddings
        if max_model_len is not None and not 2 <= max_model_len <= limit:
            raise ValueError(f"max_model_len is {max_model_len}, wanted 2 to {limit} (the model's context)")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}, wanted at least 1")
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}, wanted at least 1")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization is {gpu_memory_utilization}, wanted above 0 and at most 1")
        self.max_model_len, self.page_size, self.max_num_seqs = max_model_len or limit, page_size, max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.gpu_memory_utilization = gpu_memory_utilization
        self._costs = LearnedCosts() if model.stack is None else costs_of(model)
        # Where steps are recorded the engine of a batch serves the next ones: to record takes longer than many steps.
        self._keeps_engine, self._kept = model.device.type == "cuda", None  # type: tuple[bool, Engine | None]

    @classmethod
    @renamed(max_len="max_model_len", max_batch="max_num_seqs")
    def from_pretrained(
        cls,
        source: str | Path = "default",
        *,
        adapter: str | Path | None = "default",
        mask_input: MaskInputKind | None = None,
        mask_token_id: int | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        activations: str = "auto",
        backend: str | None = None,
        max_model_len: int | None = None,
        page_size: int = 64,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        gpu_memory_utilization: float = 0.5,
        random_weights: bool = False,
    ) -> Generator:
        """Load a checkpoint (Hugging Face folder, GGUF file, hub id, or "default") and an optional adapter folder.

        The adapter "default" is the one that comes with the default model, or the one in the folder "adapter" inside
        the model's own, where there is one; None is none. mask_input and mask_token_id: what MASK rows embed
        (`MaskInput`), where the adapter does not say it or says it wrongly.
        dtype is that of the weights: auto, fp32, fp16 or bf16. activations: "auto", or "int8" as LLM explains it.
        backend forces one for every op, process-wide.
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
            adapter = None if random_weights else adapter_folder(source, checkpoint.path)
        loaded, chosen = load_with_input(checkpoint, adapter, mask_input, mask_token_id)
        model = Transformer(
            checkpoint, device=device, dtype=dtype, activations=activations, adapter=loaded, mask_input=chosen
        )
        return cls(
            model,
            checkpoint.tokenizer,
            max_model_len=max_model_len,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: DecodeOptions | None = None,
        *,
        progress: Callable[[int], None] | None = None,
        **changes: Any,
    ) -> list[GenerationResult]:
        """Decode a batch of prompts (token ids) to the end; results in the order of the prompts.

        One SamplingParams for all mixes its seed with the index of the prompt; a list gives each prompt its own.
        Keywords are fields of DecodeOptions that differ from `options`, such as plan="quadratic", stride=4. progress
        is called with the number of prompts that are answered, whenever it grows.

        Raises: TypeError, ValueError naming the argument, and the prompt, that cannot run.
        """
        each, seeds = _spread(params, len(prompts))
        if not prompts:
            return []
        options = (options or DecodeOptions()).changed(**changes)
        # Taken out while in use: a second thread, and whoever comes after a fault, gets an engine of its own.
        kept, self._kept = self._kept, None
        engine = kept if kept is not None and _serves(kept, options, *self._size(prompts, each)) else None
        del kept
        engine = engine or self._engine(prompts, each, options, roomy=self._keeps_engine)
        requests = []
        for i, (prompt, p, seed) in enumerate(zip(prompts, each, seeds, strict=True)):
            try:
                requests.append(engine.submit(prompt, p, seed))
            except (TypeError, ValueError) as error:
                raise type(error)(f"prompt {i}: {error}") from None
        answered = 0
        for request, _ in engine.events():
            if progress is not None and request.ended:
                answered += 1
                progress(answered)
        if self._keeps_engine:
            self._kept = engine
        return [_result(request, engine.policy) for request in requests]

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        options: DecodeOptions | None = None,
        **changes: Any,
    ) -> Stream:
        """Decode one prompt step by step, as `generate` does.

        Iterate (`for` or `async for`) for StreamEvents; `.result` holds text and figures at any time.
        """
        (one,), (seed,) = _spread(params, 1)
        engine = self._engine([prompt], [one], (options or DecodeOptions()).changed(**changes))
        return Stream(engine, engine.submit(prompt, one, seed), engine.policy)

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        """How probable a continuation is after a context, for pairs of the two (token ids); in the order of the pairs.

        A context has at least one token. Pairs with the same context are cheap, and so are those whose continuations
        differ in the last token alone. A pair may have one token more than max_model_len: nothing is computed for its
        last one. progress is called with the number of pairs that are done, whenever it grows.

        Raises: TypeError, ValueError naming the pair that cannot run; nothing is computed then.
        """
        listed = [self._checked_pair(i, *pair) for i, pair in enumerate(pairs)]
        longest = max((len(context) + len(continuation) - 1 for context, continuation in listed), default=0)
        if longest < 1:
            return [Score([], True) for _ in listed]
        sizes = EngineOptions(
            plan="ar", max_num_seqs=self.max_num_seqs, max_model_len=max(2, longest), page_size=self.page_size
        )
        policy, page_size = self.policy("ar"), page_size_for(self.page_size, sizes.max_model_len)
        self._kept = None  # its steps may refer to the rotary table, and its cache takes the memory
        pages = pages_in_memory(self.model, sizes, policy, self.gpu_memory_utilization)
        needed = sum(-(-(len(a) + len(b)) // page_size) for a, b in listed)
        self.model.reserve_positions(longest)
        id_limit = self.config.vocab_size
        if self.tokenizer is not None:
            id_limit = min(id_limit, self.tokenizer.vocab_size)
        scorer = Scorer(
            self.model, min(pages, needed), page_size, id_limit, self.max_num_seqs, self.max_num_batched_tokens
        )
        return scorer.score(listed, progress)

    def _checked_pair(
        self, index: int, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        context, continuation = list(context), list(continuation)
        if not context:
            raise ValueError(f"the context of pair {index} is empty, wanted at least one token")
        for token in (*context, *continuation):
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"pair {index} holds a {type(token).__name__}, wanted token ids (int)")
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"pair {index} holds the id {token}, outside the vocabulary of {self.config.vocab_size}"
                )
        if len(context) + len(continuation) - 1 > self.max_model_len:
            raise ValueError(
                f"pair {index} has {len(context) + len(continuation)} tokens, wanted at most {self.max_model_len + 1} "
                "(max_model_len, and the last one)"
            )
        return context, continuation

    def _size(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> tuple[int, int]:
        """How many of these prompts are decoded together, and the most tokens of one."""
        longest = max(len(p) + s.max_tokens for p, s in zip(prompts, params, strict=True))
        return min(self.max_num_seqs, len(prompts)), max(2, min(self.max_model_len, longest))

    def _engine(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        options: DecodeOptions,
        roomy: bool = False,
    ) -> Engine:
        """An engine with the memory that these prompts need and no more; if roomy, for up to twice as many and as long.

        Where there is no memory for that, an engine for these.
        """
        batch, longest = self._size(prompts, params)
        if roomy:
            batch = min(self.max_num_seqs, 1 << (batch - 1).bit_length())
        policy = PlanPolicy.of(self.model, options, self._costs)
        sizes = EngineOptions.of(
            options,
            max_num_seqs=batch,
            max_model_len=longest,
            max_num_batched_tokens=self.max_num_batched_tokens,
            page_size=self.page_size,
        )
        if roomy:
            longer = min(self.max_model_len, 1 << (longest - 1).bit_length())
            with contextlib.suppress(ValueError):  # too little memory
                return self._engine_of(policy, dataclasses.replace(sizes, max_model_len=longer))
        return self._engine_of(policy, sizes)

    def new_engine(self, sizes: EngineOptions) -> Engine:
        """An engine of these sizes, whose cache takes no more than gpu_memory_utilization of the free memory."""
        return self._engine_of(PlanPolicy.of(self.model, sizes, self._costs), sizes)

    def _engine_of(self, policy: PlanPolicy, sizes: EngineOptions) -> Engine:
        pages = pages_in_memory(self.model, sizes, policy, self.gpu_memory_utilization)
        return Engine(self.model, self.tokenizer, policy, dataclasses.replace(sizes, num_pages=pages))

    def engine(self, options: EngineOptions) -> Engine:
        """An engine of this model, for a caller that submits requests and runs it.

        Its cache has the pages that the options ask for, as far as the memory goes.
        """
        return self._engine_of(PlanPolicy.of(self.model, options, self._costs), options)

    def policy(self, plan: Plan, stride: Stride = "auto", row_budget: int | None = None) -> PlanPolicy:
        """The choice among plans that these arguments leave; see DecodeOptions."""
        options = DecodeOptions(plan, stride, row_budget=row_budget)
        return PlanPolicy.of(self.model, options, self._costs)


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


def _serves(engine: Engine, options: DecodeOptions, batch: int, longest: int) -> bool:
    """Whether an engine decodes with these options, and is large enough."""
    has = engine.options
    alike = all(getattr(has, f.name) == getattr(options, f.name) for f in dataclasses.fields(DecodeOptions))
    return alike and has.max_num_seqs >= batch and has.max_model_len >= longest


def _result(request: Request, policy: PlanPolicy) -> GenerationResult:
    plan = policy.plans[0].kind if len(policy.plans) == 1 else "auto"
    result = request.output.result(plan, max(plan.stride for plan in policy.plans))
    return dataclasses.replace(result, prompt_token_ids=request.prompt)


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
