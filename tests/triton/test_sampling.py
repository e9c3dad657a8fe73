"""sample_rows and verify_accept on backend `triton`.

They have to give the very results of the references: the noise is the same to 2e-6, so only a near-tie could tell them
apart, and the fixed seeds here hold none.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import python_ref
from bench.ptx import recorded_launches, resources
from idlm_kernels.triton import perturb, sampling
from idlm_kernels.triton.noise import gumbel, uniform
from tests.softgpu_support import SCHEDULES
from tests.triton.support import INTERPRETED, assert_ieee, caught, mutant

DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
BASE = DTYPES[0]
TRUNCATIONS = [
    (0, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.9, 0.0),
    (40, 0.5, 0.0),
    (1, 1.0, 0.0),
    (0, 1.0, 0.3),
    (50, 0.95, 0.02),
]


# Noise


@triton.jit
def _noise_kernel(gWords, gUniform, gGumbel, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = uniform(tl.load(gWords + i))
    tl.store(gUniform + i, v)
    tl.store(gGumbel + i, gumbel(v))


def test_noise_of_every_kind_of_word() -> None:
    edges = [
        0,
        1,
        2,
        127,
        2**27 - 1,
        2**27,
        2**27 + 64,
        2**31,
        2**32 - 256,
        2**32 - 129,
        2**32 - 128,
        2**32 - 1,
    ]
    spread = torch.randint(0, 2**32, (1 << 14,)) >> torch.randint(0, 32, (1 << 14,))
    words = torch.cat([torch.tensor(edges), 2**32 - 1 - spread, spread])
    words = words[: words.numel() // 512 * 512]
    v, g = (torch.empty(words.shape, dtype=torch.float32) for _ in range(2))
    unsigned = words.to(torch.uint32)
    _noise_kernel[(words.numel() // 512,)](unsigned, v, g, BLOCK=512, enable_fp_fusion=False)
    wanted = python_ref.noise.word_to_uniform(words)
    assert torch.equal(v, wanted)
    exact = -torch.log(-torch.log1p(-wanted.double()))
    assert g.isfinite().all()
    assert (g.double() - exact).abs().max() < 2e-6


# sample_rows


def rows_of(logits: Tensor, id_limit: int | None = None, mask_id: int = 7, **changes: Any) -> dict[str, Any]:
    """Arguments of sample_rows: every truncation, at temperatures from greedy up."""
    count = logits.shape[0]
    cycle = [TRUNCATIONS[i % len(TRUNCATIONS)] for i in range(count)]
    arguments = {
        "logits": logits,
        "positions": torch.randint(0, 5000, (count,)),
        "temperature": torch.tensor([(0.0, 0.7, 1.0, 1.6)[i // len(TRUNCATIONS) % 4] for i in range(count)]),
        "top_k": torch.tensor([c[0] for c in cycle], dtype=torch.int32),
        "top_p": torch.tensor([c[1] for c in cycle]),
        "min_p": torch.tensor([c[2] for c in cycle]),
        "seed": torch.randint(-(2**63), 2**63 - 1, (count,)),
        "id_limit": logits.shape[1] if id_limit is None else id_limit,
        "mask_id": mask_id,
    }
    return {**arguments, **changes}


def compare_rows(module: ModuleType, arguments: dict[str, Any]) -> None:
    count = arguments["logits"].shape[0]
    error_flags, wanted_flags = (torch.full((count,), 16, dtype=torch.int32) for _ in range(2))
    out = torch.full((count,), -5)
    got = module.sample_rows(**arguments, error_flags=error_flags, out=out)
    assert got is out
    assert got.tolist() == python_ref.sample_rows(**arguments, error_flags=wanted_flags).tolist()
    assert error_flags.tolist() == wanted_flags.tolist()


def check_rows(module: ModuleType, vocab_size: int = 1501, dtype: torch.dtype = BASE) -> None:
    logits = (torch.randn(28, vocab_size) * torch.tensor([1.0, 3.0]).repeat(14)[:, None]).to(dtype)
    compare_rows(module, rows_of(logits, max(vocab_size - 11, 1)))


def check_slices(module: ModuleType) -> None:
    check_rows(module, 5003)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [9, 5003] if INTERPRETED else [9, 61, 1501, 5003])
def test_sample_rows(vocab_size: int, dtype: torch.dtype) -> None:
    check_rows(sampling, vocab_size, dtype)


@pytest.mark.compiled
@pytest.mark.parametrize("vocab_size, dtype", [(151_936, torch.bfloat16), (262_144, torch.float32)])
def test_sample_rows_of_a_full_vocabulary(vocab_size: int, dtype: torch.dtype) -> None:
    """Under a Zipf distribution, whose tail of rare tokens shows noise that is too coarse or infinite."""
    zipf = -torch.log(torch.arange(1, vocab_size + 1).float())
    logits = zipf[torch.randperm(vocab_size)].expand(4, -1).to(dtype)
    extra = {
        "temperature": torch.tensor([1.0, 1.0, 0.0, 1.0]),
        "top_k": torch.tensor([0, 50, 0, 0], dtype=torch.int32),
    }
    compare_rows(sampling, rows_of(logits, top_p=torch.tensor([1.0, 1.0, 1.0, 0.9]), **extra))


def check_ties(module: ModuleType) -> None:
    """Few distinct logits: the ties of the last kept value are all kept, greedy takes the lowest id."""
    logits = torch.randint(-2, 3, (28, 300)).to(BASE)
    logits[:, ::3] *= -0.0  # -0.0 and 0.0 tie
    compare_rows(module, rows_of(logits))


def test_ties() -> None:
    check_ties(sampling)


def check_faults(module: ModuleType) -> None:
    logits = torch.randn(8, 130)
    logits[0, 3], logits[1, 5], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 3:9], logits[4], logits[5, 6:] = torch.inf, torch.nan, -torch.inf
    logits[6, 7], logits[6, 129] = torch.nan, torch.nan  # neither id is allowed: no fault
    for mask_id, temperature in ((7, 1.0), (0, 0.0), (-1, 2.0)):
        parameters = {"temperature": torch.full((8,), temperature)}
        compare_rows(module, rows_of(logits, 129, mask_id, **parameters))


def test_faults_set_bits_and_give_defined_tokens() -> None:
    check_faults(sampling)


def test_extreme_parameters() -> None:
    logits = torch.randn(7, 200) * 1e4
    logits[3], logits[4, 9] = 3.0e38, -3.0e38
    compare_rows(sampling, rows_of(logits, temperature=torch.tensor([2e-4, 1e30, 1.0, 1e-3, 1e-3, 9e-5, 3.0])))
    large = {"top_k": torch.tensor([200, 199, 10**9, -3, 198, 2, 1], dtype=torch.int32)}
    compare_rows(sampling, rows_of(logits, 198, **large))
    compare_rows(sampling, rows_of(logits, min_p=torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1e-9, 1.0])))
    compare_rows(sampling, rows_of(logits, top_p=torch.tensor([1e-9, 0.0, 2.0, 0.999999, 0.3, 1.0, 0.5])))


@pytest.mark.compiled
def test_logit_bias_and_streams() -> None:
    logits, bias = torch.randn(28, 300).to(BASE), torch.randn(28, 300)
    bias[:, 5] = -torch.inf
    for stream in (0, 1, 2):
        compare_rows(sampling, rows_of(logits, logit_bias=bias, stream=stream))


@pytest.mark.compiled
def test_cut_far_below_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose kept values are not all listed as near the largest: too far from it, or too many."""
    compare_rows(sampling, rows_of(torch.randn(28, 700) * 100, temperature=torch.ones(28)))
    spread = torch.linspace(-400, 400, 700)[torch.randperm(700)].expand(7, -1)
    compare_rows(sampling, rows_of(spread, top_k=torch.full((7,), 300, dtype=torch.int32)))
    monkeypatch.setattr(perturb, "kMaxNear", 64)
    check_rows(sampling)
    check_ties(sampling)


