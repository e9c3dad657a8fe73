"""The noise of the exactness contract: generator, uniform and Gumbel transform, and what a word depends on."""

from __future__ import annotations

import inspect
import math
import struct

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_ref import STREAM_ACCEPT, STREAM_DRAFT, STREAM_TARGET, gumbel, noise, philox4x32, uniform
from python_ref.noise import gumbel_at, noise_words, uniform_to_gumbel, word_to_uniform
from tests.ref.distributions import REJECT_BELOW, chi_square_p

MASK32 = 0xFFFFFFFF


def slow_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python integers, as in section 5 of Salmon et al., SC 2011."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & MASK32, (first >> 32) ^ c[3] ^ k[1], first & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return tuple(c)


def slow_word(seed: int, position: int, vocab_id: int, stream: int) -> int:
    """The word of the contract: counter (id / 4, position, stream, 0), key = the 64 bits of the seed, word id % 4."""
    key = (seed & MASK32, (seed >> 32) & MASK32)
    return slow_philox((vocab_id // 4, position, stream, 0), key)[vocab_id % 4]


def round_to_fp32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]


def slow_uniform(word: int) -> float:
    """v of the contract, one fp32 rounding at a time (each intermediate result is exact in fp64)."""
    return min(round_to_fp32(round_to_fp32(float(word)) * 2.0**-32 + 2.0**-33), 1 - 2.0**-24)


def bits(v: torch.Tensor) -> list[int]:
    return v.view(torch.int32).tolist()


def words_over_the_range() -> torch.Tensor:
    """Words dense at both ends and around the change of formula at v = 2^-5, random in between."""
    generator = torch.Generator().manual_seed(0)
    near_change = torch.arange(2**27 - 50_000, 2**27 + 50_000)
    spread = torch.randint(0, 2**32, (500_000,), generator=generator)
    small = (2.0 ** (torch.rand(200_000, generator=generator, dtype=torch.float64) * 32)).long()
    ends = torch.arange(50_000), 2**32 - 1 - torch.arange(50_000), 2**32 - 1 - small
    return torch.cat([near_change, spread, small, *ends])


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    """The philox4x32 10 lines of Random123's kat_vectors."""
    as_tensors = [torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key]
    assert tuple(int(w) for w in philox4x32(tuple(as_tensors[0]), tuple(as_tensors[1]))) == expected
    assert slow_philox(counter, key) == expected


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**31 - 1),
    vocab_id=st.integers(0, 4095),
    stream=st.sampled_from([0, 1, 2]),
)
def test_counter_and_key_layout(seed, position, vocab_id, stream):
    words = noise_words(torch.tensor([seed]), torch.tensor([position]), vocab_id + 1, stream)
    assert words.shape == (1, vocab_id + 1)
    for i in {0, vocab_id // 2, vocab_id}:
        assert int(words[0, i]) == slow_word(seed, position, i, stream)


def test_words_at_the_end_of_a_large_vocabulary():
    words = noise_words(torch.tensor([-2]), torch.tensor([40_000]), 262_143, STREAM_DRAFT)
    for i in (151_935, 262_140, 262_141, 262_142):
        assert int(words[0, i]) == slow_word(-2, 40_000, i, STREAM_DRAFT)


def test_both_halves_of_the_seed_count():
    """Seeds that differ in one bit, of either half, share no word."""
    seeds = torch.tensor([5, 5 ^ 1, 5 ^ (1 << 31), 5 ^ (1 << 32), 5 - 2**63])
    words = noise_words(seeds, torch.zeros(5, dtype=torch.int64), 64, STREAM_TARGET)
    assert len(set(words.flatten().tolist())) == words.numel()


def test_streams_share_no_word():
    assert (STREAM_TARGET, STREAM_DRAFT, STREAM_ACCEPT) == (0, 1, 2)
    words = [noise_words(torch.tensor([9]), torch.tensor([3]), 64, stream) for stream in (0, 1, 2)]
    assert len(set(torch.cat(words).flatten().tolist())) == 3 * 64


def test_a_word_does_not_know_its_row_batch_or_vocabulary():
    """Words are a function of (seed, position, id, stream): any selection of rows, in any shape, has the same ones."""
    seed, position = torch.arange(12) * 7919 - 40_000, torch.arange(12) * 31
    all_words = noise_words(seed, position, 103, STREAM_TARGET)
    for rows in ([3], [11, 0, 5], [5, 5, 5, 2]):
        assert torch.equal(noise_words(seed[rows], position[rows], 103, STREAM_TARGET), all_words[rows])
    grid = noise_words(seed.view(3, 4), position.view(3, 4), 103, STREAM_TARGET)
    assert torch.equal(grid.flatten(0, 1), all_words)
    for vocab_size in (1, 2, 3, 4, 5, 102):
        assert torch.equal(noise_words(seed, position, vocab_size, STREAM_TARGET), all_words[:, :vocab_size])
    as_int32 = noise_words(seed, position.to(torch.int32), 103, STREAM_TARGET)
    assert torch.equal(as_int32, all_words)


def test_nothing_else_can_reach_the_noise():
    assert list(inspect.signature(noise_words).parameters) == ["seed", "position", "vocab_size", "stream"]


# Uniform

# word -> bits of v. Between 2^24 and 2^32 both roundings matter: of the word to fp32, then of the sum.
UNIFORM_BITS = {
    0: 0x2F000000,  # 2^-33
    1: 0x2FC00000,  # 3 * 2^-33
    2: 0x30200000,  # 5 * 2^-33
    2**23 - 1: 0x3AFFFFFF,  # 2^23 - 1/2: the last word whose sum is exact
    2**24 - 1: 0x3B800000,  # 2^24 - 1/2 has 25 bits; the tie goes to the even 2^24
    2**24: 0x3B800000,
    2**24 + 1: 0x3B800000,  # the word itself is a tie, to even
    2**24 + 2: 0x3B800001,
    2**24 + 3: 0x3B800002,  # a tie again, to even
    2**27 - 1: 0x3D000000,  # rounds up to 2^27, v = 2^-5
    2**31: 0x3F000000,  # 1/2
    2**32 - 513: 0x3F7FFFFE,
    2**32 - 385: 0x3F7FFFFE,  # 1 - 2^-23
    2**32 - 384: 0x3F7FFFFE,  # a tie, to even
    2**32 - 383: 0x3F7FFFFF,  # 1 - 2^-24
    2**32 - 129: 0x3F7FFFFF,
    2**32 - 128: 0x3F7FFFFF,  # rounds to 2^32: would be 1 without the minimum
    2**32 - 127: 0x3F7FFFFF,
    2**32 - 1: 0x3F7FFFFF,
}


@pytest.mark.parametrize("word", UNIFORM_BITS)
def test_bits_of_the_uniform(word):
    v = word_to_uniform(torch.tensor([word]))
    assert v.dtype == torch.float32
    assert bits(v) == [UNIFORM_BITS[word]]
    assert slow_uniform(word) == v.item()


def test_uniform_equals_a_slow_evaluation_bit_for_bit():
    words = words_over_the_range()[::37]
    slow = torch.tensor([slow_uniform(w) for w in words.tolist()], dtype=torch.float32)
    assert torch.equal(word_to_uniform(words), slow)


def test_uniform_lies_strictly_between_0_and_1_and_never_falls():
    words = words_over_the_range().sort().values
    v = word_to_uniform(words)
    assert v.min() == 2.0**-33 and v.max() == 1 - 2.0**-24
    assert (v.diff() >= 0).all()


def test_the_plain_formula_reaches_1():
    """Why the minimum is there: (word + 0.5) * 2^-32 in fp32 is 1 for 128 words, whose noise is then -inf."""

    def plain(word: torch.Tensor) -> torch.Tensor:
        return (word.to(torch.float32) + 0.5) * 2.0**-32

    top = 2**32 - 1 - torch.arange(1000)
    assert int((plain(top) == 1).sum()) == 128
    assert top[plain(top) == 1].min() == 2**32 - 128
    assert uniform_to_gumbel(plain(torch.tensor([2**32 - 128]))).tolist() == [-math.inf]
    assert (word_to_uniform(top) < 1).all()
    in_a_row = 1 - (1 - 128 / 2**32) ** 151_936  # the chance that a row of a large vocabulary holds such a word
    assert in_a_row == pytest.approx(0.0045, rel=0.01)


def test_acceptance_uniform_is_id_0_of_its_stream():
    seed, position = torch.arange(100) - 50, torch.arange(100) * 3
    expected = [slow_uniform(slow_word(s, p, 0, 2)) for s, p in zip(seed.tolist(), position.tolist(), strict=True)]
    assert uniform(seed, position).tolist() == expected
    assert uniform(seed.view(4, 25), position.view(4, 25)).shape == (4, 25)


# Gumbel


def test_fp64_oracle_against_mpmath():
    """The fp64 option is the oracle of the next test; here it is held to 40 digits."""
    mpmath.mp.dps = 40
    for word in [*UNIFORM_BITS, 7, 12345, 2**20, 2**26, 2**27 + 12345, 2**28, 3_000_000_000, 4_000_000_000]:
        v = word_to_uniform(torch.tensor([word])).double()
        exact = -mpmath.log(-mpmath.log1p(-mpmath.mpf(v.item())))
        assert abs(mpmath.mpf(uniform_to_gumbel(v).item()) - exact) < 1e-14 * max(1, abs(exact))


def test_gumbel_is_finite_and_within_the_contract():
    words = words_over_the_range()
    v = word_to_uniform(words)
    g = uniform_to_gumbel(v)
    assert g.dtype == torch.float32
    assert g.isfinite().all()
    exact = -torch.log(-torch.log1p(-v.double()))
    error = (g.double() - exact).abs()
    assert error.max() < 2e-6, f"worst at word {int(words[error.argmax()])}"
    both_sides = (v > 2.0**-5 - 2.0**-10) & (v < 2.0**-5 + 2.0**-10)
    assert (v[both_sides] < 2.0**-5).any() and (v[both_sides] >= 2.0**-5).any()


def test_small_uniforms_need_the_series():
    """Without it -log(1 - v) loses v: at word 0 it would be the logarithm of 0."""
    v = word_to_uniform(torch.tensor([0, 1, 5, 1000]))
    naive = -torch.log(-torch.log(1 - v))
    assert naive[0].isinf()
    exact = -torch.log(-torch.log1p(-v.double()))
    assert (naive[1:] - exact[1:]).abs().max() > 0.01
    assert (uniform_to_gumbel(v) - exact).abs().max() < 2e-6


def test_extremes_of_gumbel():
    g = uniform_to_gumbel(word_to_uniform(torch.tensor([0, 2**32 - 1])))
    assert g.tolist() == pytest.approx([33 * math.log(2), -math.log(24 * math.log(2))], abs=2e-6)


def test_gumbel_is_the_transform_of_the_words():
    seed, position = torch.tensor([3, -3]), torch.tensor([10, 11])
    words = noise_words(seed, position, 50, STREAM_DRAFT)
    assert torch.equal(gumbel(seed, position, 50, STREAM_DRAFT), uniform_to_gumbel(word_to_uniform(words)))
    in_fp64 = gumbel(seed, position, 50, STREAM_DRAFT, torch.float64)
    assert in_fp64.dtype == torch.float64
    assert (gumbel(seed, position, 50, STREAM_DRAFT) - in_fp64).abs().max() < 2e-6


# Distribution


@pytest.mark.parametrize("along", ["ids", "positions", "seeds", "high half of seeds"])
def test_words_are_uniform_and_neighbours_independent(along):
    """64 bins of single words and 16 x 16 bins of neighbours, along each coordinate that a decode walks."""
    count, zero = 200_000, torch.zeros(1, dtype=torch.int64)
    steps = torch.arange(count)
    if along == "ids":
        words = noise_words(zero, zero, count, STREAM_TARGET)[0]
    elif along == "positions":
        words = noise_words(zero, steps, 1, STREAM_TARGET)[:, 0]
    else:
        seeds = steps if along == "seeds" else steps << 32
        words = noise_words(seeds, zero, 1, STREAM_TARGET)[:, 0]
    single = torch.bincount(words >> 26, minlength=64)
    assert chi_square_p(single, torch.full((64,), 1 / 64)) > REJECT_BELOW
    low_bits = torch.bincount(words & 63, minlength=64)
    assert chi_square_p(low_bits, torch.full((64,), 1 / 64)) > REJECT_BELOW
    pairs = torch.bincount((words[:-1] >> 28) * 16 + (words[1:] >> 28), minlength=256)
    assert chi_square_p(pairs, torch.full((256,), 1 / 256)) > REJECT_BELOW


def test_gumbel_has_its_distribution():
    """32 bins of equal probability of exp(-exp(-g))."""
    g = gumbel(torch.tensor([1]), torch.tensor([0]), 200_000)[0].double()
    bins = (torch.exp(-torch.exp(-g)) * 32).long().clamp(0, 31)
    assert chi_square_p(torch.bincount(bins, minlength=32), torch.full((32,), 1 / 32)) > REJECT_BELOW


def test_a_weak_generator_would_be_seen(monkeypatch):
    """The distribution test has teeth: with the round multipliers at 1 it fails."""
    monkeypatch.setattr(noise, "_ROUND_MULTIPLIERS", (1, 1))
    words = noise_words(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 200_000, 0)[0]
    assert chi_square_p(torch.bincount(words >> 26, minlength=64), torch.full((64,), 1 / 64)) < REJECT_BELOW


def test_single_ids_have_the_noise_of_the_row() -> None:
    seed, position = torch.tensor([3, -(2**63)]), torch.tensor([0, 2**31 - 1])
    ids = torch.tensor([[0, 1, 2, 3, 4, 1022], [5, 1000, 7, 7, 0, 63]])
    for dtype in (torch.float32, torch.float64):
        row = gumbel(seed, position, 1023, STREAM_DRAFT, dtype)
        assert torch.equal(gumbel_at(seed, position, ids, STREAM_DRAFT, dtype), row.gather(1, ids))
