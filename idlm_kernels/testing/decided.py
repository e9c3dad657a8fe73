"""Sampling and verification judged id by id: wherever the contract decides an id, it has to be that one.

The contract fixes logit / T to the bit, the noise to 2e-6, and a kernel's masses are good to a relative 1e-5: a row is
left out only if its id is not the same for every noise and every cut within those bounds, which is sharper than a
margin of 1e-4 between the two best scores and 1e-5 of mass around a cut. What is left out is counted (`Tally`) and has
to stay below 1 % in every case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import python_ref
from idlm_kernels.testing.numerics import same_bits
from python_ref import DraftDistributions
from python_ref import sampling as ref
from python_ref.noise import gumbel, uniform

NOISE = 2e-6  # error of a Gumbel variable
MASS = 1e-5  # relative error of a sum of weights; of a share p of one, 2 p (1 - p) times this
MAX_LEFT_OUT = 0.01  # of the results of a case


@dataclass(frozen=True)
class Mix:
    """Sampling parameters; each row or request takes the next one."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


MIXES = (
    Mix(),
    Mix(temperature=0.0),
    Mix(temperature=0.7, top_k=50),
    Mix(temperature=1.3, top_p=0.9),
    Mix(min_p=0.05),
    Mix(temperature=0.9, top_k=40, top_p=0.95, min_p=0.02),
    Mix(temperature=0.0, top_k=3, top_p=0.5),
    Mix(top_k=1),
    Mix(temperature=2.5, top_p=0.3),
    Mix(temperature=0.01),
)


def parameters(count: int, mixes: tuple[Mix, ...] = MIXES) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = [mixes[i % len(mixes)] for i in range(count)]
    return (
        torch.tensor([m.temperature for m in chosen]),
        torch.tensor([m.top_k for m in chosen], dtype=torch.int32),
        torch.tensor([m.top_p for m in chosen]),
        torch.tensor([m.min_p for m in chosen]),
    )


