"""Problems for attention of backend `cuda`, and the checks that the kernel passes and planted faults do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from idlm_kernels import _semaphores, testing
from idlm_kernels.native import attention
from idlm_kernels.testing import Call, Ran, StridedAttention, check_bits, same_bits
from idlm_kernels.testing.problems import repaged, request_rows
from python_ref.attention import visible_slots

MANY, ONE = 0, 1  # CTAs of a launch: 132, and so parts of tiles for these small problems; or all units by one


def attend(
    lengths: Sequence[int] = (300, 70, 0), rows: Sequence[int] = (7, 4, 0), *, window: int = -1, **shapes: Any
) -> Call:
    """Three rows belong to no request."""
    shapes = {"padding": 3, "heads": (8, 2, 128), **shapes}
    return StridedAttention(lengths=tuple(lengths), rows=tuple(rows), **shapes).call().changed(window=window)


@contextmanager
def with_ctas(count: int) -> Iterator[None]:
    before, attention.max_ctas = attention.max_ctas, count
    try:
        yield
    finally:
        attention.max_ctas = before


def run(call: Call, ctas: int = MANY) -> Ran:
    with with_ctas(ctas):
        return call.run(attention.strided_attention)


def check(call: Call, ctas: int = MANY) -> Ran:
    """Twice: what a launch leaves behind suits the next."""
    with with_ctas(ctas):
        for _ in range(2):
            out = torch.full_like(call["q"], torch.nan)
            found = testing.check(call, partial(attention.strided_attention, out=out))
            check_flags()
    return found


def check_flags() -> None:
    """Between launches all flags are 0."""
    for (purpose, *_), words in _semaphores._words.items():
        assert purpose != "attention" or not words.any(), "flags are left behind"


def check_same(got: Ran, wanted: Ran, which: Any = slice(None), among: Any = slice(None)) -> None:
    """Rows `which` of a result have the bits of rows `among` of another one, and their lse as well."""
    check_bits(got.result[which], wanted.result[among])
    check_bits(got.left["lse"][which], wanted.left["lse"][among], "lse")


def check_values(softgpu: ModuleType | None = None) -> None:
    check(attend())
    check(attend(heads=(9, 3, 128), page_size=1))
    check(attend((300, 70), (40, 4), heads=(3, 1, 128), page_size=3), ONE)


def check_edges(softgpu: ModuleType | None = None, ctas: Sequence[int] = (MANY, ONE)) -> None:
    """Lengths around the edges of tiles, leaves, supers and pages, and very unequal ones; more rows than slots."""
    lengths = [1, 31, 63, 64, 65, 255, 256, 257, 0, 513, 600, 1023, 1024, 1025, 2049, 3]
    rows = [1, 7, 1, 4, 5, 7, 1, 7, 2, 3, 16, 1, 16, 1, 2, 3]
    call = attend(lengths, rows, heads=(4, 1, 128), page_size=48)
    for count in ctas:
        check(call, count)


def check_tree(softgpu: ModuleType | None = None, head_dim: int = 128) -> None:
    """Every way to cut a tile into parts has the same bits: whole, 1024, 512 and 256 slots.

    A full tile, for the fp32 of its 128 lse: another order of sums hardly ever shows in an output of 16 bits.
    """
    call = attend((2900,), (64,), heads=(2, 2, head_dim))
    counts = (1, 5, 12, 132)  # of 2 tiles of 12 leaves
    found = [run(call, count) for count in counts]
    for other in found[1:]:
        check_same(other, found[0])
    check(call)


def check_tail(softgpu: ModuleType | None = None) -> None:
    for ctas in (MANY, ONE):
        check(attend((270, 64, 40, 4), (64, 64, 9, 1), heads=(4, 2, 128), tail="random"), ctas)
        check(attend((261, 16, 0), (16, 16, 0), tail="quadratic"), ctas)


def check_window(softgpu: ModuleType | None = None) -> None:
    for window in (0, 5, 300):
        for ctas in (MANY, ONE):
            check(attend((1500, 70), (7, 40), heads=(4, 1, 128), window=window), ctas)


def check_scales(softgpu: ModuleType | None = None) -> None:
    one, each = torch.tensor(0.5), torch.tensor([0.5, 0.1])
    for ctas in (MANY, ONE):
        for scales in ({"k_scale": one, "v_scale": 6 * one}, {"k_scale": each, "v_scale": 7 - 60 * each}):
            check(attend((600, 70), (7, 4)).changed(**scales, sm_scale=0.3), ctas)
            check(of_fp8(attend((600, 70), (7, 4))).changed(**scales), ctas)
        alike = attend((600, 70), (7, 4))
        same = alike.changed(k_scale=one.expand(2).clone(), v_scale=one.expand(2).clone())
        check_same(run(same, ctas), run(alike.changed(k_scale=one, v_scale=one), ctas))


def of_fp8(call: Call) -> Call:
    """The call over caches of e4m3."""
    return call.changed(**{name: call[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")})


def among_nan(x: torch.Tensor) -> torch.Tensor:
    """x, with 16 columns of NaN behind those of each head, in memory that it does not show."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 16), torch.nan).to(x.dtype)
    return room[..., : x.shape[-1]].copy_(x)


