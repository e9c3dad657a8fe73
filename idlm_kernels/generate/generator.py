"""The generator: prompts in, text out. Thin; all arithmetic is in the ops, all decisions of a step on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from idlm_kernels import ops
from idlm_kernels.generate.output import GenerationResult, RequestOutput, StreamEvent
from idlm_kernels.generate.params import SamplingParams, draw_seed, mixed_seed
from idlm_kernels.generate.plan import PlanKind, StepPlan
from idlm_kernels.generate.state import STOPPED, DecodeState
from idlm_kernels.generate.step import Decoder, StepOutcome, decode_step, prefill
from idlm_kernels.model.adapter import load_adapter
from idlm_kernels.model.checkpoint import load_checkpoint
from idlm_kernels.model.tokenizer import Tokenizer
from idlm_kernels.model.transformer import Transformer
from idlm_kernels.ops.sampling import MODES
from python_ref import QState

PREFILL_CHUNK_TOKENS = 512  # bounds the memory of a prefill; the bits of the result do not depend on it


class Generator:
    """A model that decodes by introspective strided decoding.

    Args:
        model: the transformer; its backend is the one in force when it was loaded.
        tokenizer: turns ids into text; without one, results carry ids only.
        max_len: the most tokens of a request, prompt included; the model's own limit when None.
        page_size: tokens per KV page. Any size from 1 gives the same output.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        max_len: int | None = None,
        page_size: int = 64,
    ):
        limit = model.config.max_position_embeddings
        if max_len is not None and not 2 <= max_len <= limit:
            raise ValueError(f"max_len is {max_len}, wanted 2 to {limit} (the model's context)")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}, wanted at least 1")
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.max_len, self.page_size = max_len or limit, page_size
        self.id_limit = min(model.config.vocab_size, tokenizer.vocab_size if tokenizer else model.config.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "default",
        *,
        adapter: str | Path | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        backend: str | None = None,
        max_len: int | None = None,
        page_size: int = 64,
    ) -> Generator:
        """Load a checkpoint (Hugging Face folder, GGUF file, hub id, or "default") and an optional adapter folder.

        dtype is that of the weights: auto, fp32, fp16 or bf16. backend forces one for every op, process-wide.

        Raises: CheckpointError, FileNotFoundError, ValueError saying what is wrong with which file or argument.
        """
        if backend is not None:
            ops.set_backend(backend)
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no CUDA device here; use device='cpu'")
        checkpoint = load_checkpoint(source, revision=revision)
        loaded = None if adapter is None else load_adapter(adapter, checkpoint.config)
        model = Transformer(checkpoint, device=device, dtype=dtype, adapter=loaded)
        return cls(model, checkpoint.tokenizer, max_len=max_len, page_size=page_size)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        plan: PlanKind = "branched",
        stride: int = 4,
        verify: str = "match",
        row_budget: int | None = None,
    ) -> list[GenerationResult]:
        """Decode a batch of prompts (token ids) to the end; results in the order of the prompts.

        One SamplingParams for all mixes its seed with the index of the prompt; a list gives each prompt its own.
        With a row_budget, a step uses at most so many rows per request: plan and stride are then upper bounds.
        """
        run = Batch(self, prompts, params, _step_plan(plan, stride, row_budget), verify)
        for _ in run.events():
            pass
        return run.results()

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        plan: PlanKind = "branched",
        stride: int = 4,
        verify: str = "match",
        row_budget: int | None = None,
    ) -> Stream:
        """Decode one prompt step by step. Iterate for StreamEvents; `.result` holds text and figures at any time."""
        return Stream(Batch(self, [prompt], params, _step_plan(plan, stride, row_budget), verify))


class Stream:
    """An iterator over the steps of one request."""

    def __init__(self, batch: Batch):
        self._batch = batch
        self._events = batch.events()

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        return next(self._events)[1]

    @property
    def result(self) -> GenerationResult:
        """Text and figures so far; asked for before the end, it ends the request ("cancelled")."""
        return self._batch.results()[0]


