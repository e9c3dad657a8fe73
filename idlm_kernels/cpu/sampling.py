"""Sampling and verify-and-accept on a CPU: the results of `python_ref.sampling`, row by row and only where needed.

Rows are handled one at a time in numpy, whose argmax and sort of fp32 are 10 and 80 times faster than torch's (49,152
numbers on one core: 3 and 90 us against 30 and 7,400 us). A row that holds anything out of the ordinary (NaN, +inf, no
finite logit, an overflow in logit / T) passes through the reference's `sanitise`.

What is saved: no noise and no sort for greedy rows, no sort without top-p and min-p, with truncation noise for the kept
ids alone, and in `rejection` no distribution beyond the first rejected draft. With few ids the calls per row cost more
than that: `rejection` then takes the requests together, as the reference does. Quadratic steps of 3 drafts on one
core, together and one by one: 1000 requests, 61 ids 43 and 2,440 ms; 16 requests, 1500 ids 40 and 49, 2500 ids 80 and
46.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import python_ref
from idlm_kernels.cpu.noise import gumbel_at, gumbel_row
from idlm_kernels.cpu.step import draw as native_draw
from idlm_kernels.cpu.step import verify_greedy
from python_ref.contract import FLAG_BAD_DRAFT, GREEDY_BELOW, STREAM_DRAFT, STREAM_TARGET, DraftDistributions
from python_ref.noise import uniform
from python_ref.sampling import add_bias, distribution, sanitise, scale_by_temperature

_Floats = NDArray[np.float32]
_GREEDY_BELOW = float(np.float32(GREEDY_BELOW))  # temperatures are fp32, and so is the bound that they are held to
MANY_BELOW = 2048  # ids; `rejection`. By the vocabulary alone: the two ways may round a distribution differently
MANY_ELEMENTS = 1 << 22  # of a distribution of some requests, taken together: 32 MB in fp64
SPARSE_BELOW = 1 / 16  # share of the ids up to which their noise alone is computed, and not kept; 5 times slower per id


@dataclass(frozen=True)
class _Params:
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def cut(self, z: _Floats) -> float:
        return truncation_cut(z, self.top_k, self.top_p, self.min_p)


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

    def biased(self, row: int) -> Tensor:
        return add_bias(self.logits[row], None if self.logit_bias is None else self.logit_bias[row])

    def transform(self, logits: Tensor, params: _Params) -> tuple[_Floats, int]:
        """z [V] = logits / T with forbidden ids at -inf, not yet truncated, and the error flags of the row."""
        x: _Floats = logits.detach().float().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            z = x.copy() if params.greedy else x / np.float32(params.temperature)
        z[self.id_limit :] = -math.inf
        if self.mask_id >= 0:
            z[self.mask_id] = -math.inf
        if math.isfinite(z.max()):
            return z, 0
        # NaN, +inf, nothing finite or an overflow in the division: the reference knows what to do.
        x_row, error_flags = sanitise(logits.unsqueeze(0), self.id_limit, self.mask_id)
        return scale_by_temperature(x_row, torch.tensor([params.temperature]))[0].numpy(), int(error_flags)

    def sample(self, row: int, params: _Params, position: int, stream: int) -> tuple[int, int]:
        """(token, error flags) of one row."""
        logits = self.biased(row)
        if params.greedy:
            allowed: _Floats = logits[: self.id_limit].detach().float().numpy()
            best = int(allowed.argmax())  # the first of equals; the first NaN, if there is one
            if best != self.mask_id and math.isfinite(allowed[best]):
                return best, 0
        elif (token := self.drawn(logits, params, position, stream)) is not None:
            return token, 0
        z, error_flags = self.transform(logits, params)
        return draw(z, params, params.cut(z) if params.truncates else -math.inf, position, stream), error_flags

    def drawn(self, logits: Tensor, params: _Params, position: int, stream: int) -> int | None:
        """The token by the compiled kernels; None where they are absent or the row is out of the ordinary."""
        limits = logits.detach(), self.id_limit, self.mask_id
        cuts = params.top_k, params.top_p, params.min_p
        return native_draw(*limits, params.temperature, *cuts, params.seed, position, stream)


def draw(z: _Floats, params: _Params, cut: float, position: int, stream: int) -> int:
    """argmax(z + noise) over the ids with z >= cut, without noise for greedy requests."""
    if params.greedy:
        return int(z.argmax())
    if cut == -math.inf:
        return int((z + gumbel_row(z.size, params.seed, position, stream).numpy()).argmax())
    ids = np.flatnonzero(z >= cut)
    if ids.size < z.size * SPARSE_BELOW:
        noise = gumbel_at(ids, params.seed, position, stream).numpy()
    else:
        noise = gumbel_row(z.size, params.seed, position, stream).numpy()[ids]
    return int(ids[(z[ids] + noise).argmax()])


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
            before = _count_below(weight, top_p)  # tokens that do not reach top_p yet
            likely &= ordered >= ordered[min(before, ordered.size - 1)]
        kept = ordered[likely]
    kept = kept[kept > -math.inf]
    return float(kept.min() if kept.size else z.max())  # the largest always stays


HEAD = 2048  # a running sum is sequential: of a whole vocabulary it takes longer than its sort


def _count_below(weight: NDArray[np.float64], top_p: float) -> int:
    """How many running sums of the falling weights stay below top_p of their total."""
    total = weight.sum()
    for size in (HEAD, weight.size):
        mass = np.cumsum(weight[:size]) / total
        if mass[-1] >= top_p:
            break
    return int(np.count_nonzero(mass < top_p))


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
            error_flags=error_flags,
            out=out,
        )
    rows = _Rows(logits, logit_bias, id_limit, mask_id)
    params = _params(temperature, top_k, top_p, min_p, seed)
    sampled = [rows.sample(i, p, at, stream) for i, (p, at) in enumerate(zip(params, positions.tolist(), strict=True))]
    if error_flags is not None:
        error_flags |= torch.tensor([bits for _, bits in sampled], dtype=torch.int32)
    ids = torch.tensor([token for token, _ in sampled], dtype=torch.int64)
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
    quadratic: bool,
    rule: str,
    draft_dists: DraftDistributions | None = None,
    logit_bias: Tensor | None = None,
    error_flags: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Verify the drafts of every request, sample its next token and propose its next drafts; see the reference.

    Of draft_dists the rows of requests that propose are written.
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
            quadratic=quadratic,
            rule=rule,
            draft_dists=draft_dists,
            logit_bias=logit_bias,
            error_flags=error_flags,
            out=out,
        )
    if rule == "match" and logit_bias is None:
        decided = verify_greedy(logits, query_start_loc, num_drafts, drafts, temperature, id_limit, mask_id, quadratic)
        if decided is not None:
            if out is None:
                return decided
            for target, value in zip(out, decided, strict=True):
                target.copy_(value)
            return out
    batch, num_spec_tokens = drafts.shape
    if rule == "rejection" and logits.shape[1] < MANY_BELOW:
        return _verify_together(
            logits,
            query_start_loc,
            (num_drafts, drafts, positions, temperature, top_k, top_p, min_p, seed),
            (id_limit, mask_id),
            quadratic,
            draft_dists,
            logit_bias,
            error_flags,
            out,
        )
    rows = _Rows(logits, logit_bias, id_limit, mask_id)
    starts, counts, all_drafts = query_start_loc.tolist(), num_drafts.tolist(), drafts.tolist()
    num_accepted, flags = [0] * batch, [0] * batch
    tokens, next_drafts = (
        [[-1] * (num_spec_tokens + 1) for _ in range(batch)],
        [[-1] * num_spec_tokens for _ in range(batch)],
    )
    next_num_drafts = [0] * batch

    for b, (params, pending) in enumerate(
        zip(_params(temperature, top_k, top_p, min_p, seed), positions.tolist(), strict=True)
    ):
        start, m = starts[b], starts[b + 1] - starts[b]
        if m <= 0:
            continue
        n = min(max(counts[b], 0), m - 1, num_spec_tokens)
        given = all_drafts[b][:n]
        if n != counts[b] or any(not 0 <= d < logits.shape[1] for d in given):
            flags[b] |= FLAG_BAD_DRAFT
        if rule == "match":
            sampled = [rows.sample(start + i, params, pending + 1 + i, STREAM_TARGET) for i in range(n + 1)]
            a = next((i for i, d in enumerate(given) if d != sampled[i][0]), n)
            token = sampled[a][0]
            for _, bits in sampled:
                flags[b] |= bits
        else:
            assert draft_dists is not None
            a, token, bits = _reject(rows, start, params, pending, given, draft_dists, b)
            flags[b] |= bits
        num_accepted[b] = a
        tokens[b][: a + 1] = [*given[:a], token]

        # MASK row j of branch a proposes for position L + a + 1 + j; a chain has branch n only.
        first_mask = 1 + n + (a * num_spec_tokens if quadratic else 0)
        if num_spec_tokens == 0 or first_mask + num_spec_tokens > m or not (quadratic or a == n):
            continue
        stream = STREAM_TARGET if rule == "match" else STREAM_DRAFT
        for j in range(num_spec_tokens):
            row, position = start + first_mask + j, pending + 2 + a + j
            if rule == "match":
                next_drafts[b][j], bits = rows.sample(row, params, position, stream)
            else:
                assert draft_dists is not None
                q, bits = _distribution_of(rows, rows.biased(row), params)
                next_drafts[b][j] = draw(q.z, params, q.cut, position, stream)
                draft_dists.logits[b, j] = rows.biased(row)
                draft_dists.cut[b, j], draft_dists.log_norm[b, j] = q.cut, q.log_norm
            flags[b] |= bits
        next_num_drafts[b] = num_spec_tokens
    if error_flags is not None:
        error_flags |= torch.tensor(flags, dtype=torch.int32)
    result = (
        torch.tensor(num_accepted, dtype=torch.int32),
        torch.tensor(tokens, dtype=torch.int64).view(batch, num_spec_tokens + 1),
        torch.tensor(next_drafts, dtype=torch.int64).view(batch, num_spec_tokens),
        torch.tensor(next_num_drafts, dtype=torch.int32),
    )
    if out is None:
        return result
    for target, value in zip(out, result, strict=True):
        target.copy_(value)
    return out


def _verify_together(
    logits: Tensor,
    query_start_loc: Tensor,
    of_requests: tuple[Tensor, ...],
    limits: tuple[int, int],
    quadratic: bool,
    draft_dists: DraftDistributions | None,
    logit_bias: Tensor | None,
    error_flags: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rejection` of as many requests at a time as fit into MANY_ELEMENTS, by the reference."""
    assert draft_dists is not None
    batch, num_spec_tokens = of_requests[1].shape
    if out is None:
        count, ids = torch.empty(batch, dtype=torch.int32), torch.empty(batch, num_spec_tokens + 1, dtype=torch.int64)
        out = count, ids, torch.empty(batch, num_spec_tokens, dtype=torch.int64), torch.empty_like(count)
    at_once = max(MANY_ELEMENTS // ((num_spec_tokens + 1) * logits.shape[1]), 1)
    for first in range(0, batch, at_once):
        last = min(first + at_once, batch)
        num_drafts, drafts, positions, temperature, top_k, top_p, min_p, seed = (x[first:last] for x in of_requests)
        python_ref.verify_accept(
            logits,
            query_start_loc[first : last + 1],
            num_drafts,
            drafts,
            positions,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            *limits,
            quadratic=quadratic,
            rule="rejection",
            draft_dists=draft_dists.requests(first, last),
            logit_bias=logit_bias,
            error_flags=None if error_flags is None else error_flags[first:last],
            out=(out[0][first:last], out[1][first:last], out[2][first:last], out[3][first:last]),
        )
    return out


@dataclass(frozen=True)
class _Distribution:
    """The distribution of a row: exp(z - log_norm) where z >= cut; all mass on the largest z for greedy requests."""

    z: _Floats
    cut: float
    log_norm: float
    greedy: bool

    def of(self, token: int) -> Tensor:
        """The probability of one token, in the arithmetic of `python_ref.sampling.distribution`."""
        if self.greedy:
            return torch.tensor(float(token == self.z.argmax()))
        if self.z[token] < self.cut:
            return torch.tensor(0.0)
        return torch.exp(torch.tensor(self.z[token] - np.float32(self.log_norm)))

    def of_all(self) -> Tensor:
        z, cut, log_norm = torch.from_numpy(self.z), torch.tensor(self.cut), torch.tensor(self.log_norm)
        return distribution(z, cut, log_norm, torch.tensor(self.greedy))


def _distribution_of(rows: _Rows, logits: Tensor, params: _Params) -> tuple[_Distribution, int]:
    """The distribution of biased logits [V], and the error flags of the row."""
    z, error_flags = rows.transform(logits, params)
    return _distribution(z, params), error_flags


def _distribution(z: _Floats, params: _Params) -> _Distribution:
    cut = params.cut(z)
    # Of the kept ids alone: exp of the -inf of the others would take longer than all the rest.
    log_norm = torch.logsumexp(torch.from_numpy(z[z >= cut]), 0)
    return _Distribution(z, cut, float(log_norm), params.greedy)


def _reject(
    rows: _Rows, start: int, params: _Params, pending: int, given: list[int], draft_dists: DraftDistributions, b: int
) -> tuple[int, int, int]:
    """(accepted drafts, the token after them, error flags) by the rule of `rejection`."""
    n, vocab_size = len(given), rows.logits.shape[1]
    transformed = [rows.transform(rows.biased(start + i), params) for i in range(n + 1)]
    error_flags = functools.reduce(operator.or_, (bits for _, bits in transformed))
    for i, draft in enumerate(given):
        position = pending + 1 + i
        p = _distribution(transformed[i][0], params)
        residual = None
        if 0 <= draft < vocab_size:
            q_z, _ = rows.transform(draft_dists.logits[b, i], params)
            q = _Distribution(q_z, float(draft_dists.cut[b, i]), float(draft_dists.log_norm[b, i]), params.greedy)
            u = uniform(torch.tensor(params.seed), torch.tensor(position))
            if bool(u * q.of(draft) < p.of(draft)):
                continue
            residual = (p.of_all() - q.of_all()).clamp(min=0)
        if residual is None or not bool(residual.any()):
            residual = p.of_all()
        return i, _argmax_of_distribution(residual, params, position), error_flags
    cut = params.cut(transformed[n][0]) if params.truncates else -math.inf
    return n, draw(transformed[n][0], params, cut, pending + 1 + n, STREAM_TARGET), error_flags


def _argmax_of_distribution(p: Tensor, params: _Params, position: int) -> int:
    """A sample of the unnormalised distribution p [V] by the target's noise; its mode for a greedy request."""
    score = p if params.greedy else p.log() + gumbel_row(p.shape[0], params.seed, position, STREAM_TARGET)
    return int(score.numpy().argmax())
