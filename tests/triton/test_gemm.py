"""linear, gated_lora_linear and linear_silu_and_mul on backend `triton`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ptx import opcodes, recorded_launches
from idlm_kernels.testing import (
    Call,
    GatedLoraLinear,
    Linear,
    LinearSiluAndMul,
    check,
    check_bits,
    check_rows,
    same_bits,
)
from idlm_kernels.triton import gemm, layers
from tests.softgpu_support import SCHEDULES
from tests.triton.support import INTERPRETED, caught, mutant

DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
BASE = DTYPES[0]


def layer(rows: int, n: int, k: int, dtype: torch.dtype = BASE, seed: int = 0) -> Call:
    return Linear(rows=rows, n=n, k=k, dtype=dtype).call(seed=seed)


# linear


def check_linear(module: ModuleType, rows: int = 7, n: int = 100, k: int = 584, dtype: torch.dtype = BASE) -> None:
    call, out = layer(rows, n, k, dtype), torch.empty(rows, n + 3, dtype=dtype)[:, :n]
    for _ in range(2):  # what one launch leaves behind must suit the next
        out.fill_(torch.nan)
        check(call, partial(module.linear, out=out))
    check(call.changed(bias=None), module.linear)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, n, k", [(1, 1, 1), (7, 100, 77), (16, 64, 584), (64, 200, 1024), (65, 130, 576), (130, 65, 64)]
)
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    check_linear(gemm, rows, n, k, dtype)


@pytest.mark.compiled
@pytest.mark.parametrize("rows, n, k", [(7, 4096, 4096), (16, 16384, 256), (5, 960, 576)])
def test_linear_at_model_shapes(rows: int, n: int, k: int) -> None:
    check_linear(gemm, rows, n, k)


def test_linear_takes_any_layout() -> None:
    x, weight = (layer(5, 70, 96)[name] for name in ("x", "weight"))
    wanted = gemm.linear(x, weight)
    odd = torch.zeros(5, 97, dtype=BASE)[:, 1:]
    odd.copy_(x)
    check_bits(gemm.linear(odd, weight), wanted)
    check_bits(gemm.linear(x, weight.T.contiguous().T), wanted)
    check_bits(gemm.linear(x, torch.cat([weight, weight], 1)[:, :96]), wanted)


def test_linear_of_nothing() -> None:
    x, weight, bias = layer(3, 8, 16).arguments.values()
    assert gemm.linear(x[:0], weight).shape == (0, 8)
    assert torch.equal(gemm.linear(x[:, :0], weight[:, :0], bias=bias), bias.expand(3, 8))


def test_linear_reads_narrower_weights() -> None:
    call = layer(5, 70, 96, torch.float32)
    check(call.changed(weight=call["weight"].half(), bias=None), gemm.linear)


def test_config_depends_on_the_weight_alone_and_cuts_k_without_rest() -> None:
    for n in (1, 64, 576, 1024, 4096, 6144, 24576, 151936):
        for k in (1, 64, 576, 4096, 12288):
            for dtype in DTYPES:
                config = gemm.gemm_config(n, k, dtype)
                blocks = -(-k // config.block_k)
                assert (config.splits - 1) * config.blocks_per_split < blocks <= config.splits * config.blocks_per_split


# Row invariance


ROWS = (slice(0, 1), slice(5, 12), slice(64, 80), slice(129, 130), slice(1, 65), slice(60, 128))


def check_row_bits(module: ModuleType, n: int = 128, k: int = 1024) -> None:
    check_rows(layer(130, n, k), module.linear, *ROWS)


@pytest.mark.compiled
def test_row_bits_depend_on_the_row_alone() -> None:
    check_row_bits(gemm)
    check_row_bits(gemm, 70, 77)


@pytest.mark.compiled
def test_row_bits_depend_on_the_row_alone_with_wide_tiles() -> None:
    check_row_bits(gemm, 16384, 64)


@pytest.mark.compiled
def test_parts_in_one_cta_give_the_bits_of_parts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    call = layer(70, 192, 1024)
    assert gemm.gemm_config(192, 1024, BASE).splits > 1
    apart = call.run(gemm.linear)
    monkeypatch.setattr(gemm, "kMaxCtasApart", 0)
    check_rows(call, gemm.linear, slice(70), slice(3, 10), among=apart)


# gated_lora_linear


def adapter(**shapes: Any) -> Call:
    return GatedLoraLinear(**{"rank": 40, "dtype": BASE, **shapes}).call()


def plain_of(call: Call, module: ModuleType) -> Tensor:
    """The same layer without its adapter."""
    return module.linear(call["x"], call["weight"], bias=call["bias"])


def check_adapter(module: ModuleType, call: Call | None = None) -> None:
    call = adapter() if call is None else call
    got = check(call, module.gated_lora_linear).result
    ungated = call["lora_mask"] == 0
    check_bits(got[ungated], plain_of(call, module)[ungated])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, k, output_sizes, rank",
    [
        (9, 320, (70, 40, 90), 40),
        (1, 64, (64,), 1),
        (7, 96, (64, 64), 128),
        (70, 1024, (1, 130), 16),
        (3, 77, (5,), 5),
    ],
)
def test_adapter(rows: int, k: int, output_sizes: Sequence[int], rank: int, dtype: torch.dtype) -> None:
    check_adapter(gemm, adapter(rows=rows, k=k, output_sizes=output_sizes, rank=rank, dtype=dtype))


@pytest.mark.parametrize("lora_mask_dtype", [torch.uint8, torch.int32])
def test_gate_is_whatever_is_not_zero(lora_mask_dtype: torch.dtype) -> None:
    call = adapter(lora_mask_dtype=lora_mask_dtype)
    wanted = call.run(gemm.gated_lora_linear).result
    call["lora_mask"].mul_(200 if lora_mask_dtype == torch.uint8 else 1 << 20)
    check_bits(call.run(gemm.gated_lora_linear).result, wanted)


def spoilt_adapter(**shapes: Any) -> tuple[Call, Tensor]:
    """Gated rows and an adapter that are not finite; and which rows are not gated."""
    call = adapter(**shapes)
    ungated = call["lora_mask"] == 0
    call["x"][~ungated] = torch.nan
    call["lora_a"][3], call["lora_b"][::2] = torch.inf, torch.nan
    return call, ungated


def check_ungated_rows_are_untouched(module: ModuleType) -> None:
    call, ungated = spoilt_adapter()
    call["bias"][0], call["weight"][0] = -0.0, 0.0
    plain = plain_of(call, module)[ungated]
    assert plain.isfinite().all() and (plain[:, 0] == 0).all()
    check_bits(call.run(module.gated_lora_linear).result[ungated], plain)


def test_ungated_rows_are_untouched() -> None:
    check_ungated_rows_are_untouched(gemm)


def test_slices_do_not_touch_each_other() -> None:
    """A NaN in one slice's adapter stays in that slice, also inside a tile that two slices share."""
    call = adapter()
    wanted = call.run(gemm.gated_lora_linear).result
    call["lora_a"][: call["lora_b"].shape[1]] = torch.nan
    got, first = call.run(gemm.gated_lora_linear).result, call["output_sizes"][0]
    assert got[call["lora_mask"] != 0][:, :first].isnan().all()
    check_bits(got[:, first:], wanted[:, first:])


