"""The noise of the exactness contract: Philox4x32-10 words, their uniforms and Gumbel variables.

Every random number of a decode is a pure function of (request seed, position of the predicted token, vocabulary id,
stream). It does not know the row, the batch, the step or the stride, so a token is sampled with the same noise
whether an AR step, a strided step or a resumed request samples it.

Source of the generator: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from python_ref.contract import STREAM_ACCEPT, STREAM_INPUT, STREAM_TARGET

_MASK32 = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def _mul_hi_lo(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of multiplier * x. The int64 product wraps modulo 2^64, which keeps both halves right."""
    product = x * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10. Counter words and key words are int64 tensors holding 32-bit values; so are the four results."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_ROUND_MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(_ROUND_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = (k0 + _WEYL_INCREMENTS[0]) & _MASK32
        k1 = (k1 + _WEYL_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def noise_words(seed: Tensor, position: Tensor, vocab_size: int, stream: int) -> Tensor:
    """Words [..., vocab_size] (int64 holding 32 bits) of ids 0..vocab_size-1 for seeds and positions [...].

    Counter (id / 4, position, stream, 0), key the 64-bit seed (low word first), word id % 4.
    """
    quads = (vocab_size + 3) // 4
    c0 = torch.arange(quads, device=seed.device, dtype=torch.int64)
    c1 = position.to(torch.int64).unsqueeze(-1) & _MASK32
    k0 = seed.unsqueeze(-1) & _MASK32
    k1 = (seed.unsqueeze(-1) >> 32) & _MASK32
    c2, c3 = torch.full_like(c1, stream), torch.zeros_like(c1)
    words = torch.stack(philox4x32((c0, c1, c2, c3), (k0, k1)), dim=-1)
    return words.flatten(-2)[..., :vocab_size]


def noise_ids(seed: Tensor, place: Tensor, position: Tensor, below: int) -> Tensor:
    """Ids int64 [...], uniform on 1 .. below - 1, that MASK rows embed. seed int64 [...]: of the request; place and
    position int64 [...]: where the row lies among the request's keys, and its position.

    Two rows of a step differ in their place; a row of a later step that has the same place has another position.
    Counter (place, position, stream 3, 0), word 0; id = 1 + floor(word * (below - 1) / 2^32).
    """
    c0, c1 = place & _MASK32, position & _MASK32
    key = seed & _MASK32, (seed >> 32) & _MASK32
    word = philox4x32((c0, c1, torch.full_like(c1, STREAM_INPUT), torch.zeros_like(c1)), key)[0]
    return 1 + ((word * (below - 1)) >> 32)


def word_to_uniform(word: Tensor) -> Tensor:
    """v = min(fp32(word) * 2^-32 + 2^-33, 1 - 2^-24), fp32 in (0, 1): bit-identical in every backend.

    The minimum matters: without it 128 of the 2^32 words round to 1, whose Gumbel variable is -inf, and a row whose
    only kept id meets one would lose it. (In the form -log(-log v) it would be +inf, and at a vocabulary of 151,936
    hand 0.45 % of all rows to a random token.)
    """
    return (word.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=1.0 - 2.0**-24)


def uniform_to_gumbel(v: Tensor) -> Tensor:
    """g = -log E with E = -log1p(-v), finite for every v of `word_to_uniform`; in the dtype of `v`.

    Small v would lose E's relative precision in 1 - v, so there the series of -log1p(-v) is used.
    """
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v / 5))))
    exponential = torch.where(v < 2.0**-5, series, -torch.log(1 - v))
    if v.dtype == torch.float64:
        exponential = -torch.log1p(-v)
    return -torch.log(exponential)


def uniform(seed: Tensor, position: Tensor, stream: int = STREAM_ACCEPT) -> Tensor:
    """The acceptance uniform, fp32 [...], of seeds [...] at positions [...]: id 0 of its stream."""
    return word_to_uniform(noise_words(seed, position, 1, stream)).squeeze(-1)


def gumbel(
    seed: Tensor, position: Tensor, vocab_size: int, stream: int = STREAM_TARGET, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard Gumbel noise [..., vocab_size] for seeds int64 [...] and positions of the predicted tokens [...]."""
    return uniform_to_gumbel(word_to_uniform(noise_words(seed, position, vocab_size, stream)).to(dtype))


def gumbel_at(
    seed: Tensor, position: Tensor, ids: Tensor, stream: int = STREAM_TARGET, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The entries `ids` [..., C] of `gumbel`, for seeds and positions [...]."""
    c0, c1 = ids >> 2, position.to(torch.int64).unsqueeze(-1) & _MASK32
    k0, k1 = seed.unsqueeze(-1) & _MASK32, (seed.unsqueeze(-1) >> 32) & _MASK32
    words = torch.stack(philox4x32((c0, c1, torch.full_like(c1, stream), torch.zeros_like(c1)), (k0, k1)), dim=-1)
    word = words.gather(-1, (ids & 3).unsqueeze(-1)).squeeze(-1)
    return uniform_to_gumbel(word_to_uniform(word).to(dtype))
