"""strided_attention on backend `triton`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from torch import Tensor

import python_ref
from bench import counters
from bench.ptx import opcodes, recorded_launches, resources
from idlm_kernels.triton import attention
from python_ref.attention import visible_slots
from tests.softgpu_support import SCHEDULES
from tests.triton.support import INTERPRETED, caught, judge, mutant, same_bits

DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
BASE = DTYPES[0]
SPLIT, TOGETHER = (
    264,
    0,
)  # values of kTargetCtas: chunks of these small problems in CTAs of their own, or in one


def branch_masks(num_drafts: int, stride: int) -> list[int]:
    """Tail masks of a branched step (design section 3): clean rows 0..n, then K MASK rows for each branch."""
    k = stride - 1
    masks = [(2 << i) - 1 for i in range(num_drafts + 1)]
    for b in range(num_drafts + 1):
        first = num_drafts + 1 + b * k
        masks += [((2 << b) - 1) | (((2 << j) - 1) << first) for j in range(k)]
    return [m - (1 << 64) if m >= 1 << 63 else m for m in masks]


class Problem:
    """Arguments of strided_attention. Slots that no request has written hold NaN; three rows belong to no request."""

    def __init__(
        self,
        lengths: Sequence[int] = (300, 70, 0),
        rows: Sequence[int] = (7, 4, 0),
        heads: tuple[int, int] = (8, 2),
        head_dim: int = 64,
        page_size: int = 16,
        dtype: torch.dtype = BASE,
        tail: str | None = None,
        window: int = -1,
        cache_dtype: torch.dtype | None = None,
    ):
        num_heads, num_kv_heads = heads
        self.lengths, self.rows, self.window, self.page_size = list(lengths), list(rows), window, page_size
        self.k, self.v = (torch.randn(len(rows), max(lengths), num_kv_heads, head_dim).to(dtype) for _ in range(2))
        self.cache_dtype = dtype if cache_dtype is None else cache_dtype
        self.q = torch.randn(sum(rows) + 3, num_heads, head_dim).to(dtype)
        self.tail = None
        if tail == "random":
            self.tail = torch.randint(-(2**63), 2**63 - 1, (self.q.shape[0],))
        elif tail == "branched":  # n = K drafts at this stride: stride^2 rows
            masks = [
                m for count in rows for m in (branch_masks(math.isqrt(count) - 1, math.isqrt(count)) if count else [])
            ]
            self.tail = torch.tensor([*masks, 1, 1, 1])

    def caches(self, page_size: int | None = None, head_major: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        page_size = page_size or self.page_size
        batch, max_len = self.k.shape[:2]
        max_pages = -(-max_len // page_size) + 1
        num_pages = batch * max_pages + 2
        shape = (num_pages, page_size, *self.k.shape[2:])
        if head_major:
            caches = [torch.full((shape[2], *shape[:2], shape[3]), torch.nan).permute(1, 2, 0, 3) for _ in range(2)]
        else:
            caches = [torch.full(shape, torch.nan) for _ in range(2)]
        table = torch.randperm(num_pages)[: batch * max_pages].view(batch, max_pages)
        for b, length in enumerate(self.lengths):
            slot = torch.arange(length)
            for cache, values in zip(caches, (self.k, self.v), strict=True):
                cache[table[b, slot // page_size], slot % page_size] = values[b, :length].float()
        return caches[0].to(self.cache_dtype), caches[1].to(self.cache_dtype), table.to(torch.int32)

    def run(
        self,
        function: object,
        caches: tuple[Tensor, Tensor, Tensor] | None = None,
        upcast: bool = False,
        scales: bool = False,
        **changes: object,
    ) -> tuple[Tensor, Tensor]:
        k, v, table = self.caches() if caches is None else caches
        q = self.q
        if upcast:
            q, k, v = q.double(), k.double(), v.double()
        lse = torch.full(q.shape[:2], torch.nan)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        start = torch.tensor([0, *self.rows]).cumsum(0).to(torch.int32)
        options = {"tail_mask": self.tail, "max_query_len": max(self.rows), "window": self.window, "lse": lse}
        if scales:
            options.update(k_scale=torch.tensor(0.5), v_scale=torch.tensor(3.0))
        options.update(changes)
        return function(q, k, v, table, lengths, start, **options), lse  # type: ignore[operator]

    def peer(self) -> Tensor:
        """Attention as PyTorch computes it in this dtype: scores, probabilities and product each rounded."""
        out = torch.zeros_like(self.q)
        start, group = 0, self.q.shape[1] // self.k.shape[2]
        for b, (length, m) in enumerate(zip(self.lengths, self.rows, strict=True)):
            q = self.q[start : start + m].transpose(0, 1)
            k, v = (x[b, :length].repeat_interleave(group, 1).transpose(0, 1) for x in (self.k, self.v))
            tail = None if self.tail is None else self.tail[None, start : start + m]
            visible = visible_slots(torch.tensor([m]), torch.tensor([length]), m, length, tail, self.window)[0]
            scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
            out[start : start + m] = (scores.softmax(-1) @ v).transpose(0, 1)
            start += m
        return out


def check(module: ModuleType, problem: Problem | None = None, target: int = SPLIT) -> None:
    problem = Problem() if problem is None else problem
    kept, module.kTargetCtas = module.kTargetCtas, target  # type: ignore[attr-defined]
    try:
        caches = problem.caches()
        out = torch.full_like(problem.q, torch.nan)
        got, lse = problem.run(module.strided_attention, caches, out=out)
    finally:
        module.kTargetCtas = kept  # type: ignore[attr-defined]
    assert got is out
    exact, exact_lse = problem.run(python_ref.strided_attention, caches, upcast=True)
    judge(got, exact, problem.peer())
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)
    assert (got[sum(problem.rows) :] == 0).all() and (lse[sum(problem.rows) :] == -math.inf).all()


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, head_dim, page_size",
    [((16, 2), 128, 256), ((8, 2), 128, 16), ((9, 3), 64, 1), ((1, 1), 256, 64), ((6, 2), 48, 3)],
)
def test_attention(heads: tuple[int, int], head_dim: int, page_size: int, dtype: torch.dtype, target: int) -> None:
    check(attention, Problem(heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype), target)


def check_edges(module: ModuleType, target: int = SPLIT) -> None:
    """Lengths around the edges of tiles, chunks and pages, and very unequal ones."""
    lengths = [1, 31, 32, 33, 63, 64, 65, 255, 256, 257, 0, 513, 600]
    rows = [1, 7, 1, 16, 4, 5, 7, 1, 7, 7, 0, 3, 16]
    check(module, Problem(lengths, rows, heads=(4, 1)), target)


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
def test_edges(target: int) -> None:
    check_edges(attention, target)


def check_tail(module: ModuleType, target: int = SPLIT) -> None:
    check(module, Problem((270, 64, 40, 4), (64, 64, 9, 1), tail="random", dtype=torch.float32), target)
    check(module, Problem((261, 16, 0), (16, 16, 0), tail="branched"), target)


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
def test_tail_masks(target: int) -> None:
    check_tail(attention, target)


def check_window(module: ModuleType, target: int = SPLIT) -> None:
    for window in (0, 5, 300):
        check(module, Problem((600, 70), (7, 40), window=window), target)


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
def test_window(target: int) -> None:
    check_window(attention, target)


def test_prefill_chunk_of_many_rows() -> None:
    check(attention, Problem((300, 513), (200, 65), heads=(3, 1)))


def check_large_tiles(module: ModuleType) -> None:
    """Tiles of 128 packed rows: right, and with the bits of tiles of 64, whatever the rows are packed into."""
    for head_dim, heads, window in ((64, (4, 1), -1), (128, (3, 1), -1), (128, (4, 1), 20)):
        problem = Problem((300, 513, 90), (200, 65, 33), heads, head_dim, window=window)
        caches = problem.caches()
        found = []
        for least in (1, 10**9):
            module.kMinLargeCtas = least  # type: ignore[attr-defined]
            check(module, problem, TOGETHER)
            for target in (SPLIT, TOGETHER):
                module.kTargetCtas = target  # type: ignore[attr-defined]
                found.append(problem.run(module.strided_attention, caches))
        for other in found[1:]:
            assert same_bits(other[0], found[0][0]) and same_bits(other[1], found[0][1])


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
    problem = Problem([600, 300, 90], [7, 4, 1]) if is_together else Problem([600] * 450, [1] * 450, heads=(1, 1))
    caches = problem.caches()
    exact, _ = problem.run(python_ref.strided_attention, caches, upcast=True)
    words = torch.zeros(450, dtype=torch.int64)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "words_of_stream", lambda *_: words)
            patch.setattr(module, "kTargetCtas", 10**6)
            got, _ = problem.run(module.strided_attention, caches)
        judge(got, exact, problem.peer())
        used = words[words != 0]
        assert (used & ((1 << 48) - 1) == 0).all(), "counts are left behind"
        took_part = used >> 48 & 1
        assert took_part.all() if is_together and not INTERPRETED else not took_part.all()
    assert (used >> 49 == 2).all() and used.numel() == (4 if is_together else 450)


def test_ctas_of_a_tile_meet() -> None:
    check_meeting(attention, is_together=True)


@pytest.mark.compiled
def test_more_ctas_than_fit_on_the_machine_meet() -> None:
    check_meeting(attention, is_together=False)


def test_there_is_a_word_for_every_tile_that_is_shared() -> None:
    tiles = attention.kTargetCtas // 2
    assert attention.num_splits(tiles, 16, 1000) > 1 and attention.num_splits(tiles + 1, 16, 1000) == 1


def check_scales(module: ModuleType) -> None:
    problem = Problem(head_dim=64)
    caches = problem.caches()
    got, lse = problem.run(module.strided_attention, caches, scales=True, sm_scale=0.3)
    exact, exact_lse = problem.run(python_ref.strided_attention, caches, upcast=True, scales=True, sm_scale=0.3)
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_scales() -> None:
    check_scales(attention)


@pytest.mark.compiled
def test_fp8_cache() -> None:
    problem = Problem(cache_dtype=torch.float8_e4m3fn)
    caches = problem.caches()
    got, lse = problem.run(attention.strided_attention, caches, scales=True)
    exact, exact_lse = problem.run(python_ref.strided_attention, caches, upcast=True, scales=True)
    torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_faulty_page_tables_and_lengths_read_no_foreign_memory() -> None:
    problem = Problem((40, 40), (3, 3))
    k, v, table = problem.caches()
    table[0, 1], table[0, 0] = -5, 10**6
    problem.lengths[1] = 10**6
    problem.run(attention.strided_attention, (k, v, table))


def check_max_query_len(module: ModuleType, target: int = SPLIT) -> None:
    """Rows beyond max_query_len are padding, not what memory held before; the others are what they are anyway."""
    for problem in (Problem((300, 70), (47, 4)), Problem((50, 20), (16, 4), tail="branched")):
        caches, m = problem.caches(), problem.rows[0]
        whole, whole_lse = problem.run(module.strided_attention, caches)
        for function in (module.strided_attention, python_ref.strided_attention):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "kTargetCtas", target)
                got, lse = problem.run(function, caches, max_query_len=5, out=torch.full_like(problem.q, torch.nan))
            assert (got[5:m] == 0).all() and (lse[5:m] == -math.inf).all()
            torch.testing.assert_close(got[:5], whole[:5], rtol=2e-2, atol=2e-2)
        got, lse = problem.run(module.strided_attention, caches, max_query_len=5)
        computed = torch.arange(whole.shape[0]) < 5
        computed[m:] = True
        assert same_bits(got[computed], whole[computed]) and same_bits(lse[computed], whole_lse[computed])


@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
def test_rows_beyond_max_query_len_are_padding(target: int) -> None:
    check_max_query_len(attention, target)


# Row invariance


def rows_of(problem: Problem, b: int, rows: slice, length: int) -> Problem:
    """Request b alone, with some of its rows and a cache that ends where the last of them stands."""
    part = Problem.__new__(Problem)
    part.__dict__.update(problem.__dict__)
    start = sum(problem.rows[:b])
    part.lengths, part.rows = [length], [rows.stop - rows.start]
    part.k, part.v = problem.k[b : b + 1, :length], problem.v[b : b + 1, :length]
    part.q = torch.cat([problem.q[start + rows.start : start + rows.stop], torch.zeros_like(problem.q[:3])])
    return part


def check_row_bits(module: ModuleType) -> None:
    problem = Problem((600, 70, 257), (40, 7, 16), heads=(4, 1), head_dim=128)
    whole, whole_lse = problem.run(module.strided_attention)
    for target in (SPLIT, TOGETHER, 20):
        module.kTargetCtas = target  # type: ignore[attr-defined]
        for page_size, head_major in ((16, False), (3, False), (1, True), (256, False)):
            got, lse = problem.run(module.strided_attention, problem.caches(page_size, head_major))
            assert same_bits(got, whole) and same_bits(lse, whole_lse)
        # AR: the row alone, the cache ends at it. And prefill chunks, and other steps that hold it.
        for b, rows in (
            (0, slice(39, 40)),
            (0, slice(0, 1)),
            (0, slice(17, 24)),
            (1, slice(2, 3)),
            (2, slice(1, 16)),
        ):
            length = problem.lengths[b] - problem.rows[b] + rows.stop
            part = rows_of(problem, b, rows, length)
            got, lse = part.run(module.strided_attention)
            start = sum(problem.rows[:b])
            wanted = slice(start + rows.start, start + rows.stop)
            assert same_bits(got[:-3], whole[wanted]) and same_bits(lse[:-3], whole_lse[wanted])


@pytest.mark.compiled
def test_row_bits_depend_on_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kTargetCtas", SPLIT)
    check_row_bits(attention)


@pytest.mark.compiled
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_clean_rows_of_a_branched_step_have_the_bits_of_ar(head_dim: int) -> None:
    problem = Problem((270,), (16,), head_dim=head_dim, tail="branched")
    whole, _ = problem.run(attention.strided_attention)
    problem.tail = None
    for row in range(4):
        part = rows_of(problem, 0, slice(row, row + 1), 270 - 16 + row + 1)
        assert same_bits(part.run(attention.strided_attention)[0][:1], whole[row : row + 1])


@pytest.mark.compiled
def test_what_a_row_must_not_see_leaves_its_bits_alone() -> None:
    problem = Problem((270,), (16,), tail="branched")
    k, v, table = problem.caches()
    whole, _ = problem.run(attention.strided_attention, (k, v, table))
    for hidden in range(16):
        slot = 270 - 16 + hidden
        page, offset = int(table[0, slot // 16]), slot % 16
        k2, v2 = k.clone(), v.clone()
        k2[page, offset], v2[page, offset] = 7.0, -9.0
        got, _ = problem.run(attention.strided_attention, (k2, v2, table))
        sees = torch.tensor([bool(int(mask) >> hidden & 1) for mask in problem.tail[:16]])  # type: ignore[index]
        assert same_bits(got[:16][~sees], whole[:16][~sees])
        assert not same_bits(got[:16][sees], whole[:16][sees])


# What the compiler made of it


@pytest.mark.compiled
def test_every_row_count_runs_the_same_matrix_instructions(
    softgpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for head_dim, n in ((64, (64, 64)), (128, (32, 128)), (256, (16, 128))):
        found = set()
        with recorded_launches(softgpu) as launches:
            for rows in (1, 7, 16, 200):
                Problem((260,), (rows,), head_dim=head_dim).run(attention.strided_attention)
            with monkeypatch.context() as patch:
                patch.setattr(attention, "kMinLargeCtas", 1)
                Problem((260,), (200,), head_dim=head_dim).run(attention.strided_attention)
            Problem((260,), (16,), head_dim=head_dim, tail="branched").run(attention.strided_attention)
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
            Problem((300,), (40,), (4, 1), head_dim, window=20).run(attention.strided_attention)
        Problem((300,), (40,), (4, 1), head_dim, tail="random").run(attention.strided_attention)
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
        Problem((600,), (7,)).run(attention.strided_attention)
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
    problem = Problem((300, 70, 0), (7, 4, 0), head_dim=128)
    with softgpu.configured(**SCHEDULES[schedule]):
        for target in (SPLIT, TOGETHER):
            check(attention, problem, target)
        check_meeting(attention, is_together=True)
        check_tail(attention)
        monkeypatch.setattr(attention, "kMinLargeCtas", 1)
        check(attention, Problem((90,), (40,), (4, 1), head_dim=128))


def check_crowd(module: ModuleType) -> None:
    check_meeting(module, is_together=False)


def check_all_meet(module: ModuleType) -> None:
    check_meeting(module, is_together=True)


def check_spoilt(module: ModuleType) -> None:
    for problem in (Problem((270, 40), (9, 3)), Problem((270, 40), (9, 3), window=11)):
        check_unseen(module, problem, TOGETHER, problem.caches())


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
        "scale_log2 = scale_log2 * tl.load(cache.k_scale)",
        "scale_log2 = scale_log2 * 1.0",
    ),
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


def check_unseen(module: ModuleType, problem: Problem, target: int, caches: tuple[Tensor, Tensor, Tensor]) -> None:
    """Rows that do not see a spoilt slot keep their bits; the others are not finite where the reference's are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kTargetCtas", target)
        clean, clean_lse = problem.run(module.strided_attention, caches)
        k, v, table = caches
        length, m = problem.lengths[0], problem.rows[0]
        tail = None if problem.tail is None else problem.tail[None, :m]
        visible = visible_slots(torch.tensor([m]), torch.tensor([length]), m, length, tail, problem.window)[0]
        for slot, value in ((length - m + 1, math.inf), (length - 2, math.nan), (length - m - 4, -math.inf)):
            v2, k2 = v.clone(), k.clone()
            page, offset = int(table[0, slot // problem.page_size]), slot % problem.page_size
            v2[page, offset, 0, 3::5], k2[page, offset, 0] = value, value
            got, lse = problem.run(module.strided_attention, (k2, v2, table))
            hidden = ~visible[:, slot]
            assert hidden.any() or slot < length - m
            assert same_bits(got[:m][hidden], clean[:m][hidden]) and same_bits(lse[:m][hidden], clean_lse[:m][hidden])
            assert same_bits(got[m:], clean[m:]), "other requests"
            seen, _ = problem.run(module.strided_attention, (k, v2, table))
            wanted, _ = problem.run(python_ref.strided_attention, (k, v2, table))
            assert torch.equal(seen.isfinite(), wanted.isfinite())
            alone = rows_of(problem, 0, slice(m - 1, m), length)
            if problem.tail is None:
                assert same_bits(alone.run(module.strided_attention, (k, v2, table))[0][:1], seen[m - 1 : m])


def unseen_problems() -> dict[str, Problem]:
    return {
        "causal": Problem((270, 40), (9, 3)),
        "causal, several tiles": Problem((270,), (40,), heads=(4, 1), head_dim=128),
        "branched": Problem((270, 20), (16, 4), heads=(4, 1), head_dim=128, tail="branched"),
        "window": Problem((270, 40), (9, 3), window=11),
        "wide": Problem((270, 40), (9, 3), heads=(2, 1), head_dim=256),
        "fp32": Problem((270, 40), (9, 3), dtype=torch.float32, heads=(2, 1)),
    }


@pytest.mark.compiled
@pytest.mark.parametrize("target", [SPLIT, TOGETHER])
@pytest.mark.parametrize("name", unseen_problems())
def test_a_value_that_a_row_does_not_see_never_reaches_it(name: str, target: int) -> None:
    problem = unseen_problems()[name]
    check_unseen(attention, problem, target, problem.caches())


@pytest.mark.compiled
def test_a_value_that_a_row_of_a_large_tile_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kMinLargeCtas", 1)
    problem = Problem((290,), (60,), (4, 1))
    check_unseen(attention, problem, TOGETHER, problem.caches())