@pytest.mark.compiled
def test_adapter_row_bits_depend_on_the_row_alone() -> None:
    rows = (slice(1, 2), slice(4, 11), slice(60, 76), slice(2, 66))
    check_rows(adapter(rows=130, k=1024), gemm.gated_lora_linear, *rows)


# linear_silu_and_mul


def agree(a: Tensor, b: Tensor) -> bool:
    """The same bits. In the interpreter products are numpy's, whose bits depend on where a row stands."""
    if INTERPRETED:
        torch.testing.assert_close(a, b, rtol=4e-3, atol=1e-3)
        return True
    return same_bits(a, b)


def activation(**shapes: Any) -> Call:
    return LinearSiluAndMul(**{"k": 1024, "rank": 40, "dtype": BASE, **shapes}).call()


def check_activation(module: ModuleType, call: Call | None = None) -> None:
    """Every row is silu_and_mul of the linear layer, to the bit, with and without an adapter."""
    call = activation() if call is None else call
    without = call.of(call.op, "x", "weight", "bias")
    rows, features = call["x"].shape[0], call["weight"].shape[0] // 2
    out = torch.empty(rows, features + 3, dtype=call["x"].dtype)[:, :features]
    plain = layers.silu_and_mul(plain_of(call, gemm))
    for _ in range(2):  # what one launch leaves behind must suit the next
        out.fill_(torch.nan)
        assert without.run(partial(module.linear_silu_and_mul, out=out)).result is out
        assert agree(out, plain)
    got = call.run(module.linear_silu_and_mul).result
    assert agree(got, layers.silu_and_mul(call.run(gemm.gated_lora_linear).result))
    ungated = call["lora_mask"] == 0
    assert agree(got[ungated], plain[ungated]) and not same_bits(got, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, k, output_sizes, rank",
    [
        (9, 320, (51, 60, 89), 40),
        (7, 576, (96, 96), 16),
        (2, 64, (1, 1), 1),
        (70, 1024, (40, 40), 16),
        (3, 77, (10,), 5),
    ],
)
def test_activation(rows: int, k: int, output_sizes: Sequence[int], rank: int, dtype: torch.dtype) -> None:
    check_activation(gemm, activation(rows=rows, k=k, output_sizes=output_sizes, rank=rank, dtype=dtype))


