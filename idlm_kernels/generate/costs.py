"""What a step costs by its number of rows: a table, or what the steps that run tell."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch

from idlm_kernels.model.transformer import Transformer

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


# Steps of the default model by rows, in units of one row, to begin with: the compiled kernels on two Zen 5 cores.
CPU_PRIOR = CostTable({1: 1.0, 3: 1.25, 4: 1.3, 7: 1.7, 9: 2.0, 16: 3.0, 64: 12.0})


class LearnedCosts:
    """Costs that are learned from the steps that run; nothing is timed beforehand.

    A row count that was seen counts by the median of its latest steps, which a moment's noise does not move. Others
    follow the prior, scaled to what was seen.
    """

    LATEST = 16  # steps that a row count is judged by
    ENOUGH = 3  # steps after which a row count is known

    def __init__(self, prior: CostTable = CPU_PRIOR):
        self._prior = prior
        # Of all policies that share these costs: a policy may last for one short request.
        self.choices_since_trial = self.retries = 0
        self._seen: dict[int, deque[float]] = {}

    def observe(self, rows: int, seconds: float) -> None:
        self._seen.setdefault(rows, deque(maxlen=self.LATEST)).append(seconds)

    def knows(self, rows: int) -> bool:
        return len(self._seen.get(rows, ())) >= self.ENOUGH

    def of(self, rows: int) -> float:
        if self.knows(rows):
            return median(self._seen[rows])
        known = [other for other in self._seen if self.knows(other)]
        if not known:
            return self._prior.of(rows)
        nearest = min(known, key=lambda other: abs(other - rows))
        return self._prior.of(rows) * median(self._seen[nearest]) / self._prior.of(nearest)
