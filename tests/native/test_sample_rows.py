"""sample_rows of backend `cuda` against the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import python_ref
from idlm_kernels.native import backend
from idlm_kernels.testing.decided import MIXES, Mix, Rows, Tally, check_rows
from python_ref.noise import gumbel
from tests.softgpu_support import SCHEDULES

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def built(module: ModuleType) -> None:
    """Every test here launches kernels."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_parameter_mix(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    for vocab_size in (8, 37, 1000, 5003, 32_000):
        for spread in (1.0, 6.0):
            rows = Rows.make(40, vocab_size, dtype, generator, spread=spread)
            check_rows(rows, backend, device, tally, f"V={vocab_size} spread={spread}")
    tally.hold()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(151_936, torch.bfloat16), (151_936, torch.float32), (262_144, torch.float16), (262_144, torch.float32)],
    ids=str,
)
def test_full_vocabularies(
    vocab_size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    tally = Tally()
    rows = Rows.make(len(MIXES), vocab_size, dtype, generator, spread=2.5)
    rows.logits[:, ::997] += 9  # a few likely tokens, as in text
    check_rows(rows, backend, device, tally)
    tally.hold()


def test_statistics_of_ids_rest_on_many_rows(device: torch.device, generator: torch.Generator) -> None:
    # Equality with the reference, whose distribution is tested, on as many rows as a distribution would need.
    tally = Tally()
    mixes = (Mix(), Mix(top_p=0.8), Mix(temperature=0.6, top_k=20))
    check_rows(Rows.make(4096, 64, torch.float32, generator, mixes=mixes), backend, device, tally)
    tally.hold()


def test_only_what_errors_can_turn_is_left_out(generator: torch.Generator) -> None:
    """The judge itself: near ties of scores and of cuts are undecided, what is farther apart is not."""
    position = torch.tensor([9])

    def noise(seed: int) -> torch.Tensor:
        return gumbel(torch.tensor([seed]), position, 3)[0]

    def decided(mix: Mix, logits: torch.Tensor) -> bool:
        given = {"positions": position, "seed": torch.tensor([seed]), "id_limit": 3, "mask_id": -1}
        rows = Rows.make(1, 3, torch.float32, generator, mixes=(mix,), **given)
        return bool(replace(rows, logits=logits.unsqueeze(0)).decided())

    # The id with the lowest logit has by far the best noise: it is sampled, if it is kept.
    seed = next(s for s in range(1000) if noise(s)[2] > noise(s)[:2].max() + 2)
    distribution = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    for gap, certain in ((0.0, False), (1e-6, False), (-1e-6, False), (1e-5, True), (-1e-5, True)):
        assert decided(Mix(), torch.tensor([0.0, gap, -50.0]) - noise(seed)) == certain, gap
        assert decided(Mix(top_p=0.75 + gap), distribution.log().float()) == certain, gap


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_faulty_rows_are_defined(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    vocab_size = 700
    kinds: list[tuple[str, object]] = [
        ("one NaN", lambda x: x.index_fill_(0, torch.tensor([5]), math.nan)),
        ("all NaN", lambda x: x.fill_(math.nan)),
        ("+inf", lambda x: x.index_fill_(0, torch.tensor([7, 600]), math.inf)),
        ("all -inf", lambda x: x.fill_(-math.inf)),
        ("+inf and NaN", lambda x: x.index_fill_(0, torch.tensor([9]), math.inf)[8].fill_(math.nan)),
        ("constant", lambda x: x.fill_(1.5)),
        ("zero", lambda x: x.zero_()),
        ("one finite", lambda x: x.fill_(-math.inf).index_fill_(0, torch.tensor([31]), -2.0)),
        ("largest values", lambda x: x.fill_(torch.finfo(dtype).max)),
        ("both ends", lambda x: x.fill_(torch.finfo(dtype).max)[::2].fill_(torch.finfo(dtype).min)),
        ("only forbidden ids finite", lambda x: x.fill_(-math.inf).index_fill_(0, torch.tensor([2, 699]), 1.0)),
        ("NaN at forbidden ids", lambda x: x.index_fill_(0, torch.tensor([2, 699]), math.nan)),
        ("signed zeros", lambda x: x.zero_().index_fill_(0, torch.arange(0, 700, 3), -0.0)),
        ("smallest values", lambda x: x.fill_(torch.finfo(dtype).tiny)),
    ]  # fmt: skip
    tally = Tally()
    for name, spoil in kinds:
        rows = Rows.make(len(MIXES), vocab_size, dtype, generator)
        for row in rows.logits:
            spoil(row)  # type: ignore[operator]
        check_rows(rows, backend, device, tally, name)
    tally.hold()


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 50.0, 1e8, 1e30, math.inf])
def test_extreme_temperatures(temperature: float, device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    mixes = (Mix(temperature), Mix(temperature, top_k=7), Mix(temperature, min_p=0.3), Mix(temperature, top_p=0.7))
    for dtype in DTYPES:
        for spread in (1.0, 1e3):
            rows = Rows.make(24, 500, dtype, generator, mixes=mixes, spread=spread)
            check_rows(rows, backend, device, tally, f"{dtype} spread={spread}")
    tally.hold()


def test_top_k_keeps_all_ties(device: torch.device, generator: torch.Generator) -> None:
    # Logits that differ but whose quotients do not (neighbours above 14, divided by 3 or 7) are tied as well.
    tally = Tally()
    rows = Rows.make(600, 50, torch.float32, generator, mixes=(Mix(3.0, top_k=3), Mix(7.0, top_k=2)))
    ladder = torch.nextafter(torch.tensor(14.0), torch.tensor(15.0)) - 14.0
    steps = torch.randint(0, 100, (600, 1), generator=generator) + torch.randint(0, 6, (600, 50), generator=generator)
    rows.logits = 14.0 + ladder * steps
    check_rows(rows, backend, device, tally, "neighbours")
    rows.logits = torch.randint(-3, 3, rows.logits.shape, generator=generator).float()
    check_rows(rows, backend, device, tally, "integers")
    tally.hold()


def test_extreme_truncations(device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    mixes = (
        Mix(top_k=10_000),
        Mix(top_k=2**31 - 1),
        Mix(top_k=299, top_p=1e-7),
        Mix(top_p=1e-30),
        Mix(top_p=1 - 2**-24),
        Mix(min_p=1.0),
        Mix(min_p=1e-30),
        Mix(top_k=-4),
    )
    check_rows(Rows.make(80, 300, torch.float32, generator, mixes=mixes), backend, device, tally)
    check_rows(Rows.make(80, 300, torch.bfloat16, generator, mixes=mixes), backend, device, tally)
    tally.hold()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias(dtype: torch.dtype, bias_dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    for vocab_size in (64, 1001):
        bias = torch.randn(30, vocab_size, generator=generator) * 2
        bias[:, ::5] = -math.inf
        rows = Rows.make(30, vocab_size, dtype, generator, logit_bias=bias.to(bias_dtype))
        check_rows(rows, backend, device, tally, f"V={vocab_size}")
    tally.hold()


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_any_address_and_stride(offset: int, device: torch.device, generator: torch.Generator) -> None:
    """Rows that start anywhere, with neighbours that must not be read."""
    tally = Tally()
    for dtype in DTYPES:
        rows = Rows.make(20, 333, dtype, generator)
        wide = torch.full((20, 333 + 19), math.nan, dtype=dtype)
        wide[:, offset : offset + 333] = rows.logits
        rows = replace(rows, logits=wide.to(device)[:, offset : offset + 333])
        ids, error_flags = rows.run(backend, device)
        rows = replace(rows, logits=rows.logits.cpu())
        expected, wanted = rows.run(python_ref)  # type: ignore[arg-type]
        assert torch.equal(error_flags, wanted)
        tally.add(str(dtype), ids == expected, rows.decided())
    tally.hold()


def test_streams_and_position_types(device: torch.device, generator: torch.Generator) -> None:
    tally = Tally()
    for stream in (0, 1, 2):
        rows = Rows.make(40, 256, torch.float32, generator, stream=stream)
        check_rows(rows, backend, device, tally, f"stream {stream}")
        ids = rows.run(backend, device)[0]
        narrow = replace(rows, positions=rows.positions.to(torch.int32))
        assert torch.equal(narrow.run(backend, device)[0], ids)
    tally.hold()


def test_row_invariance(device: torch.device, generator: torch.Generator) -> None:
    """Ids depend on nothing but the row and its parameters: not on its neighbours, their number or the cluster."""
    rows = Rows.make(12, 20_000, torch.bfloat16, generator)
    ids = rows.run(backend, device)[0]

    def some(which: list[int]) -> torch.Tensor:
        names = ("logits", "positions", "temperature", "top_k", "top_p", "min_p", "seed")
        return replace(rows, **{n: getattr(rows, n)[which].contiguous() for n in names}).run(backend, device)[0]

    order = torch.randperm(12, generator=generator).tolist()
    assert torch.equal(some(order), ids[order])
    for i in (0, 5):
        assert torch.equal(some([i]), ids[[i]])
    assert torch.equal(some([3] * 200), ids[3].repeat(200))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_cluster_size_does_not_show(
    size: int, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in DTYPES:
        for vocab_size in (5, 100, 7001):
            rows = Rows.make(20, vocab_size, dtype, generator)
            monkeypatch.setattr(backend, "cluster_size", 0)
            ids = rows.run(backend, device)[0]
            monkeypatch.setattr(backend, "cluster_size", size)
            assert torch.equal(rows.run(backend, device)[0], ids)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(
    schedule: str, softgpu: ModuleType, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "cluster_size", 4)
    rows = Rows.make(10, 3001, torch.bfloat16, generator)
    ids = rows.run(backend)[0]
    with softgpu.configured(**SCHEDULES[schedule]):
        assert torch.equal(rows.run(backend)[0], ids)


def test_refusals(device: torch.device, generator: torch.Generator) -> None:
    rows = Rows.make(2, 64, torch.float32, generator)
    with pytest.raises(TypeError, match="logits in bfloat16 or float16 or float32, got float64"):
        replace(rows, logits=rows.logits.double()).run(backend, device)
    with pytest.raises(TypeError, match="logit_bias in bfloat16 or float16 or float32, got float64"):
        replace(rows, logit_bias=torch.zeros(2, 64, dtype=torch.float64)).run(backend, device)
    with pytest.raises(ValueError, match="leave no id"):
        replace(rows, id_limit=1, mask_id=0).run(backend, device)
    empty = Rows.make(0, 64, torch.float32, generator)
    assert empty.run(backend, device)[0].shape == (0,)