@pytest.mark.compiled
def test_activation_with_wide_tiles() -> None:
    check_activation(gemm, activation(rows=9, k=64, output_sizes=(8200, 8200), rank=16))
    check_activation(gemm, activation(rows=66, k=64, output_sizes=(8200, 8200), rank=16))


def check_activation_row_bits(module: ModuleType) -> None:
    call = activation(rows=130, output_sizes=(40, 40))
    whole = check_rows(call, module.linear_silu_and_mul, *ROWS).result
    plain = module.linear_silu_and_mul(call["x"], call["weight"], bias=call["bias"])
    ungated = call["lora_mask"] == 0
    check_bits(plain[ungated], whole[ungated])
    check_rows(call.of(call.op, "x", "weight", "bias"), module.linear_silu_and_mul, *ROWS)


@pytest.mark.compiled
def test_activation_row_bits_depend_on_the_row_alone() -> None:
    check_activation_row_bits(gemm)


def test_activation_of_rows_that_no_adapter_may_touch() -> None:
    call, ungated = spoilt_adapter(output_sizes=(100, 100))
    got = call.run(gemm.linear_silu_and_mul).result[ungated]
    plain = gemm.linear_silu_and_mul(call["x"], call["weight"], bias=call["bias"])[ungated]
    assert plain.isfinite().all()
    check_bits(got, plain)


def test_activation_of_nothing() -> None:
    x, weight, _ = layer(3, 8, 16).arguments.values()
    assert gemm.linear_silu_and_mul(x[:0], weight).shape == (0, 4)
    assert gemm.linear_silu_and_mul(x, weight[:0]).shape == (3, 0)
    assert (gemm.linear_silu_and_mul(x[:, :0], weight[:, :0]) == 0).all()


# What the compiler made of it


@pytest.mark.compiled
def test_every_row_count_runs_the_same_matrix_instruction(softgpu: ModuleType) -> None:
    call = adapter(rows=130, k=1024, output_sizes=(64, 128), rank=128)
    with recorded_launches(softgpu) as launches:
        for rows in (1, 7, 16, 64, 65, 130):
            gemm.linear(call["x"][:rows], call["weight"])
            call.rows(slice(rows)).run(gemm.gated_lora_linear)
            gemm.linear_silu_and_mul(call["x"][:rows], call["weight"])
    for launch in launches:
        assert opcodes(launch.ptx, "wgmma.mma") == {"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"}
        assert not opcodes(launch.ptx, "mma.sync")
        assert "cp.async.cg.shared.global" in opcodes(launch.ptx, "cp.async")  # 16 bytes each


@pytest.mark.compiled
def test_no_adapter_work_without_a_gated_row(softgpu: ModuleType) -> None:
    call = adapter(rows=70, k=1024, output_sizes=(64, 128), rank=128)
    call["lora_mask"].fill_(False)
    with recorded_launches(softgpu) as launches:
        call.run(gemm.gated_lora_linear)
        plain_of(call, gemm)
    shrink, gated, plain = (launch.counters for launch in launches)
    assert shrink["wgmma_flops"] == 0
    assert gated["wgmma_flops"] == plain["wgmma_flops"]


def check_order_of_arrival(module: ModuleType) -> None:
    """CTAs announce their part with release and take the others with acquire, at the scope of the GPU. softgpu does not
    model weak memory: that the order suffices is read off the code, that it is there is held here."""
    from tests.softgpu_support import activate_triton

    with recorded_launches(activate_triton()) as launches:
        check_linear(module, 7, 64, 1024)
    assert opcodes(launches[0].ptx, "atom.") == {"atom.global.gpu.acq_rel.add.u32"}


@pytest.mark.compiled
@pytest.mark.emulator
def test_order_of_arrival() -> None:
    check_order_of_arrival(gemm)


