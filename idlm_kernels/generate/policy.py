"""Which plan a batch should run: the one of most expected tokens per second. Without effect on output in `match`."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from idlm_kernels.generate.plan import StepPlan
from idlm_kernels.model.transformer import Rows, Transformer

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
    def measure(cls, model: Transformer, most_rows: int = 64, repeats: int = 3) -> CostTable:
        """Time forwards of 1, 2, 4, .. rows of one request on the device in use; the best of a few."""
        seconds: dict[int, float] = {}
        cache = model.new_cache(1, most_rows)
        device = model.device
        rows = 1
        while rows <= most_rows:
            batch = Rows(
                ids=torch.zeros(rows, dtype=torch.int64, device=device),
                is_mask=torch.arange(rows, device=device) * 2 >= rows,
                positions=torch.arange(rows, device=device),
                slot_mapping=torch.arange(rows, device=device),
                page_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
                seq_lens=torch.full((1,), rows, dtype=torch.int32, device=device),
                query_start_loc=torch.tensor([0, rows], dtype=torch.int32, device=device),
                tail_mask=None,
                max_query_len=rows,
            )
            times = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                model.forward(batch, cache)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - start)
            seconds[rows] = min(times[1:])
            rows *= 2
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
    """Chooses among plans by batch size, a cost table and the acceptance seen so far (a fading average)."""

    plans: tuple[StepPlan, ...]
    cost: CostTable
    acceptance: float = 0.6
    memory: float = 64.0  # drafts after which an observation has faded to 1 / e

    def choose(self, batch: int) -> StepPlan:
        """The plan of most expected tokens per second for this many requests."""
        return max(
            self.plans, key=lambda plan: plan.expected_tpf(self.acceptance) / self.cost.of(batch * plan.max_rows)
        )

    def observe(self, verified: int, accepted: int) -> None:
        """Take note of drafts that were verified, given that all before them stood."""
        if verified:
            weight = verified / (verified + self.memory)
            self.acceptance += weight * (accepted / verified - self.acceptance)

    @property
    def widest(self) -> StepPlan:
        """The plan with the most rows, which sizes pages and tables."""
        return max(self.plans, key=lambda plan: plan.max_rows)

    @property
    def num_drafts(self) -> int:
        return max(plan.num_drafts for plan in self.plans)

    @classmethod
    def fixed(cls, plan: StepPlan) -> PlanPolicy:
        return cls((plan,), CostTable({1: 1.0}))

    @classmethod
    def auto(cls, cost: CostTable, max_stride: int = 8, row_budget: int | None = None) -> PlanPolicy:
        """All plans up to a stride, and up to a number of rows per request."""
        strides = range(2, max_stride + 1)
        drafting = [StepPlan("chain", n) for n in strides] + [StepPlan("branched", n) for n in strides]
        fitting = [plan for plan in drafting if row_budget is None or plan.max_rows <= row_budget]
        return cls((StepPlan("ar", 1), *fitting), cost)
