"""The state of a decode: a handful of device tensors of fixed shape. A step is a pure function of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from idlm_kernels.generate.params import SamplingParams, signed_seed
from python_ref.state import LENGTH, RUNNING, STOPPED

__all__ = ["LENGTH", "RUNNING", "STOPPED", "DecodeState"]


@dataclass
class DecodeState:
    """B requests. L is `lengths`; pending is text[b, L - 1], whose KV is not in the cache yet.

    text int64 [B, max_len]; lengths, num_drafts, length_limits, finish, status, top_k int32 [B]; drafts int64 [B, K];
    stop_ids int64 [B, S]; page_table int32 [B, max_pages]; temperature, top_p, min_p fp32 [B]; seed int64 [B].
    mask_id: the id given to MASK rows (any valid one if the model has none); sampled_mask_id: the id that must never be
    sampled, -1 if none; id_limit: ids from here on are never sampled.
    """

    text: Tensor
    lengths: Tensor
    drafts: Tensor
    num_drafts: Tensor
    length_limits: Tensor
    stop_ids: Tensor
    finish: Tensor
    status: Tensor
    page_table: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    mask_id: int
    sampled_mask_id: int
    id_limit: int

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    def requests(self, first: int, last: int) -> DecodeState:
        """A view of requests first .. last - 1: what is written to it is written here."""
        views: dict[str, Any] = {f.name: getattr(self, f.name)[first:last] for f in fields(self) if f.type == "Tensor"}
        return replace(self, **views)

    @classmethod
    def create(
        cls,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        stop_ids: Sequence[Sequence[int]],
        page_table: Tensor,
        *,
        max_len: int,
        num_drafts: int,
        mask_token_id: int | None,
        id_limit: int,
        device: torch.device,
    ) -> DecodeState:
        """The state before prefill: text holds the prompts, nothing is cached and nothing drafted."""
        batch = len(prompts)

        def column(values: Sequence[float] | Sequence[list[int]], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
            return column([[*row, *[fill] * (width - len(row))] for row in rows], torch.int64).view(batch, width)

        limits = [min(max_len, len(p) + s.max_tokens) for p, s in zip(prompts, params, strict=True)]
        return cls(
            text=padded(prompts, max_len, 0),
            lengths=column([len(p) for p in prompts], torch.int32),
            drafts=torch.full((batch, num_drafts), -1, dtype=torch.int64, device=device),
            num_drafts=torch.zeros(batch, dtype=torch.int32, device=device),
            length_limits=column(limits, torch.int32),
            stop_ids=padded(stop_ids, max(1, *map(len, stop_ids)), -1),
            finish=torch.zeros(batch, dtype=torch.int32, device=device),
            status=torch.zeros(batch, dtype=torch.int32, device=device),
            page_table=page_table,
            temperature=column([s.temperature for s in params], torch.float32),
            top_k=column([s.top_k for s in params], torch.int32),
            top_p=column([s.top_p for s in params], torch.float32),
            min_p=column([s.min_p for s in params], torch.float32),
            seed=column([signed_seed(s) for s in seeds], torch.int64),
            mask_id=0 if mask_token_id is None else mask_token_id,
            sampled_mask_id=-1 if mask_token_id is None else mask_token_id,
            id_limit=id_limit,
        )