def check_row_alone(module: ModuleType) -> None:
    """A row's token does not depend on the row, the batch, or the width of the table that the row is part of."""
    arguments = rows_of(torch.randn(28, 700))
    whole = module.sample_rows(**arguments)
    for rows in (slice(3, 4), slice(9, 16), slice(27, 28)):
        part = {k: v[rows] if isinstance(v, Tensor) else v for k, v in arguments.items()}
        assert module.sample_rows(**part).tolist() == whole[rows].tolist()


def test_token_depends_on_the_row_alone() -> None:
    check_row_alone(sampling)


# verify_accept


def step_of(
    plan: str = "quadratic", vocab_size: int = 61, num_spec_tokens: int = 3, batch: int = 8, dtype: torch.dtype = BASE
) -> dict[str, Any]:
    """A step of several requests: absent ones, fewer drafts than K, steps without MASK rows, padding rows, and drafts
    that agree with what will be sampled up to some place."""
    quadratic = plan == "quadratic"
    num_drafts = torch.randint(0, num_spec_tokens + 1, (batch,), dtype=torch.int32)
    rows = num_drafts + 1 + (num_spec_tokens * (num_drafts + 1) if quadratic else num_spec_tokens)
    rows[1], rows[2] = 0, num_drafts[2] + 1  # absent; no MASK rows
    start = torch.cat([torch.zeros(1, dtype=torch.int32), rows.cumsum(0).to(torch.int32)])
    logits = (torch.randn(int(start[-1]) + 3, vocab_size) * 2).to(dtype)
    options = rows_of(torch.empty(batch, vocab_size), vocab_size - 2)
    per_request = {k: options[k] for k in ("temperature", "top_k", "top_p", "min_p", "seed")}
    positions = torch.randint(0, 900, (batch,), dtype=torch.int32)
    arguments = {
        "logits": logits,
        "query_start_loc": start,
        "num_drafts": num_drafts,
        "drafts": torch.randint(0, vocab_size, (batch, num_spec_tokens)),
        "positions": positions,
        **per_request,
        "id_limit": vocab_size - 2,
        "mask_id": 7,
        "quadratic": quadratic,
        "rule": "match",
    }
    for b in range(batch):
        n = int(num_drafts[b])
        if rows[b] > 0 and n:
            one = {k: v[b].repeat(n) for k, v in per_request.items()}
            where = positions[b] + 1 + torch.arange(n)
            clean = logits[int(start[b]) : int(start[b]) + n]
            agreed = python_ref.sample_rows(clean, where, **one, id_limit=vocab_size - 2, mask_id=7)
            arguments["drafts"][b, :n] = agreed
            if b % (n + 1) < n:  # this one is refused, though those behind it agree
                arguments["drafts"][b, b % (n + 1)] += 1
    return arguments


