"""verify_accept of backend `cuda` against the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import python_ref
from idlm_kernels.native import backend
from idlm_kernels.testing.decided import MIXES, Mix, Step, Tally, check_step, check_stored, decided_requests
from python_ref import DraftDistributions
from python_ref.contract import FLAG_BAD_DRAFT
from tests.softgpu_support import SCHEDULES

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RULES = ["match", "rejection"]


@pytest.fixture(autouse=True)
def built(module: ModuleType) -> None:
    """Every test here launches kernels."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("quadratic", [True, False], ids=["quadratic", "chain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_batches(
    rule: str, quadratic: bool, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    tally = Tally()
    for num_spec_tokens, vocab_size in ((3, 37), (1, 8), (0, 64), (7, 256), (2, 1000), (3, 5003)):
        for closeness in (0.05, 0.5):
            step = Step.make(
                16, num_spec_tokens, vocab_size, dtype, generator, quadratic=quadratic, rule=rule, closeness=closeness
            )
            check_step(step, backend, device, tally, f"K={num_spec_tokens} V={vocab_size} closeness={closeness}")
    tally.hold()


@pytest.mark.parametrize("rule", RULES)
def test_full_vocabulary(rule: str, device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    mixes = (Mix(), Mix(0.8, top_p=0.9))
    step = Step.make(
        2, 3, 151_936, torch.bfloat16, generator, quadratic=True, rule=rule, closeness=0.1, mixes=mixes, kinds=(2,)
    )
    check_step(step, backend, device, tally)
    tally.hold()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bias(rule: str, bias_dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    for dtype in DTYPES:
        step = Step.make(20, 3, 300, dtype, generator, quadratic=True, rule=rule, bias_dtype=bias_dtype)
        check_step(step, backend, device, tally, str(dtype))
    tally.hold()


@pytest.mark.parametrize("rule", RULES)
def test_longest_chain(rule: str, device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    step = Step.make(8, 31, 64, torch.float32, generator, quadratic=False, rule=rule, closeness=0.0)
    check_step(step, backend, device, tally)
    tally.hold()


@pytest.mark.parametrize("rule", RULES)
def test_what_lies_outside_the_contract_is_refused(
    rule: str, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels take bf16, fp16 and fp32 logits, and chains have at most 32 tokens per step: fp64 and K > 31 are for the
    references. The C++ launcher holds its limit itself."""
    too_long = Step.make(2, 32, 64, torch.float32, generator, quadratic=False, rule=rule)
    with pytest.raises(ValueError, match="32 columns, backend 'cuda' takes at most 31 .*use backend 'torch'"):
        too_long.run(backend, device)
    monkeypatch.setattr(backend, "MAX_DRAFTS", 100)
    with pytest.raises(ValueError, match="32 drafts per request, this kernel takes 0 to 31"):
        too_long.run(backend, device)
    step = Step.make(2, 3, 64, torch.float32, generator, quadratic=False, rule=rule)
    with pytest.raises(TypeError, match="logits in bfloat16 or float16 or float32, got float64; use backend 'torch'"):
        replace(step, logits=step.logits.double()).run(backend, device)
    with pytest.raises(TypeError, match="logit_bias in bfloat16 or float16 or float32, got float64"):
        replace(step, logit_bias=torch.zeros_like(step.logits).double()).run(backend, device)
    if step.draft_dists is not None:
        distributions = replace(step.draft_dists, logits=step.draft_dists.logits.bfloat16())
        with pytest.raises(TypeError, match="draft_dists.logits in float32, got bfloat16"):
            replace(step, draft_dists=distributions).run(backend, device)


@pytest.mark.parametrize("rule", RULES)
def test_full_acceptance(rule: str, device: torch.device, generator: torch.Generator) -> None:
    """Perfect drafts stand: every request commits all of them."""
    options = {"mixes": (Mix(), Mix(0.6)), "kinds": (2,), "closeness": 0.0}
    step = Step.make(12, 3, 100, torch.float32, generator, quadratic=True, rule="match", **options)
    distributions = DraftDistributions.empty(12, 3, 100, torch.float32, torch.device("cpu"))
    if rule == "rejection":
        for b in range(12):
            start = int(step.query_start_loc[b])
            rows = step.logits[start : start + 3]
            distributions.logits[b, : len(rows)] = rows
            z = rows.masked_fill(torch.arange(100) >= step.id_limit, -math.inf)
            z[:, step.mask_id] = -math.inf
            distributions.cut[b, : len(rows)] = -math.inf
            distributions.log_norm[b, : len(rows)] = torch.logsumexp(z / step.temperature[b], -1)
        step = replace(step, rule="rejection", draft_dists=distributions)
    got = step.run(backend, device)
    assert torch.equal(got.num_accepted, step.num_drafts)


@pytest.mark.parametrize("rule", RULES)
def test_bad_drafts_and_counts(rule: str, device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    # Distributions apart from each other: of two equal ones the residual is nothing but rounding.
    options = {"mixes": (Mix(), Mix(0.5)), "kinds": (2,), "closeness": 0.3}
    step = Step.make(16, 3, 64, torch.float32, generator, quadratic=True, rule=rule, **options)
    step.num_drafts[:8] = torch.tensor([-1, 4, 100, -(2**31), 2**31 - 1, 3, 0, 1])
    step.drafts[8:, 0] = torch.tensor([-1, 64, 2**31, 2**32 + 5, -(2**63), 63, 2, 2**63 - 1])
    check_step(step, backend, device, tally)
    tally.hold()
    flagged = step.run(backend, device).error_flags & FLAG_BAD_DRAFT
    assert flagged[:5].bool().all()


@pytest.mark.parametrize("rule", RULES)
def test_faulty_rows(rule: str, device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    for dtype in DTYPES:
        for round_ in range(4):
            step = Step.make(10, 2, 50, dtype, generator, quadratic=True, rule=rule, mixes=(Mix(), Mix(0.7), Mix(0.0)))
            for row in range(round_, len(step.logits), 4):
                kind = row % 5
                if kind == 0:
                    step.logits[row] = math.nan
                elif kind == 1:
                    step.logits[row, 7] = math.inf
                elif kind == 2:
                    step.logits[row] = -math.inf
                elif kind == 3:
                    step.logits[row, 3::5] = math.nan
                else:
                    step.logits[row] = 0.25
            got, expected = step.run(backend, device), step.run(python_ref)  # type: ignore[arg-type]
            assert torch.equal(got.error_flags, expected.error_flags)
            tally.add(f"{dtype} {round_}", got.equal(expected), decided_requests(step))
    tally.hold()


def test_distribution_of_empty_rows_are_point_masses(device: torch.device, generator: torch.Generator) -> None:
    step = Step.make(3, 2, 20, torch.float32, generator, quadratic=True, rule="rejection", kinds=(2,), mixes=(Mix(),))
    step.logits.fill_(math.nan)
    step.num_drafts.zero_()
    got = step.run(backend, device)
    assert got.draft_dists is not None
    distribution = python_ref.sampling.distribution(
        python_ref.sampling.sanitise(got.draft_dists.logits, step.id_limit, step.mask_id)[0],
        got.draft_dists.cut,
        got.draft_dists.log_norm,
        torch.zeros(3, 1, dtype=torch.bool),
    )
    complete = got.next_num_drafts > 0
    assert complete.any()
    assert torch.equal(distribution[complete].argmax(-1), torch.zeros(int(complete.sum()), 2, dtype=torch.int64))
    assert torch.equal(distribution[complete].amax(-1), torch.ones(int(complete.sum()), 2))


def test_distribution_carry_over_steps(device: torch.device, generator: torch.Generator) -> None:
    """What one step stores the next one judges by, in both dtypes that it may be stored in, as the reference does."""
    for distribution_dtype in (torch.bfloat16, torch.float32):
        step = Step.make(10, 3, 500, torch.bfloat16, generator, quadratic=True, rule="rejection", kinds=(2,))
        assert step.draft_dists is not None
        step.draft_dists.logits = step.draft_dists.logits.to(distribution_dtype)
        first, wanted = step.run(backend, device), step.run(python_ref)  # type: ignore[arg-type]
        check_stored(step, first, wanted, decided_requests(step))
        following = Step.make(10, 3, 500, torch.bfloat16, generator, quadratic=True, rule="rejection", kinds=(2,))
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        following = replace(following, **{n: getattr(step, n) for n in names}, draft_dists=first.draft_dists)
        following = replace(following, drafts=first.next_drafts.clamp(min=0))
        tally = Tally()
        check_step(following, backend, device, tally)
        tally.hold()


@pytest.mark.parametrize("rule", RULES)
def test_requests_do_not_see_each_other(rule: str, device: torch.device, generator: torch.Generator) -> None:
    step = Step.make(8, 3, 2000, torch.bfloat16, generator, quadratic=True, rule=rule, kinds=(2,))
    whole = step.run(backend, device)
    for b in (0, 3, 7):
        assert step.requests(b, b + 1).run(backend, device).same_bits(whole.requests(b, b + 1))


@pytest.mark.parametrize("rule", RULES)
def test_cluster_size_does_not_show(
    rule: str, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step.make(len(MIXES), 3, 3001, torch.float32, generator, quadratic=True, rule=rule)
    outcomes = []
    for size in (0, 1, 2, 4, 8):
        monkeypatch.setattr(backend, "cluster_size", size)
        outcomes.append(step.run(backend, device))
    assert all(outcomes[0].same_bits(other) for other in outcomes[1:])


@pytest.mark.parametrize("rule", RULES)
def test_the_configurations_of_small_and_large_batches_agree(
    rule: str, module: ModuleType, device: torch.device, generator: torch.Generator
) -> None:
    """4 requests of stride 4 are the last batch that takes clusters of 8, 5 the first that takes smaller ones."""
    vocab_size = 65_536
    assert [module.choose_cluster_size(4 * batch, 2 * vocab_size) for batch in (4, 5)] == [8, 4]
    step = Step.make(
        5, 3, vocab_size, torch.bfloat16, generator, quadratic=False, rule=rule, kinds=(2,), closeness=0.1,
        num_drafts=3, mixes=(Mix(0.9, top_p=0.95), Mix(top_k=40)),
    )  # fmt: skip
    large, small = step.run(backend, device), step.requests(0, 4).run(backend, device)
    assert small.same_bits(large.requests(0, 4))
    tally = Tally()
    check_step(step, backend, device, tally)
    tally.hold()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(
    rule: str, schedule: str, softgpu: ModuleType, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "cluster_size", 2)
    step = Step.make(6, 3, 1501, torch.bfloat16, generator, quadratic=True, rule=rule, mixes=MIXES[3:])
    expected = step.run(backend)
    with softgpu.configured(**SCHEDULES[schedule]):
        assert step.run(backend).same_bits(expected)


@pytest.mark.parametrize("rule", RULES)
def test_results_go_where_they_are_asked_for(rule: str, device: torch.device, generator: torch.Generator) -> None:
    """Strided outputs, drafts and distributions; what lies between them stays."""
    step = Step.make(5, 3, 101, torch.bfloat16, generator, quadratic=True, rule=rule, kinds=(2,))
    expected = step.run(backend, device)

    def padded(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, -77, dtype=dtype, device=device)

    tokens, drafts = padded(5, 9, dtype=torch.int64), padded(5, 6, dtype=torch.int64)
    out = (padded(5, dtype=torch.int32), tokens[:, 2:6], drafts[:, 1:4], padded(5, dtype=torch.int32))
    given = padded(5, 8, dtype=torch.int64)
    given[:, 4:7] = step.drafts
    if step.draft_dists is not None:
        logits = padded(5, 4, 120, dtype=torch.bfloat16)
        logits[:, :3, 3:104] = step.draft_dists.logits
        cut, norm = padded(5, 7, dtype=torch.float32), padded(5, 7, dtype=torch.float32)
        cut[:, :3], norm[:, :3] = step.draft_dists.cut, step.draft_dists.log_norm
        q = DraftDistributions(logits[:, :3, 3:104], cut[:, :3], norm[:, :3])
    else:
        q = None

    class Redirected:
        @staticmethod
        def verify_accept(*args: object, **options: object) -> object:
            positional = [*args[:3], given[:, 4:7], *args[4:]]
            return backend.verify_accept(*positional, **{**options, "out": out, "draft_dists": q})  # type: ignore[arg-type]

    got = step.run(Redirected, device)  # type: ignore[arg-type]
    assert got.equal(expected).all()
    assert (tokens[:, :2] == -77).all() and (tokens[:, 6:] == -77).all()
    assert (drafts[:, :1] == -77).all() and (drafts[:, 4:] == -77).all()
    if q is not None and expected.draft_dists is not None:
        assert torch.equal(q.logits.cpu(), expected.draft_dists.logits) and torch.equal(
            q.cut.cpu(), expected.draft_dists.cut
        )
        assert (logits[:, 3] == -77).all() and (logits[:, :, :3] == -77).all() and (logits[:, :, 104:] == -77).all()


@pytest.mark.parametrize("rule", RULES)
def test_strict_bounds(
    rule: str, softgpu: ModuleType, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With only the tensors of the call known, nothing outside them is read or written."""
    allocate = backend._empty
    monkeypatch.setattr(backend, "_empty", lambda *args: softgpu.register(allocate(*args)))
    with softgpu.configured(strict=1):
        for vocab_size, dtype in ((37, torch.bfloat16), (64, torch.float32), (1003, torch.float16)):
            step = Step.make(6, 3, vocab_size, dtype, generator, quadratic=True, rule=rule)
            expected = step.run(python_ref)  # type: ignore[arg-type]

            class Registered:
                @staticmethod
                def verify_accept(*args: object, **options: object) -> object:
                    kept = []
                    q = options["draft_dists"]
                    distributions = [q.logits, q.cut, q.log_norm] if isinstance(q, DraftDistributions) else []
                    for x in (*args, options["error_flags"], *distributions):
                        if isinstance(x, torch.Tensor) and x.numel():
                            writable = x is options["error_flags"] or any(x is y for y in distributions)
                            kept.append(softgpu.register(x, writable=writable))
                    try:
                        return backend.verify_accept(*args, **options)  # type: ignore[arg-type]
                    finally:
                        for x in kept:
                            softgpu.unregister(x)

            got = step.run(Registered)  # type: ignore[arg-type]
            assert got.equal(expected)[decided_requests(step)].all()


@pytest.mark.parametrize("num_spec_tokens", [0, 3])
def test_match_commits_what_autoregressive_sampling_gives(
    num_spec_tokens: int, device: torch.device, generator: torch.Generator
) -> None:
    """The bits of a row's sample do not know the plan: sample_rows of the clean rows gives the committed tokens."""
    step = Step.make(10, num_spec_tokens, 3001, torch.bfloat16, generator, quadratic=True, rule="match", kinds=(2,))
    got = step.run(backend, device)
    for b in range(10):
        clean = int(step.num_drafts[b]) + 1
        first = int(step.query_start_loc[b])
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        ids = backend.sample_rows(
            step.logits[first : first + clean].to(device),
            (step.positions[b] + 1 + torch.arange(clean)).to(device),
            *(getattr(step, name)[b].expand(clean).contiguous().to(device) for name in names),
            step.id_limit,
            step.mask_id,
        )
        accepted = int(got.num_accepted[b])
        assert ids[: accepted + 1].tolist() == got.tokens[b, : accepted + 1].tolist()
