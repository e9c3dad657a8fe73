"""strided_attention on backend `cuda`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import idlm_kernels
from idlm_kernels.native import attention
from idlm_kernels.testing import Call, check_bits
from idlm_kernels.testing.problems import request_rows
from tests.native.attention_support import (
    MANY,
    ONE,
    attend,
    check,
    check_chain,
    check_edges,
    check_filled_up,
    check_flags,
    check_hidden,
    check_max_query_len,
    check_order,
    check_quadratic_row_bits,
    check_row_bits,
    check_row_bits_of,
    check_rows_of_chain,
    check_same,
    check_scales,
    check_tail,
    check_tree,
    check_unseen,
    check_window,
    of_fp8,
    run,
    with_ctas,
)
from tests.softgpu_support import SCHEDULES

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def on_device(device: torch.device) -> None:
    """Tensors are made where the kernel runs."""
    torch.set_default_device(device)
    yield  # type: ignore[misc]
    torch.set_default_device(None)


@pytest.mark.parametrize("ctas", [MANY, ONE])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "heads, page_size",
    [
        ((16, 2, 128), 256),
        ((8, 2, 128), 16),
        ((9, 3, 64), 1),
        ((7, 1, 128), 3),
        ((70, 1, 64), 64),
        ((2, 2, 64), 24),
        ((4, 2, 256), 16),
    ],
)
def test_attention(heads: tuple[int, int, int], page_size: int, dtype: torch.dtype, ctas: int) -> None:
    check(attend(heads=heads, page_size=page_size, dtype=dtype), ctas)


def test_edges() -> None:
    check_edges()


@pytest.mark.parametrize("head_dim", [128, 256])
def test_tree(head_dim: int) -> None:
    check_tree(head_dim=head_dim)


def test_tree_masks() -> None:
    check_tail()


def test_window() -> None:
    check_window()


def test_scales() -> None:
    check_scales()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("heads", [(8, 2, 128), (9, 3, 64), (2, 1, 256)])
def test_fp8_caches(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Right, and with the bits of the same numbers in q's dtype, which holds them exactly."""
    for call in (
        attend((600, 70, 0), heads=heads, dtype=dtype, page_size=3),
        attend((90,), (16,), heads=heads, dtype=dtype, tail="quadratic"),
    ):
        narrow = of_fp8(call)
        wide = narrow.changed(**{name: narrow[name].to(dtype) for name in ("k_cache", "v_cache")})
        for ctas in (MANY, ONE):
            check_same(check(narrow, ctas), run(wide, ctas))


@pytest.mark.parametrize("fp8", [False, True], ids=["wide", "fp8"])
@pytest.mark.parametrize("dim", [16, 48, 80, 96, 112, 192])
def test_head_dims_in_between(dim: int, fp8: bool) -> None:
    check_filled_up(dim, FP16 if dim == 96 else BF16, fp8)


def test_heads_of_one_vector() -> None:
    check_filled_up(8, BF16, fp8=False)


@pytest.mark.parametrize("head_dim", [80, 256])
def test_rows_have_the_bits_of_one_row(head_dim: int) -> None:
    check_rows_of_chain(attend((700,), (64,), heads=(4, 1, head_dim)))
    check_row_bits_of(attend((1100, 70, 257), (40, 7, 16), heads=(4, 1, head_dim)))


def test_prefill_chunk_of_many_rows() -> None:
    for ctas in (MANY, ONE):
        check(attend((300, 513), (200, 65), heads=(3, 1, 64)), ctas)


def test_rows_beyond_max_query_len_are_padding() -> None:
    check_max_query_len()


def test_row_bits_depend_on_the_row_alone() -> None:
    check_row_bits()


def test_rows_of_a_step_have_the_bits_of_one_row() -> None:
    check_quadratic_row_bits()


def test_what_a_row_must_not_see_leaves_its_bits_alone() -> None:
    check_hidden()


