"""Sampling and verify-and-accept on a CPU: the results of `python_ref.sampling`, row by row and only where needed.

Rows are handled one at a time in numpy, whose argmax, sort and partition of fp32 are 10 to 80 times faster than torch's
on one core (49,152 numbers: 3 us, 90 us, 31 us against 30 us, 7,400 us, -). A row that holds anything out of the ordinary
(NaN, +inf, no finite logit, an overflow in logit / T) is left to the reference.

What is saved: no noise and no sort for greedy rows, no sort without top-p and min-p, with truncation noise for the kept
ids alone, and in `rejection` no law beyond the first refused draft.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import python_ref
from idlm_kernels.cpu.noise import gumbel_at, gumbel_row
from python_ref.noise import STREAM_DRAFT, STREAM_TARGET, uniform
from python_ref.sampling import (
    GREEDY_BELOW,
    STATUS_BAD_DRAFT,
    QState,
    add_bias,
    law,
    log_norm_of,
    sanitise,
    scale_by_temperature,
)

_Floats = NDArray[np.float32]
SPARSE_BELOW = 1 / 8  # share of the ids up to which noise is computed id by id: 10 times slower per id than a row's


@dataclass(frozen=True)
class _Params:
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _params(temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor) -> list[_Params]:
    columns = (x.tolist() for x in (temperature, top_k, top_p, min_p, seed))
    return [_Params(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class _Rows:
    """The logits of a call, and which ids may be sampled."""

    logits: Tensor
    logit_bias: Tensor | None
    id_limit: int
    mask_id: int

    def biased(self, row: int | slice) -> Tensor:
        return add_bias(self.logits[row], None if self.logit_bias is None else self.logit_bias[row])

    def sample(self, row: int, params: _Params, position: int, stream: int) -> tuple[int, int]:
        """(token, status bits) of one row."""
        x: _Floats = self.biased(row)[: self.id_limit].float().numpy()
        ids = None  # of the scores; None: all
        if params.greedy and not 0 <= self.mask_id < self.id_limit:
            score = x
        else:
            score = x.copy() if params.greedy else x / np.float32(params.temperature)
            if 0 <= self.mask_id < self.id_limit:
                score[self.mask_id] = -math.inf
        if not params.greedy:
            if not math.isfinite(score.max()):
                return self._sample_by_reference(row, params, position, stream)
            vocab_size = self.logits.shape[1]
            if params.truncates:
                ids = np.flatnonzero(score >= truncation_cut(score, params.top_k, params.top_p, params.min_p))
                score = score[ids]
            if ids is None or ids.size > vocab_size * SPARSE_BELOW:
                noise = gumbel_row(vocab_size, params.seed, position, stream).numpy()
                score = score + (noise[: self.id_limit] if ids is None else noise[ids])
            else:
                score = score + gumbel_at(ids, params.seed, position, stream).numpy()
        best = int(score.argmax())  # the first of equals; a NaN, if there is one
        if not math.isfinite(score[best]):
            return self._sample_by_reference(row, params, position, stream)
        return best if ids is None else int(ids[best]), 0

    def _sample_by_reference(self, row: int, params: _Params, position: int, stream: int) -> tuple[int, int]:
        status = torch.zeros(1, dtype=torch.int32)
        token = python_ref.sample_rows(
            self.biased(row).unsqueeze(0),
            torch.tensor([position]),
            torch.tensor([params.temperature]),
            torch.tensor([params.top_k]),
            torch.tensor([params.top_p]),
            torch.tensor([params.min_p]),
            torch.tensor([params.seed]),
            self.id_limit,
            self.mask_id,
            stream=stream,
            status=status,
        )
        return int(token), int(status)


def truncation_cut(z: _Floats, top_k: int, top_p: float, min_p: float) -> float:
    """The smallest kept value of z [V] after top-k, top-p and min-p, as `python_ref.sampling.truncation_cut`.

    z holds no NaN and no +inf, and at least one finite number.
    """
    kept = z
    if 0 < top_k < z.size:
        kth = np.partition(z, z.size - top_k)[z.size - top_k]
        kept = z[z >= kth]  # ties of the k-th included
    if top_p < 1 or min_p > 0:
        ordered = -np.sort(-kept)
        distance = torch.from_numpy(ordered - ordered[0])
        likely = (torch.exp(distance) >= min_p).numpy()
        if top_p < 1:
            weight = np.exp(distance.numpy().astype(np.float64))
            before = int(np.count_nonzero(np.cumsum(weight) / weight.sum() < top_p))  # do not reach top_p yet
            likely &= ordered >= ordered[min(before, ordered.size - 1)]
        kept = ordered[likely]
    kept = kept[kept > -math.inf]
    return float(kept.min() if kept.size else z.max())  # the largest always stays


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
) -> Tensor:
    """One token per row of logits [T, V] -> ids int64 [T]."""
    if logits.dtype == torch.float64:
        return python_ref.sample_rows(
            logits,
            positions,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            id_limit,
            mask_id,
            stream=stream,
            logit_bias=logit_bias,
            status=status,
        )
    rows = _Rows(logits, logit_bias, id_limit, mask_id)
    params = _params(temperature, top_k, top_p, min_p, seed)
    sampled = [rows.sample(i, p, at, stream) for i, (p, at) in enumerate(zip(params, positions.tolist(), strict=True))]
    if status is not None:
        status |= torch.tensor([bits for _, bits in sampled], dtype=torch.int32)
    return torch.tensor([token for token, _ in sampled], dtype=torch.int64)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Verify the drafts of every request, sample its next token and propose its next drafts; see the reference.

    Of q_state the rows of requests that propose are written.
    """
    if logits.dtype == torch.float64:
        return python_ref.verify_accept(
            logits,
            query_start_loc,
            num_drafts,
            drafts,
            positions,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            id_limit,
            mask_id,
            branched=branched,
            mode=mode,
            q_state=q_state,
            logit_bias=logit_bias,
            status=status,
        )
    batch, num_k = drafts.shape
    rows = _Rows(logits, logit_bias, id_limit, mask_id)
    starts, counts, all_drafts = query_start_loc.tolist(), num_drafts.tolist(), drafts.tolist()
    num_accepted, flags = [0] * batch, [0] * batch
    tokens, next_drafts = [[-1] * (num_k + 1) for _ in range(batch)], [[-1] * num_k for _ in range(batch)]
    next_num_drafts = [0] * batch

    for b, (params, pending) in enumerate(
        zip(_params(temperature, top_k, top_p, min_p, seed), positions.tolist(), strict=True)
    ):
        start, m = starts[b], starts[b + 1] - starts[b]
        if m <= 0:
            continue
        n = min(max(counts[b], 0), m - 1, num_k)
        given = all_drafts[b][:n]
        if n != counts[b] or any(not 0 <= d < logits.shape[1] for d in given):
            flags[b] |= STATUS_BAD_DRAFT
        if mode == "match":
            sampled = [rows.sample(start + i, params, pending + 1 + i, STREAM_TARGET) for i in range(n + 1)]
            a = next((i for i, d in enumerate(given) if d != sampled[i][0]), n)
            token = sampled[a][0]
            for _, bits in sampled:
                flags[b] |= bits
        else:
            assert q_state is not None
            a, token, bits = _reject(rows, start, params, pending, given, q_state, b)
            flags[b] |= bits
        num_accepted[b] = a
        tokens[b][: a + 1] = [*given[:a], token]

        # MASK row j of branch a proposes for position L + a + 1 + j; a chain has branch n only.
        first_mask = 1 + n + (a * num_k if branched else 0)
        if num_k == 0 or first_mask + num_k > m or not (branched or a == n):
            continue
        stream = STREAM_TARGET if mode == "match" else STREAM_DRAFT
        for j in range(num_k):
            row = start + first_mask + j
            next_drafts[b][j], bits = rows.sample(row, params, pending + 2 + a + j, stream)
            flags[b] |= bits
        next_num_drafts[b] = num_k
        if mode == "rejection":
            assert q_state is not None
            masks = slice(start + first_mask, start + first_mask + num_k)
            z, cut, _ = _transform(rows.biased(masks), params, rows)
            q_state.logits[b] = rows.biased(masks)
            q_state.cut[b] = cut
            q_state.log_norm[b] = log_norm_of(z, cut)

    if status is not None:
        status |= torch.tensor(flags, dtype=torch.int32)
    return (
        torch.tensor(num_accepted, dtype=torch.int32),
        torch.tensor(tokens, dtype=torch.int64).view(batch, num_k + 1),
        torch.tensor(next_drafts, dtype=torch.int64).view(batch, num_k),
        torch.tensor(next_num_drafts, dtype=torch.int32),
    )


