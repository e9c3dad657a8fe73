"""strided_attention on backend `triton`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton

import python_ref
from bench import counters
from bench.ptx import opcodes, recorded_launches, resources
from idlm_kernels import testing
from idlm_kernels.testing import Call, Ran, StridedAttention, check_bits, same_bits
from idlm_kernels.testing.problems import repaged, request_rows
from idlm_kernels.triton import attention
from python_ref.attention import visible_slots
from tests.softgpu_support import SCHEDULES
from tests.triton.support import INTERPRETED, caught, mutant

DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
BASE = DTYPES[0]
SPLIT, TOGETHER = 264, 0  # values of kTargetCtas: chunks of these small problems in CTAs of their own, or in one


def attend(
    lengths: Sequence[int] = (300, 70, 0), rows: Sequence[int] = (7, 4, 0), *, window: int = -1, **shapes: Any
) -> Call:
    """Three rows belong to no request."""
    shapes = {"padding": 3, "dtype": BASE, **shapes}
    return StridedAttention(lengths=tuple(lengths), rows=tuple(rows), **shapes).call().changed(window=window)


def check(module: ModuleType, call: Call | None = None, target: int = SPLIT) -> None:
    call = attend() if call is None else call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kTargetCtas", target)
        testing.check(call, partial(module.strided_attention, out=torch.full_like(call["q"], torch.nan)))


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, page_size",
    [((16, 2, 128), 256), ((8, 2, 128), 16), ((9, 3, 64), 1), ((1, 1, 256), 64), ((6, 2, 80), 3)],
)
def test_attention(heads: tuple[int, int, int], page_size: int, dtype: torch.dtype, target: int) -> None:
    check(attention, attend(heads=heads, page_size=page_size, dtype=dtype), target)


def check_edges(module: ModuleType, target: int = SPLIT) -> None:
    """Lengths around the edges of tiles, chunks and pages, and very unequal ones."""
    lengths = [1, 31, 32, 33, 63, 64, 65, 255, 256, 257, 0, 513, 600]
    rows = [1, 7, 1, 16, 4, 5, 7, 1, 7, 7, 0, 3, 16]
    check(module, attend(lengths, rows, heads=(4, 1, 64)), target)


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
def test_edges(target: int) -> None:
    check_edges(attention, target)


def check_tail(module: ModuleType, target: int = SPLIT) -> None:
    check(module, attend((270, 64, 40, 4), (64, 64, 9, 1), tail="random", dtype=torch.float32), target)
    check(module, attend((261, 16, 0), (16, 16, 0), tail="quadratic"), target)


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
def test_tree_masks(target: int) -> None:
    check_tail(attention, target)


def check_window(module: ModuleType, target: int = SPLIT) -> None:
    for window in (0, 5, 300):
        check(module, attend((600, 70), (7, 40), window=window), target)


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
def test_window(target: int) -> None:
    check_window(attention, target)


def test_prefill_chunk_of_many_rows() -> None:
    check(attention, attend((300, 513), (200, 65), heads=(3, 1, 64)))


def check_large_tiles(module: ModuleType) -> None:
    """Tiles of 128 packed rows: right, and with the bits of tiles of 64, whatever the rows are packed into."""
    for heads, window in (((4, 1, 64), -1), ((3, 1, 128), -1), ((4, 1, 128), 20)):
        call = attend((300, 513, 90), (200, 65, 33), heads=heads, window=window)
        found = []
        for least in (1, 10**9):
            module.kMinLargeCtas = least  # type: ignore[attr-defined]
            check(module, call, TOGETHER)
            for target in (SPLIT, TOGETHER):
                module.kTargetCtas = target  # type: ignore[attr-defined]
                found.append(call.run(module.strided_attention))
        for other in found[1:]:
            check_same(other, found[0])


@pytest.mark.compiled
def test_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kMinLargeCtas", "kTargetCtas"):
        monkeypatch.setattr(attention, name, getattr(attention, name))
    check_large_tiles(attention)


def test_large_tiles_are_for_prefill_of_a_full_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    monkeypatch.setattr(
        attention, "launch", lambda kernel, grid, *_, **meta: launches.append((grid, meta["shape"].BLOCK_M))
    )
    found = []
    for rows, batch, kv_heads in ((16, 64, 8), (17, 64, 8), (320, 1, 8), (256, 1, 8), (320, 1, 2)):
        q = torch.empty(batch * rows, 4 * kv_heads, 128, dtype=torch.bfloat16)
        cache = torch.empty(1, 16, kv_heads, 128, dtype=torch.bfloat16)
        zeros = torch.zeros(batch + 1, dtype=torch.int32)
        attention.strided_attention(q, cache, cache, zeros[:-1, None], zeros[:-1], zeros, max_query_len=rows)
        grid, block_m = launches.pop()
        found.append((grid[0] // ((batch + 1) * kv_heads), block_m))
    assert found == [(1, 64), (1, 128), (10, 128), (16, 64), (20, 64)]


def check_meeting(module: ModuleType, is_together: bool) -> None:
    """The CTAs of a tile meet to fold its chunks, launch after launch: side by side, or, where not all fit on the
    machine at once or the interpreter runs one after the other, without waiting."""
    call = attend([600, 300, 90], [7, 4, 1]) if is_together else attend([600] * 250, [1] * 250, heads=(1, 1, 64))
    words = torch.zeros(250, dtype=torch.int64)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "semaphores", lambda *_: words)
            check(module, call, 10**6)
        used = words[words != 0]
        assert (used & ((1 << 48) - 1) == 0).all(), "counts are left behind"
        took_part = used >> 48 & 1
        assert took_part.all() if is_together and not INTERPRETED else not took_part.all()
    assert (used >> 49 == 2).all() and used.numel() == (4 if is_together else 250)


def test_ctas_of_a_tile_meet() -> None:
    check_meeting(attention, is_together=True)


@pytest.mark.compiled
def test_more_ctas_than_fit_on_the_machine_meet() -> None:
    check_meeting(attention, is_together=False)


def test_there_is_a_word_for_every_tile_that_is_shared() -> None:
    tiles = attention.kTargetCtas // 2
    assert attention.num_splits(tiles, 16, 1000) > 1 and attention.num_splits(tiles + 1, 16, 1000) == 1


def check_scales(module: ModuleType) -> None:
    one, each = torch.tensor(0.5), torch.tensor([0.5, 0.1])
    for scales in ({"k_scale": one, "v_scale": 6 * one}, {"k_scale": each, "v_scale": 7 - 60 * each}):
        check(module, attend().changed(**scales, sm_scale=0.3))
        if not INTERPRETED:
            check(module, of_fp8(attend()).changed(**scales))
    both = [attend().changed(k_scale=x, v_scale=x).run(module.strided_attention) for x in (one, one.expand(2).clone())]
    check_same(*both)


def of_fp8(call: Call) -> Call:
    return call.changed(**{name: call[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")})


def test_scales() -> None:
    check_scales(attention)


def test_faulty_page_tables_and_lengths_read_no_foreign_memory() -> None:
    call = attend((40, 40), (3, 3))
    call["page_table"][0, 1], call["page_table"][0, 0], call["seq_lens"][1] = -5, 10**6, 10**6
    call.run(attention.strided_attention)


def check_max_query_len(module: ModuleType, target: int = SPLIT) -> None:
    """Rows beyond max_query_len are padding, not what memory held before; the others are what they are anyway."""
    for call in (attend((300, 70), (47, 4)), attend((50, 20), (16, 4), tail="quadratic")):
        m, few = int(call["query_start_loc"][1]), call.changed(max_query_len=5)
        check(module, few, target)
        for function in (module.strided_attention, python_ref.strided_attention):
            got, left = few.run(function)
            assert (got[5:m] == 0).all() and (left["lse"][5:m] == -math.inf).all()
        whole, got = call.run(module.strided_attention), few.run(module.strided_attention)
        computed = torch.arange(len(whole.result)) < 5
        computed[m:] = True
        check_same(got, whole, computed, computed)


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
def test_rows_beyond_max_query_len_are_padding(target: int) -> None:
    check_max_query_len(attention, target)


# Row invariance


def check_same(got: Ran, wanted: Ran, which: Any = slice(None), among: Any = slice(None)) -> None:
    """Rows `which` of a result have the bits of rows `among` of another one, and their lse as well."""
    check_bits(got.result[which], wanted.result[among])
    check_bits(got.left["lse"][which], wanted.left["lse"][among], "lse")


def check_row_bits(module: ModuleType) -> None:
    call = attend((600, 70, 257), (40, 7, 16), heads=(4, 1, 128))
    whole = call.run(module.strided_attention)
    for target in (SPLIT, TOGETHER, 20):
        module.kTargetCtas = target  # type: ignore[attr-defined]
        for page_size, head_major in ((16, False), (3, False), (1, True), (256, False)):
            check_same(repaged(call, page_size, head_major).run(module.strided_attention), whole)
        # AR: the row alone, the cache ends at it. And prefill chunks, and other steps that hold it.
        for b, rows in ((0, slice(39, 40)), (0, slice(0, 1)), (0, slice(17, 24)), (1, slice(2, 3)), (2, slice(1, 16))):
            start = int(call["query_start_loc"][b])
            alone = repaged(request_rows(call, b, rows), 16).run(module.strided_attention)
            check_same(alone, whole, among=slice(start + rows.start, start + rows.stop))


@pytest.mark.compiled
def test_row_bits_depend_on_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kTargetCtas", SPLIT)
    check_row_bits(attention)


@pytest.mark.compiled
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_clean_rows_of_a_quadratic_step_have_the_bits_of_ar(head_dim: int) -> None:
    call = attend((270,), (16,), heads=(8, 2, head_dim), tail="quadratic")
    whole = call.run(attention.strided_attention)
    for row in range(4):
        alone = repaged(request_rows(call, 0, slice(row, row + 1)), 16).run(attention.strided_attention)
        check_same(alone, whole, among=slice(row, row + 1))


@pytest.mark.compiled
def test_what_a_row_must_not_see_leaves_its_bits_alone() -> None:
    call = attend((270,), (16,), tail="quadratic")
    whole = call.run(attention.strided_attention).result[:16]
    for hidden in range(16):
        slot = 270 - 16 + hidden
        page, offset = int(call["page_table"][0, slot // 16]), slot % 16
        k, v = call["k_cache"].clone(), call["v_cache"].clone()
        k[page, offset], v[page, offset] = 7.0, -9.0
        got = call.changed(k_cache=k, v_cache=v).run(attention.strided_attention).result[:16]
        sees = torch.tensor([bool(mask >> hidden & 1) for mask in call["tree_mask"][:16].tolist()])
        check_bits(got[~sees], whole[~sees])
        assert not same_bits(got[sees], whole[sees])


# What the compiler made of it


@pytest.mark.compiled
def test_every_row_count_runs_the_same_matrix_instructions(
    softgpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for head_dim, n in ((64, (64, 64)), (128, (32, 128)), (256, (16, 128))):
        found = set()
        with recorded_launches(softgpu) as launches:
            for rows in (1, 7, 16, 200):
                attend((260,), (rows,), heads=(8, 2, head_dim)).run(attention.strided_attention)
            with monkeypatch.context() as patch:
                patch.setattr(attention, "kMinLargeCtas", 1)
                attend((260,), (200,), heads=(8, 2, head_dim)).run(attention.strided_attention)
            attend((260,), (16,), heads=(8, 2, head_dim), tail="quadratic").run(attention.strided_attention)
        for launch in launches:
            if launch.name == "attention":
                found |= opcodes(launch.ptx, "wgmma.mma")
                assert "cp.async.cg.shared.global" in opcodes(launch.ptx, "cp.async")
            assert not opcodes(launch.ptx, "mma.sync")
        assert found == {f"wgmma.mma_async.sync.aligned.m64n{i}k16.f32.bf16.bf16" for i in n}


@pytest.mark.compiled
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_no_spills_where_it_counts(head_dim: int, softgpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forms that the budget's cases do not have. Other compilers than the budget's may spill a little."""
    with recorded_launches(softgpu) as launches:
        for target, least in ((SPLIT, 10**9), (TOGETHER, 10**9), (TOGETHER, 1)):
            monkeypatch.setattr(attention, "kTargetCtas", target)
            monkeypatch.setattr(attention, "kMinLargeCtas", least)
            attend((300,), (40,), heads=(4, 1, head_dim), window=20).run(attention.strided_attention)
        attend((300,), (40,), heads=(4, 1, head_dim), tail="random").run(attention.strided_attention)
    found = [resources(launch.ptx) for launch in launches]
    assert all(used.spills_in_loops == 0 for used in found)
    # Once per CTA, around the loops: some registers of the forms that are short of them.
    allowed = {64: 0, 128: 64, 256: 256}[head_dim]
    if triton.__version__ != json.loads(counters.BUDGET.read_text())["triton"]:
        allowed += 128
    assert max(used.spill_bytes for used in found) <= allowed


