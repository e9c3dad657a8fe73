"""What a step costs by its number of rows: a table, or what the steps that run tell."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
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


# Steps by rows, in units of one row, to begin with: between what two cores of Zen 5 and of Sapphire Rapids take.
CPU_PRIOR = CostTable({1: 1.0, 3: 1.4, 4: 1.55, 7: 2.1, 9: 2.5, 16: 4.0, 64: 15.0})


class LearnedCosts:
    """Costs that are learned from the steps that run; nothing is timed beforehand.

    What decides between plans is what their steps cost beside a step of ordinary decoding. So a step with drafts counts
    by that ratio, to the ordinary steps of about the same time: longer contexts and other programs slow both. A plan
    counts by the median of its latest steps, which a moment's noise does not move. Plans that were not seen follow the
    prior, whose price of a row is scaled to what was seen.
    """

    LATEST = 16  # steps that a plan is judged by
    ENOUGH = 3  # steps after which a plan is known

    def __init__(self, prior: CostTable = CPU_PRIOR):
        self._prior = prior
        # Of all policies that share these costs: a policy may last for one short request.
        self.choices_since_trial = self.choices_since_ordinary = 0
        self._ordinary: dict[int, deque[float]] = {}  # seconds, by the number of requests
        self._guessed: dict[int, float] = {}  # the same, of plans without ordinary decoding
        self._ratios: dict[tuple[int, int], deque[float]] = {}  # by the number of requests and the rows of each

    def observe(self, batch: int, rows: int, seconds: float) -> None:
        """A step of `batch` requests of `rows` rows each took so long. One row: ordinary decoding."""
        if rows == 1:
            self._ordinary.setdefault(batch, deque(maxlen=self.ENOUGH + 1)).append(seconds)
            return
        ordinary = self._ordinary.get(batch)
        # Where ordinary decoding is no choice, the first step of another plan stands for it.
        unit = median(ordinary) if ordinary else self._guessed.setdefault(batch, seconds / self._expected(batch, rows))
        self._ratios.setdefault((batch, rows), deque(maxlen=self.LATEST)).append(seconds / unit)

    def knows(self, batch: int, rows: int) -> bool:
        seen = self._ordinary.get(batch, ()) if rows == 1 else self._ratios.get((batch, rows), ())
        return len(seen) >= self.ENOUGH

    def of(self, batch: int, rows: int) -> float:
        """A step of `batch` requests of `rows` rows each, in units of an ordinary step of so many requests."""
        if rows == 1:
            return 1.0
        if self.knows(batch, rows):
            return median(self._ratios[batch, rows])
        known = [key for key in self._ratios if self.knows(*key)]
        if not known:
            return self._expected(batch, rows)
        nearest = min(known, key=lambda key: (abs(math.log(key[0] / batch)), abs(key[1] - rows)))
        seen, expected = median(self._ratios[nearest]) - 1, self._expected(*nearest) - 1
        return 1 + max(self._expected(batch, rows) - 1, 0.0) * (seen / expected if expected > 0 < seen else 1.0)

    def _expected(self, batch: int, rows: int) -> float:
        return self._prior.of(batch * rows) / self._prior.of(batch)

    def table(self) -> list[tuple[int, int, float]]:
        """What is known: requests, rows of each, and the ratio."""
        return [(*key, median(self._ratios[key])) for key in sorted(self._ratios) if self.knows(*key)]

    def begin_with(self, table: Iterable[tuple[int, int, float]]) -> None:
        """Take a table of earlier steps as if they had just run."""
        for batch, rows, ratio in table:
            self._ratios[batch, rows] = deque([ratio] * self.ENOUGH, maxlen=self.LATEST)
