"""Problems for the sampling kernels, and the judgement of their results.

A kernel's logarithms and sums may differ from the reference's in the last place, so ids are compared only where that
cannot decide: where the two best perturbed scores are more than 1e-4 apart, and where the reference samples the same id
with the cuts of top-p and min-p moved by 1e-5 of mass either way. What is left out is counted.
"""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import python_ref
from python_ref import QState
from python_ref import sampling as ref
from python_ref.noise import gumbel

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 1e-4  # of perturbed scores
MASS = 1e-5  # of probability


@dataclass(frozen=True)
class Toolkit:
    """csrc/build.py as a module, and the toolchain that it found."""

    build: ModuleType
    toolchain: Any

    def tool(self, name: str) -> str:
        """A tool of the CUDA toolkit; Triton brings those that a minimal toolkit lacks."""
        triton = importlib.util.find_spec("triton")
        folders = [self.toolchain.nvcc.resolve().parent]
        if triton is not None and triton.origin is not None:
            folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
        for folder in folders:
            if (folder / name).is_file():
                return str(folder / name)
        pytest.skip(f"{name} is neither in {' nor in '.join(map(str, folders))}")

    def nvcc(self, *args: str) -> None:
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        command = [str(self.toolchain.nvcc), "-std=c++17", *includes, *args]
        subprocess.run(command, check=True, capture_output=True, text=True)


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

    def run(self, backend: ModuleType, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Ids and status."""
        args, options = self.arguments(device)
        status = torch.zeros(self.logits.shape[0], dtype=torch.int32, device=device)
        ids = backend.sample_rows(*args, **options, status=status)
        return ids.cpu(), status.cpu()

    def decided(self) -> Tensor:
        """Rows [T] whose id no last-place difference can change."""
        z, cut, greedy = self._transformed(self.top_p, self.min_p)
        noise = gumbel(self.seed, self.positions, z.shape[-1], self.stream, z.dtype)
        margin = _margin(z, cut, noise) > MARGIN
        same = torch.ones_like(margin)
        expected = ref.perturbed_argmax(z, cut, greedy, noise)
        for sign in (-1, 1):
            top_p = torch.where(self.top_p < 1, self.top_p + sign * MASS, self.top_p)
            min_p = torch.where(self.min_p > 0, self.min_p * (1 - sign * MASS), self.min_p)
            cut = self._transformed(top_p, min_p)[1]
            same &= ref.perturbed_argmax(z, cut, greedy, noise) == expected
        return greedy | (margin & same)

    def _transformed(self, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = ref.add_bias(self.logits, self.logit_bias)
        z = ref.scale_by_temperature(ref.sanitise(x, self.id_limit, self.mask_id)[0], self.temperature)
        return z, ref.truncation_cut(z, self.top_k, top_p, min_p), self.temperature < ref.GREEDY_BELOW


def _margin(z: Tensor, cut: Tensor, noise: Tensor) -> Tensor:
    """Distance of the two best perturbed scores; beyond 30, as a share of their size, which their roundings grow with.
    Infinite where they are so large that the noise, below 23, is lost in the sum: then ties are exact."""
    scores = (z + noise).masked_fill(z < cut.unsqueeze(-1), float("-inf")).double()
    if scores.shape[-1] == 1:
        return torch.full(scores.shape[:-1], float("inf"), dtype=torch.float64)
    best = scores.topk(2, -1).values
    size = best[..., 0].abs()
    return ((best[..., 0] - best[..., 1]) / (size.clamp(min=30.0) / 30.0)).masked_fill(size > 2.0**31, float("inf"))


@dataclass
class Tally:
    """How many results were compared, and how many left out."""

    compared: int = 0
    left_out: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, equal: Tensor, decided: Tensor) -> None:
        self.compared += int(decided.sum())
        self.left_out += int((~decided).sum())
        bad = (decided & ~equal).nonzero().flatten().tolist()
        if bad:
            self.wrong.append(f"{name}: rows {bad[:8]}")

    def hold(self, share: float = 0.01) -> None:
        assert not self.wrong, "; ".join(self.wrong)
        total = self.compared + self.left_out
        print(f"left out {self.left_out} of {total} results")
        assert self.left_out <= max(share * total, 1), f"{self.left_out} of {total} results left out"


def check_rows(rows: Rows, backend: ModuleType, device: torch.device, tally: Tally, name: str = "") -> None:
    ids, status = rows.run(backend, device)
    expected, expected_status = rows.run(python_ref)  # type: ignore[arg-type]
    assert torch.equal(status, expected_status), f"{name}: status {status.tolist()}, wanted {expected_status.tolist()}"
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
    branched: bool
    mode: str
    q_state: QState | None = None
    logit_bias: Tensor | None = None

    @classmethod
    def make(
        cls,
        batch: int,
        num_k: int,
        vocab_size: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        *,
        branched: bool,
        mode: str,
        mixes: tuple[Mix, ...] = MIXES,
        closeness: float = 0.5,
        bias_dtype: torch.dtype | None = None,
        kinds: tuple[int, ...] = (0, 1, 2, 3),
    ) -> Step:
        """Drafts are drawn from laws `closeness` away from those of the clean rows, so that some stand. Kinds of
        requests: 0 absent, 1 without MASK rows, others complete."""

        def draw(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, dtype=dtype)

        def noisy(count: int) -> Tensor:
            return base + closeness * torch.randn(count, vocab_size, generator=generator)

        base = 3 * torch.randn(1, vocab_size, generator=generator)
        num_drafts = draw(0, num_k + 1, (batch,), torch.int32)
        kind = torch.tensor(kinds)[draw(0, len(kinds), (batch,))]
        masks = num_k * (num_drafts + 1 if branched else torch.ones_like(num_drafts))
        counts = torch.where(kind == 0, 0, 1 + num_drafts + torch.where(kind == 1, 0, masks))
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        total = max(1, int(start[-1]))
        bias = None if bias_dtype is None else torch.randn(total, vocab_size, generator=generator).to(bias_dtype)
        temperature, top_k, top_p, min_p = parameters(batch, mixes)
        seed = draw(-(2**63), 2**63 - 1, (batch,))
        positions = draw(0, 100_000, (batch,), torch.int32)
        id_limit, mask_id = vocab_size - 1, 2
        q_logits = noisy(batch * num_k).to(torch.float32 if bias_dtype else dtype)
        each = [x.repeat_interleave(num_k) for x in (temperature, top_k, top_p, min_p, seed)]
        where = (positions.long().unsqueeze(1) + 1 + torch.arange(num_k)).flatten()
        drafts = torch.zeros(batch, num_k, dtype=torch.int64)
        q_state = None
        if num_k:
            stream = 0 if mode == "match" else 1
            drafts = ref.sample_rows(q_logits, where, *each, id_limit, mask_id, stream=stream).view(batch, num_k)
        if mode == "rejection":
            q_state = QState.empty(batch, num_k, vocab_size, q_logits.dtype, q_logits.device)
            if num_k:
                z = ref.scale_by_temperature(ref.sanitise(q_logits, id_limit, mask_id)[0], each[0])
                cut = ref.truncation_cut(z, *each[1:4])
                q_state.logits.copy_(q_logits.view(batch, num_k, vocab_size))
                q_state.cut.copy_(cut.view(batch, num_k))
                q_state.log_norm.copy_(ref.log_norm_of(z, cut).view(batch, num_k))
        return cls(
            noisy(total).to(dtype), start, num_drafts, drafts, positions, temperature, top_k, top_p, min_p, seed,
            id_limit, mask_id, branched, mode, q_state, bias,
        )  # fmt: skip

    def run(self, backend: ModuleType, device: torch.device | None = None) -> Outcome:
        def at(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) and device is not None else x

        names = ("logits", "query_start_loc", "num_drafts", "drafts", "positions", "temperature", "top_k", "top_p")
        args = [at(getattr(self, name)) for name in (*names, "min_p", "seed", "id_limit", "mask_id")]
        status = torch.zeros(len(self.positions), dtype=torch.int32, device=device)
        q = self.q_state
        q = None if q is None else QState(at(q.logits).clone(), at(q.cut).clone(), at(q.log_norm).clone())
        options = {"branched": self.branched, "mode": self.mode, "logit_bias": at(self.logit_bias), "status": status}
        results = backend.verify_accept(*args, **options, q_state=q)
        q = None if q is None else QState(q.logits.cpu(), q.cut.cpu(), q.log_norm.cpu())
        return Outcome(*(x.cpu() for x in results), status.cpu(), q)

    def biased(self) -> Tensor:
        return ref.add_bias(self.logits, self.logit_bias)


@dataclass
class Outcome:
    num_accepted: Tensor
    tokens: Tensor
    next_drafts: Tensor
    next_num_drafts: Tensor
    status: Tensor
    q_state: QState | None

    def equal(self, other: Outcome) -> Tensor:
        """Requests [B] with the same decision."""
        return (
            (self.num_accepted == other.num_accepted)
            & (self.tokens == other.tokens).all(1)
            & (self.next_drafts == other.next_drafts).all(1)
            & (self.next_num_drafts == other.next_num_drafts)
        )

    def same_bits(self, other: Outcome) -> bool:
        q, p = self.q_state, other.q_state
        laws = q is None or p is None or all(
            torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
            for a, b in ((q.logits, p.logits), (q.cut, p.cut), (q.log_norm, p.log_norm))
        )  # fmt: skip
        return laws and bool(self.equal(other).all()) and torch.equal(self.status, other.status)


def check_step(step: Step, backend: ModuleType, device: torch.device, tally: Tally, name: str = "") -> None:
    got, expected = step.run(backend, device), step.run(python_ref)  # type: ignore[arg-type]
    assert torch.equal(got.status, expected.status), f"{name}: status {got.status}, wanted {expected.status}"
    decided = decided_requests(step)
    tally.add(name, got.equal(expected), decided)
    if step.mode == "rejection":
        check_laws(step, got, expected, decided & (expected.next_num_drafts > 0))


def decided_requests(step: Step) -> Tensor:
    """Requests [B] whose outcome stays the same in fp64, with scores moved by up to 1e-4 against each other and with
    the cuts moved by 1e-5 of mass."""
    expected = step.run(python_ref)  # type: ignore[arg-type]
    same = torch.ones(len(step.positions), dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    owner = torch.bucketize(torch.arange(len(step.logits)), step.query_start_loc[1:], right=True)
    temperature = step.temperature[owner.clamp(max=len(same) - 1)]
    # Greedy rows have no noise and no roundings: their ties are ties.
    scale = torch.where(temperature < ref.GREEDY_BELOW, 0.0, MARGIN / 2 * temperature).double().unsqueeze(1)
    for sign in (-1, 1, -1, 1):
        shift = 2 * torch.rand(step.logits.shape, dtype=torch.float64, generator=generator) - 1
        q = step.q_state
        if q is not None:
            # fp64 quotients lie beside the fp32 cut that one of them was.
            q = QState(q.logits.double(), q.cut - q.cut.abs() * 2e-7, q.log_norm + sign * MASS)
        moved = replace(
            step,
            logits=step.biased().double() + scale * shift,
            logit_bias=None,
            q_state=q,
            top_p=torch.where(step.top_p < 1, step.top_p + sign * MASS, step.top_p),
            min_p=torch.where(step.min_p > 0, step.min_p * (1 - sign * MASS), step.min_p),
        )
        same &= moved.run(python_ref).equal(expected)  # type: ignore[arg-type]
    return same


def check_laws(step: Step, got: Outcome, expected: Outcome, which: Tensor) -> None:
    """The stored laws of the requests `which` keep the same ids with the same probabilities."""
    assert got.q_state is not None and expected.q_state is not None
    for b in which.nonzero().flatten().tolist():
        num_k = step.drafts.shape[1]
        temperature = step.temperature[b].expand(num_k)
        laws = []
        for q in (got.q_state, expected.q_state):
            z = ref.scale_by_temperature(ref.sanitise(q.logits[b], step.id_limit, step.mask_id)[0], temperature)
            laws.append((z, z >= q.cut[b].unsqueeze(1), q.log_norm[b]))
        (z, kept, norm), (want_z, want_kept, want_norm) = laws
        assert torch.equal(z, want_z), f"request {b}: the stored logits differ"
        stray = (kept != want_kept).double() * torch.exp(want_z.double() - want_norm.double().unsqueeze(1))
        assert float(stray.sum(1).max()) <= 3 * MASS, f"request {b}: the kept ids differ"
        if torch.equal(kept, want_kept):
            assert torch.allclose(norm, want_norm, atol=4e-6, rtol=1e-6), f"request {b}: {norm} instead of {want_norm}"
