"""The small ops of the CPU backend: equal to the references, and row-invariant to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import python_ref
from idlm_kernels.cpu import qk_norm_rope_append, rms_norm, silu_and_mul

ROWS = [*range(1, 41), 63, 64, 65, 100, 171, 299, 300]
HALVES = [torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request: pytest.FixtureRequest):
    """Numbers that divide rows into blocks at any place: torch's vector loops must not show."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# rms_norm


@pytest.mark.parametrize("width", [576, 100, 33])
def test_rms_norm_bits(width: int, threads: None) -> None:
    x, weight = randn(300, width), randn(width, seed=1)
    want = torch.cat([rms_norm(row, weight, 1e-5) for row in x.split(1)])
    for rows in ROWS:
        assert torch.equal(rms_norm(x[:rows], weight, 1e-5), want[:rows]), rows


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rms_norm_against_the_reference(dtype: torch.dtype) -> None:
    x, weight, residual = randn(9, 96).to(dtype), randn(96, seed=1), randn(9, 96, seed=2).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), python_ref.rms_norm(x, weight, 1e-5))
    sums = [residual.clone(), residual.clone()]
    y, want = rms_norm(x, weight, 1e-5, residual=sums[0]), python_ref.rms_norm(x, weight, 1e-5, residual=sums[1])
    torch.testing.assert_close(y, want)
    assert torch.equal(*sums)
    assert rms_norm(x, weight, 1e-5, out=x) is x  # in place
    torch.testing.assert_close(x, python_ref.rms_norm(randn(9, 96).to(dtype), weight, 1e-5))
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, 96)


def test_rms_norm_in_fp64() -> None:
    x, weight = randn(3, 32).double(), randn(32).double()
    assert torch.equal(rms_norm(x, weight, 1e-5), python_ref.rms_norm(x, weight, 1e-5))


# silu_and_mul


@pytest.mark.parametrize("width", [1536, 100, 48, 33, 40_000])
def test_silu_and_mul_bits(width: int, threads: None) -> None:
    most = 300 if width < 10_000 else 5
    x = randn(most, 2 * width)
    want = torch.cat([silu_and_mul(row) for row in x.split(1)])
    for rows in itertools.takewhile(lambda rows: rows <= most, ROWS):
        assert torch.equal(silu_and_mul(x[:rows]), want[:rows]), rows


@pytest.mark.parametrize("width", [64, 100, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_silu_and_mul_against_the_reference(dtype: torch.dtype, width: int) -> None:
    x = (4 * randn(3, 2 * width)).to(dtype)
    x[0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, torch.inf, torch.nan])
    want, out = python_ref.silu_and_mul(x), torch.empty(3, width, dtype=dtype)
    torch.testing.assert_close(silu_and_mul(x), want, equal_nan=True)
    assert silu_and_mul(x, out=out) is out
    torch.testing.assert_close(out, want, equal_nan=True)
    assert silu_and_mul(x[:0]).shape == (0, width)


# qk_norm_rope_append

HEADS, KV_HEADS, DIM, PAGE_SIZE, PAGES = 4, 2, 16, 4, 90


class Step:
    """Arguments of qk_norm_rope_append for `rows` rows."""

    def __init__(self, rows: int, *, dtype: torch.dtype = torch.float32, norm: bool = True):
        self.qkv = randn(300, (HEADS + 2 * KV_HEADS) * DIM)[:rows].to(dtype)
        self.positions = torch.arange(300)[:rows] * 3
        self.rotary = python_ref.rotary_table(10_000 ** -(torch.arange(DIM // 2) / DIM * 2), 1000)
        slots = torch.randperm(PAGES * PAGE_SIZE, generator=torch.Generator().manual_seed(1))
        self.slot_mapping = slots[:rows]
        self.caches = [
            torch.full((KV_HEADS, PAGES, PAGE_SIZE, DIM), 7.0, dtype=dtype).permute(1, 2, 0, 3) for _ in "kv"
        ]
        self.weights = {"q_weight": randn(DIM, seed=2), "k_weight": randn(DIM, seed=3)} if norm else {}

    def run(self, op=qk_norm_rope_append, **options: object) -> Tensor:
        return op(self.qkv, self.positions, self.rotary, self.slot_mapping, *self.caches, **self.weights, **options)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("skipped", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rope_append_against_the_reference(dtype: torch.dtype, skipped: str, norm: bool) -> None:
    got, want = Step(11, dtype=dtype, norm=norm), Step(11, dtype=dtype, norm=norm)
    for step in (got, want):
        step.slot_mapping[{"none": slice(0), "some": slice(None, None, 3), "all": slice(None)}[skipped]] = -1
    torch.testing.assert_close(got.run(), want.run(python_ref.qk_norm_rope_append))
    for cache, expected in zip(got.caches, want.caches, strict=True):
        torch.testing.assert_close(cache, expected)
    out = torch.empty(11, HEADS, DIM, dtype=dtype)
    assert got.run(out=out) is out
    assert torch.equal(out, got.run())


@pytest.mark.parametrize("norm", [True, False])
def test_rope_append_bits(norm: bool, threads: None) -> None:
    whole = Step(300, norm=norm)
    q = whole.run()
    for rows in ROWS:
        part = Step(rows, norm=norm)
        assert torch.equal(part.run(), q[:rows])
        page, offset = part.slot_mapping // PAGE_SIZE, part.slot_mapping % PAGE_SIZE
        for cache, expected in zip(part.caches, whole.caches, strict=True):
            assert torch.equal(cache[page, offset], expected[page, offset])


def test_rotation_follows_a_table_that_is_changed() -> None:
    step = Step(5)
    step.run()
    step.rotary.mul_(2)
    assert torch.equal(step.run(), Step(5).run(lambda *a, **k: qk_norm_rope_append(a[0], a[1], 2 * a[2], *a[3:], **k)))
    step, shifted = Step(5), Step(5)
    step.run()
    step.positions += 1  # the same tensor with other values, as in a decode
    shifted.positions = step.positions.clone()
    assert torch.equal(step.run(), shifted.run())


def test_slots_out_of_range_are_skipped() -> None:
    step = Step(5)
    step.slot_mapping = torch.tensor([-1, -7, PAGES * PAGE_SIZE, 1 << 40, 0])
    step.run()
    assert (step.caches[0].flatten(0, 1)[1:] == 7).all()
    assert (step.caches[0][0, 0] != 7).all()


def test_rope_append_without_rows() -> None:
    step = Step(0)
    assert step.run().shape == (0, HEADS, DIM)
    assert (step.caches[0] == 7).all()
