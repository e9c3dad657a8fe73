"""strided_attention against a brute-force loop in fp64: one request, row, head and slot after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm_kernels import strided_attention, use_backend

FP64 = {"rtol": 1e-12, "atol": 1e-13}
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


@dataclass
class Problem:
    """Arguments of strided_attention, and the K and V of every request in slot order for the brute force."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    keys: list[Tensor] = field(repr=False)  # per request [seq_len, Hkv, D], in the cache's dtype
    values: list[Tensor] = field(repr=False)

    def args(self) -> tuple[Tensor, ...]:
        return (self.q, self.k_cache, self.v_cache, self.page_table, self.seq_lens, self.query_start_loc)

    def run(self, **options) -> Tensor:
        return strided_attention(*self.args(), max_query_len=self.max_query_len, **options)


def problem(
    requests: list[tuple[int, int]],  # (seq_len, m) each; (0, 0) is a padded request
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    page_size: int = 3,
    padding_rows: int = 0,
    dtype: torch.dtype = torch.float64,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Problem:
    """Pages lie in random order, and whatever is not written holds NaN, Inf or a huge number."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    pages_of = [-(-seq_len // page_size) for seq_len, _ in requests]
    max_pages = max([*pages_of, 1]) + 1
    num_pages = sum(pages_of) + 3
    cache_shape = (num_pages, page_size, num_kv_heads, head_dim)
    garbage = torch.tensor(GARBAGE)[torch.randint(0, 4, cache_shape, generator=generator)]
    k_cache, v_cache = garbage.to(dtype), garbage.flip(0).to(dtype)
    order = torch.randperm(num_pages, generator=generator).tolist()
    page_table = torch.full((len(requests), max_pages), -1, dtype=torch.int32)
    keys, values = [], []
    for b, (seq_len, _) in enumerate(requests):
        k, v = (
            torch.randn(seq_len, num_kv_heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
            for _ in range(2)
        )
        for p in range(pages_of[b]):
            page = order.pop()
            page_table[b, p] = page
            slots = slice(p * page_size, min((p + 1) * page_size, seq_len))
            k_cache[page, : slots.stop - slots.start] = k[slots]
            v_cache[page, : slots.stop - slots.start] = v[slots]
        page_table[b, pages_of[b] :] = order[0]  # unused entries point at a page of garbage
        keys.append(k)
        values.append(v)
    m = [rows for _, rows in requests]
    total = sum(m) + padding_rows
    q = torch.randn(total, num_heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    return Problem(
        q,
        k_cache if cache_dtype is None else k_cache.to(cache_dtype),
        v_cache if cache_dtype is None else v_cache.to(cache_dtype),
        page_table,
        torch.tensor([seq_len for seq_len, _ in requests], dtype=torch.int32),
        torch.tensor([0, *torch.tensor(m).cumsum(0).tolist()] if m else [0], dtype=torch.int32),
        max([*m, 1]),
        [k if cache_dtype is None else k.to(cache_dtype) for k in keys],
        [v if cache_dtype is None else v.to(cache_dtype) for v in values],
    )


def sees(seq_len: int, m: int, i: int, slot: int, tail_bits: int | None, window: int) -> bool:
    """The contract, word for word. tail_bits: the row's mask as a Python int, None without a tree_mask."""
    if tail_bits is not None:
        return slot < seq_len - m or bool(tail_bits >> (slot - (seq_len - m)) & 1)
    newest = seq_len - m + i
    return slot <= newest and (window < 0 or slot >= newest - window)


def brute_force(
    p: Problem,
    *,
    tree_mask: Tensor | None = None,
    sm_scale: float | None = None,
    window: int = -1,
    k_scale: Sequence[float] | None = None,
    v_scale: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64. k_scale, v_scale: of each KV head."""
    rows, num_heads, head_dim = p.q.shape
    k_scales, v_scales = (scales or [1.0] * num_heads for scales in (k_scale, v_scale))
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    out = torch.zeros(rows, num_heads, head_dim, dtype=torch.float64)
    lse = torch.full((rows, num_heads), -math.inf, dtype=torch.float64)
    for b, (keys, values) in enumerate(zip(p.keys, p.values, strict=True)):
        start, stop = p.query_start_loc[b : b + 2].tolist()
        seq_len, m = int(p.seq_lens[b]), stop - start
        for i in range(m):
            tail_bits = None if tree_mask is None else int(tree_mask[start + i]) & (2**64 - 1)
            slots = [s for s in range(seq_len) if sees(seq_len, m, i, s, tail_bits, window)]
            if not slots:
                continue
            for h in range(num_heads):
                kv_head = h // (num_heads // keys.shape[1])
                query = p.q[start + i, h].double()
                scores = [float(query @ keys[s, kv_head].double()) * k_scales[kv_head] * scale for s in slots]
                top = max(scores)
                weights = [math.exp(x - top) for x in scores]
                total = math.fsum(weights)
                for weight, s in zip(weights, slots, strict=True):
                    out[start + i, h] += weight / total * v_scales[kv_head] * values[s, kv_head].double()
                lse[start + i, h] = top + math.log(total)
    return out, lse


def check(p: Problem, tree_mask: Tensor | None = None, **options) -> None:
    """Output and lse against the brute force; both written over NaN so that no entry is left out."""
    rows, num_heads, _ = p.q.shape
    lse = torch.full((rows, num_heads), math.nan, dtype=torch.float32)
    out = torch.full_like(p.q, math.nan)
    got = p.run(tree_mask=tree_mask, lse=lse, out=out, **options)
    assert got is out
    num_kv_heads = p.keys[0].shape[1]
    scales = {name: options[name].expand(num_kv_heads).tolist() for name in ("k_scale", "v_scale") if name in options}
    plain = {name: value for name, value in options.items() if name not in ("k_scale", "v_scale")}
    want, want_lse = brute_force(p, tree_mask=tree_mask, **plain, **scales)
    torch.testing.assert_close(out, want, **FP64)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-6, atol=1e-6)


# (seq_len, m): AR rows, steps, whole prompts, later chunks of prompts, a padded request in the middle
RAGGED = [(5, 1), (9, 4), (7, 7), (0, 0), (1, 1), (12, 5), (3, 2)]


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_causal(heads, page_size):
    check(problem(RAGGED, heads=heads, page_size=page_size, padding_rows=3))


@pytest.mark.parametrize("window", [0, 1, 4, 100])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_window(window, page_size):
    """A row sees the `window` slots before its own, and its own."""
    check(problem(RAGGED, page_size=page_size, padding_rows=1), window=window)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("seed", range(3))
def test_random_trees(page_size, seed):
    """Any 64 bits, the sign bit and bits beyond the request's rows included: those name no slot."""
    p = problem(RAGGED, page_size=page_size, padding_rows=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.randint(0, 2**32, (len(p.q),), generator=generator) for _ in range(2))
    check(p, tree_mask=(high << 32) | low)


def test_64_rows_use_every_bit():
    p = problem([(70, 64), (3, 1)], heads=(2, 1), head_dim=4, page_size=16)
    generator = torch.Generator().manual_seed(1)
    low, high = (torch.randint(0, 2**32, (len(p.q),), generator=generator) for _ in range(2))
    check(p, tree_mask=(high << 32) | low)
    last_bit_only = torch.full((len(p.q),), -(2**63))
    check(p, tree_mask=last_bit_only)


def quadratic_masks(n: int, num_spec_tokens: int) -> list[int]:
    """Bits of each row of a quadratic step, from the words of the design: row order, then who sees whom."""
    rows: list[tuple[str, int, int]] = [("clean", i, 0) for i in range(n + 1)]
    rows += [("mask", b, j) for b in range(n + 1) for j in range(num_spec_tokens)]

    def visible(row: tuple[str, int, int], other: tuple[str, int, int]) -> bool:
        kind, b, j = row
        other_kind, other_b, other_j = other
        if other_kind == "clean":
            return other_b <= b  # clean row i sees 0..i, a MASK row of branch b sees 0..b
        return kind == "mask" and other_b == b and other_j <= j

    return [sum(visible(row, other) << c for c, other in enumerate(rows)) for row in rows]


def signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


@pytest.mark.parametrize("num_spec_tokens", [1, 3, 7])
def test_quadratic_layout(num_spec_tokens):
    """Requests with 0..K drafts in one batch; K = 7 makes the 64 rows of N = 8."""
    masks = [quadratic_masks(n, num_spec_tokens) for n in sorted({0, 1, num_spec_tokens})]
    requests = [(5 + b + len(bits), len(bits)) for b, bits in enumerate(masks)]
    p = problem(requests, heads=(2, 1), head_dim=4, page_size=3)
    check(p, tree_mask=torch.tensor([signed(bits) for row in masks for bits in row]))


def test_a_causal_tree_mask_is_plain_causal_attention():
    p = problem([(9, 5), (6, 6)])
    bits = [(2 << i) - 1 for _, m in [(9, 5), (6, 6)] for i in range(m)]
    assert torch.equal(p.run(tree_mask=torch.tensor(bits)), p.run())


def test_visible_set_read_out():
    """With q = 0 and V the unit vectors the output is the visible set itself, divided by its size."""
    p = problem([(9, 4)], heads=(1, 1), head_dim=16, page_size=3)
    p.q.zero_()
    for s in range(9):
        p.v_cache[p.page_table[0, s // 3], s % 3, 0] = torch.eye(16, dtype=torch.float64)[s]
    lse = torch.empty(4, 1)

    def seen(**options) -> list[list[int]]:
        out = p.run(lse=lse, **options)[:, 0]
        sizes = (out > 0).sum(1)
        torch.testing.assert_close(out.sum(1), torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(lse[:, 0], sizes.float().log())
        return [row.nonzero().flatten().tolist() for row in out]

    assert seen() == [list(range(6)), list(range(7)), list(range(8)), list(range(9))]
    assert seen(window=2) == [[3, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8]]
    cached = [0, 1, 2, 3, 4]
    masks = torch.tensor([0b0001, 0b1000, 0b0000, 0b0110])
    assert seen(tree_mask=masks) == [[*cached, 5], [*cached, 8], cached, [*cached, 6, 7]]


def test_rows_that_see_nothing():
    """A step without a cached prefix and a mask of 0; a padded request that still has rows; padding rows."""
    p = problem([(3, 3), (4, 2)], padding_rows=2)
    tree_mask = torch.tensor([0, 0b1, 0b110, 0b1, 0b11, -1, -1])
    check(p, tree_mask=tree_mask)
    p.seq_lens[1] = 0
    p.keys[1], p.values[1] = p.keys[1][:0], p.values[1][:0]
    check(p)
    lse = torch.zeros(7, 4)
    out = p.run(lse=lse)
    assert (out[3:] == 0).all() and (lse[3:] == -math.inf).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_sm_scale(scale):
    check(problem(RAGGED), sm_scale=scale)


def test_kv_scales():
    check(problem(RAGGED), k_scale=torch.tensor(0.25), v_scale=torch.tensor(3.0))
    check(problem(RAGGED), v_scale=torch.tensor(-0.5))
    for_heads = {"k_scale": torch.tensor([0.25, 2.0]), "v_scale": torch.tensor([3.0, -0.5])}
    check(problem(RAGGED, heads=(4, 2)), **for_heads)
    check(problem(RAGGED, heads=(4, 2)), v_scale=for_heads["v_scale"])


def test_fp8_cache():
    p = problem(RAGGED, dtype=torch.float32, cache_dtype=torch.float8_e4m3fn, page_size=4)
    options = {"k_scale": 0.5, "v_scale": 2.0}
    got = p.run(**{name: torch.tensor(value) for name, value in options.items()})
    want, _ = brute_force(p, **{name: [value] * p.q.shape[1] for name, value in options.items()})
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_dtypes_accumulate_in_fp32(dtype, tolerance):
    """The error is that of the one rounding of the result, in every dtype."""
    p = problem(RAGGED, dtype=dtype, padding_rows=1)
    got = p.run()
    assert got.dtype == dtype
    want, _ = brute_force(p)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance / 4)


def test_large_scores_do_not_overflow():
    p = problem([(6, 3)], dtype=torch.float32)
    p.q *= 1e4
    lse = torch.empty(3, 4)
    got = p.run(lse=lse)
    want, want_lse = brute_force(p)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=0.0)


def test_a_row_is_untouched_by_what_it_must_not_see():
    """Each slot in turn is overwritten: rows that do not see it keep their very bits, the others change."""
    masks = quadratic_masks(2, 2)
    p = problem([(4 + len(masks), len(masks))], dtype=torch.float32, page_size=3, heads=(2, 1))
    seq_len, m = 4 + len(masks), len(masks)
    tree_mask = torch.tensor([signed(bits) for bits in masks])
    before = p.run(tree_mask=tree_mask)
    for slot in range(seq_len):
        page, offset = int(p.page_table[0, slot // 3]), slot % 3
        saved = p.k_cache[page, offset].clone(), p.v_cache[page, offset].clone()
        p.k_cache[page, offset] += 1.0
        p.v_cache[page, offset] *= -7.0
        after = p.run(tree_mask=tree_mask)
        for i in range(m):
            seen = sees(seq_len, m, i, slot, masks[i], -1)
            assert torch.equal(after[i], before[i]) != seen, f"row {i}, slot {slot}"
        p.k_cache[page, offset], p.v_cache[page, offset] = saved


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_unwritten_slots_and_pages_do_not_matter(page_size):
    """`problem` fills them with NaN and Inf: zeros in their place give the same bits."""
    p = problem(RAGGED, dtype=torch.float32, page_size=page_size, padding_rows=1)
    before = p.run()
    assert before.isfinite().all()
    written = torch.zeros(p.k_cache.shape[:2], dtype=torch.bool)
    for b, seq_len in enumerate(p.seq_lens.tolist()):
        for s in range(seq_len):
            written[p.page_table[b, s // page_size], s % page_size] = True
    assert not p.k_cache[~written].isfinite().all()
    p.k_cache[~written] = 0
    p.v_cache[~written] = 0
    assert torch.equal(p.run(), before)


def test_table_entries_out_of_range_are_not_followed():
    """Entries that no slot of the request uses may hold anything."""
    p = problem(RAGGED, page_size=3)
    want = p.run()
    for b, seq_len in enumerate(p.seq_lens.tolist()):
        p.page_table[b, -(-seq_len // 3) :] = 2**31 - 1 if b % 2 else -(2**31)
    assert torch.equal(p.run(), want)


def test_pages_may_be_shared():
    """Two requests with a common prefix in the same pages."""
    p = problem([(6, 2), (6, 2)], page_size=3)
    p.page_table[1, 0] = p.page_table[0, 0]
    for name in ("keys", "values"):
        of = getattr(p, name)
        of[1] = torch.cat([of[0][:3], of[1][3:]])
    check(p)


def _interleaved(p: Problem) -> tuple[Tensor, Tensor]:
    kv = torch.stack([p.k_cache, p.v_cache], dim=1)  # [num_pages, 2, page_size, Hkv, D]
    return kv[:, 0], kv[:, 1]


def _heads_first(p: Problem) -> tuple[Tensor, Tensor]:
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.k_cache, p.v_cache))
    return k, v


def _wide_rows(p: Problem) -> tuple[Tensor, Tensor]:
    both = torch.cat([p.k_cache, p.v_cache], dim=-1)
    return both.chunk(2, dim=-1)


@pytest.mark.parametrize("view", [_interleaved, _heads_first, _wide_rows])
def test_strided_caches(view):
    p = problem(RAGGED, padding_rows=1)
    want = p.run()
    p.k_cache, p.v_cache = view(p)
    assert not p.k_cache.is_contiguous()
    assert torch.equal(p.run(), want)


def test_strided_q_and_out():
    p = problem(RAGGED)
    want = p.run()
    wide = torch.zeros(p.q.shape[0], 2 * p.q.shape[1], p.q.shape[2], dtype=p.q.dtype)
    wide[:, ::2] = p.q
    p.q = wide[:, ::2]
    out = torch.zeros_like(wide)[:, 1::2]
    assert p.run(out=out) is out
    assert torch.equal(out, want)


def test_empty_inputs():
    p = problem([(0, 0), (0, 0)], padding_rows=0)
    assert p.run(lse=torch.empty(0, 4)).shape == (0, 4, 8)  # a step of padded requests only
    only_padding = problem([(0, 0)], padding_rows=3)
    check(only_padding)
    no_request = problem([], padding_rows=2)
    assert (no_request.run() == 0).all()


def test_max_query_len_may_be_larger_than_any_request():
    p = problem(RAGGED)
    want = p.run()
    p.max_query_len = 40
    torch.testing.assert_close(p.run(), want, **FP64)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_problems(data):
    requests = []
    for _ in range(data.draw(st.integers(1, 5), label="batch")):
        m = data.draw(st.integers(0, 6), label="rows")
        cached = data.draw(st.integers(0, 9), label="cached")
        requests.append((cached + m if m else 0, m))
    num_kv_heads = data.draw(st.integers(1, 2))
    p = problem(
        requests,
        heads=(num_kv_heads * data.draw(st.integers(1, 3)), num_kv_heads),
        head_dim=4,
        page_size=data.draw(st.sampled_from([1, 2, 3, 5, 16])),
        padding_rows=data.draw(st.integers(0, 2)),
        seed=data.draw(st.integers(0, 999)),
    )
    if data.draw(st.booleans(), label="tree_mask"):
        masks = st.integers(-(2**63), 2**63 - 1)
        check(p, tree_mask=torch.tensor([data.draw(masks) for _ in range(len(p.q))], dtype=torch.int64))
    else:
        check(p, window=data.draw(st.sampled_from([-1, 0, 1, 3])))
