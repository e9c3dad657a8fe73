"""The explorer's formulas against simulated steps, and the page that holds them."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import torch

from bench import explorer
from bench.explorer import Point, budgeted_tpf, page, points, two_pass_tpf
from idlm_kernels.generate.plan import StepPlan


def simulated(widths: list[int], acceptance: list[float], steps: int = 60_000) -> float:
    rng = random.Random(3)
    n = tokens = 0
    for _ in range(steps):
        a = 0
        while a < n and rng.random() < acceptance[min(a, len(acceptance) - 1)]:
            a += 1
        tokens, n = tokens + a + 1, widths[a] if a < n else len(widths)
    return tokens / steps


@pytest.mark.parametrize("widths", [[1], [0], [1, 0], [3, 0, 0], [2, 0, 3], [4, 3, 2, 1]])
def test_budgeted_plans_commit_what_their_steps_commit(widths: list[int]) -> None:
    for acceptance in ([0.8], [0.7, 0.5, 0.9]):
        found = float(budgeted_tpf(torch.tensor([widths]), acceptance))
        assert found == pytest.approx(simulated(widths, acceptance), rel=0.015)


@pytest.mark.parametrize("stride", range(2, 9))
def test_budgets_lie_between_the_chain_and_the_quadratic_plan(stride: int) -> None:
    acceptance = [0.8, 0.6, 0.7]
    for kind, width in (("chain", 0), ("quadratic", stride - 1)):
        found = float(budgeted_tpf(torch.full((1, stride - 1), width), acceptance))
        assert found == pytest.approx(StepPlan(kind, stride).expected_tpf(acceptance))  # type: ignore[arg-type]
    assert float(budgeted_tpf(torch.full((1, stride - 1), stride - 1), [1.0])) == pytest.approx(stride)


def test_two_passes_are_those_of_the_paper() -> None:
    """A cycle commits the base's token, the accepted of N - 1 drafts and one more: 2 to N + 1 in two forwards."""
    assert two_pass_tpf(4, [0.0]) == 1.0
    assert two_pass_tpf(4, [1.0]) == pytest.approx(2.5)
    assert two_pass_tpf(3, [0.5, 0.4]) == pytest.approx((2 + 0.5 + 0.2) / 2)


def test_what_is_drawn() -> None:
    found = points([0.7, 0.6])
    assert [p.rows for p in found["quadratic"]] == [n * n for n in range(2, 9)]
    assert found["chain"][0] == Point("chain N=2", 3, StepPlan("chain", 2).expected_tpf([0.7]))
    assert all(p.forwards == 2 for p in found["two passes"])
    for of_budget, above in zip(found["budgeted"], found["budgeted"][1:], strict=False):
        assert of_budget.rows < above.rows <= 64 and of_budget.tpf < above.tpf, "each is the best of its rows"
    for plan in found["quadratic"] + found["chain"]:
        assert any(p.rows <= plan.rows and p.tpf >= plan.tpf - 1e-9 for p in found["budgeted"])


def test_the_page_holds_the_figures_and_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "EVEN", (0.7,))
    record: dict[str, Any] = {
        "machine": "</script>",
        "threads": 2,
        "curves": [
            {
                "name": "greedy",
                "acceptance": [0.6, 0.5],
                "tpf": {"chain": {"2": 1.4}, "quadratic": {"2": 1.6}},
                "committed": {"chain": [0.6, 0.4, 0.0, 0.0], "quadratic": [0.4, 0.6, 0.0, 0.0]},
            }
        ],
        "speed, greedy": [
            {"plan": "ar", "tpf": 1.0, "tokens_per_second": 10.0, "of_ar": 1.0},
            {"plan": "quadratic N=2", "tpf": 1.6, "tokens_per_second": 12.0, "of_ar": 1.2},
        ],
    }
    text = page(record)
    found = re.search(r"const DATA = (.*);\n", text)
    assert found and text.count("</script>") == 1
    data = json.loads(found[1])
    assert data["machine"] == "</script>"
    assert data["costs"] == [["quadratic N=2", 4, pytest.approx(1.6 / 1.2)]], "a forward of 4 rows in forwards of one"
    assert [c["name"] for c in data["curves"]] == ["greedy", *(f"all drafts {p:.0%}" for p in explorer.EVEN)]
    assert data["curves"][0]["points"]["quadratic"][0] == ["quadratic N=2", 4, 1.6, 1]
    assert not re.findall(r"(?:src|href|url)\s*[=(]", text) and text.count("http") == 1, "but for SVG's namespace"
