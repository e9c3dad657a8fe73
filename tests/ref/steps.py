"""Arguments of the ops of a step: of sample_rows and verify_accept from one request after the other, or at random."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from idlm_kernels import StepState, sample_rows, verify_accept
from python_ref import STREAM_TARGET
from tests.ops.cases import mapped


def sample(
    logits: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seed: Any = 0,
    position: Any = 7,
    id_limit: int | None = None,
    mask_id: int = -1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    """sample_rows with every parameter a number or one number per row; logits a list of rows or one row."""
    logits = torch.as_tensor(logits, dtype=dtype)
    logits = logits if logits.dim() == 2 else logits.unsqueeze(0)
    rows = logits.shape[0]
    if isinstance(seed, Tensor) and logits.shape[0] == 1:
        rows = len(seed)
        logits = logits.expand(rows, -1).contiguous()

    def column(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, dtype=dtype).expand(rows).contiguous()

    return sample_rows(
        logits,
        column(position, torch.int64),
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(seed, torch.int64),
        logits.shape[1] if id_limit is None else id_limit,
        mask_id,
        **options,
    )


@dataclass
class Step:
    """One request of a step: its logits rows in step order, its drafts, its parameters."""

    logits: Tensor  # [m, V]
    drafts: list[int]  # n of them
    position: int  # of pending, L - 1
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    count: int | None = None  # the num_drafts that is passed on, if not len(drafts)

    def sampled(self, row: int, position: int, stream: int = STREAM_TARGET, **options: Any) -> int:
        """sample_rows of one row, for the token at `position`."""
        ids = sample(
            self.logits[row : row + 1],
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            position=position,
            stream=stream,
            dtype=self.logits.dtype,
            **options,
        )
        return int(ids)


ID_LIMIT, MASK_ID = 11, 4
VOCAB = 13


def parameters_of(steps: list[Step], num_spec_tokens: int) -> tuple[Tensor, ...]:
    """The positional arguments of verify_accept before id_limit. Unused draft entries hold a poison id."""
    drafts = torch.full((len(steps), num_spec_tokens), 2**40)
    for b, step in enumerate(steps):
        drafts[b, : len(step.drafts)] = torch.tensor(step.drafts, dtype=torch.int64)
    rows = [step.logits for step in steps]
    padding = torch.full((2, VOCAB), math.nan, dtype=rows[0].dtype)  # rows beyond query_start_loc[B]

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(step, name) for step in steps], dtype=dtype)

    counts = [len(step.drafts) if step.count is None else step.count for step in steps]
    return (
        torch.cat([*rows, padding]),
        torch.tensor([0, *np.cumsum([len(r) for r in rows])], dtype=torch.int32),
        torch.tensor(counts, dtype=torch.int32),
        drafts,
        column("position", torch.int32),
        column("temperature", torch.float32),
        column("top_k", torch.int32),
        column("top_p", torch.float32),
        column("min_p", torch.float32),
        column("seed", torch.int64),
    )


def verify(
    steps: list[Step], num_spec_tokens: int, *, quadratic: bool, rule: str = "match", **options: Any
) -> tuple[list, ...]:
    """The four results of verify_accept and the error_flags, as lists."""
    error_flags = torch.zeros(len(steps), dtype=torch.int32)
    args = parameters_of(steps, num_spec_tokens)
    results = verify_accept(
        *args, ID_LIMIT, MASK_ID, quadratic=quadratic, rule=rule, error_flags=error_flags, **options
    )
    return tuple(x.tolist() for x in (*results, error_flags))


def random_commit(seed: int, num_spec_tokens: int | None = None, device: Any = "cpu", **options: Any) -> dict[str, Any]:
    """Arguments of commit_step for some requests of every kind; texts of few ids, so that they repeat themselves."""
    with torch.device("cpu"):
        args = _random_commit(seed, num_spec_tokens) | options
    return {name: mapped(lambda x: x.to(device), value) for name, value in args.items()}


def _random_commit(seed: int, num_spec_tokens: int | None) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=random, dtype=dtype)

    batch, max_len = 12, 40
    num_spec_tokens = int(ints(0, 5)) if num_spec_tokens is None else num_spec_tokens
    lengths = ints(1, max_len + 1, batch)
    num_drafts, present = ints(0, num_spec_tokens + 1, batch), ints(0, 8, batch) > 0
    accepted = torch.minimum(ints(0, num_spec_tokens + 1, batch), num_drafts) * present
    tokens = ints(0, 3, batch, num_spec_tokens + 1, dtype=torch.int64)
    tokens[(torch.arange(num_spec_tokens + 1) > accepted.unsqueeze(1)) | ~present.unsqueeze(1)] = -1
    proposed = (ints(0, 2, batch) > 0) & present
    next_drafts = ints(0, 3, batch, num_spec_tokens, dtype=torch.int64)
    next_drafts[~proposed] = -1
    finish_reason = torch.tensor([0] * 8 + [1, 2, 3, 4])[ints(0, 12, batch).long()]
    state = StepState(
        text=ints(0, 3, batch, max_len, dtype=torch.int64),
        lengths=lengths,
        drafts=ints(-1, 3, batch, num_spec_tokens, dtype=torch.int64),
        num_drafts=num_drafts,
        max_drafts=torch.where(ints(0, 4, batch) > 0, num_spec_tokens, ints(0, 3, batch)).to(torch.int32),
        draft_source=ints(0, 3, batch),
        length_limits=torch.minimum(lengths + ints(0, 12, batch), torch.tensor(max_len)),
        stop_ids=torch.where(ints(0, 6, batch, 2) > 0, -1, ints(0, 3, batch, 2)).long(),
        finish_reason=finish_reason.to(torch.int32),
        error_flags=torch.tensor([0, 0, 0, 0, 1, 2, 4, 8])[ints(0, 8, batch).long()].to(torch.int32),
        page_table=torch.zeros(batch, 1, dtype=torch.int32),
        seed=ints(-(2**62), 2**62, batch, dtype=torch.int64),
    )
    return {
        "num_accepted": accepted.to(torch.int32),
        "tokens": tokens,
        "next_drafts": next_drafts,
        "next_num_drafts": (proposed * num_spec_tokens).to(torch.int32),
        "state": state,
        "quadratic": bool(ints(0, 2)),
        "suffix": bool(ints(0, 2)),
        "acceptance": [None, 0.0, 0.5, 1.0][int(ints(0, 4))],
    }


def random_places(seed: int, num_spec_tokens: int, page_size: int, device: Any = "cpu") -> StepState:
    """A state for plan_rows: requests of every number of drafts, idle places, some that reach beyond their pages."""
    state: StepState = random_commit(seed, num_spec_tokens)["state"]
    (batch, max_len), random = state.text.shape, torch.Generator().manual_seed(seed)
    pages = -(-(max_len + 4) // page_size)
    table = torch.randperm(batch * pages, generator=random, device="cpu").view(batch, pages).to(torch.int32)
    return mapped(lambda x: x.to(device), dataclasses.replace(state, page_table=table))  # type: ignore[no-any-return]