UNSEEN = {
    "causal": lambda: attend((270, 40), (9, 3)),
    "causal, several tiles": lambda: attend((270,), (40,), heads=(4, 1, 128)),
    "quadratic": lambda: attend((270, 20), (16, 4), heads=(4, 1, 128), tail="quadratic"),
    "window": lambda: attend((270, 40), (9, 3), window=11),
    "fp16": lambda: attend((270, 40), (9, 3), dtype=FP16, heads=(2, 1, 64)),
    "256 columns": lambda: attend((270, 40), (9, 3), heads=(2, 1, 256)),
}


@pytest.mark.parametrize("ctas", [MANY, ONE])
@pytest.mark.parametrize("name", UNSEEN)
def test_a_value_that_a_row_does_not_see_never_reaches_it(name: str, ctas: int) -> None:
    check_unseen(UNSEEN[name](), ctas)


def test_faulty_page_tables_and_lengths_read_no_foreign_memory() -> None:
    call = attend((40, 40), (3, 3))
    call["page_table"][0, 1], call["page_table"][0, 0], call["seq_lens"][1] = -5, 10**6, 10**6
    run(call)
    call["seq_lens"][0] = -7
    assert (run(call).result[:3] == 0).all()
    check_flags()


def direct(call: Call, ctas: int = MANY, **changes: Any) -> torch.Tensor:
    """The result, without the copies of arguments that `run` makes: their layout counts."""
    with with_ctas(ctas):
        return attention.strided_attention(**{**call.arguments, **changes})