@pytest.mark.compiled
def test_ctas_meet_by_acquire_and_release(softgpu: ModuleType) -> None:
    """Of the order of memory among CTAs softgpu sees nothing, so this holds what the kernel says of it: all threads are
    past a barrier when one announces the CTA, and what it announces and waits for is ordered on the whole GPU."""
    with recorded_launches(softgpu) as launches:
        attend((600,), (7,)).run(attention.strided_attention)
    ptx = launches[0].ptx
    polls = {"ld.global.gpu.acquire.b64", "atom.global.gpu.acquire.add.u64"}  # compilers differ
    assert len(polls & (opcodes(ptx, "atom") | opcodes(ptx, "ld.global.gpu"))) == 1
    assert opcodes(ptx, "atom") - polls == {
        "atom.global.gpu.relaxed.add.u64",  # has started: tells nobody of anything
        "atom.global.gpu.acq_rel.add.u64",
        "atom.global.gpu.release.exch.b64",
    }
    stores, arrival = [ptx.rindex("st.global", 0, ptx.index("acq_rel")), ptx.index("acq_rel")]
    assert "bar.sync" in ptx[stores:arrival]
    chunks = ptx[arrival:]
    assert "ld.global.cg.v4.b32" in chunks and "ld.global.v4" not in chunks and "ld.global.nc" not in chunks


