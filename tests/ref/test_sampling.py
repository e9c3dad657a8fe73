"""sample_rows and verify_accept against a plain Python reading of the contract, one row at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm_kernels import QState, sample_rows, use_backend, verify_accept
from python_ref import (
    STATUS_BAD_DRAFT,
    STATUS_EMPTY_ROW,
    STATUS_INF,
    STATUS_NAN,
    STREAM_DRAFT,
    STREAM_TARGET,
    gumbel,
    uniform,
)
from python_ref.sampling import truncation_cut

FP32_MAX = float(np.finfo(np.float32).max)
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


def sample(
    logits: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seed: Any = 0,
    position: Any = 7,
    id_limit: int | None = None,
    mask_id: int = -1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    """sample_rows with every parameter a number or one number per row; logits a list of rows or one row."""
    logits = torch.as_tensor(logits, dtype=dtype)
    logits = logits if logits.dim() == 2 else logits.unsqueeze(0)
    rows = logits.shape[0]
    if isinstance(seed, Tensor) and logits.shape[0] == 1:
        rows = len(seed)
        logits = logits.expand(rows, -1).contiguous()

    def column(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, dtype=dtype).expand(rows).contiguous()

    return sample_rows(
        logits,
        column(position, torch.int64),
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(seed, torch.int64),
        logits.shape[1] if id_limit is None else id_limit,
        mask_id,
        **options,
    )


def status_of(logits: Any, **options: Any) -> tuple[list[int], list[int]]:
    status = torch.zeros(1 if torch.as_tensor(logits).dim() == 1 else len(logits), dtype=torch.int32)
    ids = sample(logits, status=status, **options)
    return ids.tolist(), status.tolist()


SEEDS = torch.arange(400)  # enough for an id of probability 5 % to appear (misses: 1e-9)


def support(weights: list[float], **options: Any) -> set[int]:
    """The ids that sampling from these weights ever gives."""
    return set(sample(torch.tensor(weights).log(), seed=SEEDS, **options).tolist())


# Truncation


def kept_exactly(weights: list[int], top_k: int, top_p: Fraction, min_p: Fraction) -> set[int]:
    """The contract in exact arithmetic: weights are unnormalised probabilities, 0 a forbidden id."""
    kept = {i for i, w in enumerate(weights) if w > 0}
    if top_k > 0:
        kth = sorted((weights[i] for i in kept), reverse=True)[: top_k][-1]
        kept = {i for i in kept if weights[i] >= kth}
    if top_p < 1:
        total = sum(weights[i] for i in kept)
        mass, last = Fraction(0), 0
        for w in sorted((weights[i] for i in kept), reverse=True):
            mass, last = mass + Fraction(w, total), w
            if mass >= top_p:
                break
        kept = {i for i in kept if weights[i] >= last}
    largest = max(weights[i] for i in kept)
    return {i for i in kept if Fraction(weights[i], largest) >= min_p}


def kept_by_reference(weights: list[int], top_k: int, top_p: float, min_p: float) -> set[int]:
    z = torch.tensor([weights], dtype=torch.float32).log()
    cut = truncation_cut(z, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    return set((z[0] >= cut).nonzero().flatten().tolist())


def as_fp32(x: float) -> Fraction:
    return Fraction(float(np.float32(x)))


@settings(max_examples=400, deadline=None)
@given(
    weights=st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(any),
    top_k=st.integers(0, 25),
    top_p=st.floats(2**-7, 1.0, width=32),
    min_p=st.one_of(st.just(0.0), st.floats(2**-7, 1.0, width=32)),
)
def test_truncation_in_exact_arithmetic(weights, top_k, top_p, min_p):
    """Small integer weights make ties at every edge; fractions decide them."""
    largest = max(weights)
    # An fp32 logarithm cannot hold a ratio or a mass to more than some 1e-6: stay off the edges, except min_p = 1.
    assume(min_p == 1 or all(abs(w / largest - min_p) > 1e-5 for w in weights))
    kept = kept_exactly(weights, top_k, Fraction(1), Fraction(0))
    ordered = sorted((weights[i] for i in kept), reverse=True)
    masses = [sum(ordered[: i + 1]) / sum(ordered) for i in range(len(ordered))]
    assume(top_p == 1 or all(abs(mass - top_p) > 1e-5 for mass in masses))
    want = kept_exactly(weights, top_k, as_fp32(top_p), as_fp32(min_p))
    assert kept_by_reference(weights, top_k, top_p, min_p) == want


@pytest.mark.parametrize(
    ("weights", "options", "kept"),
    [
        ([1, 5, 3, 4, 2], {"top_k": 1}, {1}),
        ([1, 5, 3, 4, 2], {"top_k": 3}, {1, 2, 3}),
        ([1, 5, 3, 4, 2], {"top_k": 0}, {0, 1, 2, 3, 4}),
        ([1, 5, 3, 4, 2], {"top_k": 99}, {0, 1, 2, 3, 4}),
        ([2, 3, 2, 2, 1], {"top_k": 2}, {0, 1, 2, 3}),  # all ties of the 2nd
        ([4, 3, 3, 1], {"top_p": 0.5}, {0, 1, 2}),  # .36, .64: the 2nd reaches it, and its tie stays
        ([6, 3, 2], {"top_p": 0.54}, {0}),  # .545
        ([6, 3, 2], {"top_p": 0.55}, {0, 1}),
        ([6, 3, 2], {"top_p": 1e-6}, {0}),
        ([6, 3, 2], {"top_p": 1.0}, {0, 1, 2}),
        ([8, 4, 2, 1], {"min_p": 0.3}, {0, 1}),
        ([8, 8, 4, 1], {"min_p": 1.0}, {0, 1}),
        ([8, 4, 2, 1], {"min_p": 0.0}, {0, 1, 2, 3}),
        ([5, 5, 5, 5], {"top_k": 1, "top_p": 0.1, "min_p": 1.0}, {0, 1, 2, 3}),
        ([9, 7, 5, 3, 1, 1], {"top_k": 4, "top_p": 0.8, "min_p": 0.7}, {0, 1}),
    ],
)
def test_truncation_cases(weights, options, kept):
    """What ever comes out is what must be kept: sampled, so through the whole of sample_rows."""
    assert support(weights, **options) == kept


def test_top_k_comes_before_top_p():
    """k first: 4 of 7 reach one half alone. p first: 4 and 3 of 10 do, and k = 2 would keep both."""
    assert support([4, 3, 2, 1], top_k=2, top_p=0.5) == {0}
    assert support([4, 3, 2, 1], top_p=0.5) == {0, 1}


def test_top_p_comes_before_min_p():
    """p first: 4 and 3 of 10 reach one half, min-p keeps both. min-p first: 4 of 7 would reach it alone."""
    assert support([4, 3, 2, 1], top_p=0.5, min_p=0.6) == {0, 1}
    assert support([4, 3], top_p=0.5) == {0}


def test_temperature_comes_before_the_truncation():
    """At T = 1/2 the weights are squared: 16, 9, 4, 1 of 30."""
    assert support([4, 3, 2, 1], top_p=0.53, temperature=0.5) == {0}
    assert support([4, 3, 2, 1], top_p=0.53) == {0, 1}
    assert support([4, 3, 2, 1], min_p=0.5, temperature=0.5) == {0, 1}
    assert support([4, 3, 2, 1], min_p=0.5, temperature=1.0) == {0, 1, 2}


def test_forbidden_ids_are_out_before_the_truncation():
    assert support([90, 4, 3, 2, 1], top_k=2, mask_id=0) == {1, 2}
    assert support([4, 3, 2, 1, 90], top_p=0.5, id_limit=4) == {0, 1}
    assert support([4, 3, 2, 1, 90], min_p=0.7, id_limit=4) == {0, 1}


def test_top_p_over_a_whole_vocabulary():
    """An fp32 running sum over 151,936 equal shares misses the edge by hundreds of ids; a ramp has no ties."""
    vocab_size = 151_936
    z = torch.linspace(0, -1e-3, vocab_size, dtype=torch.float64).float()
    ordered = z.sort(descending=True).values
    mass = ordered.double().exp().cumsum(0) / ordered.double().exp().sum()
    for top_p in (0.1, 0.5, 0.9):
        last = ordered[int((mass < float(np.float32(top_p))).sum())]
        cut = truncation_cut(z.unsqueeze(0), torch.tensor([0]), torch.tensor([top_p]), torch.tensor([0.0]))
        assert int((z >= cut).sum()) == pytest.approx(int((z >= last).sum()), abs=200)


def test_out_of_range_parameters_still_give_a_token():
    """The checks of a request refuse these; the op still never samples a forbidden id."""
    for options in ({"min_p": 2.0}, {"min_p": NAN}, {"top_p": 0.0}, {"top_p": -1.0}, {"top_p": NAN}, {"top_k": -3}):
        ids = sample([9.0, 1.0, 3.0, 2.0, 9.0], seed=SEEDS[:50], mask_id=0, id_limit=4, **options)
        assert set(ids.tolist()) <= {1, 2, 3}


# Bad and extreme rows


@pytest.mark.parametrize(
    ("row", "token", "bits"),
    [
        ([0.0, NAN, 50.0, 1.0], 2, STATUS_NAN),
        ([NAN, NAN, NAN, 1.0], 3, STATUS_NAN),
        ([0.0, INF, 1.0, 2.0], 1, STATUS_INF),
        ([0.0, 1.0, INF, INF], 2, STATUS_INF),  # a tie that noise cannot break: the lowest id
        ([NAN, INF, -INF, 0.0], 1, STATUS_NAN | STATUS_INF),
        ([-INF] * 4, 0, STATUS_EMPTY_ROW),
        ([NAN] * 4, 0, STATUS_NAN | STATUS_EMPTY_ROW),
        ([NAN, -INF, -INF, NAN], 0, STATUS_NAN | STATUS_EMPTY_ROW),
        ([-INF, -INF, -5.0, -INF], 2, 0),
        ([-FP32_MAX, -INF, -INF, -INF], 0, 0),
        ([0.0, FP32_MAX, 0.0, 0.0], 1, 0),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.3, 1e9])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}])
def test_bad_rows(row, token, bits, temperature, truncation):
    if temperature == 1e9 and row == [0.0, NAN, 50.0, 1.0]:
        pytest.skip("at such a temperature the finite logits of this row are equal")
    for seed in range(5):
        ids, status = status_of(row, temperature=temperature, seed=seed, **truncation)
        assert (ids, status) == ([token], [bits])


def test_an_empty_row_gives_the_lowest_allowed_id():
    assert status_of([-INF] * 4, mask_id=0) == ([1], [STATUS_EMPTY_ROW])
    assert status_of([-INF] * 4, mask_id=0, temperature=0.0) == ([1], [STATUS_EMPTY_ROW])
    assert status_of([-INF] * 4, mask_id=2, id_limit=2) == ([0], [STATUS_EMPTY_ROW])
    assert status_of([3.0, -INF, 5.0, 9.0], mask_id=0, id_limit=2) == ([1], [STATUS_EMPTY_ROW])


def test_bad_values_of_forbidden_ids_are_no_fault():
    """Forbidden ids become -inf first, whatever they hold."""
    assert status_of([1.0, NAN, 0.0, INF], mask_id=1, id_limit=3, temperature=0.0) == ([0], [0])


def test_status_bits_are_added_to_what_is_there():
    status = torch.tensor([16, 32, 1], dtype=torch.int32)
    sample([[0.0, NAN], [0.0, 1.0], [INF, 0.0]], status=status)
    assert status.tolist() == [17, 32, 3]


@pytest.mark.parametrize("logit", [0.0, -1e4, 3e38, -3e38])
def test_constant_rows_follow_the_noise_or_the_lowest_id(logit):
    """A constant row is decided by the noise alone, unless its logits are so large that the noise is lost."""
    ids = sample([logit] * 9, seed=SEEDS)
    if abs(logit) < 1e6:
        noise = gumbel(SEEDS, torch.full_like(SEEDS, 7), 9)
        assert torch.equal(ids, (logit + noise).argmax(-1))
        assert set(ids.tolist()) == set(range(9))
    else:
        assert (ids == 0).all()
    assert (sample([logit] * 9, seed=SEEDS, temperature=0.0) == 0).all()


def test_ties_go_to_the_lowest_id():
    assert sample([1.0, 3.0, 3.0, 2.0, 3.0], temperature=0.0).tolist() == [1]
    assert (sample([0.0, 1e9, 0.0, 1e9], seed=SEEDS) == 1).all()  # 1e9 + noise rounds to 1e9
    assert (sample([0.0, 0.0, 7.0, 7.0], temperature=0.0, mask_id=2) == 3).all()


def test_greedy_below_1e_4():
    """T < 1e-4 is an argmax: equal logits give the lowest id. From fp32(1e-4) on the noise decides."""
    below = float(torch.tensor(1e-4).nextafter(torch.tensor(0.0)))
    for temperature in (0.0, 1e-30, 5e-5, below):
        assert (sample([0.0, 0.0], seed=SEEDS, temperature=temperature) == 0).all()
    for temperature in (1e-4, 1e-3):
        assert set(sample([0.0, 0.0], seed=SEEDS, temperature=temperature).tolist()) == {0, 1}
    # the truncation does not matter to an argmax
    assert sample([1.0, 3.0, 2.0], temperature=0.0, top_k=2, top_p=0.1, min_p=1.0).tolist() == [1]


def test_small_and_huge_temperatures():
    row = [1.0, 1.01, 0.9]
    assert (sample(row, seed=SEEDS, temperature=1e-4) == 1).all()  # 100 apart: the noise spans some 26
    for temperature in (1e30, FP32_MAX, INF):
        ids = sample([-50.0, 3e38 if temperature == INF else 50.0, 0.0], seed=SEEDS, temperature=temperature)
        noise = gumbel(SEEDS, torch.full_like(SEEDS, 7), 3)
        assert torch.equal(ids, noise.argmax(-1))
    # logits / T beyond fp32 stays finite: the largest wins without a NaN
    assert status_of([1e38, 3e38, -3e38], temperature=1e-3) == ([0], [0])  # both clamped: a tie
    assert status_of([1e30, 3e38, -3e38], temperature=0.5) == ([1], [0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logit_dtypes(dtype):
    """Narrow logits are the fp32 values that they hold; fp64 ones are sampled in fp64."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(200, 17, generator=generator) * 3).to(dtype)
    options = {"seed": torch.arange(200), "temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    ids = sample(logits, dtype=dtype, **options)
    wide = sample(logits.float(), **options)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, wide)