def check_schedule_bits(module: ModuleType) -> None:
    from tests.softgpu_support import activate_triton

    for seed in range(16):
        call = layer(7, 64, 1024, seed=seed).changed(bias=None)
        wanted = check(call, module.linear).result
        with activate_triton().configured(sched="random", seed=seed, quantum=64):
            check_bits(call.run(module.linear).result, wanted)


@pytest.mark.compiled
@pytest.mark.emulator
def test_bits_do_not_depend_on_the_order_of_ctas() -> None:
    check_schedule_bits(gemm)


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        check_linear(gemm, 7, 100, 584)
        check_linear(gemm, 66, 64, 512)
    # The shrink finds out with a reduction in shared memory whether a row is gated, and copies over it with cp.async.
    # softgpu takes that for an access through the async proxy, which non-bulk cp.async is not.
    with softgpu.configured(**{**SCHEDULES[schedule], "proxy": 0}):
        check_adapter(gemm)
        check_activation(gemm)


SELECTED = "y = tl.where(gated[None, :] & in_slice[:, None], (sums + adapter.scale * update).to(y.dtype), y)"
MUTANTS = {
    "adapter added to every row": (
        check_ungated_rows_are_untouched,
        SELECTED,
        "y = tl.where(in_slice[:, None], (sums + adapter.scale * update).to(y.dtype), y)",
    ),
    "adapter multiplied by the lora_mask": (
        check_ungated_rows_are_untouched,
        SELECTED,
        SELECTED.replace("gated[None, :] & ", "").replace(
            "adapter.scale", "tl.where(gated, adapter.scale, 0.0)[None, :]"
        ),
    ),
    "scale forgotten": (check_adapter, "sums + adapter.scale * update", "sums + update"),
    "every slice takes the first h": (check_adapter, "s * RANK + r", "r"),
    "slice edge off by one": (
        check_adapter,
        "(n < end)\n            update",
        "(n <= end)\n            update",
    ),
    "rank tail not masked": (check_adapter, "mask=in_slice[:, None] & (r < RANK)", "mask=in_slice[:, None]"),
    "last part dropped": (check_linear, "tl.range(1, SPLITS, num_stages=1)", "tl.range(1, SPLITS - 1, num_stages=1)"),
    "parts added in order of arrival": (
        check_schedule_bits,
        "split = tl.program_id(1)\n",
        "split = (tl.program_id(1) + tl.atomic_add(gArrivals + 300, 1)) % SPLITS\n",
    ),
    "arrivals not counted anew": (check_linear, "            tl.store(gArrivals + tile, 0)\n", ""),
    "last but one to arrive finishes": (
        check_schedule_bits,
        "if arrived != SPLITS - 1:",
        "if arrived != SPLITS - 2:",
    ),
    "arrival without order": (check_order_of_arrival, 'sem="acq_rel", scope', 'sem="relaxed", scope'),
    "cut of K by row count": (
        check_row_bits,
        "config = gemm_config(n, k, x.dtype)",
        "config = gemm_config(n if num_rows < 65 else n * 100, k, x.dtype)",
    ),
    "K tail not masked": (check_linear, "mask=tile.has_n & has_k", "mask=tile.has_n"),
    "row edge off by one": (check_linear, "    has_t = t < num_rows\n", "    has_t = t <= num_rows\n"),
    "up rows of the neighbour": (
        check_activation,
        "return column + i // 8 % 2 * (N // 2)",
        "return column + i // 8 % 2 * (N // 2 - 1)",
    ),
    "activation of sums that are not rounded": (
        check_activation,
        "y = sums.to(out.dtype.element_ty)",
        "y = sums if shape.PAIRED else sums.to(out.dtype.element_ty)",
    ),
    "gate and up swapped": (check_activation, "gate, up = tl.split(pairs)", "up, gate = tl.split(pairs)"),
    "slice of the up rows skipped": (
        check_activation,
        " | (first + N // 2 < end) & (column_end + N // 2 > begin)",
        "",
    ),
    "activation before the adapter's second slice": (
        check_activation,
        "s * RANK + r",
        "(0 if shape.PAIRED else s) * RANK + r",
    ),
    "columns beyond the last gate row": (check_activation, "column < N // 2\n", "column <= N // 2\n"),
    "parts of paired tiles share their place": (
        check_activation,
        "parts_n = weight_tiles * config.block_n if paired else n",
        "parts_n = n // 2",
    ),
    "bias forgotten": (check_linear, "HAS_BIAS=bias is not None", "HAS_BIAS=False"),
}


@pytest.mark.compiled
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    check_, old, new = MUTANTS[name]
    check_(gemm)
    assert caught(check_, mutant(gemm, old, new, tmp_path))
