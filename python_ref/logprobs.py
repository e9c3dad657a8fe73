"""The most probable tokens of the rows that a step committed."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_logprobs(
    logits: Tensor,
    query_start_loc: Tensor,
    tokens: Tensor,
    count: int,
    id_limit: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The `count` likeliest ids below id_limit at each committed token, and the log softmax of the logits there.

    logits [T, V]; query_start_loc int32 [B + 1]; tokens int64 [B, N] of `verify_accept`, negative where there is none.
    Returns ids int64 [B, N, count], the lowest of ties first, and logprobs fp32 (fp64 of fp64 logits). Ids are -1, and
    logprobs 0, where there is no token.
    """
    i = torch.arange(tokens.shape[1], device=tokens.device)
    rows = (query_start_loc[:-1].long().unsqueeze(1) + i).clamp(0, max(len(logits) - 1, 0))
    x = logits[rows].to(torch.promote_types(logits.dtype, torch.float32))
    listed = x.masked_fill(x.isnan(), -math.inf)[..., :id_limit]
    ids = listed.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    logprobs = x.gather(-1, ids) - x.logsumexp(-1, keepdim=True)
    is_token = (tokens >= 0).unsqueeze(-1)
    result = torch.where(is_token, ids, -1), torch.where(is_token, logprobs, 0.0)
    if out is None:
        return result
    for target, value in zip(out, result, strict=True):
        target.copy_(value)
    return out