def test_fp64_logits_are_not_rounded():
    tiny = 1e-12
    assert sample([0.0, tiny], dtype=torch.float64, temperature=0.0).tolist() == [1]
    assert sample([0.0, tiny], dtype=torch.float32, temperature=0.0).tolist() == [1]
    assert sample([1.0, 1.0 + tiny], dtype=torch.float64, temperature=0.0).tolist() == [1]
    assert sample([1.0, 1.0 + tiny], dtype=torch.float32, temperature=0.0).tolist() == [0]


def test_id_limit_and_mask_id_are_never_sampled():
    row = [0.0, 5.0, 0.0, 0.0, 9.0, INF]
    ids = sample(row, seed=SEEDS, mask_id=1, id_limit=4)
    assert set(ids.tolist()) == {0, 2, 3}
    assert sample(row, mask_id=1, id_limit=4, temperature=0.0).tolist() == [0]
    assert set(sample(row, seed=SEEDS, mask_id=5, id_limit=4, temperature=50.0).tolist()) == {0, 1, 2, 3}


# logit_bias


def test_logit_bias_bans_and_forces():
    bias = torch.tensor([[0.0, -INF, 0.0, 0.0]])
    assert sample([0.0, 9.0, 1.0, 0.0], temperature=0.0, logit_bias=bias).tolist() == [2]
    assert status_of([0.0, 9.0, 1.0, 0.0], temperature=0.0, logit_bias=torch.full((1, 4), -INF)) == (
        [0],
        [STATUS_EMPTY_ROW],
    )
    status = torch.zeros(1, dtype=torch.int32)
    both = torch.tensor([[INF, 0.0, 0.0, 0.0]])  # -inf + inf is a NaN, and a NaN is out
    assert sample([-INF, 1.0, 0.0, 0.0], temperature=0.0, logit_bias=both, status=status).tolist() == [1]
    assert status.tolist() == [STATUS_NAN]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logit_bias_is_added_in_fp32(dtype):
    """In bf16 20 - 0.05 is 20 again, and in fp16 60,000 + 60,000 is infinite."""
    logits = torch.tensor([[20.0, 20.0]], dtype=dtype)
    bias = torch.tensor([[-0.05, 0.0]], dtype=dtype)
    assert sample(logits, dtype=dtype, temperature=0.0, logit_bias=bias).tolist() == [1]
    if dtype == torch.float16:
        large, status = torch.tensor([[60000.0, 0.0]], dtype=dtype), torch.zeros(1, dtype=torch.int32)
        assert sample(large, dtype=dtype, logit_bias=large, status=status).tolist() == [0]
        assert status.tolist() == [0]


