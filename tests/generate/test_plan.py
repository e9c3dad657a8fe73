"""The rows of a step against the visibility rules of the design, element by element."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from idlm_kernels import use_backend
from idlm_kernels.generate import StepPlan
from idlm_kernels.generate.plan import plan_rows, prefill_rows
from idlm_kernels.generate.state import LENGTH, DecodeState
from tests.tiny import tiny_state

MASK_ID = 60


def make_state(lengths: list[int], num_drafts: list[int], stride: int, page_size: int, absent: set[int]) -> DecodeState:
    batch = len(lengths)
    pages = -(-(max(lengths) + 80) // page_size)
    order = list(range(batch * pages))
    random.Random(1).shuffle(order)
    state = tiny_state([[(7 * b + i) % 50 for i in range(n)] for b, n in enumerate(lengths)], pages, stride - 1)
    state = dataclasses.replace(state, mask_id=MASK_ID)
    state.page_table.copy_(torch.tensor(order).view(batch, pages))
    state.num_drafts.copy_(torch.tensor(num_drafts))
    for b, n in enumerate(num_drafts):
        state.drafts[b, :n] = torch.tensor([50 + i for i in range(n)])
    for b in absent:
        state.finish_reason[b] = LENGTH
    return state


def expected_rows(state: DecodeState, b: int, kind: str, num_spec_tokens: int) -> list[tuple[int, bool, int, set[int]]]:
    """(id, is MASK, position, visible step rows) of each row of request b, read off design section 3."""
    length, n = int(state.lengths[b]), int(state.num_drafts[b])
    rows = [(int(state.text[b, length - 1]), False, length - 1, {0})]
    for i in range(1, n + 1):
        rows.append((int(state.drafts[b, i - 1]), False, length - 1 + i, set(range(i + 1))))
    for branch in {"ar": [], "chain": [n], "quadratic": list(range(n + 1))}[kind]:
        first = len(rows)
        for j in range(num_spec_tokens):
            seen = set(range(branch + 1)) | set(range(first, first + j + 1))
            rows.append((MASK_ID, True, length + branch + j, seen))
    return rows


CASES = [("ar", 1), *(("chain", n) for n in (2, 3, 4, 8, 32)), *(("quadratic", n) for n in range(2, 9))]


@pytest.mark.parametrize(("kind", "stride"), CASES)
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_rows_follow_the_design(backend: str, kind: str, stride: int, page_size: int) -> None:
    plan = StepPlan(kind, stride)  # type: ignore[arg-type]
    num_spec_tokens = plan.num_drafts
    lengths = [1, 5, 12, 2, 9]
    state = make_state(
        lengths,
        [num_spec_tokens, 0, min(1, num_spec_tokens), num_spec_tokens, num_spec_tokens],
        plan.stride,
        page_size,
        absent={3},
    )
    with use_backend(backend):
        rows = plan_rows(plan, state, page_size)
    total = len(lengths) * plan.max_rows
    assert rows.ids.shape == (total,)
    start = 0
    for b in range(len(lengths)):
        want = [] if b == 3 else expected_rows(state, b, kind, num_spec_tokens)
        assert rows.query_start_loc[b] == start
        assert rows.seq_lens[b] == (lengths[b] - 1 + len(want) if want else 0)
        for r, (token, is_mask, position, seen) in enumerate(want):
            t = start + r
            assert (rows.ids[t], rows.is_mask[t], rows.positions[t]) == (token, is_mask, position)
            slot = lengths[b] - 1 + r
            page = int(state.page_table[b, slot // page_size])
            assert rows.slot_mapping[t] == page * page_size + slot % page_size
            if kind == "quadratic":
                assert rows.tree_mask is not None
                assert {j for j in range(64) if int(rows.tree_mask[t]) >> j & 1} == seen
            else:
                assert rows.tree_mask is None and seen == set(range(r + 1)), "a chain is plain causal attention"
        start += len(want)
    assert rows.query_start_loc[-1] == start
    assert (rows.slot_mapping[start:] == -1).all() and not rows.is_mask[start:].any()


def test_prefill_rows_end_in_the_first_step() -> None:
    state = make_state([7, 3], [0, 0], 4, 3, set())
    rows = prefill_rows(state, [2, 0], [7, 3], 3, 3)
    masks = [MASK_ID] * 3
    assert rows.ids.tolist() == [*state.text[0, 2:7].tolist(), *masks, *state.text[1, :3].tolist(), *masks]
    assert rows.is_mask.tolist() == [False] * 5 + [True] * 3 + [False] * 3 + [True] * 3
    assert rows.positions.tolist() == [*range(2, 10), *range(6)]
    assert rows.seq_lens.tolist() == [10, 6] and rows.query_start_loc.tolist() == [0, 8, 14]


@pytest.mark.parametrize(
    ("kind", "stride", "error"),
    [
        ("quadratic", 1, ValueError),
        ("quadratic", 9, ValueError),
        ("chain", 1, ValueError),
        ("chain", 33, ValueError),
        ("chain", True, TypeError),
        ("chain", 2.0, TypeError),
        ("tree", 4, ValueError),
    ],
)
def test_plans_out_of_range_are_refused(kind: str, stride: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="stride|plan"):
        StepPlan(kind, stride)  # type: ignore[arg-type]


def test_ar_is_one_row_at_any_stride() -> None:
    assert (StepPlan("ar", 4).max_rows, StepPlan("ar", 4).num_drafts) == (1, 0)
    assert StepPlan("quadratic", 4).max_rows == 16 and StepPlan("chain", 4).max_rows == 7


def simulated_tpf(plan: StepPlan, p: float, steps: int = 200_000) -> float:
    """Tokens per forward of the rules of design section 3 with independent acceptance, by brute force."""
    rng = random.Random(7)
    n = tokens = 0
    for _ in range(steps):
        a = 0
        while a < n and rng.random() < p:
            a += 1
        tokens += a + 1
        n = plan.num_drafts if plan.quadratic or a == n else 0
    return tokens / steps


@pytest.mark.parametrize(
    ("kind", "stride"), [("ar", 1), ("chain", 2), ("chain", 4), ("quadratic", 2), ("quadratic", 4)]
)
@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 1.0])
def test_expected_tpf(kind: str, stride: int, p: float) -> None:
    plan = StepPlan(kind, stride)  # type: ignore[arg-type]
    assert plan.expected_tpf(p) == pytest.approx(simulated_tpf(plan, p), rel=0.01)


def test_expected_tpf_of_the_design() -> None:
    assert StepPlan("chain", 4).expected_tpf(0.9) == pytest.approx(2.92, abs=0.005)
    assert StepPlan("quadratic", 4).expected_tpf(0.9) == pytest.approx(3.44, abs=0.005)


def test_row_budget() -> None:
    assert StepPlan.within(1, "quadratic", 8) == StepPlan("ar", 1)
    assert StepPlan.within(2, "quadratic", 8) == StepPlan("ar", 1)
    assert StepPlan.within(16, "quadratic", 4) == StepPlan("quadratic", 4)
    assert StepPlan.within(64, "quadratic", 3) == StepPlan("quadratic", 3)
    assert StepPlan.within(64, "chain", 4, acceptance=1.0) == StepPlan("chain", 4)
    for budget in range(1, 80):
        for kind in ("ar", "chain", "quadratic"):
            chosen = StepPlan.within(budget, kind, 6)  # type: ignore[arg-type]
            assert chosen.max_rows <= budget and (kind == "quadratic" or not chosen.quadratic)
            rivals = [StepPlan(k, n) for k in ("chain", "quadratic") for n in range(2, 7) if k == "chain" or k == kind]  # type: ignore[arg-type]
            fitting = [r for r in rivals if r.max_rows <= budget and kind != "ar"]
            assert all(chosen.expected_tpf(0.8) >= r.expected_tpf(0.8) for r in fitting)
    with pytest.raises(ValueError, match="row_budget is 0"):
        StepPlan.within(0, "chain", 4)
    with pytest.raises(TypeError, match="row_budget"):
        StepPlan.within(2.5, "chain", 4)  # type: ignore[arg-type]
