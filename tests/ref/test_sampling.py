"""sample_rows against a plain Python reading of the contract, one row at a time."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from idlm_kernels import use_backend
from python_ref import FLAG_EMPTY_ROW, FLAG_INF, FLAG_NAN, STREAM_DRAFT, STREAM_TARGET, gumbel
from python_ref.sampling import truncation_cut
from tests.ref.steps import sample

FP32_MAX = float(np.finfo(np.float32).max)
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


def status_of(logits: Any, **options: Any) -> tuple[list[int], list[int]]:
    error_flags = torch.zeros(1 if torch.as_tensor(logits).dim() == 1 else len(logits), dtype=torch.int32)
    ids = sample(logits, error_flags=error_flags, **options)
    return ids.tolist(), error_flags.tolist()


SEEDS = torch.arange(400)  # enough for an id of probability 5 % to appear (misses: 1e-9)


def support(weights: list[float], **options: Any) -> set[int]:
    """The ids that sampling from these weights ever gives."""
    return set(sample(torch.tensor(weights).log(), seed=SEEDS, **options).tolist())


# Truncation


def kept_exactly(weights: list[int], top_k: int, top_p: Fraction, min_p: Fraction) -> set[int]:
    """The contract in exact arithmetic: weights are unnormalised probabilities, 0 a forbidden id."""
    kept = {i for i, w in enumerate(weights) if w > 0}
    if top_k > 0:
        kth = sorted((weights[i] for i in kept), reverse=True)[:top_k][-1]
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
        ([0.0, NAN, 1e38, 1.0], 2, FLAG_NAN),
        ([NAN, NAN, NAN, 1.0], 3, FLAG_NAN),
        ([0.0, INF, 1.0, 2.0], 1, FLAG_INF),
        ([0.0, 1.0, INF, INF], 2, FLAG_INF),  # a tie that noise cannot break: the lowest id
        ([NAN, INF, -INF, 0.0], 1, FLAG_NAN | FLAG_INF),
        ([-INF] * 4, 0, FLAG_EMPTY_ROW),
        ([NAN] * 4, 0, FLAG_NAN | FLAG_EMPTY_ROW),
        ([NAN, -INF, -INF, NAN], 0, FLAG_NAN | FLAG_EMPTY_ROW),
        ([-INF, -INF, -5.0, -INF], 2, 0),
        ([-FP32_MAX, -INF, -INF, -INF], 0, 0),
        ([0.0, FP32_MAX, 0.0, 0.0], 1, 0),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.3, 1e9])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}])
def test_bad_rows(row, token, bits, temperature, truncation):
    for seed in range(5):
        ids, error_flags = status_of(row, temperature=temperature, seed=seed, **truncation)
        assert (ids, error_flags) == ([token], [bits])


def test_an_empty_row_gives_the_lowest_allowed_id():
    assert status_of([-INF] * 4, mask_id=0) == ([1], [FLAG_EMPTY_ROW])
    assert status_of([-INF] * 4, mask_id=0, temperature=0.0) == ([1], [FLAG_EMPTY_ROW])
    assert status_of([-INF] * 4, mask_id=2, id_limit=2) == ([0], [FLAG_EMPTY_ROW])
    assert status_of([3.0, -INF, 5.0, 9.0], mask_id=0, id_limit=2) == ([1], [FLAG_EMPTY_ROW])


def test_bad_values_of_forbidden_ids_are_no_fault():
    """Forbidden ids become -inf first, whatever they hold."""
    assert status_of([1.0, NAN, 0.0, INF], mask_id=1, id_limit=3, temperature=0.0) == ([0], [0])


def test_error_flags_are_added_to_what_is_there():
    error_flags = torch.tensor([16, 32, 1], dtype=torch.int32)
    sample([[0.0, NAN], [0.0, 1.0], [INF, 0.0]], error_flags=error_flags)
    assert error_flags.tolist() == [17, 32, 3]


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
    assert status_of([0.0, -3e38, -3.2e38], temperature=0.5, mask_id=0) == ([1], [0])  # not lost below fp32


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
        [FLAG_EMPTY_ROW],
    )
    error_flags = torch.zeros(1, dtype=torch.int32)
    both = torch.tensor([[INF, 0.0, 0.0, 0.0]])  # -inf + inf is a NaN, and a NaN is out
    assert sample([-INF, 1.0, 0.0, 0.0], temperature=0.0, logit_bias=both, error_flags=error_flags).tolist() == [1]
    assert error_flags.tolist() == [FLAG_NAN]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logit_bias_is_added_in_fp32(dtype):
    """In bf16 20 - 0.05 is 20 again, and in fp16 60,000 + 60,000 is infinite."""
    logits = torch.tensor([[20.0, 20.0]], dtype=dtype)
    bias = torch.tensor([[-0.05, 0.0]], dtype=dtype)
    assert sample(logits, dtype=dtype, temperature=0.0, logit_bias=bias).tolist() == [1]
    if dtype == torch.float16:
        large, error_flags = torch.tensor([[60000.0, 0.0]], dtype=dtype), torch.zeros(1, dtype=torch.int32)
        assert sample(large, dtype=dtype, logit_bias=large, error_flags=error_flags).tolist() == [0]
        assert error_flags.tolist() == [0]


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
    bits = FLAG_NAN * any(row[i] != row[i] for i in allowed) | FLAG_INF * any(row[i] == INF for i in allowed)
    if not x:
        x, bits = {allowed[0]: 0.0}, bits | FLAG_EMPTY_ROW
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
