"""The device functions that the exactness contract fixes to the bit."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from python_ref.noise import philox4x32, uniform_to_gumbel, word_to_uniform

# Of the distribution of Random123 (kat_vectors, philox4x32 10): counter, key, output.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def run(probe: ModuleType, name: str, *args: object, count: int) -> None:
    probe.launch(name, (count + 255) // 256, 256, [*args, count])


def test_philox_known_answers(probe: ModuleType) -> None:
    random = np.random.default_rng(0).integers(0, 2**32, (1000, 6), dtype=np.uint32)
    counters = np.concatenate([np.array([k[0] for k in KNOWN], dtype=np.uint32), random[:, :4]])
    keys = np.concatenate([np.array([k[1] for k in KNOWN], dtype=np.uint32), random[:, 4:]])
    got = np.zeros_like(counters)
    run(probe, "philox", np.ascontiguousarray(counters), np.ascontiguousarray(keys), got, count=len(got))
    assert got[: len(KNOWN)].tolist() == [k[2] for k in KNOWN]
    c, k = torch.from_numpy(counters.astype(np.int64)), torch.from_numpy(keys.astype(np.int64))
    words = philox4x32((c[:, 0], c[:, 1], c[:, 2], c[:, 3]), (k[:, 0], k[:, 1]))
    assert torch.equal(torch.from_numpy(got.astype(np.int64)), torch.stack(words, 1))


def test_uniform_bits_and_gumbel(probe: ModuleType) -> None:
    edges = [0, 1, 2, 3, 2**27 - 1, 2**27, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 2, 2**32 - 1]
    random = np.random.default_rng(1)
    words = np.concatenate([
        np.array(edges, dtype=np.uint32),
        np.arange(2**27 - 500, 2**27 + 500, dtype=np.uint32),  # where the series ends
        random.integers(0, 2**32, 20_000, dtype=np.uint32),
        (2.0 ** random.uniform(0, 32, 20_000)).astype(np.uint32),
        (2**32 - 2.0 ** random.uniform(0, 31, 20_000)).astype(np.uint32),
    ])  # fmt: skip
    v, g = np.zeros(len(words), np.float32), np.zeros(len(words), np.float32)
    run(probe, "noise", words, v, g, count=len(words))
    want = word_to_uniform(torch.from_numpy(words.astype(np.int64)))
    assert torch.equal(torch.from_numpy(v), want)
    exact = uniform_to_gumbel(want.double())
    error = (torch.from_numpy(g).double() - exact).abs()
    assert np.isfinite(g).all() and v.min() > 0 and v.max() < 1
    assert float(error.max()) <= 2e-6, f"word {words[int(error.argmax())]}: g is off by {float(error.max()):.2e}"


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e30, 1e-30])
def test_division_by_temperature_is_fp32_division(probe: ModuleType, scale: float) -> None:
    random = np.random.default_rng(2)
    x = (random.normal(size=200_000) * scale).astype(np.float32)
    x[:6] = [0.0, -0.0, np.inf, 3.4e38, -3.4e38, 1e-44]
    t = np.exp(random.uniform(np.log(1e-4), np.log(100), len(x))).astype(np.float32)
    t[::7] = random.choice(np.array([1.0, 2.0, 3.0, 0.7, 0.1, 1e-4, 1e20, 3e38, np.inf], np.float32), len(t[::7]))
    t[:6] = [3.0, 3.0, 0.5, 0.5, 0.5, 2.0]
    z = np.full(len(x), np.nan, np.float32)
    run(probe, "divide", x, t, z, count=len(x))
    finite = torch.from_numpy(x).clamp(max=torch.finfo(torch.float32).max)
    big = torch.finfo(torch.float32).max
    want = (finite / torch.from_numpy(t)).clamp(-big, big)
    different = (torch.from_numpy(z) != want).nonzero().flatten()
    wrong = [(x[i], t[i], z[i], float(want[i])) for i in different[:4]]
    assert not wrong, f"(x, T, got, wanted): {wrong}"
