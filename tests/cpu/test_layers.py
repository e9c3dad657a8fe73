"""The small ops of the CPU backend: equal to the references, and row-invariant to the bit."""

from __future__ import annotations

import pytest
import torch

import python_ref
from idlm_kernels.cpu import qk_norm_rope_append, rms_norm, silu_and_mul
from idlm_kernels.testing import Call, QkNormRopeAppend, RmsNorm, SiluAndMul, check, check_bits, check_rows

ROWS = [*range(1, 41), 63, 64, 65, 100, 171, 299, 300]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
FP32 = torch.float32


def some_rows(count: int) -> list[slice]:
    """The first rows, so many of them, and some rows alone."""
    return [*(slice(n) for n in ROWS if n <= count), *(slice(i, i + 1) for i in range(0, count, 7))]


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
    call = RmsNorm(rows=300, width=width, residual=False, dtype=FP32).call("cpu")
    check_rows(call, rms_norm, *some_rows(300))


@DTYPES
def test_rms_norm_against_the_reference(dtype: torch.dtype) -> None:
    call = RmsNorm(rows=9, width=96, dtype=dtype).call("cpu")
    got, plain = check(call, rms_norm), call.changed(residual=None)
    check_bits(got.left["residual"], call.run().left["residual"])
    x, weight = call["x"], call["weight"]
    wanted = check(plain, rms_norm).result
    assert rms_norm(x, weight, 0.3, out=x) is x  # in place
    check_bits(x, wanted)
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, 96)


def test_rms_norm_in_fp64() -> None:
    call = RmsNorm(rows=3, width=32, dtype=torch.float64).call("cpu")
    check_bits(call.run(rms_norm).result, call.run().result)


# silu_and_mul


@pytest.mark.parametrize("width", [1536, 100, 48, 33, 40_000])
def test_silu_and_mul_bits(width: int, threads: None) -> None:
    rows = 300 if width < 10_000 else 5
    check_rows(SiluAndMul(rows=rows, width=width, dtype=FP32).call("cpu"), silu_and_mul, *some_rows(rows))


@pytest.mark.parametrize("width", [64, 100, 40_000])
@DTYPES
def test_silu_and_mul_against_the_reference(dtype: torch.dtype, width: int) -> None:
    call, out = SiluAndMul(rows=3, width=width, dtype=dtype).call("cpu"), torch.empty(3, width, dtype=dtype)
    call["x"][0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, torch.inf, torch.nan])
    assert silu_and_mul(call["x"], out=out) is out
    torch.testing.assert_close(out, check(call, silu_and_mul).result, rtol=0, atol=0, equal_nan=True)
    assert silu_and_mul(call["x"][:0]).shape == (0, width)


# qk_norm_rope_append

HEADS, KV_HEADS, DIM, PAGE_SIZE, PAGES = 4, 2, 16, 4, 90


def append(rows: int, *, dtype: torch.dtype = FP32, norm: bool = True) -> Call:
    """Rows to append to caches [Hkv, pages, page_size, D], as this backend keeps them, full of sevens."""
    heads = (HEADS, KV_HEADS, DIM)
    call = QkNormRopeAppend(rows=rows, heads=heads, page_size=PAGE_SIZE, norm=norm, dtype=dtype).call("cpu")
    caches = [torch.full((KV_HEADS, PAGES, PAGE_SIZE, DIM), 7.0, dtype=dtype).permute(1, 2, 0, 3) for _ in "kv"]
    slots = torch.randperm(PAGES * PAGE_SIZE, generator=torch.Generator().manual_seed(1))[:rows]
    return call.changed(k_cache=caches[0], v_cache=caches[1], slot_mapping=slots)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("skipped", ["none", "some", "all"])
@DTYPES
def test_rope_append_against_the_reference(dtype: torch.dtype, skipped: str, norm: bool) -> None:
    call, out = append(11, dtype=dtype, norm=norm), torch.empty(11, HEADS, DIM, dtype=dtype)
    call["slot_mapping"][{"none": slice(0), "some": slice(None, None, 3), "all": slice(None)}[skipped]] = -1
    wanted = check(call, qk_norm_rope_append).result
    assert qk_norm_rope_append(**call.arguments, out=out) is out
    check_bits(out, wanted)


@pytest.mark.parametrize("norm", [True, False])
def test_rope_append_bits(norm: bool, threads: None) -> None:
    call = append(300, norm=norm)
    whole = call.run(qk_norm_rope_append)
    for rows in ROWS:
        part = call.rows(slice(rows))
        got, slots = part.run(qk_norm_rope_append), part["slot_mapping"]
        page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
        check_bits(got.result, whole.result[:rows])
        for name in ("k_cache", "v_cache"):
            check_bits(got.left[name][page, offset], whole.left[name][page, offset], name)


def test_rotation_follows_a_table_that_is_changed() -> None:
    arguments = append(5).arguments
    for name, change in (("rotary", 2.0), ("positions", 2)):  # the same tensors with other values, as in a decode
        qk_norm_rope_append(**arguments)
        arguments[name].mul_(change).clamp_(max=49)
        fresh = {**arguments, name: arguments[name].clone()}
        check_bits(qk_norm_rope_append(**arguments), qk_norm_rope_append(**fresh))
        torch.testing.assert_close(qk_norm_rope_append(**arguments), python_ref.qk_norm_rope_append(**arguments))


def test_slots_out_of_range_are_skipped() -> None:
    call = append(5).changed(slot_mapping=torch.tensor([-1, -7, PAGES * PAGE_SIZE, 1 << 40, 0]))
    cache = call.run(qk_norm_rope_append).left["k_cache"]
    assert (cache.flatten(0, 1)[1:] == 7).all()
    assert (cache[0, 0] != 7).all()


def test_rope_append_without_rows() -> None:
    result, left = append(0).run(qk_norm_rope_append)
    assert result.shape == (0, HEADS, DIM)
    assert (left["k_cache"] == 7).all()