def compare_steps(module: ModuleType, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    batch = arguments["num_drafts"].shape[0]
    error_flags, wanted_flags = (torch.full((batch,), 32, dtype=torch.int32) for _ in range(2))
    got = module.verify_accept(**arguments, error_flags=error_flags)
    wanted = python_ref.verify_accept(**arguments, error_flags=wanted_flags)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.tolist() == b.tolist()
    assert error_flags.tolist() == wanted_flags.tolist()
    return got


def check_steps(
    module: ModuleType, plan: str = "quadratic", num_spec_tokens: int = 3, dtype: torch.dtype = BASE
) -> None:
    for _ in range(1 if INTERPRETED else 3):
        num_accepted, *_ = compare_steps(module, step_of(plan, num_spec_tokens=num_spec_tokens, dtype=dtype))
    if num_spec_tokens > 1:
        assert num_accepted.max() > 0


SLOW = pytest.mark.compiled  # these take the interpreter minutes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "plan, num_spec_tokens",
    [
        pytest.param("quadratic", 1, marks=SLOW),
        ("quadratic", 3),
        pytest.param("quadratic", 7, marks=SLOW),
        ("chain", 2),
        pytest.param("chain", 31, marks=SLOW),
        ("chain", 0),
    ],
)
def test_verify_accept(plan: str, num_spec_tokens: int, dtype: torch.dtype) -> None:
    check_steps(sampling, plan, num_spec_tokens, dtype)


def check_step_faults(module: ModuleType) -> None:
    arguments = step_of()
    arguments["drafts"][::2, 0], arguments["drafts"][1::2, 0] = -1, 61
    arguments["num_drafts"][4], arguments["num_drafts"][5] = 9, -2
    arguments["logits"][int(arguments["query_start_loc"][6])] = torch.nan
    arguments["logits"][int(arguments["query_start_loc"][7]), 3] = torch.inf
    compare_steps(module, arguments)


def test_step_faults() -> None:
    check_step_faults(sampling)


def test_step_with_bias() -> None:
    arguments = step_of()
    arguments["logit_bias"] = torch.randn(arguments["logits"].shape)
    compare_steps(sampling, arguments)


def test_drafts_and_stride_do_not_change_the_output() -> None:
    """Each committed token is what sample_rows gives for its row and position: with any drafts, in any plan."""
    arguments = step_of("quadratic", num_spec_tokens=3)
    num_accepted, tokens, _, _ = sampling.verify_accept(**arguments)
    per_request = ("temperature", "top_k", "top_p", "min_p", "seed")
    for b, start in enumerate(arguments["query_start_loc"][:-1].tolist()):
        if arguments["query_start_loc"][b + 1] == start:
            continue
        for i in range(int(num_accepted[b]) + 1):
            one = {k: arguments[k][b : b + 1] for k in per_request}
            row = arguments["logits"][start + i : start + i + 1]
            token = sampling.sample_rows(row, arguments["positions"][b : b + 1] + 1 + i, **one, id_limit=59, mask_id=7)
            assert token.item() == tokens[b, i]


# What the compiler made of it


@pytest.mark.compiled
def test_arithmetic_is_ieee(softgpu: ModuleType) -> None:
    with recorded_launches(softgpu) as launches:
        check_rows(sampling)
        check_steps(sampling)
    assert {launch.name for launch in launches} == {"cut", "perturb", "pick", "decide"}
    assert_ieee(launches)