def test_logit_bias_equals_biased_logits():
    generator = torch.Generator().manual_seed(1)
    logits, bias = (torch.randn(50, 11, generator=generator) for _ in range(2))
    options = {"seed": torch.arange(50), "top_k": 5, "temperature": 1.3}
    assert torch.equal(sample(logits, logit_bias=bias, **options), sample(logits + bias, **options))


# Rows and noise


def test_a_sample_is_the_argmax_of_scaled_logits_and_noise():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 23, generator=generator) * 2
    seed, position = torch.arange(300) * 12345 - 999, torch.arange(300) * 7
    for stream in (STREAM_TARGET, STREAM_DRAFT):
        ids = sample(logits, temperature=0.7, seed=seed, position=position, stream=stream)
        score = logits / torch.tensor(0.7) + gumbel(seed, position, 23, stream)
        assert torch.equal(ids, score.argmax(-1))


def test_a_row_does_not_know_its_batch():
    generator = torch.Generator().manual_seed(2)
    rows = 40
    logits = torch.randn(rows, 31, generator=generator) * 4
    parameters = {
        "temperature": torch.rand(rows, generator=generator) * 2 * (torch.arange(rows) % 5 > 0),
        "top_k": torch.randint(0, 9, (rows,), generator=generator),
        "top_p": torch.rand(rows, generator=generator) * 0.9 + 0.1,
        "min_p": torch.rand(rows, generator=generator) * 0.3,
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        "position": torch.randint(0, 1000, (rows,), generator=generator),
    }
    together = sample(logits, **parameters)
    order = torch.randperm(rows, generator=generator)
    shuffled = sample(logits[order], **{name: value[order] for name, value in parameters.items()})
    assert torch.equal(shuffled, together[order])
    for r in range(rows):
        alone = sample(logits[r : r + 1], **{name: value[r : r + 1] for name, value in parameters.items()})
        assert alone.tolist() == together[r : r + 1].tolist()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_rows_in_plain_python(data):
    """Everything at once: bad values, temperature, truncation, limits, noise. Near-ties are skipped, not tolerated."""
    vocab_size = data.draw(st.integers(2, 12))
    value = st.one_of(st.floats(-20, 20, width=32), st.sampled_from([NAN, INF, -INF]))
    row = data.draw(st.lists(value, min_size=vocab_size, max_size=vocab_size))
    temperature = data.draw(st.one_of(st.just(0.0), st.floats(0.25, 4.0, width=32)))
    top_k = data.draw(st.integers(0, vocab_size + 1))
    top_p = data.draw(st.floats(0.125, 1.0, width=32))
    min_p = data.draw(st.floats(0.0, 1.0, width=32))
    mask_id = data.draw(st.integers(-1, vocab_size - 1))
    id_limit = data.draw(st.integers(2, vocab_size))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))

    allowed = [i for i in range(vocab_size) if i < id_limit and i != mask_id]
    x = {i: FP32_MAX if row[i] == INF else row[i] for i in allowed if row[i] == row[i] and row[i] != -INF}
    bits = STATUS_NAN * any(row[i] != row[i] for i in allowed) | STATUS_INF * any(row[i] == INF for i in allowed)
    if not x:
        x, bits = {allowed[0]: 0.0}, bits | STATUS_EMPTY_ROW
    if temperature == 0:
        largest = max(x.values())
        want = min(i for i in x if x[i] == largest)
    else:
        t = np.float32(temperature)
        z = {i: v if abs(v) == FP32_MAX and t < 1 else float(np.float32(v) / t) for i, v in x.items()}
        if top_k:
            kth = sorted(z.values(), reverse=True)[:top_k][-1]
            z = {i: v for i, v in z.items() if v >= kth}
        top = max(z.values())
        weight = {i: math.exp(max(v - top, -1e3)) for i, v in z.items()}
        if top_p < 1:
            total, mass = math.fsum(weight.values()), 0.0
            for i in sorted(z, key=lambda i: -z[i]):
                mass += weight[i] / total
                assume(abs(mass - top_p) > 1e-5)
                last = z[i]
                if mass >= top_p:
                    break
            z = {i: v for i, v in z.items() if v >= last}
        for i in z:
            assume(min_p in (0, 1) or abs(weight[i] - min_p) > 1e-5)
        z = {i: v for i, v in z.items() if weight[i] >= min_p or z[i] == top}
        noise = gumbel(torch.tensor([seed]), torch.tensor([7]), vocab_size)[0].tolist()
        score = {i: float(np.float32(v) + np.float32(noise[i])) for i, v in z.items()}
        best = max(score.values())
        assume(all(s == best or best - s > 1e-5 for s in score.values()))
        want = min(i for i in score if score[i] == best)
    got = status_of(
        row,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        mask_id=mask_id,
        id_limit=id_limit,
        seed=seed,
    )
    assert got == ([want], [bits])