@dataclass
class Rows:
    """A problem for sample_rows, on the CPU."""

    logits: Tensor
    positions: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    id_limit: int
    mask_id: int
    stream: int = 0
    logit_bias: Tensor | None = None

    @classmethod
    def make(
        cls,
        count: int,
        vocab_size: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        *,
        mixes: tuple[Mix, ...] = MIXES,
        spread: float = 3.0,
        **changes: Any,
    ) -> Rows:
        logits = (torch.randn(count, vocab_size, generator=generator) * spread).to(dtype)
        positions = torch.randint(0, 100_000, (count,), generator=generator)
        seed = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
        mask = min(2, vocab_size - 1)
        rows = cls(logits, positions, *parameters(count, mixes), seed, max(1, vocab_size - 1), mask)
        return replace(rows, **changes)

    def arguments(self, device: torch.device | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def at(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) and device is not None else x

        names = ("logits", "positions", "temperature", "top_k", "top_p", "min_p", "seed", "id_limit", "mask_id")
        args = tuple(at(getattr(self, name)) for name in names)
        return args, {"stream": self.stream, "logit_bias": at(self.logit_bias)}

    def run(self, backend: Any, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Ids and error_flags."""
        args, options = self.arguments(device)
        error_flags = torch.zeros(self.logits.shape[0], dtype=torch.int32, device=device)
        ids = backend.sample_rows(*args, **options, error_flags=error_flags)
        return ids.cpu(), error_flags.cpu()

    def decided(self) -> Tensor:
        """Rows [T] whose id is the same for all noise and all cuts within their errors."""
        z, (low_cut, high_cut) = self.transformed()
        noise = gumbel(self.seed, self.positions, z.shape[-1], self.stream, torch.float64)
        kept = z >= low_cut.unsqueeze(-1)
        # Sums are rounded to fp32: where logits are so large that the noise is lost, ties are exact.
        low, high = ((z.double() + noise + s * NOISE).to(z.dtype).masked_fill(~kept, -math.inf) for s in (-1, 1))
        best = ref.lowest_argmax((z.double() + noise).masked_fill(~kept, -math.inf)).unsqueeze(-1)
        ids, least = torch.arange(z.shape[-1]), low.gather(-1, best)
        wins = (least > high) | ((least == high) & (best < ids)) | (ids == best) | ~kept
        greedy = self.temperature < ref.GREEDY_BELOW
        return greedy | (wins.all(-1) & (z.gather(-1, best).squeeze(-1) >= high_cut))

    def transformed(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """logits / T [T, V], and the lowest and the highest cut [T] that errors allow."""
        x = ref.add_bias(self.logits, self.logit_bias)
        z = ref.scale_by_temperature(ref.sanitise(x, self.id_limit, self.mask_id)[0], self.temperature)
        # A share p of a sum whose parts are off by MASS moves by 2 p (1 - p) as much.
        p, least = self.top_p.double(), self.min_p.double()
        wide = torch.where(p < 1, p + 2 * MASS * p * (1 - p), p)
        narrow = torch.where(p < 1, p - 2 * MASS * p * (1 - p), p)
        low = ref.truncation_cut(z, self.top_k, wide, least * (1 - MASS))
        return z, (low, ref.truncation_cut(z, self.top_k, narrow, least * (1 + MASS)))


@dataclass
class Tally:
    """How many results of each case were compared, and how many left out."""

    cases: dict[str, list[int]] = field(default_factory=dict)  # name: compared, left out
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, equal: Tensor, decided: Tensor) -> None:
        case = self.cases.setdefault(name, [0, 0])
        case[0] += int(decided.sum())
        case[1] += int((~decided).sum())
        bad = (decided & ~equal).nonzero().flatten().tolist()
        if bad:
            self.wrong.append(f"{name}: rows {bad[:8]}")

    def hold(self) -> None:
        """Every compared result was right, and of every case all but 1 % was compared."""
        assert not self.wrong, "; ".join(self.wrong)
        REPORT.append(self)
        for name, (compared, left_out) in self.cases.items():
            total = compared + left_out
            assert left_out < MAX_LEFT_OUT * total, f"{name}: {left_out} of {total} results left out"


REPORT: list[Tally] = []  # of this run


def check_rows(rows: Rows, backend: Any, device: torch.device, tally: Tally, name: str = "") -> None:
    ids, error_flags = rows.run(backend, device)
    expected, expected_flags = rows.run(python_ref)
    assert torch.equal(error_flags, expected_flags), (
        f"{name}: error_flags {error_flags.tolist()}, wanted {expected_flags.tolist()}"
    )
    tally.add(name, ids == expected, rows.decided())


# verify_accept


@dataclass
class Step:
    """A problem for verify_accept, on the CPU."""

    logits: Tensor
    query_start_loc: Tensor
    num_drafts: Tensor
    drafts: Tensor
    positions: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    id_limit: int
    mask_id: int
    quadratic: bool
    rule: str
    draft_dists: DraftDistributions | None = None
    logit_bias: Tensor | None = None

    @classmethod
    def make(
        cls,
        batch: int,
        num_spec_tokens: int,
        vocab_size: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        *,
        quadratic: bool,
        rule: str,
        mixes: tuple[Mix, ...] = MIXES,
        closeness: float = 0.5,
        bias_dtype: torch.dtype | None = None,
        kinds: tuple[int, ...] = (0, 1, 2, 3),
        num_drafts: int | None = None,
    ) -> Step:
        """Drafts, `num_drafts` or any number per request, are drawn from distributions `closeness` away from the clean
        rows, so that some stand. Kinds of requests: 0 absent, 1 without MASK rows, others complete."""

        def draw(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, dtype=dtype)

        def noisy(count: int) -> Tensor:
            return base + closeness * torch.randn(count, vocab_size, generator=generator)

        base = 3 * torch.randn(1, vocab_size, generator=generator)
        drafted = draw(0, num_spec_tokens + 1, (batch,), torch.int32)
        if num_drafts is not None:
            drafted.fill_(num_drafts)
        kind = torch.tensor(kinds)[draw(0, len(kinds), (batch,))]
        masks = num_spec_tokens * (drafted + 1 if quadratic else torch.ones_like(drafted))
        counts = torch.where(kind == 0, 0, 1 + drafted + torch.where(kind == 1, 0, masks))
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        total = max(1, int(start[-1]))
        bias = None if bias_dtype is None else torch.randn(total, vocab_size, generator=generator).to(bias_dtype)
        temperature, top_k, top_p, min_p = parameters(batch, mixes)
        seed = draw(-(2**63), 2**63 - 1, (batch,))
        positions = draw(0, 100_000, (batch,), torch.int32)
        id_limit, mask_id = vocab_size - 1, 2
        q_logits = noisy(batch * num_spec_tokens).to(torch.float32 if bias_dtype else dtype)
        each: Any = [x.repeat_interleave(num_spec_tokens) for x in (temperature, top_k, top_p, min_p, seed)]
        where = (positions.long().unsqueeze(1) + 1 + torch.arange(num_spec_tokens)).flatten()
        drafts = torch.zeros(batch, num_spec_tokens, dtype=torch.int64)
        draft_dists = None
        if num_spec_tokens:
            stream = 0 if rule == "match" else 1
            sample: Any = ref.sample_rows
            drafts = sample(q_logits, where, *each, id_limit, mask_id, stream=stream).view(batch, num_spec_tokens)
        if rule == "rejection":
            draft_dists = DraftDistributions.empty(batch, num_spec_tokens, vocab_size, q_logits.dtype, q_logits.device)
            if num_spec_tokens:
                z = ref.scale_by_temperature(ref.sanitise(q_logits, id_limit, mask_id)[0], each[0])
                cut = ref.truncation_cut(z, *each[1:4])
                draft_dists.logits.copy_(q_logits.view(batch, num_spec_tokens, vocab_size))
                draft_dists.cut.copy_(cut.view(batch, num_spec_tokens))
                draft_dists.log_norm.copy_(ref.log_norm_of(z, cut).view(batch, num_spec_tokens))
        return cls(
            noisy(total).to(dtype), start, drafted, drafts, positions, temperature, top_k, top_p, min_p, seed,
            id_limit, mask_id, quadratic, rule, draft_dists, bias,
        )  # fmt: skip

    def run(self, backend: Any, device: torch.device | None = None) -> Outcome:
        def at(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) and device is not None else x

        names = ("logits", "query_start_loc", "num_drafts", "drafts", "positions", "temperature", "top_k", "top_p")
        args = [at(getattr(self, name)) for name in (*names, "min_p", "seed", "id_limit", "mask_id")]
        error_flags = torch.zeros(len(self.positions), dtype=torch.int32, device=device)
        q = self.draft_dists
        q = None if q is None else DraftDistributions(at(q.logits).clone(), at(q.cut).clone(), at(q.log_norm).clone())
        options = {
            "quadratic": self.quadratic,
            "rule": self.rule,
            "logit_bias": at(self.logit_bias),
            "error_flags": error_flags,
        }
        results = backend.verify_accept(*args, **options, draft_dists=q)
        q = None if q is None else DraftDistributions(q.logits.cpu(), q.cut.cpu(), q.log_norm.cpu())
        num_accepted, tokens, next_drafts, next_num_drafts = (x.cpu() for x in results)
        return Outcome(num_accepted, tokens, next_drafts, next_num_drafts, error_flags.cpu(), q)

    def requests(self, first: int, last: int) -> Step:
        """Requests first .. last - 1 alone, with their rows."""
        names = ("num_drafts", "drafts", "positions", "temperature", "top_k", "top_p", "min_p", "seed")
        start = self.query_start_loc[first : last + 1]
        rows = slice(int(start[0]), int(start[-1]))
        return replace(
            self,
            **{name: getattr(self, name)[first:last] for name in names},
            logits=self.logits[rows],
            query_start_loc=start - start[0],
            draft_dists=None if self.draft_dists is None else self.draft_dists.requests(first, last),
            logit_bias=None if self.logit_bias is None else self.logit_bias[rows],
        )

    def rows_of(self, b: int, first: int, count: int, offset: int, stream: int) -> Rows:
        """Rows first .. first + count - 1 of the logits, sampled for request b from `offset` after pending on."""
        which = slice(first, first + count)
        each = {
            name: getattr(self, name)[b].expand(count) for name in ("temperature", "top_k", "top_p", "min_p", "seed")
        }
        return Rows(
            logits=self.logits[which],
            positions=self.positions[b].long() + offset + torch.arange(count),
            id_limit=self.id_limit,
            mask_id=self.mask_id,
            stream=stream,
            logit_bias=None if self.logit_bias is None else self.logit_bias[which],
            **each,
        )


@dataclass
class Outcome:
    num_accepted: Tensor
    tokens: Tensor
    next_drafts: Tensor
    next_num_drafts: Tensor
    error_flags: Tensor
    draft_dists: DraftDistributions | None

    def equal(self, other: Outcome) -> Tensor:
        """Requests [B] with the same decision."""
        return (
            (self.num_accepted == other.num_accepted)
            & (self.tokens == other.tokens).all(1)
            & (self.next_drafts == other.next_drafts).all(1)
            & (self.next_num_drafts == other.next_num_drafts)
        )

    def requests(self, first: int, last: int) -> Outcome:
        q = self.draft_dists and self.draft_dists.requests(first, last)
        each = (self.num_accepted, self.tokens, self.next_drafts, self.next_num_drafts, self.error_flags)
        num_accepted, tokens, next_drafts, next_num_drafts, error_flags = (x[first:last] for x in each)
        return Outcome(num_accepted, tokens, next_drafts, next_num_drafts, error_flags, q)

    def same_bits(self, other: Outcome) -> bool:
        q, p = self.draft_dists, other.draft_dists
        distributions = q is None or p is None or all(
            same_bits(a, b) for a, b in ((q.logits, p.logits), (q.cut, p.cut), (q.log_norm, p.log_norm))
        )  # fmt: skip
        return distributions and bool(self.equal(other).all()) and torch.equal(self.error_flags, other.error_flags)


def check_step(step: Step, backend: Any, device: torch.device, tally: Tally, name: str = "") -> None:
    got, expected = step.run(backend, device), step.run(python_ref)
    assert torch.equal(got.error_flags, expected.error_flags), (
        f"{name}: error_flags {got.error_flags}, wanted {expected.error_flags}"
    )
    decided = decided_requests(step)
    tally.add(name, got.equal(expected), decided)
    if step.rule == "rejection":
        check_stored(step, got, expected, decided & (expected.next_num_drafts > 0))


def decided_requests(step: Step) -> Tensor:
    """Requests [B] whose outcome is the same for all noise, cuts and probabilities within their errors."""
    expected = step.run(python_ref)
    decided = torch.ones(len(step.positions), dtype=torch.bool)
    for b in (step.query_start_loc.diff() > 0).nonzero().flatten().tolist():
        accepted = int(expected.num_accepted[b])
        num_spec_tokens, start = step.drafts.shape[1], int(step.query_start_loc[b])
        num_rows = int(step.query_start_loc[b + 1]) - start
        num_drafts = min(max(int(step.num_drafts[b]), 0), num_rows - 1, num_spec_tokens)
        clean = step.rows_of(b, start, accepted + 1, 1, python_ref.STREAM_TARGET)
        sound = clean.decided()
        if step.rule == "rejection" and step.temperature[b] >= ref.GREEDY_BELOW:
            for i in range(min(accepted + 1, num_drafts)):
                if 0 <= int(step.drafts[b, i]) < step.logits.shape[-1]:
                    sound[i] = _judgement_decided(step, clean, b, i)
        decided[b] = bool(sound.all())
        if expected.next_num_drafts[b]:
            first = start + 1 + num_drafts + (accepted * num_spec_tokens if step.quadratic else 0)
            stream = python_ref.STREAM_TARGET if step.rule == "match" else python_ref.STREAM_DRAFT
            decided[b] &= bool(step.rows_of(b, first, num_spec_tokens, accepted + 2, stream).decided().all())
    return decided


def _judgement_decided(step: Step, clean: Rows, b: int, i: int) -> bool:
    """Whether it is certain that draft i of request b stands or, where it does not, which token takes its place."""
    assert step.draft_dists is not None
    q_z = ref.sanitise(step.draft_dists.logits[b, i : i + 1], step.id_limit, step.mask_id)[0]
    q_z = ref.scale_by_temperature(q_z, step.temperature[b : b + 1])[0]
    q_norm = step.draft_dists.log_norm[b, i].double()
    q = torch.exp(q_z.double() - q_norm).masked_fill(q_z < step.draft_dists.cut[b, i], 0.0)
    u = uniform(clean.seed[i : i + 1], clean.positions[i : i + 1]).double().item()
    g = gumbel(clean.seed[i : i + 1], clean.positions[i : i + 1], len(q), python_ref.STREAM_TARGET, torch.float64)[0]
    x = int(step.drafts[b, i])
    outcomes = set()
    z, cuts = clean.transformed()
    for cut in cuts:
        kept = z[i].double().masked_fill(z[i] < cut[i], -math.inf)
        p_norm = kept.logsumexp(-1)
        p = torch.exp(kept - p_norm)
        # A normaliser is rounded to fp32; that of a point mass is exact.
        p_error, q_error = (
            torch.where(distribution < 1, (MASS + 2.0**-22 * norm.abs()) * distribution, 0.0)
            for norm, distribution in ((p_norm, p), (q_norm, q))
        )
        difference = u * q - p
        if difference[x].abs() <= u * q_error[x] + p_error[x] and max(p[x], q[x]) > 0:
            return False
        if difference[x] < 0:
            outcomes.add(-1)
            continue
        residual, error = p - q, p_error + q_error
        # Scores are rounded to fp32, as is the logarithm.
        low, high = ((residual + s * error).clamp(min=0).log() + g + s * 3 * NOISE for s in (-1, 1))
        best = int((residual.clamp(min=0).log() + g).argmax())
        high[best] = -math.inf
        if not low[best] > high.max():
            return False
        outcomes.add(best)
    return len(outcomes) == 1


def check_stored(step: Step, got: Outcome, expected: Outcome, which: Tensor) -> None:
    """The stored distributions of the requests `which` keep the same ids with the same probabilities."""
    assert got.draft_dists is not None and expected.draft_dists is not None
    for b in which.nonzero().flatten().tolist():
        num_spec_tokens = step.drafts.shape[1]
        temperature = step.temperature[b].expand(num_spec_tokens)
        distributions = []
        for q in (got.draft_dists, expected.draft_dists):
            z = ref.scale_by_temperature(ref.sanitise(q.logits[b], step.id_limit, step.mask_id)[0], temperature)
            distributions.append((z, z >= q.cut[b].unsqueeze(1), q.log_norm[b]))
        (z, kept, norm), (want_z, want_kept, want_norm) = distributions
        assert torch.equal(z, want_z), f"request {b}: the stored logits differ"
        stray = (kept != want_kept).double() * torch.exp(want_z.double() - want_norm.double().unsqueeze(1))
        assert float(stray.sum(1).max()) <= 3 * MASS, f"request {b}: the kept ids differ"
        if torch.equal(kept, want_kept):
            assert torch.allclose(norm, want_norm, atol=4e-6, rtol=1e-6), f"request {b}: {norm} instead of {want_norm}"