def test_splits_depend_on_shapes_alone() -> None:
    assert attention.num_splits(8, 16, 1000) == 16
    assert attention.num_splits(8, 128, 1000) == 33
    assert attention.num_splits(8, 1, 1000) == 1
    assert attention.num_splits(200, 16, 1000) == 1
    assert attention.num_splits(8, 128, 1 << 30) == 1


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call = attend(heads=(8, 2, 128))
    with softgpu.configured(**SCHEDULES[schedule]):
        for target in (SPLIT, TOGETHER):
            check(attention, call, target)
        check_meeting(attention, is_together=True)
        check_tail(attention)
        monkeypatch.setattr(attention, "kMinLargeCtas", 1)
        check(attention, attend((90,), (40,), heads=(4, 1, 128)))


def check_crowd(module: ModuleType) -> None:
    check_meeting(module, is_together=False)


def check_all_meet(module: ModuleType) -> None:
    check_meeting(module, is_together=True)


def check_spoilt(module: ModuleType) -> None:
    for window in (-1, 11):
        check_unseen(module, attend((270, 40), (9, 3), window=window), TOGETHER)


MUTANTS = {
    "rows beyond max_query_len are left as they were": (
        check_max_query_len,
        "if (row_tile == row_tiles - 1) &",
        "if (row_tile == row_tiles) &",
    ),
    "a row alone reads the slots after it": (
        check_spoilt,
        "            end = first_of_step + only + 1\n",
        "            end = end + 0\n",
    ),
    "a row alone reads what is older than its window": (
        check_spoilt,
        "            low = first_of_step + only - shape.WINDOW\n",
        "            low = low + 0\n",
    ),
    "causal edge off by one": (
        check,
        "visible = step_slot <= tile.i[:, None]",
        "visible = step_slot < tile.i[:, None]",
    ),
    "own slot of the next row seen": (
        check_row_bits,
        "visible = step_slot <= tile.i[:, None]",
        "visible = step_slot <= tile.i[:, None] + 1",
    ),
    "window edge off by one": (
        check_window,
        "bitcast=True) <= shape.WINDOW",
        "bitcast=True) < shape.WINDOW",
    ),
    "window starts a chunk too late": (
        check_window,
        "tl.maximum(first_of_step + first_row - shape.WINDOW, 0)",
        "tl.maximum(first_of_step + first_row - shape.WINDOW + 256, 0)",
    ),
    "tail bit of the neighbour": (
        check_tail,
        "tl.maximum(step_slot, 0), 63)",
        "tl.maximum(step_slot - 1, 0), 63)",
    ),
    "tail hides the context": (check_tail, "visible = (step_slot < 0) |", "visible = (step_slot < -1) |"),
    "unwritten slots are read": (
        check_edges,
        "v = tl.load(pV, mask=inside[:, None] & has_d, other=0.0)",
        "v = tl.load(pV, mask=has_d & (slot >= 0)[:, None], other=0.0)",
    ),
    "scale of K forgotten": (
        check_scales,
        "scale_log2 = scale_log2 * tl.load(cache.k_scale",
        "scale_log2 = scale_log2 + 0 * tl.load(cache.k_scale",
    ),
    "all heads have the scale of the first": (check_scales, "v_scale += kv_head", "v_scale += 0"),
    "scale of V forgotten": (check_scales, "y = y * tl.load(output.v_scale)", "y = y * 1.0"),
    "sum not rescaled": (check, "total = total * old_share + tl.sum(p, axis=1)", "total = total + tl.sum(p, axis=1)"),
    "chunks relative to the length": (
        check_row_bits,
        "            chunk * shape.CHUNK,\n            tl.minimum((chunk + 1) * shape.CHUNK, end),\n",
        "            tl.maximum((chunk - 1) * shape.CHUNK + end % shape.CHUNK, 0),\n"
        "            chunk * shape.CHUNK + end % shape.CHUNK,\n",
    ),
    "fold forgets a rescaling": (
        check,
        "total = total * old_share + total_chunk * chunk_share",
        "total = total * old_share + total_chunk",
    ),
    "the last of four chunks is not loaded": (
        check,
        "(place < row_head + end_chunk)",
        "(place + 1 < row_head + end_chunk)",
    ),
    "a chunk is skipped": (check, "end_chunk = tl.cdiv(end, shape.CHUNK)", "end_chunk = end // shape.CHUNK"),
    "page table by physical page": (
        check,
        "tl.load(context.pages + slot // shape.PAGE_SIZE, mask=inside, other=0)",
        "slot // shape.PAGE_SIZE",
    ),
    "head of the wrong group": (
        check,
        "head = kv_head * GROUP + packed % GROUP",
        "head = kv_head + packed % GROUP * HKV",
    ),
    "large tiles of other slots": (
        check_large_tiles,
        "block_m=128, num_warps=8",
        "block_m=128, num_warps=8, block_kv=16",
    ),
    "large tiles half a tile apart": (
        check_large_tiles,
        "packed = row_tile * BLOCK_M +",
        "packed = row_tile * 64 +",
    ),
    "a share of rows is left out": (
        check,
        "range(first, tl.cdiv(num_packed, SHARE), step)",
        "range(first, num_packed // SHARE, step)",
    ),
    "the last one forgets that it started late": (check_crowd, " & (is_late == 0)", ""),
    "the last one alone does its share only": (check_crowd, "            first = 0\n", "            first = z\n"),
    "counts of the last meeting are kept": (check_all_meet, "tl.atomic_xchg(gMeeting, (", "tl.atomic_add(gMeeting, ("),
    "padding left as it was": (
        check,
        "for at in range(first, end, step):",
        "for at in range(first + 1, end, step):",
    ),
}