class Batch:
    """A fixed set of requests from prefill to the last stop: the seam where a scheduler takes over."""

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        plan: StepPlan,
        verify: str,
    ):
        self.plan = plan
        if verify not in MODES:
            raise ValueError(f"verify is {verify!r}, wanted one of {', '.join(MODES)}")
        self._prompts = [_checked_prompt(generator, i, prompt) for i, prompt in enumerate(prompts)]
        self._params, seeds = _spread(params, len(self._prompts))
        self._outputs = [
            RequestOutput(len(prompt), p, seed, generator.tokenizer, self.plan.num_drafts)
            for prompt, p, seed in zip(self._prompts, self._params, seeds, strict=True)
        ]
        if self._prompts:
            self._state, self._decoder = self._allocate(generator, seeds, verify)

    def _allocate(self, generator: Generator, seeds: list[int], verify: str) -> tuple[DecodeState, Decoder]:
        model, plan, batch = generator.model, self.plan, len(self._prompts)
        longest = max(len(p) + s.max_tokens for p, s in zip(self._prompts, self._params, strict=True))
        max_len = min(generator.max_len, longest)
        num_slots = max_len - 1 + plan.max_rows
        model.reserve_positions(num_slots)
        pages = -(-num_slots // generator.page_size)
        cache = model.new_cache(batch * pages, generator.page_size)
        state = DecodeState.create(
            self._prompts,
            self._params,
            seeds,
            [_stop_ids(generator, p) for p in self._params],
            torch.arange(batch * pages, dtype=torch.int32, device=model.device).view(batch, pages),
            max_len=max_len,
            num_drafts=plan.num_drafts,
            mask_token_id=model.config.mask_token_id,
            id_limit=generator.id_limit,
            device=model.device,
        )
        q_state = None
        if verify == "rejection":
            vocab_size = model.config.vocab_size
            q_state = QState.empty(batch, plan.num_drafts, vocab_size, model.dtype, model.device)
        return state, Decoder(model, cache, plan, verify, q_state)

    def events(self) -> Iterator[tuple[int, StreamEvent]]:
        """Run to the end, yielding (request index, what one step of it gave)."""
        first = 0
        for lengths in _prefill_groups([len(prompt) for prompt in self._prompts]):
            outcome = prefill(self._decoder, self._state, first, lengths, PREFILL_CHUNK_TOKENS)
            yield from self._take(outcome, range(first, first + len(lengths)))
            first += len(lengths)
        while any(output.finish_reason is None for output in self._outputs):
            outcome = decode_step(self._decoder, self._state)
            yield from self._take(outcome, range(len(self._outputs)))

    def _take(self, outcome: StepOutcome, requests: Sequence[int]) -> Iterator[tuple[int, StreamEvent]]:
        """Hand the results of a step to the outputs of its requests. The one place where the host waits."""
        for b, (n, accepted, emitted, finish, *tokens) in zip(requests, outcome.packed().tolist(), strict=True):
            output = self._outputs[b]
            if output.finish_reason is None:
                event = output.take(tokens[:emitted], n, accepted, finish)
                if output.finish_reason is not None:
                    self._state.finish[b].clamp_(min=STOPPED)  # a stop string is known to the host alone
                yield b, event

    def results(self) -> list[GenerationResult]:
        """Text and figures of every request; those still running end here as "cancelled"."""
        for output in self._outputs:
            output.cancel()
        status = self._state.status.tolist() if self._outputs else []
        return [o.result(self.plan.kind, self.plan.stride, bits) for o, bits in zip(self._outputs, status, strict=True)]


def _step_plan(plan: PlanKind, stride: int, row_budget: int | None) -> StepPlan:
    return StepPlan(plan, stride) if row_budget is None else StepPlan.within(row_budget, plan, stride)


def _prefill_groups(lengths: list[int]) -> Iterator[list[int]]:
    """Split consecutive prompts into groups that one forward can prefill; a long prompt is a group of its own."""
    group: list[int] = []
    for length in lengths:
        if group and sum(group) + length > PREFILL_CHUNK_TOKENS:
            yield group
            group = []
        group.append(length)
    if group:
        yield group


def _checked_prompt(generator: Generator, index: int, prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)
    if not ids:
        raise ValueError(f"prompt {index} is empty, wanted at least one token")
    if len(ids) >= generator.max_len:
        raise ValueError(
            f"prompt {index} has {len(ids)} tokens, but the context is {generator.max_len}: wanted at most "
            f"{generator.max_len - 1}, so that one can be added"
        )
    vocab_size = generator.config.vocab_size
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"prompt {index} holds a {type(token).__name__}, wanted token ids (int)")
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompt {index} holds the id {token}, outside the vocabulary of {vocab_size}")
    return ids


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


def _stop_ids(generator: Generator, params: SamplingParams) -> list[int]:
    for token in params.stop_token_ids:
        if token >= generator.config.vocab_size:
            raise ValueError(f"stop_token_ids holds {token}, outside the vocabulary of {generator.config.vocab_size}")
    if params.stop and generator.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and this generator has none")
    ends = () if params.ignore_eos else generator.tokenizer.eos_ids if generator.tokenizer else ()
    config_ends = () if params.ignore_eos else generator.config.eos_token_ids
    return sorted({*params.stop_token_ids, *ends, *config_ends})
