"""Sampling of rows, and verify-and-accept: the decision of an introspective strided decoding step.

Notation of a request with n drafts: clean rows 0..n (pending, then the drafts), then for each branch b its K MASK
rows. y_i is sampled from clean row i and belongs to position L + i, where L - 1 is the position of pending.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from python_ref.noise import STREAM_ACCEPT, STREAM_DRAFT, STREAM_TARGET, gumbel, uniform

STATUS_NAN = 1  # a logit was NaN, taken as -inf
STATUS_INF = 2  # a logit was +inf, taken as the largest finite value
STATUS_EMPTY_ROW = 4  # no finite logit: the lowest allowed id was taken
STATUS_BAD_DRAFT = 8  # a draft id or draft count out of range: the draft was rejected

GREEDY_BELOW = 1e-4  # temperatures below this mean argmax


@dataclass
class QState:
    """The laws that the current drafts were drawn from, exactly as they were sampled (`rejection` only).

    logits [B, K, V]: the MASK rows, logit_bias added; cut fp32 [B, K]: an id is kept iff logit / T >= cut;
    log_norm fp32 [B, K]: log-sum-exp of the kept logits / T; both fp64 for fp64 logits. Read, then overwritten with
    those of the next drafts; a request that is proposed none keeps what is there.
    """

    logits: Tensor
    cut: Tensor
    log_norm: Tensor

    @classmethod
    def empty(cls, batch: int, num_drafts: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> QState:
        acc = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(batch, num_drafts, vocab_size, dtype=dtype, device=device),
            torch.zeros(batch, num_drafts, dtype=acc, device=device),
            torch.zeros(batch, num_drafts, dtype=acc, device=device),
        )

    def requests(self, first: int, last: int) -> QState:
        """A view of requests first .. last - 1."""
        return QState(self.logits[first:last], self.cut[first:last], self.log_norm[first:last])


def add_bias(logits: Tensor, logit_bias: Tensor | None) -> Tensor:
    """logits + logit_bias in the accumulator dtype: a bf16 sum would swallow a small penalty of a large logit."""
    if logit_bias is None:
        return logits
    acc = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(acc) + logit_bias.to(acc)


def sanitise(logits: Tensor, id_limit: int, mask_id: int) -> tuple[Tensor, Tensor]:
    """Logits with forbidden ids and NaN at -inf and +inf finite, and the status bits [...] of each row."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    allowed = (ids < id_limit) & (ids != mask_id)
    x = logits.to(acc).masked_fill(~allowed, -math.inf)
    nan, inf = x.isnan(), x == math.inf
    x = x.masked_fill(nan, -math.inf).masked_fill(inf, torch.finfo(acc).max)
    empty = (x == -math.inf).all(-1)
    status = nan.any(-1) * STATUS_NAN + inf.any(-1) * STATUS_INF + empty * STATUS_EMPTY_ROW
    # An empty row is made a point mass on the lowest allowed id.
    lowest = 1 if mask_id == 0 else 0
    x = torch.where(empty.unsqueeze(-1) & (ids == lowest), 0.0, x)
    return x, status.to(torch.int32)


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


