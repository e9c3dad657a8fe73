"""Which plan a batch should run: the one of most expected tokens per second. Without effect on output in `match`."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from idlm_kernels.generate.options import DecodeOptions
from idlm_kernels.generate.plan import StepPlan, plans_up_to
from idlm_kernels.generate.state import RUNNING, DecodeState
from idlm_kernels.generate.step import Decoder, decode_step
from idlm_kernels.model.transformer import Transformer

# What is expected of the drafts of a model that says nothing of it: one trained with a MASK token, and any other.
_ACCEPTANCE_OF_MASK_MODELS = (0.8,)
_ACCEPTANCE_UNTRAINED = (0.15, 0.05)
_AUTO_STRIDE = 4
_MOST_ROWS = 128  # of a measured step
_CONTEXT = 128  # committed tokens of a request in the measurement
H100_BYTES_PER_SECOND = 3.35e12
H100_BF16_FLOPS_PER_SECOND = 989e12


@dataclass(frozen=True)
class CostTable:
    """Seconds of a forward by its number of rows; between the entries a straight line."""

    seconds: Mapping[int, float]

    def __post_init__(self) -> None:
        if not self.seconds or any(rows < 1 or s <= 0 for rows, s in self.seconds.items()):
            raise ValueError(f"a cost table needs positive rows and seconds, got {dict(self.seconds)}")

    def of(self, rows: int) -> float:
        known = sorted(self.seconds)
        i = bisect_left(known, rows)
        if i == 0:
            return self.seconds[known[0]]
        if i == len(known):
            return self.seconds[known[-1]] * rows / known[-1]
        low, high = known[i - 1], known[i]
        share = (rows - low) / (high - low)
        return self.seconds[low] + share * (self.seconds[high] - self.seconds[low])

    @classmethod
    def measure(
        cls, model: Transformer, plans: Sequence[StepPlan], max_num_seqs: int = 1, rounds: int = 5
    ) -> CostTable:
        """Time whole decode steps of these plans on the device in use, the best of a few each.

        Those of one request give the cost of few rows, with all that drafting costs beside the forward; those of up
        to max_num_seqs requests with the widest plan the cost of many. The plans take turns, so that what else the
        machine does for a while slows all of them.
        """
        widest = max(plans, key=lambda plan: plan.max_rows)
        cases = [(1, plan) for plan in plans]
        cases += [(2**i, widest) for i in range(1, max_num_seqs.bit_length()) if 2**i * widest.max_rows <= _MOST_ROWS]
        steps = {batch * plan.max_rows: _timed_step(model, batch, plan) for batch, plan in cases}
        seconds = dict.fromkeys(steps, math.inf)
        for number in range(rounds + 1):
            for rows, step in steps.items():
                elapsed = step()
                if number > 0:  # the first round loads and prepares
                    seconds[rows] = min(seconds[rows], elapsed)
        return cls(seconds)

    @classmethod
    def roofline(cls, model: Transformer, most_rows: int = 1024) -> CostTable:
        """Forwards on an H100 by its data sheet: the larger of reading all weights and multiplying by them."""
        config = model.config
        attention = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
        per_layer = config.hidden_size * (attention + 3 * config.intermediate_size)
        weights = config.num_layers * per_layer + config.vocab_size * config.hidden_size
        size = torch.finfo(model.weight_dtype).bits / 8
        table = {}
        for rows in (2**i for i in range(most_rows.bit_length())):
            table[rows] = max(weights * size / H100_BYTES_PER_SECOND, 2 * weights * rows / H100_BF16_FLOPS_PER_SECOND)
        return cls(table)


@dataclass
class PlanPolicy:
    """Chooses among plans by batch size, a cost table and the acceptance seen so far.

    acceptance: by draft index, given that all before were accepted; what is known of the model at first, then a fading
    average of what is seen. memory: drafts after which an observation has faded to 1 / e.
    """

    plans: tuple[StepPlan, ...]
    cost: CostTable
    acceptance: list[float] = field(default_factory=lambda: [0.6])
    memory: float = 64.0

    def choose(self, batch: int) -> StepPlan:
        """The plan of most expected tokens per second for this many requests."""
        return max(
            self.plans, key=lambda plan: plan.expected_tpf(self.acceptance) / self.cost.of(batch * plan.max_rows)
        )

    def observe(self, verified: Sequence[int], accepted: Sequence[int]) -> None:
        """Take note, by draft index, of drafts that were verified, given that all before them were."""
        for j, (seen, kept) in enumerate(zip(verified, accepted, strict=True)):
            if seen:
                self.acceptance += self.acceptance[-1:] * (j + 1 - len(self.acceptance))
                weight = seen / (seen + self.memory)
                self.acceptance[j] += weight * (kept / seen - self.acceptance[j])

    @property
    def widest(self) -> StepPlan:
        """The plan with the most rows, which sizes pages and tables."""
        return max(self.plans, key=lambda plan: plan.max_rows)

    @property
    def num_drafts(self) -> int:
        return max(plan.num_drafts for plan in self.plans)

    @classmethod
    def of(
        cls,
        model: Transformer,
        options: DecodeOptions,
        max_num_seqs: int = 1,
        costs: dict[tuple[object, ...], CostTable] | None = None,
    ) -> PlanPolicy:
        """The choice that the plan, stride and row_budget of the options leave, for up to max_num_seqs requests.

        costs: tables that were measured before; those that are measured here are added to it.
        """
        plan, stride, row_budget = options.plan, options.stride, options.row_budget
        acceptance = _expected_acceptance(model)
        longest = stride
        if longest == "auto":
            longest = _AUTO_STRIDE if model.acceptance is None else len(acceptance) + 1
        if plan != "auto" and stride != "auto":
            chosen = StepPlan(plan, longest) if row_budget is None else StepPlan.within(row_budget, plan, longest)
            return cls.fixed(chosen)
        plans = plans_up_to(plan, StepPlan("chain", longest).stride, row_budget)
        if len(plans) == 1:
            return cls.fixed(plans[0])
        if model.device.type != "cpu":
            return cls(tuple(plans), CostTable.roofline(model), list(acceptance))
        costs = {} if costs is None else costs
        key = (*plans, max_num_seqs.bit_length())  # what `measure` reads of it
        if key not in costs:
            costs[key] = CostTable.measure(model, plans, max_num_seqs)
        return cls(tuple(plans), costs[key], list(acceptance))

    @classmethod
    def fixed(cls, plan: StepPlan) -> PlanPolicy:
        return cls((plan,), CostTable({1: 1.0}))


def _expected_acceptance(model: Transformer) -> Sequence[float]:
    if model.acceptance is not None:
        return model.acceptance
    return _ACCEPTANCE_UNTRAINED if model.config.mask_token_id is None else _ACCEPTANCE_OF_MASK_MODELS


def _timed_step(model: Transformer, batch: int, plan: StepPlan) -> Callable[[], float]:
    """Runs a step, all drafts present, over a context of _CONTEXT tokens, and returns its seconds."""
    state = DecodeState.empty(
        batch,
        _CONTEXT + plan.stride,
        1,
        plan.num_drafts,
        1,
        mask_token_id=model.config.mask_token_id,
        id_limit=model.config.vocab_size,
        device=model.device,
    )
    state.page_table += torch.arange(batch, dtype=torch.int32, device=model.device).unsqueeze(1)
    cache = model.new_cache(batch, _CONTEXT + plan.max_rows)
    decoder = Decoder(model, cache, plan, "match", rerank=model.rerank_head is not None, greedy=True)

    def step() -> float:
        state.lengths.fill_(_CONTEXT)
        state.length_limits.fill_(_CONTEXT + plan.stride)
        state.num_drafts.fill_(plan.num_drafts)
        state.finish.fill_(RUNNING)
        start = time.perf_counter()
        with torch.inference_mode():
            decode_step(decoder, state)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - start

    return step
