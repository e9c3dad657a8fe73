"""Builds the arguments of sample_rows and verify_accept from one request after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from idlm_kernels import sample_rows, verify_accept
from python_ref import STREAM_TARGET


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


def parameters_of(steps: list[Step], num_k: int) -> tuple[Tensor, ...]:
    """The positional arguments of verify_accept before id_limit. Unused draft entries hold a poison id."""
    drafts = torch.full((len(steps), num_k), 2**40)
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


def verify(steps: list[Step], num_k: int, *, branched: bool, mode: str = "match", **options: Any) -> tuple[list, ...]:
    """The four results of verify_accept and the status, as lists."""
    status = torch.zeros(len(steps), dtype=torch.int32)
    args = parameters_of(steps, num_k)
    results = verify_accept(*args, ID_LIMIT, MASK_ID, branched=branched, mode=mode, status=status, **options)
    return tuple(x.tolist() for x in (*results, status))