def check_columns(softgpu: ModuleType | None = None) -> None:
    check_filled_up(80, torch.bfloat16, fp8=False)


def check_filled_up(dim: int, dtype: torch.dtype, fp8: bool) -> None:
    """A head_dim between those of tiles: right, with the bits of the same problem filled up with zeros. What lies
    behind the columns of a head is neither read nor written."""
    columns = (0, (64 if dim <= 64 else 128 if dim <= 128 else 256) - dim)
    for call in (
        attend((600, 70, 0), heads=(6, 2, dim), dtype=dtype, page_size=3),
        attend((90,), (16,), heads=(4, 1, dim), dtype=dtype, tail="quadratic"),
    ):
        call = of_fp8(call) if fp8 else call
        tensors = {name: call[name] for name in ("q", "k_cache", "v_cache")}
        filled_up = {name: functional.pad(x.float(), columns).to(x.dtype) for name, x in tensors.items()}
        apart = {name: among_nan(x) for name, x in tensors.items()}
        for ctas in (MANY, ONE):
            found, wanted = check(call, ctas), run(call.changed(**filled_up, sm_scale=dim**-0.5), ctas)
            check_bits(found.result, wanted.result[..., :dim])
            check_bits(found.left["lse"], wanted.left["lse"], "lse")
            out = among_nan(torch.zeros_like(call["q"]))
            with with_ctas(ctas):
                attention.strided_attention(**{**call.arguments, **apart}, out=out)
            check_bits(out, found.result)
            assert out._base is not None and out._base[..., dim:].isnan().all()


def check_max_query_len(softgpu: ModuleType | None = None) -> None:
    """Rows beyond max_query_len are padding, not what memory held before; the others are what they are anyway."""
    for call in (attend((300, 70), (47, 4)), attend((50, 20), (16, 4), tail="quadratic")):
        m, few = int(call["query_start_loc"][1]), call.changed(max_query_len=5)
        got = check(few)
        assert (got.result[5:m] == 0).all() and (got.left["lse"][5:m] == -math.inf).all()
        computed = torch.arange(len(got.result)) < 5
        computed[m:] = True
        check_same(run(few), run(call), computed, computed)


def check_row_bits(softgpu: ModuleType | None = None) -> None:
    """A row has the same bits in any company, on any pages, by any number of CTAs."""
    for window in (-1, 700):
        check_row_bits_of(attend((1100, 70, 257), (40, 7, 16), heads=(4, 1, 128), window=window))


def check_row_bits_of(call: Call) -> None:
    whole = run(call)
    for ctas in (MANY, ONE, 3):
        for page_size, head_major in ((16, False), (3, False), (1, True), (256, False)):
            check_same(run(repaged(call, page_size, head_major), ctas), whole)
        # AR: the row alone, the cache ends at it. And prefill chunks, and other steps that hold it.
        for b, rows in ((0, slice(39, 40)), (0, slice(0, 1)), (0, slice(17, 24)), (1, slice(2, 3)), (2, slice(1, 16))):
            start = int(call["query_start_loc"][b])
            alone = run(repaged(request_rows(call, b, rows), 16), ctas)
            check_same(alone, whole, among=slice(start + rows.start, start + rows.stop))


def check_quadratic_row_bits(softgpu: ModuleType | None = None) -> None:
    """Clean rows of a quadratic step have the bits of AR, and 1, 7, 16 and 64 rows of a chain those of one."""
    call = attend((270,), (16,), tail="quadratic")
    whole = run(call)
    for row in range(4):
        check_same(run(request_rows(call, 0, slice(row, row + 1))), whole, among=slice(row, row + 1))
    check_rows_of_chain(attend((700,), (64,), heads=(4, 1, 128)))


def check_rows_of_chain(call: Call) -> None:
    """1, 7 and 16 rows have the bits that they have among 64."""
    whole = run(call)
    for count in (1, 7, 16):
        for first in (0, 31, 64 - count):
            rows = slice(first, first + count)
            check_same(run(request_rows(call, 0, rows)), whole, among=rows)