def _transform(logits: Tensor, params: _Params, rows: _Rows) -> tuple[Tensor, Tensor, int]:
    """z [R, V], cut [R] and the status bits of rows of one request."""
    x, status = sanitise(logits, rows.id_limit, rows.mask_id)
    z = scale_by_temperature(x, torch.full(x.shape[:1], params.temperature))
    cut = torch.tensor([truncation_cut(row, params.top_k, params.top_p, params.min_p) for row in z.numpy()])
    bits = 0
    for row_bits in status.tolist():
        bits |= row_bits
    return z, cut, bits


def _reject(
    rows: _Rows, start: int, params: _Params, pending: int, given: list[int], q_state: QState, b: int
) -> tuple[int, int, int]:
    """(accepted drafts, the token after them, status bits) by the rule of `rejection`."""
    n, vocab_size = len(given), rows.logits.shape[1]
    greedy = torch.tensor([params.greedy])
    z, cut, bits = _transform(rows.biased(slice(start, start + n + 1)), params, rows)
    for i, draft in enumerate(given):
        p = law(z[i : i + 1], cut[i : i + 1], log_norm_of(z[i : i + 1], cut[i : i + 1]), greedy)[0]
        if not 0 <= draft < vocab_size:
            return i, _argmax_of_law(p, params, pending + 1 + i), bits
        q_x, _ = sanitise(q_state.logits[b, i : i + 1], rows.id_limit, rows.mask_id)
        q_z = scale_by_temperature(q_x, torch.tensor([params.temperature]))
        q = law(q_z, q_state.cut[b, i : i + 1], q_state.log_norm[b, i : i + 1], greedy)[0]
        u = uniform(torch.tensor(params.seed), torch.tensor(pending + 1 + i))
        if not bool(u * q[draft] < p[draft]):
            residual = (p - q).clamp(min=0)
            return i, _argmax_of_law(residual if bool(residual.any()) else p, params, pending + 1 + i), bits
    token, _ = rows.sample(start + n, params, pending + 1 + n, STREAM_TARGET)
    return n, token, bits


def _argmax_of_law(p: Tensor, params: _Params, position: int) -> int:
    """A sample of the unnormalised law p [V] by the target's noise; its mode for a greedy request."""
    score = p if params.greedy else p.log() + gumbel_row(p.shape[0], params.seed, position, STREAM_TARGET)
    return int(score.numpy().argmax())
