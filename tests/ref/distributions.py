"""Statistics for sampling tests: how well do observed counts agree with an exact distribution? No SciPy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

REJECT_BELOW = (
    1e-4  # with fixed seeds a test either passes for ever or fails for ever; true distributions stay far above
)
DETECT_BELOW = 1e-6  # a planted bias has to fall below this


def chi_square_p(counts: Tensor, distribution: Tensor, min_expected: float = 5.0) -> float:
    """p-value of Pearson's chi-square test of integer counts against probabilities of the same shape.

    Cells are merged, the rarest first, until each expects `min_expected` counts. A count in a cell of probability 0
    gives 0 at once.
    """
    counts, distribution = counts.flatten().double(), distribution.flatten().double()
    assert abs(float(distribution.sum()) - 1) < 1e-9, "the distribution does not add up to 1"
    if bool((counts[distribution == 0] > 0).any()):
        return 0.0
    expected = distribution * counts.sum()
    order = expected.argsort()
    bins: list[tuple[float, float]] = []
    seen = wanted = 0.0
    for o, e in zip(counts[order].tolist(), expected[order].tolist(), strict=True):
        seen, wanted = seen + o, wanted + e
        if wanted >= min_expected:
            bins.append((seen, wanted))
            seen = wanted = 0.0
    if bins and wanted > 0:
        last = bins.pop()
        bins.append((last[0] + seen, last[1] + wanted))
    if len(bins) < 2:
        return 1.0
    statistic = sum((o - e) ** 2 / e for o, e in bins)
    half_freedom = torch.tensor((len(bins) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def excess_p(count: int, expected: float) -> float:
    """P(Poisson(expected) >= count): for events too rare for a chi-square cell."""
    if count == 0:
        return 1.0
    return float(
        torch.special.gammainc(
            torch.tensor(float(count), dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
        )
    )


def total_variation(counts: Tensor, distribution: Tensor) -> float:
    """Half the L1 distance between the observed frequencies and the distribution."""
    return float((counts.double() / counts.sum() - distribution.double()).abs().sum() / 2)


def counts_of(ids: Tensor, num_ids: int) -> Tensor:
    """How often each id 0..num_ids-1 occurs."""
    return torch.bincount(ids.flatten(), minlength=num_ids)


def cells(*columns: Tensor, num_ids: int) -> Tensor:
    """One cell number per row for tuples of ids: the columns as digits in base num_ids."""
    cell = torch.zeros_like(columns[0])
    for column in columns:
        cell = cell * num_ids + column
    return cell


def assert_follows(counts: Tensor, distribution: Tensor, what: str = "") -> None:
    """Fail unless the counts agree with the distribution, by chi-square and by total variation."""
    p = chi_square_p(counts, distribution)
    assert p > REJECT_BELOW, f"{what}: chi-square p = {p:.2e}\ncounts {counts.tolist()}\nwanted {distribution.tolist()}"
    # E[TV] <= sum sqrt(p (1 - p) / (2 pi n)) <= 0.4 sqrt(cells / n)
    bound = (distribution.numel() / int(counts.sum())) ** 0.5
    assert total_variation(counts, distribution) < bound, (
        f"{what}: total variation {total_variation(counts, distribution):.4f}"
    )


def transformed_distribution(
    row: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    id_limit: int | None = None,
    mask_id: int = -1,
) -> list[float]:
    """Probabilities of a row of finite or -inf logits after the transform of the contract, in fp64, loop by loop."""
    limit = len(row) if id_limit is None else id_limit
    x = {i: v for i, v in enumerate(row) if i < limit and i != mask_id and v > -math.inf}
    top = max(x.values())
    if temperature < 1e-4:
        winner = min(i for i in x if x[i] == top)
        return [float(i == winner) for i in range(len(row))]
    weight = {i: math.exp((v - top) / temperature) for i, v in x.items()}
    if top_k > 0:
        kth = sorted(weight.values(), reverse=True)[:top_k][-1]
        weight = {i: w for i, w in weight.items() if w >= kth}
    if top_p < 1:
        total, mass, last = math.fsum(weight.values()), 0.0, 0.0
        for w in sorted(weight.values(), reverse=True):
            mass, last = mass + w / total, w
            if mass >= top_p:
                break
        weight = {i: w for i, w in weight.items() if w >= last}
    weight = {i: w for i, w in weight.items() if w >= min_p * max(weight.values())}
    total = math.fsum(weight.values())
    return [weight.get(i, 0.0) / total for i in range(len(row))]