def check_hidden(softgpu: ModuleType | None = None) -> None:
    """What a row must not see leaves its bits alone."""
    call = attend((270,), (16,), tail="quadratic")
    whole = run(call).result[:16]
    for hidden in range(16):
        slot = 270 - 16 + hidden
        page, offset = int(call["page_table"][0, slot // 16]), slot % 16
        k, v = call["k_cache"].clone(), call["v_cache"].clone()
        k[page, offset], v[page, offset] = 7.0, -9.0
        got = run(call.changed(k_cache=k, v_cache=v)).result[:16]
        sees = torch.tensor([bool(mask >> hidden & 1) for mask in call["tree_mask"][:16].tolist()])
        check_bits(got[~sees], whole[~sees])
        assert not same_bits(got[sees], whole[sees])


def check_unseen(call: Call, ctas: int = MANY) -> None:
    """Rows that do not see a spoilt slot keep their bits; the others are not finite where the reference's are not."""
    clean, table = run(call, ctas), call["page_table"]
    page_size = call["k_cache"].shape[1]
    length, m = int(call["seq_lens"][0]), int(call["query_start_loc"][1])
    tail = call.arguments.get("tree_mask")
    padded = None if tail is None else tail[None, :m]
    visible = visible_slots(torch.tensor([m]), torch.tensor([length]), m, length, padded, call["window"])[0]
    for slot, value in ((length - m + 1, math.inf), (length - 2, math.nan), (length - m - 4, -math.inf)):
        v, k = call["v_cache"].clone(), call["k_cache"].clone()
        page, offset = int(table[0, slot // page_size]), slot % page_size
        v[page, offset, 0, 3::5], k[page, offset, 0] = value, value
        got = run(call.changed(k_cache=k, v_cache=v), ctas)
        hidden = (~visible[:, slot]).nonzero()[:, 0]
        assert len(hidden) or slot < length - m
        check_same(got, clean, hidden, hidden)
        check_bits(got.result[m:], clean.result[m:], "other requests")
        spoilt = call.changed(v_cache=v)
        seen = run(spoilt, ctas).result
        for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(pattern(seen), pattern(spoilt.run().result))
        if tail is None:
            alone = run(request_rows(spoilt, 0, slice(m - 1, m)), ctas).result
            check_bits(alone, seen[m - 1 : m])


def check_weightless(call: Call) -> None:
    """An Inf that rows see with a weight of 0 is NaN, as in any product, whether or not others of the tile see it."""
    table, page_size, m = call["page_table"], call["k_cache"].shape[1], int(call["query_start_loc"][1])
    for slot in (1, int(call["seq_lens"][0]) - m + 1):  # the second in a tile of which rows see different slots
        v, k, q = call["v_cache"].clone(), call["k_cache"].clone(), call["q"].abs()
        page, offset = int(table[0, slot // page_size]), slot % page_size
        v[page, offset, :, 3::5], k[page, offset] = math.inf, -30_000.0
        spoilt = call.changed(q=q, k_cache=k, v_cache=v)
        found, last_slot = run(spoilt).result[:m], int(call["seq_lens"][0]) - m + torch.arange(m)
        assert torch.equal(found[..., 3::5].isnan().all(-1).all(-1), last_slot >= slot)
        for i in range(m):
            check_bits(run(request_rows(spoilt, 0, slice(i, i + 1))).result, found[i : i + 1])


def check_spoilt(softgpu: ModuleType | None = None) -> None:
    check_weightless(attend((270, 40), (4, 3), heads=(4, 1, 128)))
    check_unseen(attend((270, 40), (9, 3)))
    check_unseen(attend((270, 40), (9, 3), window=11))
    check_unseen(attend((270, 20), (16, 4), heads=(4, 1, 128), tail="quadratic"), ONE)
    check_unseen(attend((270,), (40,), heads=(4, 1, 128)))


def check_order(softgpu: ModuleType, head_dim: int = 128) -> None:
    """Asynchrony and schedules varied; units so many that every block of the ring is filled often."""
    call = attend((1300, 70, 0), (7, 4, 0), heads=(4, 1, head_dim))
    tail = attend((90,), (16,), heads=(8, 2, head_dim), tail="quadratic")
    random = {"async_": "random", "sched": "random", "quantum": 40}
    checks = {"race": 1, "uninit": 1, "proxy": 1}
    for options in (
        {"async_": "late"},
        {"async_": "war"},
        random,
        {**random, "seed": 1},
        checks,
    ):
        with softgpu.configured(**options):
            for ctas in (MANY, ONE):
                check(call, ctas)
                check(tail, ctas)


def check_chain(softgpu: ModuleType) -> None:
    """Launches in a row that start as early as they may: the output of each is the query of the next."""
    call = attend((600, 70, 9), (7, 4, 9), heads=(4, 2, 128), padding=2)
    keep: list[torch.Tensor] = []  # launches are held back, so what they read has to live on
    empty = torch.empty

    def remembered(*shape: Any, **options: Any) -> torch.Tensor:
        keep.append(empty(*shape, **options))
        return keep[-1]

    def launches() -> list[torch.Tensor]:
        outputs = [torch.full_like(call["q"], torch.nan) for _ in range(4)]
        for q, out in zip([call["q"], *outputs], outputs, strict=False):
            attention.strided_attention(**{**call.arguments, "q": q, "lse": None}, out=out)
        return outputs

    torch.empty = remembered
    try:
        wanted = launches()
        for options in ({}, {"sched": "random", "seed": 3}, {"async_": "late"}):
            with softgpu.configured(pdl="early", **options):
                got = launches()
                softgpu.synchronize()
            for a, b in zip(got, wanted, strict=True):
                assert b.isfinite().all() and same_bits(a, b)
    finally:
        torch.empty = empty
    check_flags()
