"""The likeliest tokens of a row on a CPU, without sorting all of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import python_ref


def top_logprobs(
    logits: Tensor,
    query_start_loc: Tensor,
    tokens: Tensor,
    count: int,
    id_limit: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `idlm_kernels.top_logprobs`."""
    if logits.dtype == torch.float64 or len(logits) == 0:
        return python_ref.top_logprobs(logits, query_start_loc, tokens, count, id_limit, out=out)
    if out is None:
        shape = (*tokens.shape, count)
        out = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float32)
    out[0].fill_(-1)
    out[1].zero_()
    starts = query_start_loc.tolist()
    for b, i in (tokens >= 0).nonzero().tolist():
        x = logits[min(starts[b] + i, len(logits) - 1)].float()
        listed = x[:id_limit].masked_fill(x[:id_limit].isnan(), -math.inf)
        least = listed.topk(count).values[-1]  # whose ties topk chooses among as it likes
        ids = (listed >= least).nonzero().flatten()
        ids = ids[listed[ids].sort(dim=0, descending=True, stable=True).indices[:count]]
        out[0][b, i], out[1][b, i] = ids, x[ids] - x.logsumexp(0)
    return out
