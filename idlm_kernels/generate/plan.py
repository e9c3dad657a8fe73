"""The plan of a step: which rows each request runs, and the packing of those rows into one forward.

Words and layout: design sections 2 and 3. A request with n drafts runs clean rows 0..n (pending, drafts), then K MASK
rows for each branch. `plan_rows` is a pure function of device tensors with shapes that depend on (B, plan) alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from idlm_kernels._deprecated import warn_renamed
from idlm_kernels.cpu import native
from idlm_kernels.generate.state import RUNNING, DecodeState
from idlm_kernels.model.transformer import Rows
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
    def branched(self) -> bool:
        """Whether every draft has a branch of MASK rows, and not the last one alone."""
        return self.kind == "quadratic"

    @property
    def num_drafts(self) -> int:
        """K, the drafts of a step and the MASK rows of a branch."""
        return self.stride - 1

    @property
    def max_rows(self) -> int:
        """R, the most rows of a request in a step."""
        return self.stride**2 if self.branched else 2 * self.stride - 1

    def expected_tpf(self, acceptance: float | Sequence[float]) -> float:
        """Tokens per forward in the steady state, for an acceptance by draft index (the last one goes on), or for all.

        Quadratic: 1 + p_1 + p_1 p_2 + .. Chain: of two kinds of steps, those with drafts commit the same, those after a
        rejection have none and commit one token.
        """
        shares = [acceptance] if isinstance(acceptance, (int, float)) else acceptance
        run = all_stand = 1.0
        for j in range(self.num_drafts):
            all_stand *= shares[min(j, len(shares) - 1)]
            run += all_stand
        if self.branched or self.stride == 1:
            return run
        rejected = 1 - all_stand
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
        kinds: tuple[PlanKind, ...] = ("chain", "quadratic") if bound.branched else (bound.kind,)
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
    if state.lengths.device.type == "cpu" and (library := native.library()) is not None:
        return _plan_rows_natively(library, plan, state, page_size)
    batch, num_k, device = state.batch, plan.num_drafts, state.lengths.device
    running = state.finish == RUNNING
    length, n = state.lengths.long(), state.num_drafts.long()
    num_branches = n + 1 if plan.branched else torch.ones_like(n)
    m = (1 + n + num_branches * num_k) * running
    query_start_loc = torch.nn.functional.pad(m.cumsum(0), (1, 0))

    t = torch.arange(batch * plan.max_rows, device=device)
    request = torch.searchsorted(query_start_loc[1:], t, right=True).clamp(max=batch - 1)
    is_row = t < query_start_loc[-1]
    r = torch.where(is_row, t - query_start_loc[request], 0)  # index of the row in its request
    row_n, row_length = n[request], length[request]

    is_clean = r <= row_n
    mask_index = (r - 1 - row_n).clamp(min=0)
    branch = mask_index // max(num_k, 1) if plan.branched else row_n
    j = mask_index - (branch * num_k if plan.branched else 0)
    position = row_length - 1 + torch.where(is_clean, r, 1 + branch + j)

    pending = state.text[request, row_length - 1]
    clean_id = pending
    if num_k:
        clean_id = torch.where(r == 0, pending, state.drafts[request, (r - 1).clamp(0, num_k - 1)])
    is_mask = is_row & ~is_clean
    place = row_length - 1 + r
    ids = torch.where(is_mask, _mask_ids(state, request, place, position), clean_id)

    tail_mask = None
    if plan.branched:
        own = ((2 << j) - 1) << (1 + row_n + branch * num_k).clamp(max=63)
        tail_mask = torch.where(is_clean, (2 << r) - 1, ((2 << branch) - 1) | own)

    slot = slot_of(state.page_table, request, place, page_size)
    return Rows(
        ids=torch.where(is_row, ids, 0),
        is_mask=is_mask,
        positions=torch.where(is_row, position, 0),
        slot_mapping=torch.where(is_row, slot, -1),
        page_table=state.page_table,
        seq_lens=torch.where(running, length - 1 + m, 0).to(torch.int32),
        query_start_loc=query_start_loc.to(torch.int32),
        tail_mask=tail_mask,
        max_query_len=plan.max_rows,
    )


def _mask_ids(state: DecodeState, request: Tensor, place: Tensor, position: Tensor) -> Tensor | int:
    """What MASK rows carry as their id; place: of the row among the request's keys."""
    if not state.noise_below:
        return state.mask_id
    return noise_ids(state.seed[request], place, position, state.noise_below)


def _plan_rows_natively(library: ctypes.CDLL, plan: StepPlan, state: DecodeState, page_size: int) -> Rows:
    """`plan_rows` in one call."""
    batch, most = state.batch, plan.max_rows
    ids, positions, slots = torch.empty(3, batch * most, dtype=torch.int64).unbind()
    is_mask = torch.empty(batch * most, dtype=torch.bool)
    tail_mask = torch.empty(batch * most, dtype=torch.int64) if plan.branched else None
    seq_lens, query_start_loc = torch.empty(batch, dtype=torch.int32), torch.empty(batch + 1, dtype=torch.int32)
    table = state.page_table
    struct = native.Plan(
        *(x.data_ptr() for x in (state.text, state.drafts, state.lengths, state.num_drafts, state.finish, table)),
        state.seed.data_ptr(),
        *(state.text.stride(0), state.drafts.stride(0), table.stride(0), state.mask_id, state.noise_below),
        *(batch, plan.num_drafts, plan.branched, page_size),
        *(ids.data_ptr(), positions.data_ptr(), slots.data_ptr()),
        None if tail_mask is None else tail_mask.data_ptr(),
        *(is_mask.data_ptr(), seq_lens.data_ptr(), query_start_loc.data_ptr()),
    )
    library.idlm_cpu_plan_rows(ctypes.byref(struct), most)
    return Rows(ids, is_mask, positions, slots, table, seq_lens, query_start_loc, tail_mask, most)


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
        tail_mask=None,
        max_query_len=max(counts),
    )