def odd_copy(x: torch.Tensor, columns: int = 0) -> torch.Tensor:
    """x behind one element, and with more columns."""
    dim = x.shape[-1]
    room = torch.full((1 + x.numel() // dim * (dim + columns),), torch.nan, dtype=x.dtype)
    copy = room[1:].view(*x.shape[:-1], dim + columns)[..., :dim]
    return copy.copy_(x)


def test_layouts() -> None:
    """Strided q and out, and addresses and strides that are no multiples of 16 bytes."""
    call = attend((600, 20), (7, 4))
    wanted = run(call).result
    rows, heads, dim = call["q"].shape
    packed = torch.full((rows, heads + 5, dim), torch.nan, dtype=BF16)[:, 2 : heads + 2]
    packed.copy_(call["q"])
    for ctas in (MANY, ONE):
        check_bits(direct(call, ctas, q=packed), wanted)
        check_bits(direct(call, ctas, q=odd_copy(call["q"])), wanted)
        check_bits(direct(call, ctas, q=odd_copy(call["q"], 1)), wanted)
        for out in (odd_copy(wanted), odd_copy(wanted, 3), torch.empty(heads, rows, dim, dtype=BF16).transpose(0, 1)):
            out.fill_(torch.nan)
            assert direct(call, ctas, out=out) is out
            check_bits(out, wanted)


def test_nothing() -> None:
    call = attend((40,), (3,))
    assert run(call.changed(q=call["q"][:0], lse=None)).result.shape == (0, 8, 128)
    empty = call.changed(
        page_table=call["page_table"][:0], seq_lens=call["seq_lens"][:0], query_start_loc=call["query_start_loc"][:1]
    )
    assert (run(empty).result == 0).all()


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x in untouched memory, which is free, with a stride of `dim` whose products pass 2^31."""
    strides = list(x.contiguous().stride())
    strides[dim] = (2**31 // (x.shape[dim] - 1) // 64 + 1) * 64
    count = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    return torch.empty(count, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


STRIDED = {"k_cache": 3, "v_cache": 3, "q": 2, "out": 2, "lse": 1, "page_table": 1}  # dims of any stride


@pytest.mark.parametrize("name, dim", [(name, dim) for name, count in STRIDED.items() for dim in range(count)])
def test_offsets_beyond_32_bits(name: str, dim: int) -> None:
    """Pages, slots, heads, rows and requests so far apart that products with their strides pass 2^31 elements."""
    call = attend((300, 20), (3, 3), heads=(2, 2, 64), page_size=2, padding=1)
    wanted = run(call)
    far = far_apart(call["q"] if name == "out" else call[name], dim)
    for ctas in (MANY, ONE):
        if name in ("out", "lse"):
            far.fill_(torch.nan)
        check_bits(direct(call, ctas, **{name: far}), wanted.result)
        check_bits(far if name == "lse" else call["lse"], wanted.left["lse"], "lse")


def test_more_requests_and_heads_than_16_bits() -> None:
    """10,000 x 8, of which the first, one in the middle and the last have rows, in several parts."""
    few = attend((300, 700, 70), (3, 1, 4), heads=(8, 8, 64))
    batch, places = 10_000, torch.tensor([0, 6_001, 9_999])
    rows, lengths = torch.zeros(batch + 1).int(), torch.zeros(batch).int()
    rows[places + 1], lengths[places] = few["query_start_loc"].diff(), few["seq_lens"]
    table = torch.zeros(batch, few["page_table"].shape[1]).int()
    table[places] = few["page_table"]
    query_start_loc = rows.cumsum(0, dtype=torch.int32)
    many = few.changed(query_start_loc=query_start_loc, seq_lens=lengths, page_table=table)
    for ctas in (MANY, ONE):
        check_same(run(many, ctas), run(few))
    check_flags()


def test_a_long_context_among_short_ones() -> None:
    """128k slots beside a few: right, and every request has the bits that it has alone."""
    call = attend((131_072, 1, 700, 64), (7, 1, 4, 1), heads=(4, 1, 64), padding=0)
    found = {ctas: run(call, ctas) for ctas in (MANY, 7)}
    for b in range(4):
        start, end = call["query_start_loc"][b : b + 2].tolist()
        alone = request_rows(call, b, slice(0, end - start))
        wanted = check(alone, ONE) if b == 0 else run(alone)
        for whole in found.values():
            check_same(wanted, whole, among=slice(start, end))


def test_what_the_kernel_does_not_take_the_next_backend_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {
        "it takes bf16 and fp16, not float32": attend(dtype=torch.float32),
        "it takes a head_dim that is a multiple of 8 and at most 256, not 20": attend(heads=(4, 2, 20)),
        "it takes a head_dim that is a multiple of 8 and at most 256, not 264": attend(heads=(4, 2, 264)),
        "it takes a head_dim that is a multiple of 16 and at most 256, not 24": of_fp8(attend(heads=(4, 2, 24))),
        "it takes a k_cache whose address and strides are multiples of 16 bytes": attend(),
        "it takes a v_cache whose address and strides are multiples of 16 bytes": attend(),
    }
    *_, k, v = refused.values()
    k.arguments["k_cache"], v.arguments["v_cache"] = odd_copy(k["k_cache"], 1), odd_copy(v["v_cache"])
    for reason, call in refused.items():
        assert attention.refusal(call["q"], call["k_cache"], call["v_cache"]) == reason
        assert direct(call).isfinite().all()
        monkeypatch.setattr("idlm_kernels.ops._dispatch.current_backend", lambda: "cuda")
        with pytest.raises(ValueError, match=f"backend 'cuda' does not compute this: {reason}; use backend 'triton'"):
            direct(call)
        monkeypatch.undo()
    other = attend()["k_cache"].half()
    reason = "it takes a cache of q's dtype or of float8_e4m3fn, not float16"
    assert attention.refusal(attend()["q"], other, other) == reason


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType, module: ModuleType) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        for ctas in (MANY, ONE):
            check(attend((600, 70, 0)), ctas)
            check(attend((1300,), (7,), heads=(4, 1, 64)), ctas)
            check(attend((90,), (16,), tail="quadratic"), ctas)
            check(of_fp8(attend((600, 70, 0))), ctas)
            check(attend((600, 70), (7, 4), heads=(2, 1, 256)), ctas)
        check_unseen(attend((90,), (9,), heads=(2, 1, 64)))


@pytest.mark.parametrize("dim", [80, 128, 256])
def test_stays_inside_its_tensors(
    dim: int, softgpu: ModuleType, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = attend((600, 70, 0), heads=(8, 2, dim))
    keep: list[torch.Tensor] = []

    def registered(x: torch.Tensor) -> torch.Tensor:
        softgpu.register(x)
        keep.append(x)
        return x

    empty, flags = torch.empty, attention._flags
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: registered(empty(*shape, **options)))
    monkeypatch.setattr(attention, "_flags", lambda *args: registered(flags(*args)))
    arguments = {
        name: registered(x.clone()) if isinstance(x, torch.Tensor) else x for name, x in call.arguments.items()
    }
    try:
        for ctas in (MANY, ONE):
            monkeypatch.setattr(attention, "max_ctas", ctas)
            with softgpu.configured(strict=1):
                got = attention.strided_attention(**arguments, out=registered(torch.zeros_like(call["q"])))
            check_bits(got, run(call).result)
    finally:
        for x in keep:
            softgpu.unregister(x)


def test_order_of_256_columns(softgpu: ModuleType, module: ModuleType) -> None:
    check_order(softgpu, head_dim=256)


def test_launches_in_a_row_under_early_dependent_launch(softgpu: ModuleType, module: ModuleType) -> None:
    check_chain(softgpu)


@pytest.mark.slow
def test_many_tiles() -> None:
    """More tiles than a grid has blocks in a dimension other than x: one slot each, whose value is the output."""
    call = attend([1] * 300, [1] * 300, heads=(220, 220, 64), page_size=1, padding=0)
    value = call["v_cache"][call["page_table"][:, 0].long(), 0]
    check_bits(run(call).result, torch.where(value == 0, 0, value))


@pytest.mark.parametrize("dim", [80, 128, 256])
def test_kv_is_read_once(dim: int, softgpu: ModuleType, module: ModuleType) -> None:
    call = attend((1024, 512), (16, 7), heads=(8, 2, dim), padding=0)
    run(call)
    counted = softgpu.counters()
    assert counted["cp_async_bytes"] == 1536 * 2 * dim * 2 * 2


@pytest.mark.parametrize(
    "lengths, heads, ctas, parts",
    [
        ([1024], (8, 8, 64), MANY, 32),  # 8 tiles by 4 leaves
        ([1024] * 8, (8, 8, 64), MANY, 128),  # 64 tiles by 2 leaves each, twice
        ([1024] * 5, (4, 4, 64), 20, 0),  # a tile for each CTA
        ([8192, 1024, 1024, 1024, 1024], (1, 1, 64), 16, 8),  # the long one in units of 1024, the others whole
    ],
)
def test_work_is_cut_by_length(
    lengths: list[int], heads: tuple[int, int, int], ctas: int, parts: int, softgpu: ModuleType, module: ModuleType
) -> None:
    """Each part of a shared tile counts itself once."""
    call = attend(lengths, [1] * len(lengths), heads=heads, padding=0)
    whole = run(call, ONE)
    check_same(run(call, ctas), whole)
    direct(call, ctas)
    assert softgpu.counters()["atomics"] == parts


def test_room_for_parts(module: ModuleType) -> None:
    """At most 256 MiB, with coarser units if need be, and none where whole tiles fill the machine."""

    def scratch(batch: int, rows: int, slots: int, dim: int = 128) -> int:
        fields = {"num_rows": batch * rows, "num_heads": 32, "num_kv_heads": 8, "head_dim": dim, "batch": batch}
        params = module.AttentionParams(**fields, page_size=64, max_pages=slots // 64, max_query_len=rows)
        return module.attention_scratch_bytes(params)

    assert scratch(1, 1, 4096) == 32 * 16 * 520
    assert scratch(8, 16, 4096) == 8 * 16 * 32 * 16 * 520
    assert scratch(8, 16, 32768) == 8 * 16 * 32 * 64 * 520  # units of 512 slots
    assert scratch(1, 8192, 32768) == 0
    assert scratch(8, 16, 4096, dim=256) == 8 * 16 * 32 * 16 * 1032
    assert scratch(8, 16, 32768, dim=256) == 0  # there units are 256 slots or all of them
    assert all(scratch(b, r, s) <= 256 << 20 for b in (1, 64) for r in (1, 7, 16, 64) for s in (1, 4096, 131072))


def test_the_op_finds_the_backend(module: ModuleType, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CPU tensors are not given to backend 'cuda'")
    call = attend()
    with idlm_kernels.use_backend("cuda"):
        check_bits(call.run().result, run(call).result)
