"""The plan of a step: which rows each request runs, and the packing of those rows into one forward.

Words and layout: design sections 2 and 3. A request with n drafts runs clean rows 0..n (pending, drafts), then K MASK
rows for each branch. The rows of a step are a function of device tensors, with shapes that depend on (B, plan) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from idlm_kernels import ops
from idlm_kernels._deprecated import warn_renamed
from idlm_kernels.generate.state import DecodeState
from idlm_kernels.model.rows import Rows
from python_ref.noise import noise_ids

PlanKind = Literal["ar", "chain", "quadratic"]
MAX_STRIDE = {"ar": 1, "chain": 32, "quadratic": 8}


def plan_kind(name: str) -> str:
    """The name itself, or today's name of a plan that was renamed."""
    if name != "branched":
        return name
    warn_renamed("plan ", "'branched'", "'quadratic'")
    return "quadratic"


@dataclass(frozen=True)
class StepPlan:
    """kind and stride N of every step of a batch. AR is the plan with N = 1: one row, no draft, no MASK.

    "chain": K MASK rows after the last draft, 2N - 1 rows. "quadratic": K MASK rows after pending and after each draft,
    N * N rows, so that there are new drafts whichever draft is rejected. It is the quadratic decoding of Samragh et al.
    (arXiv 2507.11851, where gated LoRA comes from as well).
    """

    kind: PlanKind
    stride: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", plan_kind(self.kind))
        if self.kind not in MAX_STRIDE:
            raise ValueError(f"plan is {self.kind!r}, wanted one of {', '.join(MAX_STRIDE)}")
        if isinstance(self.stride, bool) or not isinstance(self.stride, int):
            raise TypeError(f"stride must be an int, got {type(self.stride).__name__}")
        if self.kind == "ar":
            object.__setattr__(self, "stride", 1)
        elif not 2 <= self.stride <= MAX_STRIDE[self.kind]:
            raise ValueError(f"stride is {self.stride}, wanted 2 to {MAX_STRIDE[self.kind]} for a {self.kind} plan")

    @property
    def quadratic(self) -> bool:
        """Whether every draft has a branch of MASK rows, and not the last one alone."""
        return self.kind == "quadratic"

    @property
    def num_drafts(self) -> int:
        """K, the drafts of a step and the MASK rows of a branch."""
        return self.stride - 1

    @property
    def max_rows(self) -> int:
        """R, the most rows of a request in a step."""
        return self.stride**2 if self.quadratic else 2 * self.stride - 1

    def expected_tpf(self, acceptance: float | Sequence[float]) -> float:
        """Tokens per forward in the steady state, for an acceptance by draft index (the last one goes on), or for all.

        Quadratic: 1 + p_1 + p_1 p_2 + .. Chain: of two kinds of steps, those with drafts commit the same, those after a
        rejection have none and commit one token.
        """
        shares = [acceptance] if isinstance(acceptance, (int, float)) else acceptance
        run = all_accepted = 1.0
        for j in range(self.num_drafts):
            all_accepted *= shares[min(j, len(shares) - 1)]
            run += all_accepted
        if self.quadratic or self.stride == 1:
            return run
        rejected = 1 - all_accepted
        return (run + rejected) / (1 + rejected)

    @classmethod
    def within(cls, row_budget: int, kind: PlanKind, stride: int, acceptance: float = 0.8) -> StepPlan:
        """The plan of most expected tokens per forward with at most row_budget rows per request.

        kind and stride bound the choice from above (ar < chain < quadratic). A budget of one row leaves AR.
        """
        if isinstance(row_budget, bool) or not isinstance(row_budget, int):
            raise TypeError(f"row_budget must be an int, got {type(row_budget).__name__}")
        if row_budget < 1:
            raise ValueError(f"row_budget is {row_budget}, wanted at least 1 row per request")
        bound = cls(kind, stride)
        kinds: tuple[PlanKind, ...] = ("chain", "quadratic") if bound.quadratic else (bound.kind,)
        plans = [cls(k, n) for k in kinds for n in range(2, bound.stride + 1)] + [cls("ar", 1)]
        fitting = [plan for plan in plans if plan.max_rows <= row_budget]
        # Of equal plans the one with fewer rows: N = 2 chains and branches, say, at an acceptance of 1.
        return max(fitting, key=lambda plan: (plan.expected_tpf(acceptance), -plan.max_rows))