# verify_accept


@dataclass
class Step:
    """One request of a step: its logits rows in step order, its drafts, its parameters."""

    logits: Tensor  # [m, V]
    drafts: list[int]  # n of them
    position: int  # of pending, L - 1
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    count: int | None = None  # the num_drafts that is passed on, if not len(drafts)

    def sampled(self, row: int, position: int, stream: int = STREAM_TARGET, **options: Any) -> int:
        """sample_rows of one row, for the token at `position`."""
        ids = sample(
            self.logits[row : row + 1],
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            position=position,
            stream=stream,
            dtype=self.logits.dtype,
            **options,
        )
        return int(ids)


ID_LIMIT, MASK_ID = 11, 4
VOCAB = 13


def parameters_of(steps: list[Step], num_k: int) -> tuple[Tensor, ...]:
    """The positional arguments of verify_accept before id_limit. Unused draft entries hold a poison id."""
    drafts = torch.full((len(steps), num_k), 2**40)
    for b, step in enumerate(steps):
        drafts[b, : len(step.drafts)] = torch.tensor(step.drafts, dtype=torch.int64)
    rows = [step.logits for step in steps]
    padding = torch.full((2, VOCAB), NAN, dtype=rows[0].dtype)  # rows beyond query_start_loc[B]

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(step, name) for step in steps], dtype=dtype)

    counts = [len(step.drafts) if step.count is None else step.count for step in steps]
    return (
        torch.cat([*rows, padding]),
        torch.tensor([0, *np.cumsum([len(r) for r in rows])], dtype=torch.int32),
        torch.tensor(counts, dtype=torch.int32),
        drafts,
        column("position", torch.int32),
        column("temperature", torch.float32),
        column("top_k", torch.int32),
        column("top_p", torch.float32),
        column("min_p", torch.float32),
        column("seed", torch.int64),
    )