@pytest.mark.compiled
def test_logits_are_read_once_where_nothing_is_truncated(softgpu: ModuleType) -> None:
    logits = torch.randn(2, 151_936).bfloat16()
    off = {"top_k": torch.zeros(2, dtype=torch.int32), "top_p": torch.ones(2), "min_p": torch.zeros(2)}
    with recorded_launches(softgpu) as launches:
        sampling.sample_rows(**rows_of(logits, temperature=torch.ones(2), **off))
    read = sum(launch.counters["global_load_sectors"] * 32 for launch in launches)
    parameters = sum(launch.counters["ctas"] for launch in launches) * 1024  # of the row, per CTA and warp
    assert read <= 1.001 * logits.numel() * 2 + parameters


@pytest.mark.compiled
def test_flat_rows_are_read_a_bounded_number_of_times(softgpu: ModuleType) -> None:
    """Their kept values do not fit into the list of those near the largest."""
    flat = torch.randn(3, 151_936)
    flat[1], flat[2, 5] = 0.0, 14.0
    arguments = rows_of(flat, temperature=torch.ones(3), top_k=torch.zeros(3, dtype=torch.int32))
    arguments |= {"top_p": torch.full((3,), 0.9), "min_p": torch.zeros(3)}
    with recorded_launches(softgpu) as launches:
        compare_rows(sampling, arguments)
    assert launches[0].name == "cut"
    assert launches[0].counters["global_load_bytes"] <= 8 * flat.numel() * 4
    assert resources(launches[0].ptx).spill_bytes == 0


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        check_rows(sampling)
        check_steps(sampling)


SAMPLED = "score = z + noise(seed, first // 4 + tl.arange(0, BLOCK // 4), position, stream, BLOCK // 4)"
MUTANTS = {
    "noise keyed by the row": (
        check_row_alone,
        "position, stream, BLOCK // 4)",
        "position + tl.program_id(0), stream, BLOCK // 4)",
    ),
    "noise keyed by the slice": (
        check_slices,
        "first // 4 + tl.arange(0, BLOCK // 4), position",
        "(first - begin) // 4 + tl.arange(0, BLOCK // 4), position",
    ),
    "word order": (
        check_rows,
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
    ),
    "no noise": (check_rows, SAMPLED, "score = z"),
    "temperature forgotten": (check_rows, "z = tl.div_rn(x, tl.zeros_like(x) + divisor)", "z = x"),
    "greedy with noise": (check_rows, "if not is_greedy:", "if temperature >= 0.0:"),
    "top-k takes one more": (check_rows, "wanted = top_k.to(tl.float64)\n", "wanted = top_k.to(tl.float64) + 1\n"),
    "ties of the k-th dropped": (
        check_ties,
        "return low\n",
        "return tl.where(high - low == 1, low + 1, low) if not BY_MASS else low\n",
    ),
    "top-p of the largest's weight": (
        check_rows,
        "wanted = share * mass.to(tl.float64)\n",
        "wanted = share * 17592186044416.0\n",
    ),
    "what lies above the range forgotten": (check_rows, "n1 - n2, beyond + a2", "n1 - n2, beyond"),
    "range cut at the wrong pivot": (check_rows, "pivot2, pivot3, n2 - n3", "pivot3, pivot3 + 1, n2 - n3"),
    "min-p forgotten": (check_rows, "if least_share > 0.0:", "if least_share > 1.0:"),
    "MASK can be sampled": (check_steps, "(id_ != row.mask_id), x", "(id_ != row.mask_id - 1), x"),
    "highest id of ties": (
        check_ties,
        "tl.min(tl.where(best == score, best_id, kNoId), axis=0)",
        "tl.max(tl.where(best == score, best_id, 0), axis=0)",
    ),
    "NaN is not a fault": (check_faults, "tl.where(is_nan, kNan, 0)", "tl.where(is_nan, 0, 0)"),
    "empty row yields MASK": (check_faults, "return tl.where(mask_id == 0, 1, 0)", "return mask_id * 0"),
    "accepts past a refusal": (
        check_steps,
        "a = tl.min(tl.where(rejected, i, span.n), axis=0)",
        "a = span.n - tl.sum(rejected.to(tl.int32), axis=0)",
    ),
    "branch n instead of a": (check_steps, "first_mask += a * K", "first_mask += span.n * K"),
    "MASK row predicts its own slot": (
        check_steps,
        "ahead = branch + 1 + (i - n - 1) % k",
        "ahead = branch + (i - n - 1) % k",
    ),
    "bad drafts are not told": (
        check_step_faults,
        "tl.where(is_bad, kBadDraft, 0)",
        "tl.where(is_bad, 0, 0)",
    ),
}


@pytest.mark.compiled
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    check, old, new = MUTANTS[name]
    assert caught(check, mutant(sampling, old, new, tmp_path))