def law(z: Tensor, cut: Tensor, log_norm: Tensor, greedy: Tensor) -> Tensor:
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
    status: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token per row: argmax(kept logits / T + Gumbel noise). logits [T, V]; the rest [T] -> ids int64 [T].

    `positions` are those of the predicted tokens. mask_id = -1 when there is none. Bits are or-ed into status [T].
    """
    x, row_status = sanitise(add_bias(logits, logit_bias), id_limit, mask_id)
    z = scale_by_temperature(x, temperature)
    cut = truncation_cut(z, top_k, top_p, min_p)
    if status is not None:
        status |= row_status
    noise = gumbel(seed, positions, z.shape[-1], stream, z.dtype)
    ids = perturbed_argmax(z, cut, temperature < GREEDY_BELOW, noise)
    return ids if out is None else out.copy_(ids)


def verify_accept(
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    branched: bool,
    mode: str,
    q_state: QState | None = None,
    logit_bias: Tensor | None = None,
    status: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Verify the drafts of every request, sample its next token and propose its next drafts.

    logits [T, V]; query_start_loc int32 [B + 1]; drafts int64 [B, K]; all others [B]; positions are those of
    pending. Returns num_accepted int32 [B] (a), tokens int64 [B, K + 1] (d_1..d_a, y_a, then -1), next_drafts
    int64 [B, K] (-1 where there is none) and next_num_drafts int32 [B]. A request without rows yields 0, -1, -1, 0.
    """
    batch, num_k = drafts.shape
    vocab_size = logits.shape[-1]
    device = logits.device
    start = query_start_loc[:-1].long()
    m = query_start_loc.diff().long()
    present = m > 0
    n = num_drafts.long().clamp(min=0).minimum((m - 1).clamp(0, num_k))
    i = torch.arange(num_k + 1, device=device)
    first_position = positions.long().unsqueeze(1) + 1  # L: the position that clean row 0 predicts
    flags = torch.zeros(batch, dtype=torch.int32, device=device)
    flags |= torch.where(present & (n != num_drafts), STATUS_BAD_DRAFT, 0).to(torch.int32)

    def transform(rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, R, V], cut [B, R] and the biased logits of rows [B, R]; status bits of the valid ones are kept."""
        nonlocal flags
        raw = add_bias(logits[rows], None if logit_bias is None else logit_bias[rows])
        x, row_status = sanitise(raw, id_limit, mask_id)
        for r in range(rows.shape[1]):
            flags = flags | torch.where(valid[:, r], row_status[:, r], 0)
        per_row = [p.unsqueeze(1).expand(rows.shape) for p in (temperature, top_k, top_p, min_p)]
        z = scale_by_temperature(x, per_row[0])
        return z, truncation_cut(z.flatten(0, 1), *(p.flatten() for p in per_row[1:])).view(rows.shape), raw

    def noise(first: Tensor, count: int, stream: int, dtype: torch.dtype) -> Tensor:
        """Gumbel noise [B, count, V] of the positions first, first + 1, ..."""
        where = first + torch.arange(count, device=device)
        return gumbel(seed.unsqueeze(1).expand(where.shape), where, vocab_size, stream, dtype)

    is_clean = (i <= n.unsqueeze(1)) & present.unsqueeze(1)
    clean_rows = torch.where(is_clean, start.unsqueeze(1) + i, 0)
    greedy = (temperature < GREEDY_BELOW).unsqueeze(1)

    # y_i for every clean row, and which drafts stand.
    z, cut, _ = transform(clean_rows, is_clean)
    g = noise(first_position, num_k + 1, STREAM_TARGET, z.dtype)
    y = perturbed_argmax(z, cut, greedy.expand(batch, num_k + 1), g)
    bad = (drafts < 0) | (drafts >= vocab_size)
    is_draft = is_clean[:, 1:]
    flags |= torch.where((bad & is_draft).any(1), STATUS_BAD_DRAFT, 0).to(torch.int32)
    if mode == "match":
        accepted = drafts == y[:, :num_k]
    else:
        assert q_state is not None
        p = law(z, cut, log_norm_of(z, cut), greedy)
        q_z = scale_by_temperature(sanitise(q_state.logits, id_limit, mask_id)[0], temperature.unsqueeze(1))
        q = law(q_z, q_state.cut.to(z.dtype), q_state.log_norm.to(z.dtype), greedy)
        x = drafts.clamp(0, vocab_size - 1).unsqueeze(-1)
        where = first_position + i[:num_k]
        u = uniform(seed.unsqueeze(1).expand(where.shape), where, STREAM_ACCEPT).to(z.dtype)
        accepted = u * q.gather(-1, x).squeeze(-1) < p[:, :num_k].gather(-1, x).squeeze(-1)
    accepted = accepted & is_draft & ~bad
    a = accepted.long().cumprod(1).sum(1)
    if mode == "rejection":
        # The token after the accepted ones: of the residual if a draft was refused, of p if none was left.
        residual = (p[:, :num_k] - q).clamp(min=0)
        residual = torch.where((bad | (residual.sum(-1) == 0)).unsqueeze(-1), p[:, :num_k], residual)
        corrected = lowest_argmax(torch.where(greedy.unsqueeze(-1), residual, residual.log() + g[:, :num_k]))
        y[:, :num_k] = torch.where(is_draft, corrected, y[:, :num_k])

    tokens = torch.where(i < a.unsqueeze(1), torch.nn.functional.pad(drafts, (0, 1)), y)
    tokens = torch.where((i <= a.unsqueeze(1)) & present.unsqueeze(1), tokens, -1)

    # New drafts: MASK row j of branch a proposes for position L + a + 1 + j. A chain has branch n only.
    branch = a if branched else torch.zeros_like(a)
    first_mask = 1 + n + branch * num_k
    proposed = present & (first_mask + num_k <= m) & (num_k > 0)
    if not branched:
        proposed = proposed & (a == n)
    next_drafts = torch.full_like(drafts, -1)
    if num_k > 0:
        has_row = proposed.unsqueeze(1).expand(batch, num_k)
        mask_rows = torch.where(has_row, (start + first_mask).unsqueeze(1) + i[:num_k], 0)
        z, cut, raw = transform(mask_rows, has_row)
        stream = STREAM_TARGET if mode == "match" else STREAM_DRAFT
        g = noise(first_position + a.unsqueeze(1) + 1, num_k, stream, z.dtype)
        sampled = perturbed_argmax(z, cut, greedy.expand(batch, num_k), g)
        next_drafts = torch.where(has_row, sampled, -1)
        if mode == "rejection":
            assert q_state is not None
            # Where nothing is proposed nothing is written: a request without rows in this step keeps its drafts, and
            # a later step will need their laws.
            q_state.logits.copy_(torch.where(has_row.unsqueeze(2), raw.to(q_state.logits.dtype), q_state.logits))
            q_state.cut.copy_(torch.where(has_row, cut.to(q_state.cut.dtype), q_state.cut))
            log_norm = log_norm_of(z, cut).to(q_state.log_norm.dtype)
            q_state.log_norm.copy_(torch.where(has_row, log_norm, q_state.log_norm))
    if status is not None:
        status |= torch.where(present, flags, 0)
    next_num_drafts = torch.where(proposed, num_k, 0)
    result = a.to(torch.int32), tokens, next_drafts, next_num_drafts.to(torch.int32)
    if out is None:
        return result
    for target, value in zip(out, result, strict=True):
        target.copy_(value)
    return out