def verify(steps: list[Step], num_k: int, *, branched: bool, mode: str = "match", **options: Any) -> tuple[list, ...]:
    """The four results of verify_accept and the status, as lists."""
    status = torch.zeros(len(steps), dtype=torch.int32)
    args = parameters_of(steps, num_k)
    results = verify_accept(*args, ID_LIMIT, MASK_ID, branched=branched, mode=mode, status=status, **options)
    return tuple(x.tolist() for x in (*results, status))


def match_in_python(step: Step, num_k: int, branched: bool) -> tuple[int, list[int], list[int], int]:
    """The decision of one request in `match`, sentence by sentence from the design."""
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    m, n, length = len(step.logits), len(step.drafts), step.position + 1
    if m == 0:
        return 0, [-1] * (num_k + 1), [-1] * num_k, 0
    y = [step.sampled(i, length + i, **limits) for i in range(n + 1)]
    a = 0
    while a < n and y[a] == step.drafts[a]:
        a += 1
    tokens = [*step.drafts[:a], y[a]]
    branches = range(n + 1) if branched else [n]
    first_row = {b: 1 + n + k * num_k for k, b in enumerate(branches)}
    next_drafts: list[int] = []
    if num_k and a in first_row and first_row[a] + num_k <= m:
        new_length = length + a + 1
        next_drafts = [step.sampled(first_row[a] + j, new_length + j, **limits) for j in range(num_k)]
    padding = [-1] * (num_k + 1 - len(tokens))
    return a, tokens + padding, next_drafts or [-1] * num_k, len(next_drafts)


def random_steps(generator: np.random.Generator, num_k: int, plan: str, dtype: torch.dtype) -> list[Step]:
    """A ragged batch; most drafts are right, so that every number of accepted drafts occurs."""
    steps = []
    for _ in range(generator.integers(1, 6)):
        n = 0 if plan == "ar" else int(generator.integers(0, num_k + 1))
        rows = {"ar": 1, "chain": 1 + n + num_k, "branched": 1 + n + (n + 1) * num_k}[plan]
        if generator.random() < 0.15:
            n = rows = 0  # a padded request
        step = Step(
            torch.tensor(generator.normal(size=(rows, VOCAB)) * 3, dtype=dtype),
            [],
            int(generator.integers(0, 5000)),
            float(generator.choice([0.0, 0.5, 1.0, 1.7])),
            int(generator.choice([0, 1, 3, 50])),
            float(generator.choice([1.0, 0.9, 0.3])),
            float(generator.choice([0.0, 0.2])),
            int(generator.integers(-(2**63), 2**63 - 1)),
        )
        for i in range(n):
            right = step.sampled(i, step.position + 1 + i, id_limit=ID_LIMIT, mask_id=MASK_ID)
            wrong = int(generator.integers(0, ID_LIMIT))
            step.drafts.append(right if generator.random() < 0.8 else wrong)
        steps.append(step)
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("plan", "num_k"), [("ar", 0), ("ar", 3), ("chain", 1), ("chain", 4), ("branched", 3)])
def test_match_against_python(plan, num_k, dtype):
    generator = np.random.default_rng(num_k)
    accepted = set()
    for _ in range(25):
        steps = random_steps(generator, num_k, plan, dtype)
        a, tokens, next_drafts, next_n, status = verify(steps, num_k, branched=plan == "branched")
        for b, step in enumerate(steps):
            want = match_in_python(step, num_k, plan == "branched")
            assert (a[b], tokens[b], next_drafts[b], next_n[b]) == want
            accepted.add(a[b])
        assert status == [0] * len(steps)
    assert accepted == (set(range(num_k + 1)) if plan != "ar" else {0})


def test_match_gives_the_ar_token_at_every_position():
    """Row i and the first row of a later step give the same token for the same position."""
    generator = np.random.default_rng(0)
    for step in random_steps(generator, 3, "chain", torch.float32) * 2:
        if not len(step.logits):
            continue
        y = [step.sampled(i, step.position + 1 + i, id_limit=ID_LIMIT, mask_id=MASK_ID) for i in range(4)]
        for i in range(4):
            later = replace(step, logits=step.logits[i : i + 1], drafts=[], position=step.position + i)
            assert verify([later], 3, branched=False)[1] == [[y[i], -1, -1, -1]]


