"""A page that explores what drafts are worth: `page(record)` of the figures of `bench.acceptance`, one static HTML.

It shows acceptance by draft and the tokens that steps commit, tokens per forward (TPF) of every plan by its rows, from
formulas and from the run, and the speed-up that is left when rows cost something. Four ways of drafting stand side by
side: chain and quadratic plans; the two passes of Uno (arXiv 2609.04010), a drafting and a verifying forward of N rows
each; and budgeted quadratic plans, whose branches have fewer MASK rows the less probable they are. Budgeted plans are
formulas: the engine does not decode them.

All formulas take acceptance by draft index, given that the drafts before were accepted, as independent of the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idlm_kernels.generate.plan import StepPlan

TEMPLATE = Path(__file__).with_name("explorer.html")
MAX_STRIDE, MAX_ROWS = 16, 64
_SURE = 1 - 1e-9  # of a draft that is always accepted: so every state of a chain reaches every other
EVEN = (0.5, 0.6, 0.7, 0.8, 0.9)  # acceptance of every draft alike, for those who have no run of their own


@dataclass(frozen=True)
class Point:
    """A way of drafting: its name, rows of each forward, forwards of a cycle, and tokens per forward.

    widths: of a budgeted plan, as `budgeted_tpf` takes them.
    """

    plan: str
    rows: int
    tpf: float
    forwards: int = 1
    widths: tuple[int, ...] = ()


def accepted_chances(acceptance: Sequence[float], drafts: int) -> list[float]:
    """Chance that the first i drafts are all accepted, i = 0 .. drafts; the last acceptance goes on."""
    chances = [1.0]
    for j in range(drafts):
        chances.append(chances[-1] * min(acceptance[min(j, len(acceptance) - 1)], _SURE))
    return chances


def two_pass_tpf(stride: int, acceptance: Sequence[float]) -> float:
    """Of a cycle of two forwards: the base's own token, the accepted ones of N - 1 drafts, and one more."""
    return (2 + sum(accepted_chances(acceptance, stride - 1)[1:])) / 2


def budgeted_tpf(widths: Tensor, acceptance: Sequence[float]) -> Tensor:
    """Of quadratic plans [P, M] whose branch b has widths[:, b] <= M MASK rows, M the most drafts: fp64 [P].

    The last branch of a step, after its last draft, has M whatever the budget: it is the one that is taken where all
    drafts stand. So no widths at all make the chain, and all widths M the quadratic plan. A step with n drafts that
    accepts a of them commits a + 1 tokens and leaves widths[a] drafts to the next, M if a = n: a Markov chain over n,
    whose mean is taken over its stationary distribution.
    """
    most = widths.shape[1]
    chances = torch.tensor(accepted_chances(acceptance, most), dtype=torch.float64)
    move = torch.zeros(len(widths), most + 1, most + 1, dtype=torch.float64)
    stopped = (chances[:-1] - chances[1:]).expand(most + 1, most).tril(-1)  # [n, a]: a drafts of n stand, and no more
    index = widths.unsqueeze(1).expand(-1, most + 1, -1)
    move.scatter_add_(2, index, stopped.expand(len(widths), -1, -1))
    move[:, :, most] += chances
    # distribution (move - 1) = 0, of whose equations one says nothing new: the distribution sums to 1 instead.
    system = move.mT - torch.eye(most + 1, dtype=torch.float64)
    system[:, -1] = 1.0
    distribution = torch.linalg.solve(system, torch.eye(most + 1, dtype=torch.float64)[-1].expand(len(widths), -1))
    return distribution @ chances.cumsum(0)


def budgeted_points(acceptance: Sequence[float], max_stride: int = MAX_STRIDE) -> list[Point]:
    """Good budgeted plans by rows, found greedily: from each chain on, rows are added where they gain most, and from
    each quadratic plan on, they are taken away where they are missed least."""
    found = []
    for most in range(1, max_stride):
        one = torch.eye(most, dtype=torch.int64)
        ends = ((0, 1), (most, -1)) if (most + 1) ** 2 <= 2 * MAX_ROWS else ((0, 1),)
        for start, step in ends:
            widths = torch.full((1, most), start)
            while True:
                if (rows := 1 + 2 * most + int(widths.sum())) <= MAX_ROWS:
                    branches = tuple(widths[0].tolist())
                    name = "-".join(map(str, [*branches, most]))
                    tpf = float(budgeted_tpf(widths, acceptance))
                    found.append(Point(f"budgeted {name}", rows, tpf, widths=branches))
                elif step > 0:
                    break
                next_widths = (widths + step * one)[widths[0] != (most if step > 0 else 0)]
                if len(next_widths) == 0:
                    break
                widths = next_widths[budgeted_tpf(next_widths, acceptance).argmax()].unsqueeze(0)
    return _frontier(found)


def points(acceptance: Sequence[float]) -> dict[str, list[Point]]:
    """Every way of drafting, by kind, of up to 64 rows."""
    found: dict[str, list[Point]] = {"chain": [], "quadratic": [], "two passes": []}
    for n in range(2, MAX_STRIDE + 1):
        chain = StepPlan("chain", n)
        found["chain"].append(Point(f"chain N={n}", chain.max_rows, chain.expected_tpf(acceptance)))
        if n * n <= MAX_ROWS:
            plan = StepPlan("quadratic", n)
            found["quadratic"].append(Point(f"quadratic N={n}", plan.max_rows, plan.expected_tpf(acceptance)))
        found["two passes"].append(Point(f"two passes N={n}", n, two_pass_tpf(n, acceptance), 2))
    found["budgeted"] = budgeted_points(acceptance)
    return found


def _frontier(points: list[Point]) -> list[Point]:
    """Those that no plan of as few rows beats."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.rows, -p.tpf)):
        if not kept or point.tpf > kept[-1].tpf + 1e-6:
            kept.append(point)
    return kept


def page(record: dict[str, Any]) -> str:
    """The explorer of a run: `record` has `curves`, and where speed was measured "speed, greedy"."""
    curves = [*record["curves"], *({"name": f"all drafts {p:.0%}", "acceptance": [p] * 3} for p in EVEN)]
    for curve in curves:
        curve["points"] = {
            kind: [[p.plan, p.rows, round(p.tpf, 4), p.forwards] for p in row]
            for kind, row in points(curve["acceptance"]).items()
        }
    # What a forward of a plan cost, in forwards of one row, as the speeds of the run tell.
    costs = [
        [row["plan"], _rows_of(row["plan"]), row["tpf"] / row["of_ar"]]
        for row in record.get("speed, greedy", [])
        if "N=" in row["plan"]
    ]
    data = {"curves": curves, "costs": costs, "machine": record.get("machine", ""), "threads": record.get("threads")}
    shown = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", shown)


def _rows_of(name: str) -> int:
    kind, stride = name.split(" N=")
    return StepPlan(kind, int(stride)).max_rows  # type: ignore[arg-type]
