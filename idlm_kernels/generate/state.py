"""The state of a decode: a handful of device tensors of fixed shape. A step is a pure function of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from idlm_kernels.generate.params import MAX_LOGIT_BIAS, SamplingParams, signed_seed
from idlm_kernels.model.mask_input import MaskInput
from python_ref import Penalties, StepState
from python_ref.contract import FAILED, IDLE, LENGTH, RUNNING, STOPPED

__all__ = ["FAILED", "IDLE", "LENGTH", "RUNNING", "STOPPED", "DecodeState"]


@dataclass(frozen=True, eq=False)
class DecodeState(StepState):
    """B requests. Pending is text[b, L - 1], whose KV is not in the cache yet.

    Besides the tensors of StepState: temperature, top_p, min_p fp32 [B], top_k int32 [B]; what `Penalties` has, by
    longer names. history int64 [B, H]: passages of finished outputs to draft from, -1 between them. mask_id: the id
    given to MASK rows (any valid one where a vector takes its place); noise_below: if not 0, MASK rows are given ids
    drawn from 1 .. noise_below - 1 instead; sampled_mask_id: the id that must never be sampled, -1 if none; id_limit:
    ids from here on are never sampled.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    prompt_lengths: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    repetition_penalty: Tensor
    bias_ids: Tensor
    bias: Tensor
    history: Tensor
    mask_id: int
    sampled_mask_id: int
    id_limit: int
    noise_below: int = 0

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def penalties(self) -> Penalties:
        return Penalties(
            self.prompt_lengths,
            self.presence_penalty,
            self.frequency_penalty,
            self.repetition_penalty,
            self.bias_ids,
            self.bias,
        )

    @classmethod
    def empty(
        cls,
        batch: int,
        max_len: int,
        max_pages: int,
        num_drafts: int,
        num_stop_ids: int,
        *,
        mask_token_id: int | None,
        id_limit: int,
        device: torch.device,
        mask_input: MaskInput | None = None,
        handed_over: int = 0,
    ) -> DecodeState:
        """A batch without requests. mask_token_id: of the model, never sampled; what MASK rows embed, too, when
        mask_input is None. handed_over: H, the ids of finished outputs that a request can draft from."""
        if mask_input is None:
            mask_input = MaskInput("mean" if mask_token_id is None else "token", mask_token_id)

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        return cls(
            text=zeros(torch.int64, max_len),
            lengths=zeros(torch.int32) + 1,
            drafts=zeros(torch.int64, num_drafts),
            num_drafts=zeros(torch.int32),
            max_drafts=zeros(torch.int32) + num_drafts,
            draft_source=zeros(torch.int32),
            length_limits=zeros(torch.int32),
            stop_ids=zeros(torch.int64, num_stop_ids),
            finish_reason=zeros(torch.int32) + IDLE,
            error_flags=zeros(torch.int32),
            page_table=zeros(torch.int32, max_pages),
            temperature=zeros(torch.float32),
            top_k=zeros(torch.int32),
            top_p=zeros(torch.float32) + 1,
            min_p=zeros(torch.float32),
            prompt_lengths=zeros(torch.int32),
            presence_penalty=zeros(torch.float32),
            frequency_penalty=zeros(torch.float32),
            repetition_penalty=zeros(torch.float32) + 1,
            bias_ids=zeros(torch.int64, MAX_LOGIT_BIAS) - 1,
            bias=zeros(torch.float32, MAX_LOGIT_BIAS),
            seed=zeros(torch.int64),
            history=zeros(torch.int64, handed_over) - 1,
            mask_id=mask_input.row_id,
            sampled_mask_id=-1 if mask_token_id is None else mask_token_id,
            id_limit=id_limit,
            noise_below=mask_input.noise_below,
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type == "Tensor"}

    def requests(self, first: int, last: int) -> DecodeState:
        """A view of requests first .. last - 1: what is written to it is written here."""
        views: dict[str, Any] = {name: x[first:last] for name, x in self._tensors().items()}
        return replace(self, **views)

    def with_drafts(self, num_drafts: int) -> DecodeState:
        """A view with room for num_drafts drafts, for a plan of a smaller stride."""
        return self if self.drafts.shape[1] == num_drafts else replace(self, drafts=self.drafts[:, :num_drafts])

    def move(self, source: int, target: int) -> None:
        """Copy a request from one index to another and leave the first one idle."""
        for x in self._tensors().values():
            x[target] = x[source]
        self.finish_reason[source] = IDLE

    def insert(
        self,
        b: int,
        tokens: Sequence[int],
        params: SamplingParams,
        seed: int,
        limit: int,
        stop_ids: Sequence[int],
        drafts: bool = True,
        prompt_length: int | None = None,
    ) -> None:
        """Put a request whose committed text is `tokens` in at index b. It stays idle until its prefill ends.

        drafts: whether its steps have any. prompt_length: of the tokens, all when None; the others are output.
        """
        device = self.text.device
        self.text[b, : len(tokens)] = torch.tensor(tokens, device=device)
        self.lengths[b] = len(tokens)
        self.num_drafts[b] = 0
        self.max_drafts[b] = self.drafts.shape[1] if drafts else 0
        self.draft_source[b] = 0
        self.length_limits[b] = limit
        self.stop_ids[b] = torch.tensor([*stop_ids, *[-1] * (self.stop_ids.shape[1] - len(stop_ids))], device=device)
        self.finish_reason[b] = IDLE
        self.error_flags[b] = 0
        self.temperature[b] = params.temperature
        self.top_k[b] = params.top_k
        self.top_p[b] = params.top_p
        self.min_p[b] = params.min_p
        self.seed[b] = signed_seed(seed)
        self.prompt_lengths[b] = len(tokens) if prompt_length is None else prompt_length
        self.presence_penalty[b] = params.presence_penalty
        self.frequency_penalty[b] = params.frequency_penalty
        self.repetition_penalty[b] = params.repetition_penalty
        biases = params.logit_bias or {}
        self.bias_ids[b] = -1
        self.bias_ids[b, : len(biases)] = torch.tensor(list(biases), dtype=torch.int64, device=device)
        self.bias[b, : len(biases)] = torch.tensor(list(biases.values()), dtype=torch.float32, device=device)