def rejection_steps(seed: int, plan: str, num_k: int, dtype: torch.dtype = torch.float32) -> list[Step]:
    """A batch whose requests all have rows and K drafts at temperature > 0 or 0."""
    generator = np.random.default_rng(seed)
    rows = 1 + num_k + (num_k + 1 if plan == "branched" else 1) * num_k
    return [
        Step(
            torch.tensor(generator.normal(size=(rows, VOCAB)) * 2, dtype=dtype),
            [],
            int(generator.integers(0, 5000)),
            float(generator.choice([0.0, 0.6, 1.0, 1.4])),
            int(generator.choice([0, 4])),
            float(generator.choice([1.0, 0.8])),
            float(generator.choice([0.0, 0.1])),
            int(generator.integers(-(2**63), 2**63 - 1)),
        )
        for _ in range(6)
    ]


@pytest.mark.parametrize("mode", ["match", "rejection"])
@pytest.mark.parametrize("branched", [False, True])
def test_requests_do_not_affect_each_other(mode, branched):
    """Any request alone, or in another order, decides the same."""
    num_k, plan = 3, "branched" if branched else "chain"
    steps = rejection_steps(5, plan, num_k)

    def two_steps(chosen: list[Step]) -> list[tuple]:
        """Drafts proposed by a first step, verified in a second one."""
        q_state = QState.empty(len(chosen), num_k, VOCAB, torch.float32, torch.device("cpu"))
        options = {"branched": branched, "mode": mode, "q_state": q_state if mode == "rejection" else None}
        first = [replace(s, logits=s.logits[: 1 + num_k]) for s in chosen]
        _, _, drafts, n, _ = verify(first, num_k, **options)
        assert n == [num_k] * len(chosen)
        second = [replace(s, drafts=d, position=s.position + 1) for s, d in zip(chosen, drafts, strict=True)]
        results = verify(second, num_k, **options)
        laws = (q_state.logits.tolist(), q_state.cut.tolist(), q_state.log_norm.tolist())
        return list(zip(*results, *(laws if mode == "rejection" else ()), strict=True))

    together = two_steps(steps)
    order = [4, 0, 5, 2]
    assert two_steps([steps[b] for b in order]) == [together[b] for b in order]
    for b, step in enumerate(steps):
        assert two_steps([step]) == [together[b]]


def law_in_python(row: Tensor, step: Step) -> list[float]:
    """Probabilities of a row after the transform, in fp64 by the loop of the truncation tests."""
    x = {i: float(v) for i, v in enumerate(row) if i < ID_LIMIT and i != MASK_ID}
    if step.temperature == 0:
        best = max(x.values())
        winner = min(i for i in x if x[i] == best)
        return [float(i == winner) for i in range(VOCAB)]
    t = float(np.float32(step.temperature))
    weight = {i: math.exp(v / t) for i, v in x.items()}
    if step.top_k:
        kth = sorted(weight.values(), reverse=True)[: step.top_k][-1]
        weight = {i: w for i, w in weight.items() if w >= kth}
    if step.top_p < 1:
        total, mass, last = math.fsum(weight.values()), 0.0, 0.0
        for w in sorted(weight.values(), reverse=True):
            mass, last = mass + w / total, w
            if mass >= step.top_p:
                break
        weight = {i: w for i, w in weight.items() if w >= last}
    top = max(weight.values())
    weight = {i: w for i, w in weight.items() if w >= step.min_p * top}
    total = math.fsum(weight.values())
    return [weight.get(i, 0.0) / total for i in range(VOCAB)]


