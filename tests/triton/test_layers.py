"""rms_norm, silu_and_mul, embed and qk_norm_rope_append on backend `triton`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import idlm_kernels
from idlm_kernels.testing import (
    Embed,
    QkNormRopeAppend,
    RmsNorm,
    SiluAndMul,
    check,
    check_bits,
    check_close,
    check_rows,
)
from idlm_kernels.triton import layers
from tests.softgpu_support import SCHEDULES
from tests.triton.support import DEVICE, INTERPRETED, caught, mutant

DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
BASE = DTYPES[0]


# rms_norm


def check_rms_norm(module: ModuleType, rows: int = 7, width: int = 576, dtype: torch.dtype = BASE) -> None:
    call = RmsNorm(rows=rows, width=width, dtype=dtype).call()
    check(call.changed(residual=None), module.rms_norm)
    got = check(call, partial(module.rms_norm, out=torch.full((rows, width), torch.nan, dtype=dtype)))
    check_bits(got.left["residual"], call.run().left["residual"], "the sum")
    # The norm is of the sum as it was stored.
    stored = call.changed(x=got.left["residual"], residual=None)
    check_close(got.result, stored.widened().run().result, stored.run().result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 577, 576, 4096, 5120])
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    check_rms_norm(layers, 5, width, dtype)


def test_rms_norm_without_rows() -> None:
    x = torch.empty(0, 64, dtype=BASE)
    assert layers.rms_norm(x, torch.ones(64, dtype=BASE), 1e-6).shape == (0, 64)


@pytest.mark.parametrize("width", [576, 577, 4096])
def test_rms_norm_row_bits_depend_on_the_row_alone(width: int) -> None:
    call = RmsNorm(rows=64, width=width, dtype=BASE).call()
    for given in (call, call.of("rms_norm", "x", "weight", "eps")):
        check_rows(given, layers.rms_norm, slice(0, 1), slice(5, 12), slice(63, 64), slice(3, 35))
    x, weight = call["x"], call["weight"]
    whole, in_place = layers.rms_norm(x, weight, 1e-6), x.clone()
    check_bits(layers.rms_norm(in_place, weight, 1e-6, out=in_place), whole)


@pytest.mark.parametrize("width", [576, 577])
def test_rms_norm_row_bits_do_not_depend_on_placement(width: int) -> None:
    """Views at odd addresses and with odd row strides: the compiler must not choose another summation for them."""
    arguments = RmsNorm(rows=9, width=width, dtype=BASE).call().arguments
    x, residual, weight = (arguments[name] for name in ("x", "residual", "weight"))
    whole = layers.rms_norm(x, weight, 1e-6)
    sums = residual.clone()
    added = layers.rms_norm(x, weight, 1e-6, residual=sums)
    for first, stride in ((1, width + 1), (3, width + 5), (0, width + 3), (8, width + 64)):
        view, sum_view = (
            torch.zeros(10, stride, dtype=BASE).flatten()[first:].as_strided((9, width), (stride, 1)) for _ in range(2)
        )
        view.copy_(x)
        check_bits(layers.rms_norm(view, weight, 1e-6), whole)
        sum_view.copy_(residual)
        check_bits(layers.rms_norm(view, weight, 1e-6, residual=sum_view), added)
        check_bits(sum_view, sums)


# silu_and_mul


def check_silu_and_mul(module: ModuleType, rows: int = 3, width: int = 1030, dtype: torch.dtype = BASE) -> None:
    call = SiluAndMul(rows=rows, width=width, dtype=dtype).call()
    call["x"][0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, torch.inf, torch.nan]).to(dtype)[: 2 * width]
    check(call, module.silu_and_mul)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 1024, 1030, 3072])
def test_silu_and_mul(dtype: torch.dtype, width: int) -> None:
    check_silu_and_mul(layers, 3, width, dtype)


def test_silu_and_mul_row_bits_depend_on_the_row_alone() -> None:
    call = SiluAndMul(rows=33, width=1544, dtype=BASE).call()
    whole = check_rows(call, layers.silu_and_mul, slice(0, 1), slice(4, 11), slice(32, 33)).result
    odd = torch.zeros(33, 2 * 1544 + 1, dtype=BASE)[:, 1:]
    odd.copy_(call["x"])
    check_bits(layers.silu_and_mul(odd), whole)


# embed


def check_embed(module: ModuleType, dtype: torch.dtype = BASE, out_dtype: torch.dtype = torch.float32) -> None:
    call = Embed(width=1100, dtype=dtype).call().changed(dtype=out_dtype)
    call["mask_embedding"][7] = torch.nan  # stays where it is
    for is_mask in (call["is_mask"], call["is_mask"] != 0):
        for mask_embedding in (call["mask_embedding"], None):
            given = call.changed(is_mask=is_mask, mask_embedding=mask_embedding)
            got, peer = given.run(module.embed).result, given.run().result
            torch.testing.assert_close(
                got, peer, rtol=0, atol=0, equal_nan=True
            )  # a NaN that is converted has any bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_embed(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    check_embed(layers, dtype, out_dtype)


# qk_norm_rope_append


def check_rope(module: ModuleType, **shapes: Any) -> None:
    check(QkNormRopeAppend(**{"page_size": 16, "dtype": BASE, **shapes}).call(), module.qk_norm_rope_append)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("heads, page_size", [((8, 2, 128), 16), ((9, 3, 64), 1), ((1, 1, 256), 3), ((3, 1, 80), 64)])
def test_rope(heads: tuple[int, int, int], page_size: int, norm: bool, dtype: torch.dtype) -> None:
    check_rope(layers, heads=heads, page_size=page_size, dtype=dtype, norm=norm)


def test_rope_at_the_width_of_qwen3_8b() -> None:
    check_rope(layers, rows=3, heads=(32, 8, 128))


@pytest.mark.compiled
def test_rope_writes_fp8() -> None:
    call = QkNormRopeAppend(cache_dtype=torch.float8_e4m3fn, norm=False, dtype=BASE).call()
    call["qkv"][1] *= 1000  # beyond the largest fp8
    got, peer = call.run(layers.qk_norm_rope_append), call.run()
    for name in ("k_cache", "v_cache"):
        a, b = got.left[name].float(), peer.left[name].float()
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


def test_rope_skips_slots_beyond_the_cache_and_clamps_positions() -> None:
    call = QkNormRopeAppend(dtype=BASE).call()
    call["slot_mapping"][0] = call["k_cache"][..., 0, 0].numel()
    call["positions"][1] = 1000
    q, left = call.run(layers.qk_norm_rope_append)
    assert q[:2].isfinite().all()
    assert left["k_cache"].isfinite().flatten(0, 1).all(-1).all(-1).sum() == 3


def test_rope_row_bits_depend_on_the_row_alone() -> None:
    call = QkNormRopeAppend(rows=40, dtype=BASE).call()
    rows = (slice(0, 1), slice(3, 10), slice(39, 40))
    whole = check_rows(call, layers.qk_norm_rope_append, *rows).left
    for which in rows:
        alone, slots = call.rows(which).run(layers.qk_norm_rope_append).left, call["slot_mapping"][which]
        for name in ("k_cache", "v_cache"):
            check_bits(alone[name].flatten(0, 1)[slots[slots >= 0]], whole[name].flatten(0, 1)[slots[slots >= 0]], name)


def test_rope_row_bits_do_not_depend_on_the_layout_of_cache_and_qkv() -> None:
    call = QkNormRopeAppend(rows=9, dtype=BASE).call()
    whole = call.run(layers.qk_norm_rope_append)
    shape = num_pages, page_size, num_kv_heads, head_dim = call["k_cache"].shape
    qkv = torch.cat([call["qkv"], call["qkv"][:, :3]], 1)[:, : call["qkv"].shape[1]]
    for head_major in (True, False):
        views = []
        for name in ("k_cache", "v_cache"):
            cache = torch.empty(num_kv_heads, num_pages, page_size, head_dim, dtype=BASE).permute(1, 2, 0, 3)
            odd = torch.empty(*shape[:3], head_dim + 1, dtype=BASE)[..., 1:]
            views.append((cache if head_major else odd).copy_(call[name]))
        given = {**call.arguments, "qkv": qkv, "k_cache": views[0], "v_cache": views[1]}
        check_bits(layers.qk_norm_rope_append(**given), whole.result)
        for name, view in zip(("k_cache", "v_cache"), views, strict=True):
            check_bits(view, whole.left[name], name)


# The public ops reach these kernels, and every kernel passes every schedule.


def test_public_ops_use_the_backend() -> None:
    with idlm_kernels.use_backend("triton"):
        chosen = idlm_kernels.backends(DEVICE.type)
        x = torch.randn(3, 64).to(BASE)
        check_bits(idlm_kernels.silu_and_mul(x), layers.silu_and_mul(x))
    assert {op for op, name in chosen.items() if name == "triton"} >= {
        "rms_norm",
        "silu_and_mul",
        "embed",
        "qk_norm_rope_append",
    }


CHECKS = [check_rms_norm, check_silu_and_mul, check_embed, check_rope]


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        for check_ in CHECKS:
            check_(layers)


MUTANTS = {
    "eps forgotten": (
        check_rms_norm,
        "tl.sqrt_rn(mean_square + eps))\n    y = h",
        "tl.sqrt_rn(mean_square))\n    y = h",
    ),
    "norm of the unrounded sum's input": (
        check_rms_norm,
        "h = x.to(tl.float32)\n",
        "h = tl.load(gX + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)\n",
    ),
    "mean over the padded width": (
        check_rms_norm,
        "tl.sum(h * h, axis=0), H * 1.0",
        "tl.sum(h * h, axis=0), BLOCK_H * 1.0",
    ),
    "row edge off by one": (
        check_rms_norm,
        "column = tl.arange(0, BLOCK_H)\n    inside = column < H\n",
        "column = tl.arange(0, BLOCK_H)\n    inside = column < H - 1\n",
    ),
    "gate and up exchanged": (
        check_silu_and_mul,
        "y = silu_times(gate, up)",
        "y = silu_times(up, gate)",
    ),
    "reads past the row": (check_silu_and_mul, "column < F\n", "column < F + 1\n"),
    "id bound off by one": (check_embed, "(token < num_ids)", "(token <= num_ids)"),
    "MASK by equality to 1": (check_embed, "tl.load(gIsMask + row) != 0", "tl.load(gIsMask + row) == 1"),
    "k takes the weight of q": (check_rope, "tl.where(is_q, q1, k1)", "tl.where(is_q, q1, q1)"),
    "rotation turns the wrong way": (check_rope, "r2 = y2 * cos + y1 * sin", "r2 = y2 * cos - y1 * sin"),
    "slot -1 is written": (
        check_rope,
        "(slot >= 0) & (slot < num_slots)",
        "(slot >= -1) & (slot < num_slots)",
    ),
    "v is rotated": (
        check_rope,
        "tl.store(tl.multiple_of(pV, [1, STORE_ALIGNMENT]), x1",
        "tl.store(tl.multiple_of(pV, [1, STORE_ALIGNMENT]), r1",
    ),
    "rotation by slot, not position": (check_rope, "tl.load(gPositions + row)", "tl.load(gSlots + row)"),
}


@pytest.mark.compiled  # a mutant may read anywhere, which the interpreter does not survive
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    check_, old, new = MUTANTS[name]
    check_(layers)
    assert caught(check_, mutant(layers, old, new, tmp_path))