@pytest.mark.compiled
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    check_, old, new = MUTANTS[name]
    assert caught(check_, mutant(attention, old, new, tmp_path))


# Values that are not finite


def check_unseen(module: ModuleType, call: Call, target: int) -> None:
    """Rows that do not see a spoilt slot keep their bits; the others are not finite where the reference's are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kTargetCtas", target)
        clean, table = call.run(module.strided_attention), call["page_table"]
        page_size = call["k_cache"].shape[1]
        length, m = int(call["seq_lens"][0]), int(call["query_start_loc"][1])
        tail = call.arguments.get("tree_mask")
        padded = None if tail is None else tail[None, :m]
        visible = visible_slots(torch.tensor([m]), torch.tensor([length]), m, length, padded, call["window"])[0]
        for slot, value in ((length - m + 1, math.inf), (length - 2, math.nan), (length - m - 4, -math.inf)):
            v, k = call["v_cache"].clone(), call["k_cache"].clone()
            page, offset = int(table[0, slot // page_size]), slot % page_size
            v[page, offset, 0, 3::5], k[page, offset, 0] = value, value
            got = call.changed(k_cache=k, v_cache=v).run(module.strided_attention)
            hidden = (~visible[:, slot]).nonzero()[:, 0]
            assert len(hidden) or slot < length - m
            check_same(got, clean, hidden, hidden)
            check_bits(got.result[m:], clean.result[m:], "other requests")
            spoilt = call.changed(v_cache=v)
            seen = spoilt.run(module.strided_attention).result
            assert torch.equal(seen.isfinite(), spoilt.run().result.isfinite())
            if tail is None:
                alone = request_rows(spoilt, 0, slice(m - 1, m)).run(module.strided_attention).result
                check_bits(alone, seen[m - 1 : m])


UNSEEN: dict[str, Callable[[], Call]] = {
    "causal": lambda: attend((270, 40), (9, 3)),
    "causal, several tiles": lambda: attend((270,), (40,), heads=(4, 1, 128)),
    "quadratic": lambda: attend((270, 20), (16, 4), heads=(4, 1, 128), tail="quadratic"),
    "window": lambda: attend((270, 40), (9, 3), window=11),
    "wide": lambda: attend((270, 40), (9, 3), heads=(2, 1, 256)),
    "fp32": lambda: attend((270, 40), (9, 3), dtype=torch.float32, heads=(2, 1, 64)),
}


@pytest.mark.compiled
@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
@pytest.mark.parametrize("name", UNSEEN)
def test_a_value_that_a_row_does_not_see_never_reaches_it(name: str, target: int) -> None:
    check_unseen(attention, UNSEEN[name](), target)


@pytest.mark.compiled
def test_a_value_that_a_row_of_a_large_tile_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kMinLargeCtas", 1)
    check_unseen(attention, attend((290,), (60,), heads=(4, 1, 64)), TOGETHER)