def rejection_in_python(step: Step, q_rows: Tensor) -> tuple[int, list[int]] | None:
    """(a, emitted tokens) by the paper's rule in fp64; None where fp32 may decide otherwise."""
    length, margin, emitted = step.position + 1, 1e-5, []
    for i in range(len(step.drafts) + 1):
        at = torch.tensor([step.seed]), torch.tensor([length + i])
        target = law_in_python(step.logits[i], step)
        if i < len(step.drafts):
            p, q, x = target, law_in_python(q_rows[i], step), step.drafts[i]
            u = float(uniform(*at))
            if abs(u * q[x] - p[x]) < margin:
                return None
            if u * q[x] < p[x]:
                emitted.append(x)
                continue
            target = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
        noise = gumbel(*at, VOCAB)[0].tolist()
        # At T = 0 the law is a point mass, which no noise moves.
        score = [math.log(r) + g if r > 1e-12 else -INF for r, g in zip(target, noise, strict=True)]
        second, first = sorted(score)[-2:]
        return None if first - second < margin else (i, [*emitted, score.index(first)])
    raise AssertionError("every request emits a token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("plan", ["chain", "branched"])
def test_rejection_against_python(plan, dtype):
    """Acceptance u q(x) < p(x), the residual max(0, p - q), the bonus token of p, drafts of q with stream 1."""
    num_k, accepted, skipped = 3, [], 0
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    for trial in range(12):
        steps = rejection_steps(trial, plan, num_k, dtype)
        proposing = rejection_steps(trial + 1000, plan, num_k, dtype)
        for step, other in zip(steps, proposing, strict=True):
            other.logits = other.logits[: 1 + num_k]
            if trial % 2:  # laws close to p, so that drafts are often accepted
                other.logits[1:] = step.logits[:num_k] + 0.2 * other.logits[1:]
            for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
                setattr(other, name, getattr(step, name))
            other.position = step.position - 1
        q_state = QState.empty(len(steps), num_k, VOCAB, dtype, torch.device("cpu"))
        options = {"branched": plan == "branched", "mode": "rejection", "q_state": q_state}
        _, _, drafts, _, _ = verify(proposing, num_k, **options)
        for b, (step, other) in enumerate(zip(steps, proposing, strict=True)):
            first = step.position + 1
            assert drafts[b] == [other.sampled(1 + j, first + j, STREAM_DRAFT, **limits) for j in range(num_k)]
            assert torch.equal(q_state.logits[b], other.logits[1:])
            step.drafts = drafts[b]
        a, tokens, next_drafts, next_n, status = verify(steps, num_k, **options)
        for b, (step, other) in enumerate(zip(steps, proposing, strict=True)):
            want = rejection_in_python(step, other.logits[1:])
            if want is None:
                skipped += 1
            else:
                assert (a[b], tokens[b]) == (want[0], want[1] + [-1] * (num_k - want[0]))
            accepted.append(a[b])
            if plan == "chain" and a[b] < num_k:
                assert (next_drafts[b], next_n[b]) == ([-1] * num_k, 0)
                assert torch.equal(q_state.logits[b], other.logits[1:])
                continue
            row = 1 + num_k + (a[b] * num_k if plan == "branched" else 0)
            first = step.position + a[b] + 2
            assert next_drafts[b] == [step.sampled(row + j, first + j, STREAM_DRAFT, **limits) for j in range(num_k)]
            assert next_n[b] == num_k
            assert torch.equal(q_state.logits[b], step.logits[row : row + num_k])
        assert status == [0] * len(steps)
    assert set(accepted) == {0, 1, 2, 3}
    assert skipped < len(accepted) / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_q_state_keeps_the_law_as_it_was_sampled(dtype):
    """The kept ids of the stored law are those of the row, the last kept one included; the masses add up to 1."""
    steps = rejection_steps(77, "chain", 3, dtype)
    for step in steps:
        step.temperature, step.top_k, step.top_p, step.min_p, step.logits = 0.7, 5, 0.95, 0.01, step.logits[:4]
    q_state = QState.empty(len(steps), 3, VOCAB, dtype, torch.device("cpu"))
    verify(steps, 3, branched=False, mode="rejection", q_state=q_state)
    for b, step in enumerate(steps):
        for j in range(3):
            law = torch.tensor(law_in_python(step.logits[1 + j], step), dtype=torch.float64)
            z = q_state.logits[b, j].to(q_state.cut.dtype) / torch.tensor(0.7, dtype=torch.float32)
            z[[MASK_ID, *range(ID_LIMIT, VOCAB)]] = -INF
            kept = z >= q_state.cut[b, j]
            assert torch.equal(kept, law > 0)
            stored = torch.exp(z - q_state.log_norm[b, j])[kept].double()
            torch.testing.assert_close(stored, law[kept], rtol=1e-5, atol=1e-7)


def test_a_request_without_rows_keeps_its_drafts_law():
    """A paused request has drafts that a later step judges: its q_state must survive the steps in between."""
    steps = rejection_steps(3, "chain", 2)
    for step in steps:
        step.logits = step.logits[:3]
    q_state = QState.empty(len(steps), 2, VOCAB, torch.float32, torch.device("cpu"))
    verify(steps, 2, branched=False, mode="rejection", q_state=q_state)
    before = [x.clone() for x in (q_state.logits, q_state.cut, q_state.log_norm)]
    steps[1].logits = steps[1].logits[:0]
    for step in steps:
        step.logits = step.logits * -1
    results = verify(steps, 2, branched=False, mode="rejection", q_state=q_state)
    assert [x[1] for x in results] == [0, [-1, -1, -1], [-1, -1], 0, 0]
    for old, new in zip(before, (q_state.logits, q_state.cut, q_state.log_norm), strict=True):
        assert torch.equal(new[1], old[1])
        assert not torch.equal(new[0], old[0])


def test_rejection_logit_bias_is_part_of_p_and_q():
    """With logits bf16 and q_state fp32; equal to biasing the logits beforehand."""
    steps = rejection_steps(8, "branched", 2, torch.bfloat16)
    bias = torch.randn(sum(len(s.logits) for s in steps) + 2, VOCAB, generator=torch.Generator().manual_seed(0))
    biased, row = [], 0
    for step in steps:
        step.drafts = [3, 5]
        biased.append(replace(step, logits=step.logits.float() + bias[row : row + len(step.logits)]))
        row += len(step.logits)
    results, states = [], []
    for chosen, options in ((steps, {"logit_bias": bias}), (biased, {})):
        states.append(QState.empty(len(steps), 2, VOCAB, torch.float32, torch.device("cpu")))
        results.append(verify(chosen, 2, branched=True, mode="rejection", q_state=states[-1], **options))
    assert results[0] == results[1]
    assert torch.equal(states[0].logits, states[1].logits)
    match = [verify(c, 2, branched=True, **o) for c, o in ((steps, {"logit_bias": bias}), (biased, {}))]
    assert match[0] == match[1]


@pytest.mark.parametrize("mode", ["match", "rejection"])
@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40, -(2**40)])
def test_bad_draft_ids(mode, bad):
    """A draft id out of range is refused and flagged; its token is the sample of p, and earlier drafts stand."""
    (step, *_) = rejection_steps(1, "branched", 3)
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    y = [step.sampled(i, step.position + 1 + i, **limits) for i in range(4)]
    step.drafts = [y[0], bad, y[2]]
    q_state = None
    if mode == "rejection":
        q_state = QState.empty(1, 3, VOCAB, torch.float32, torch.device("cpu"))
        q_state.logits[0] = step.logits[:3]  # q = p: drafts that p can give are accepted
        q_state.cut.fill_(-INF)
        step.temperature, step.top_k, step.top_p, step.min_p = 1.0, 0, 1.0, 0.0
        y = [step.sampled(i, step.position + 1 + i, **limits) for i in range(4)]
        step.drafts[0] = y[0]
        logits = step.logits[:3].clone()
        logits[:, [MASK_ID, *range(ID_LIMIT, VOCAB)]] = -INF
        q_state.log_norm[0] = logits.logsumexp(-1)
    a, tokens, _, next_n, status = verify([step], 3, branched=True, mode=mode, q_state=q_state)
    assert (a, tokens, next_n, status) == ([1], [[y[0], y[1], -1, -1]], [3], [STATUS_BAD_DRAFT])


