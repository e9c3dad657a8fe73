"""The sampling transform of a row of logits, and the token that it gives with the noise of its position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from python_ref.contract import (
    FLAG_EMPTY_ROW,
    FLAG_INF,
    FLAG_NAN,
    GREEDY_BELOW,
    STREAM_TARGET,
)
from python_ref.noise import gumbel


def add_bias(logits: Tensor, logit_bias: Tensor | None) -> Tensor:
    """logits + logit_bias in the accumulator dtype: a bf16 sum would swallow a small penalty of a large logit."""
    if logit_bias is None:
        return logits
    acc = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(acc) + logit_bias.to(acc)


def sanitise(logits: Tensor, id_limit: int, mask_id: int) -> tuple[Tensor, Tensor]:
    """Logits with forbidden ids and NaN at -inf and +inf finite, and the error flags [...] of each row."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    allowed = (ids < id_limit) & (ids != mask_id)
    x = logits.to(acc).masked_fill(~allowed, -math.inf)
    nan, inf = x.isnan(), x == math.inf
    x = x.masked_fill(nan, -math.inf).masked_fill(inf, torch.finfo(acc).max)
    empty = (x == -math.inf).all(-1)
    error_flags = nan.any(-1) * FLAG_NAN + inf.any(-1) * FLAG_INF + empty * FLAG_EMPTY_ROW
    # An empty row is made a point mass on the lowest allowed id.
    lowest = 1 if mask_id == 0 else 0
    x = torch.where(empty.unsqueeze(-1) & (ids == lowest), 0.0, x)
    return x, error_flags.to(torch.int32)


def scale_by_temperature(x: Tensor, temperature: Tensor) -> Tensor:
    """x / T, kept finite where x is; greedy rows are left as they are."""
    t = torch.where(temperature < GREEDY_BELOW, 1.0, temperature).to(x.dtype)
    big = torch.finfo(x.dtype).max
    return torch.where(x == -math.inf, x, (x / t.unsqueeze(-1)).clamp(-big, big))


def truncation_cut(z: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest kept value [R] of z [R, V] after top-k, top-p and min-p, in this order; ties of it are kept."""
    ordered = z.sort(-1, descending=True).values
    vocab_size = z.shape[-1]
    k = torch.where(top_k <= 0, vocab_size, top_k).clamp(max=vocab_size).long()
    kth = ordered.gather(-1, k.unsqueeze(-1) - 1)
    # Mass in fp64: over a whole vocabulary an fp32 running sum is off by more than a rare token's share.
    weight = torch.exp((ordered - ordered[..., :1]).double()).masked_fill(ordered < kth, 0.0)
    mass = weight.cumsum(-1) / weight.sum(-1, keepdim=True)
    before = (mass < top_p.double().unsqueeze(-1)).sum(-1, keepdim=True)  # tokens that do not reach top_p yet
    p_cut = torch.where(top_p.unsqueeze(-1) < 1, ordered.gather(-1, before.clamp(max=vocab_size - 1)), -math.inf)
    likely = torch.exp(ordered - ordered[..., :1]) >= min_p.unsqueeze(-1)
    kept = (ordered >= kth) & (ordered >= p_cut) & likely & (ordered > -math.inf)
    return ordered.masked_fill(~kept, math.inf).amin(-1).minimum(ordered[..., 0])  # the largest always stays


def lowest_argmax(score: Tensor) -> Tensor:
    """Index of the largest entry of the last dimension, the lowest one of ties."""
    ids = torch.arange(score.shape[-1], device=score.device)
    return torch.where(score == score.amax(-1, keepdim=True), ids, score.shape[-1]).amin(-1)


def perturbed_argmax(z: Tensor, cut: Tensor, greedy: Tensor, noise: Tensor) -> Tensor:
    """argmax(z + noise) over the kept ids, without noise on greedy rows."""
    score = torch.where(greedy.unsqueeze(-1), z, (z + noise).masked_fill(z < cut.unsqueeze(-1), -math.inf))
    return lowest_argmax(score)


def distribution(z: Tensor, cut: Tensor, log_norm: Tensor, greedy: Tensor) -> Tensor:
    """Probabilities [..., V] of the transformed row; a point mass on the argmax for greedy rows."""
    soft = torch.exp(z - log_norm.unsqueeze(-1)).masked_fill(z < cut.unsqueeze(-1), 0.0)
    point = (torch.arange(z.shape[-1], device=z.device) == lowest_argmax(z).unsqueeze(-1)).to(z.dtype)
    return torch.where(greedy.unsqueeze(-1), point, soft)


def log_norm_of(z: Tensor, cut: Tensor) -> Tensor:
    return torch.logsumexp(z.masked_fill(z < cut.unsqueeze(-1), -math.inf), -1)


def sample_rows(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    stream: int = STREAM_TARGET,
    logit_bias: Tensor | None = None,
    error_flags: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token per row: argmax(kept logits / T + Gumbel noise). logits [T, V]; the rest [T] -> ids int64 [T].

    `positions` are those of the predicted tokens. mask_id = -1 when there is none. Bits are or-ed into error_flags [T].
    """
    x, row_flags = sanitise(add_bias(logits, logit_bias), id_limit, mask_id)
    z = scale_by_temperature(x, temperature)
    cut = truncation_cut(z, top_k, top_p, min_p)
    if error_flags is not None:
        error_flags |= row_flags
    noise = gumbel(seed, positions, z.shape[-1], stream, z.dtype)
    ids = perturbed_argmax(z, cut, temperature < GREEDY_BELOW, noise)
    return ids if out is None else out.copy_(ids)