def plans_up_to(kind: PlanKind | Literal["auto"], stride: int, row_budget: int | None = None) -> list[StepPlan]:
    """The plans of a kind with at most this stride and rows per request; of all kinds, AR too, for "auto".

    AR alone where no plan fits the budget.
    """
    kinds: tuple[PlanKind, ...] = ("chain", "quadratic") if kind == "auto" else (StepPlan(kind, 2).kind,)
    drafting = [StepPlan(k, n) for k in kinds for n in range(2, min(stride, MAX_STRIDE[k]) + 1)]
    fitting = [plan for plan in drafting if row_budget is None or plan.max_rows <= row_budget]
    return [StepPlan("ar", 1), *fitting] if kind == "auto" or not fitting else fitting


def slot_of(page_table: Tensor, request: Tensor, index: Tensor, page_size: int) -> Tensor:
    """Slot (page * page_size + offset), int64, of the index-th token of a request."""
    return page_table[request, index // page_size].long() * page_size + index % page_size


def plan_rows(plan: StepPlan, state: DecodeState, page_size: int) -> Rows:
    """The rows of the next step of every running request, packed; T = B * R rows, padding last."""
    ids, is_mask, positions, slots, tree_mask, seq_lens, query_start_loc = ops.plan_rows(
        state.with_drafts(plan.num_drafts),
        state.mask_id,
        page_size,
        quadratic=plan.quadratic,
        noise_below=state.noise_below,
    )
    return Rows(
        ids=ids,
        is_mask=is_mask,
        positions=positions,
        slot_mapping=slots,
        page_table=state.page_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        tree_mask=tree_mask if plan.quadratic else None,
        max_query_len=plan.max_rows,
        has_masks=plan.num_drafts > 0,
    )


def _mask_ids(state: DecodeState, request: Tensor, place: Tensor, position: Tensor) -> Tensor | int:
    """What MASK rows carry as their id; place: of the row among the request's keys."""
    if not state.noise_below:
        return state.mask_id
    return noise_ids(state.seed[request], place, position, state.noise_below)


def prefill_rows(state: DecodeState, starts: list[int], stops: list[int], num_masks: int, page_size: int) -> Rows:
    """Tokens starts[b] .. stops[b] - 1 of every request b, each followed by num_masks MASK rows: a prefill chunk.

    Where a chunk reaches the end of its prompt (stops[b] = L) it holds the rows of the first step as well, which so
    costs no forward of its own: pending, and the MASK rows after it, are plain causal rows behind the prompt.
    """
    device = state.text.device
    counts = [stop - start + num_masks for start, stop in zip(starts, stops, strict=True)]
    request = torch.tensor([b for b, count in enumerate(counts) for _ in range(count)], device=device)
    index = torch.tensor([start + i for start, count in zip(starts, counts, strict=True) for i in range(count)])
    index, stop = index.to(device), torch.tensor(stops, device=device)
    is_mask = index >= stop[request]
    token = state.text[request, torch.minimum(index, stop[request] - 1)]
    return Rows(
        ids=torch.where(is_mask, _mask_ids(state, request, index, index), token),
        is_mask=is_mask,
        positions=index,
        slot_mapping=slot_of(state.page_table, request, index, page_size),
        page_table=state.page_table,
        seq_lens=(stop + num_masks).to(torch.int32),
        query_start_loc=torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32),
        tree_mask=None,
        max_query_len=max(counts),
        has_masks=num_masks > 0,
    )