@pytest.mark.parametrize("mode", ["match", "rejection"])
def test_forbidden_drafts_are_never_accepted(mode):
    """An id beyond the tokenizer or MASK has p = 0."""
    for forbidden in (MASK_ID, ID_LIMIT, VOCAB - 1):
        (step, *_) = rejection_steps(2, "chain", 1)
        step.drafts = [forbidden]
        step.logits[:, forbidden] = 40.0
        q_state = QState.empty(1, 1, VOCAB, torch.float32, torch.device("cpu")) if mode == "rejection" else None
        a, tokens, *_ = verify([step], 1, branched=False, mode=mode, q_state=q_state)
        assert a == [0]
        assert tokens[0][0] not in (MASK_ID, *range(ID_LIMIT, VOCAB), -1)


@pytest.mark.parametrize(("count", "used"), [(7, 3), (-2, 0), (2**31 - 1, 3)])
def test_bad_draft_counts(count, used):
    """A count beyond K or below 0 is flagged and cut to what there is."""
    (step, *_) = rejection_steps(4, "branched", 3)
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    y = [step.sampled(i, step.position + 1 + i, **limits) for i in range(4)]
    step.drafts, step.count = y[:3], count
    a, tokens, _, _, status = verify([step], 3, branched=True)
    assert (a, status) == ([used], [STATUS_BAD_DRAFT])
    assert tokens == [y[: used + 1] + [-1] * (3 - used)]


def test_a_count_beyond_the_rows():
    """More drafts than rows: only drafts that have a clean row are verified."""
    (step, *_) = rejection_steps(4, "chain", 3)
    limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
    y = [step.sampled(i, step.position + 1 + i, **limits) for i in range(4)]
    step.drafts, step.logits = y[:3], step.logits[:2]
    a, tokens, next_drafts, next_n, status = verify([step], 3, branched=False)
    assert (a, tokens, status) == ([1], [[y[0], y[1], -1, -1]], [STATUS_BAD_DRAFT])
    assert (next_drafts, next_n) == ([[-1, -1, -1]], [0])


def test_status_covers_the_rows_that_are_used():
    """Clean rows 0..n and the MASK rows of the accepted branch; a bad row elsewhere is no fault. Bits are added."""
    num_k = 2
    for row in range(9):  # 3 clean rows, then branches 0, 1, 2
        (step, *_) = rejection_steps(6, "branched", num_k)
        limits = {"id_limit": ID_LIMIT, "mask_id": MASK_ID}
        y = [step.sampled(i, step.position + 1 + i, **limits) for i in range(3)]
        step.drafts = [y[0], (y[1] + 1) % 4]  # a = 1
        clean = verify([step], num_k, branched=True)
        assert (clean[0], clean[4]) == ([1], [0])
        step.logits[row, 0] = NAN
        status = torch.tensor([32], dtype=torch.int32)
        verify_accept(*parameters_of([step], num_k), ID_LIMIT, MASK_ID, branched=True, mode="match", status=status)
        used = row < 3 or row in (5, 6)
        assert status.tolist() == [32 + (STATUS_NAN if used else 0)], f"row {row}"


def test_padded_requests_change_nothing_and_have_no_status():
    (step, other, *_) = rejection_steps(9, "chain", 2)
    for s in (step, other):
        s.logits = s.logits[:3]
    empty = Step(step.logits[:0], [], 0, 0.0, 0, 1.0, 0.0, 0, count=5)
    alone = verify([step, other], 2, branched=False)
    a, tokens, next_drafts, next_n, status = verify([empty, step, empty, other, empty], 2, branched=False)
    for b in (0, 2, 4):
        assert (a[b], tokens[b], next_drafts[b], next_n[b], status[b]) == (0, [-1, -1, -1], [-1, -1], 0, 0)
    picked = tuple([x[1], x[3]] for x in (a, tokens, next_drafts, next_n, status))
    assert picked == alone


def test_greedy_rejection_equals_greedy_match():
    """At T = 0 both rules accept a draft iff it is the argmax, and commit the argmax otherwise."""
    for trial in range(20):
        steps = rejection_steps(trial, "branched", 3)
        for step in steps:
            step.temperature = 0.0
            best = [step.sampled(i, 0, id_limit=ID_LIMIT, mask_id=MASK_ID) for i in range(3)]
            wrong = int(torch.randint(0, 4, (1,), generator=torch.Generator().manual_seed(trial)))
            step.drafts = [best[0], wrong, best[2]] if trial % 3 else best
        q_state = QState.empty(len(steps), 3, VOCAB, torch.float32, torch.device("cpu"))
        for b, step in enumerate(steps):
            q_state.logits[b] = torch.nn.functional.one_hot(torch.tensor(step.drafts), VOCAB)
        rejection = verify(steps, 3, branched=True, mode="rejection", q_state=q_state)
        assert rejection == verify(steps, 3, branched=True)
