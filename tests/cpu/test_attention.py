"""Attention of the CPU backend: accuracy, and the bits of a row in every surrounding that must not change them."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import idlm_kernels
import python_ref
from idlm_kernels.cpu import attention, products, strided_attention

NAN, INF = math.nan, math.inf
SHAPES = {"smollm": (9, 3, 64), "mha": (2, 2, 64), "mqa": (4, 1, 128), "tiny": (4, 2, 8), "wide": (4, 2, 256)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Request:
    """K, V [slots, Hkv, D] and q [m, Hq, D] of a request whose rows sit on the last m of `length` slots."""

    q: Tensor
    k: Tensor
    v: Tensor
    length: int
    tree_mask: list[int] | None = None

    def at(self, length: int, rows: slice) -> Request:
        """Some of the rows, when the cache is `length` long."""
        return Request(self.q[rows], self.k, self.v, length)


def request(shape: tuple[int, int, int], length: int, rows: int, seed: int = 0) -> Request:
    num_heads, num_kv_heads, head_dim = shape
    k, v = randn(length, num_kv_heads, head_dim, seed=seed), randn(length, num_kv_heads, head_dim, seed=seed + 1)
    return Request(randn(rows, num_heads, head_dim, seed=seed + 2), k, v, length)


@dataclass
class Paging:
    """How the requests are laid out in the cache. What no request wrote is NaN."""

    page_size: int = 16
    head_major: bool = True
    seed: int = 0
    spare_pages: int = 1  # in the page table, behind those of the longest request
    padding_rows: int = 0
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)


def arguments(requests: list[Request], paging: Paging) -> tuple[tuple[Tensor, ...], dict]:
    num_kv_heads, head_dim = requests[0].k.shape[1:]
    size = paging.page_size
    max_pages = max(-(-r.length // size) for r in requests) + paging.spare_pages
    num_pages = max_pages * len(requests) + 3
    caches = []
    for _ in "kv":
        cache = torch.full((num_kv_heads, num_pages, size, head_dim), NAN).permute(1, 2, 0, 3)
        caches.append(cache if paging.head_major else cache.contiguous())
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(paging.seed))
    table = order[: max_pages * len(requests)].view(len(requests), max_pages)
    for r, pages in zip(requests, table, strict=True):
        slots = torch.arange(r.length)
        for cache, rows in zip(caches, (r.k, r.v), strict=True):
            cache[pages[slots // size], slots % size] = rows[: r.length]
    q = torch.cat([*(r.q for r in requests), torch.zeros(paging.padding_rows, *requests[0].q.shape[1:])])
    counts = torch.tensor([r.q.shape[0] for r in requests])
    args = (
        q.to(paging.dtype),
        *(cache.to(paging.dtype) for cache in caches),
        table.int(),
        torch.tensor([r.length for r in requests], dtype=torch.int32),
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
    )
    options = {"max_query_len": max(int(counts.max()), 1), **paging.options}
    if any(r.tree_mask is not None for r in requests):
        masks = [b for r in requests for b in r.tree_mask or []] + [0] * paging.padding_rows
        options["tree_mask"] = torch.tensor(masks, dtype=torch.int64)
    return args, options


def attend(requests: list[Request], paging: Paging | None = None, **options: object) -> list[Tensor]:
    """The results of each request's rows, [m, Hq, D]."""
    args, fixed = arguments(requests, paging or Paging())
    out = strided_attention(*args, **{**fixed, **options})
    return list(out[: sum(len(r.q) for r in requests)].split([len(r.q) for r in requests]))


# Accuracy


@shapes
@pytest.mark.parametrize("window", [-1, 0, 37, 1000])
@pytest.mark.parametrize("page_size", [1, 3, 16, 200])
def test_against_fp64(shape: tuple[int, int, int], window: int, page_size: int) -> None:
    sizes = [(300, 5), (1, 1), (129, 129), (128, 3), (40, 40)]
    requests = [request(shape, length, rows, seed=i) for i, (length, rows) in enumerate(sizes)]
    args, options = arguments(requests, Paging(page_size=page_size, padding_rows=3))
    options["window"] = window
    num_rows, num_heads = args[0].shape[:2]
    lse, lse_want, lse_fp32 = (
        torch.empty(num_rows, num_heads, dtype=d) for d in (torch.float32, torch.float64, torch.float32)
    )
    got = strided_attention(*args, **options, lse=lse)
    doubled = [x.double() if x.is_floating_point() else x for x in args]
    want = python_ref.strided_attention(*doubled, **options, lse=lse_want)
    fp32 = python_ref.strided_attention(*args, **options, lse=lse_fp32)
    assert (got - want).abs().max() <= 2 * (fp32 - want).abs().max() + 1e-7
    torch.testing.assert_close(lse, lse_want.float(), rtol=1e-6, atol=1e-6)
    assert (got[-3:] == 0).all()
    assert (lse[-3:] == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    args, options = arguments([request((4, 2, 64), 200, 7)], Paging(dtype=dtype))
    want = python_ref.strided_attention(*(x.double() if x.is_floating_point() else x for x in args), **options)
    out = torch.empty_like(args[0])
    assert strided_attention(*args, **options, out=out) is out
    assert ((out - want).abs() <= (want.to(dtype) - want).abs() + 1e-6).all()


@pytest.mark.parametrize("k_scale, v_scale", [(0.5, 3.0), ([0.5, 0.1], [3.0, -1.0]), (0.5, [3.0, 0.1])])
def test_scales_and_fp8(k_scale: float | list[float], v_scale: float | list[float]) -> None:
    args, options = arguments([request((4, 2, 64), 200, 7), request((4, 2, 64), 300, 4)], Paging())
    options |= {"k_scale": torch.tensor(k_scale), "v_scale": torch.tensor(v_scale), "sm_scale": 0.2}
    q, k, v, *rest = args
    k, v = (c.nan_to_num().to(torch.float8_e4m3fn) for c in (k, v))
    want = python_ref.strided_attention(q.double(), k.double(), v.double(), *rest, **options)
    torch.testing.assert_close(strided_attention(q, k, v, *rest, **options).double(), want, rtol=1e-5, atol=1e-6)


def test_scores_far_below_the_maximum() -> None:
    """exp of less than -87 is slow and is cut off: the result must not show it."""
    r = request((4, 2, 64), 200, 3)
    r.k[:190] *= 60
    args, options = arguments([r], Paging())
    want = python_ref.strided_attention(*(x.double() if x.is_floating_point() else x for x in args), **options)
    torch.testing.assert_close(strided_attention(*args, **options).double(), want, rtol=1e-4, atol=1e-5)


# Requests that see nothing, faults of the data


def test_padded_requests_and_rows_that_see_nothing() -> None:
    shape = (4, 2, 64)
    seen = request(shape, 150, 3)
    absent = Request(randn(2, 4, 64), randn(0, 2, 64), randn(0, 2, 64), 0)
    args, options = arguments([absent, seen, absent], Paging(padding_rows=2))
    lse = torch.full((9, 4), 5.0)
    out = strided_attention(*args, **options, lse=lse, out=torch.full_like(args[0], 5.0))
    for rows in (slice(0, 2), slice(5, 9)):
        assert (out[rows] == 0).all()
        assert (lse[rows] == -INF).all()
    assert torch.equal(out[2:5], attend([seen])[0])
    # A row of a tree mask without bits, in a request that has nothing else.
    blind = request(shape, 3, 3)
    blind.tree_mask = [1, 0, 0b101]
    args, options = arguments([blind], Paging())
    lse = torch.empty(3, 4)
    out = strided_attention(*args, **options, lse=lse)
    assert (out[1] == 0).all()
    assert (lse[1] == -INF).all()
    torch.testing.assert_close(out[0], blind.v[0].repeat_interleave(2, 0))


def test_lengths_beyond_the_page_table() -> None:
    r = request((4, 2, 64), 40, 2)
    args, options = arguments([r], Paging(spare_pages=0))
    args[4].fill_(300)
    for cache in args[1:3]:
        cache.nan_to_num_(1.0)
    torch.testing.assert_close(strided_attention(*args, **options), python_ref.strided_attention(*args, **options))


def test_pages_and_rows_out_of_range_do_not_raise() -> None:
    args, options = arguments([request((4, 2, 64), 40, 2), request((4, 2, 64), 50, 3, seed=5)], Paging())
    args[3][1, 0] = 1 << 30
    args[3][0, 1] = -5
    args[5].copy_(torch.tensor([0, 9, 4]))
    strided_attention(*args, **options)
    args[5].copy_(torch.tensor([3, -1, 99]))
    strided_attention(*args, **options)


def test_no_rows_and_no_requests() -> None:
    args, options = arguments([request((4, 2, 64), 40, 2)], Paging())
    assert strided_attention(args[0][:0], *args[1:5], torch.zeros(2, dtype=torch.int32), **options).shape == (0, 4, 64)
    q, k, v, table, lens, _ = args
    out = strided_attention(q, k, v, table[:0], lens[:0], torch.zeros(1, dtype=torch.int32), **options)
    assert (out == 0).all()


# Row invariance

LENGTH = 391  # slots of the request that all the tests below look at
ROWS = 64


def last_rows(shape: tuple[int, int, int]) -> tuple[Request, Tensor]:
    """A request, and the results of its last rows computed one at a time, each with the cache that ends at its slot."""
    r = request(shape, LENGTH, ROWS)
    return r, torch.cat([attend([r.at(LENGTH - ROWS + 1 + i, slice(i, i + 1))])[0] for i in range(ROWS)])


@shapes
def test_bits_for_any_number_of_rows(shape: tuple[int, int, int], num_threads: int) -> None:
    r, want = last_rows(shape)
    for rows in [*range(1, 21), 31, 32, 33, 63, 64]:
        assert torch.equal(attend([r.at(LENGTH, slice(ROWS - rows, ROWS))])[0], want[-rows:]), f"{rows} rows"


@shapes
def test_bits_when_more_slots_follow(shape: tuple[int, int, int]) -> None:
    r, want = last_rows(shape)
    for rows in (1, 7, 16):
        for first in (0, 5, ROWS - rows):
            end = LENGTH - ROWS + first + rows
            assert torch.equal(attend([r.at(end, slice(first, first + rows))])[0], want[first : first + rows])


@shapes
def test_bits_for_any_paging(shape: tuple[int, int, int]) -> None:
    r, want = last_rows(shape)
    for page_size in (1, 3, 16, 64, 128, 200):
        for head_major in (True, False):
            for seed, spare in ((0, 0), (1, 5)):
                got = attend([r], Paging(page_size=page_size, head_major=head_major, seed=seed, spare_pages=spare))
                assert torch.equal(got[0], want), (page_size, head_major, seed)


@shapes
def test_bits_in_any_batch(shape: tuple[int, int, int]) -> None:
    r, want = last_rows(shape)
    r, want = r.at(LENGTH, slice(ROWS - 7, ROWS)), want[-7:]
    twin = request(shape, LENGTH, 7, seed=50)  # same sizes: computed together
    others = [request(shape, length, rows, seed=9 * rows) for length, rows in ((13, 2), (700, 7), (390, 7), (64, 64))]
    broken = request(shape, LENGTH, 7, seed=50)
    broken.q, broken.v = broken.q * NAN, broken.v * INF
    for batch in (
        [r, twin],
        [twin, twin, r],
        [broken, r, broken],
        [*others, r],
        [r, *others],
        [*others, r, twin, *others],
    ):
        at = next(i for i, x in enumerate(batch) if x is r)
        for paging in (Paging(), Paging(page_size=3, padding_rows=5, seed=2)):
            assert torch.equal(attend(batch, paging)[at], want)


def test_bits_with_many_requests_and_long_caches() -> None:
    """Beyond 16 leaves sums are taken in blocks, and beyond the budget of scores rows are split."""
    shape = (9, 3, 64)
    r = request(shape, 2500, 20)
    want = torch.cat([attend([r.at(2481 + i, slice(i, i + 1))])[0] for i in range(20)])
    assert torch.equal(attend([r])[0], want)
    assert torch.equal(attend([r, r, request(shape, 2500, 20, seed=7)])[1], want)


def test_bits_do_not_depend_on_threads() -> None:
    r, before, results = request((9, 3, 64), 700, 16), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attend([r])[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 2, 8)], ids=str)
@pytest.mark.parametrize("window", [-1, 50])
def test_prefill_has_the_bits_of_single_rows(shape: tuple[int, int, int], window: int, num_threads: int) -> None:
    r = request(shape, 300, 300)
    whole = attend([r], window=window)[0]
    for i in [*range(0, 300, 23), 127, 128, 129, 299]:
        assert torch.equal(attend([r.at(i + 1, slice(i, i + 1))], window=window)[0][0], whole[i]), f"row {i}"
    chunks = [attend([r.at(stop, slice(start, stop))], window=window)[0] for start, stop in ((0, 100), (100, 300))]
    assert torch.equal(torch.cat(chunks), whole)


def quadratic_masks(n: int, k: int) -> list[int]:
    """Tail masks of a quadratic plan: clean rows 0..n, then k MASK rows for each branch."""
    masks = [(2 << i) - 1 for i in range(n + 1)]
    for b in range(n + 1):
        first = 1 + n + b * k
        masks += [((2 << b) - 1) | (((2 << j) - 1) << first) for j in range(k)]
    return masks


@shapes
@pytest.mark.parametrize("length", [16, 130, 391])
def test_bits_of_a_quadratic_plan(shape: tuple[int, int, int], length: int, num_threads: int) -> None:
    r = request(shape, length, 16)
    r.tree_mask = quadratic_masks(3, 3)
    rows = attend([r])[0]
    args, options = arguments([r], Paging())
    want = python_ref.strided_attention(*(x.double() if x.is_floating_point() else x for x in args), **options)
    torch.testing.assert_close(rows.double(), want, rtol=1e-5, atol=1e-6)
    # Clean rows are those of AR, when nothing of what follows was written.
    for i in range(4):
        assert torch.equal(attend([r.at(length - 15 + i, slice(i, i + 1))])[0][0], rows[i])
    # Next to requests of other plans, and split over several items.
    chain = request(shape, 200, 7, seed=5)
    chain.tree_mask = [(2 << i) - 1 for i in range(7)]
    assert torch.equal(attend([chain, r], Paging(page_size=3))[1], rows)
    assert torch.equal(attend([chain, r])[0], attend([request(shape, 200, 7, seed=5)])[0])


def test_the_rows_of_a_tree_mask_may_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    r = request((4, 2, 8), 391, 16)
    r.tree_mask = quadratic_masks(3, 3)
    want = attend([r])[0]
    monkeypatch.setattr(attention, "MAX_ROWS", 3)
    attention._plan.cache_clear()
    assert torch.equal(attend([r])[0], want)
    attention._plan.cache_clear()


def test_64_rows_fill_the_mask() -> None:
    r = request((4, 2, 8), 200, 64)
    r.tree_mask = [-1] * 64  # bit 63 is the sign
    last = r.at(200, slice(63, 64))
    assert torch.equal(attend([r])[0][63], attend([last])[0][0])


def test_a_plan_does_not_outlive_its_values() -> None:
    """The metadata tensors of a decode stay the same objects and change in place."""
    r = request((4, 2, 8), 100, 2)
    args, options = arguments([r], Paging())
    strided_attention(*args, **options)
    args[4].fill_(60)
    torch.testing.assert_close(strided_attention(*args, **options), python_ref.strided_attention(*args, **options))
    args[3].copy_(args[3].flip(1))
    args[1].nan_to_num_()
    args[2].nan_to_num_()
    torch.testing.assert_close(strided_attention(*args, **options), python_ref.strided_attention(*args, **options))


def test_threads_of_python_do_not_share_scratch_memory() -> None:
    requests = [request((4, 2, 64), 700, 16, seed=i) for i in range(4)]
    want = [attend([r])[0] for r in requests]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda i: attend([requests[i % 4]])[0], range(80)), want * 20, strict=True):
            assert torch.equal(got, expected)


def test_scratch_memory_across_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_scratch", attention._Scratch())
    small, large = request((4, 2, 64), 100, 5), request((4, 2, 64), 900, 5)
    with torch.inference_mode():
        want = attend([small])[0], attend([large])[0]
    assert torch.equal(attend([large])[0], want[1])
    assert torch.equal(attend([small])[0], want[0])
    monkeypatch.setattr(attention._Scratch, "MOST", 10)
    monkeypatch.setattr(attention, "_scratch", attention._Scratch())
    assert torch.equal(attend([large])[0], want[1])


# Fallbacks


@pytest.fixture
def fresh_verdicts(monkeypatch: pytest.MonkeyPatch):
    """No verdict and no plan is known before the test, and none is kept after it."""
    monkeypatch.setattr(products, "_verdicts", {})
    attention._plan.cache_clear()
    yield
    attention._plan.cache_clear()


def force(monkeypatch: pytest.MonkeyPatch, failing: tuple[str, ...]) -> None:
    monkeypatch.setattr(products, "_verified", lambda key, check: key[0] not in failing)


FALLBACKS = {"slabs": ("bmm",), "tree": ("slabs",), "sums": ("sum",), "all": ("bmm", "slabs", "sum")}


@pytest.mark.parametrize("shape", [(9, 3, 64), (2, 2, 8)], ids=str)
@pytest.mark.parametrize("failing", FALLBACKS.values(), ids=FALLBACKS.keys())
def test_fallbacks_are_invariant_too(
    shape: tuple[int, int, int], failing: tuple[str, ...], fresh_verdicts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = request(shape, 200, 7)
    usual = attend([r])[0]
    attention._plan.cache_clear()
    force(monkeypatch, failing)
    got = attend([r])[0]
    torch.testing.assert_close(got, usual, rtol=1e-5, atol=1e-6)
    if "slabs" not in failing:
        assert torch.equal(got, usual)  # what bmm was verified against
    for i in range(7):
        assert torch.equal(attend([r.at(194 + i, slice(i, i + 1))])[0][0], got[i])


def test_a_product_that_depends_on_its_shape_is_not_used(fresh_verdicts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bmm = torch.bmm

    def shape_dependent(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        return bmm(a, b, out=out).mul_(1 + 2**-20 if a.shape[1] == 12 else 1)

    def place_dependent(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        y = bmm(a, b, out=out)
        y[:, 3] *= 1 + 2**-20
        return y

    monkeypatch.setattr(torch, "bmm", shape_dependent)
    assert products.batched_product(12, 12, 64, 128, transposed=True) is products._product_in_slabs
    assert products.batched_product(12, 16, 64, 128, transposed=True) is products._bmm
    monkeypatch.setattr(torch, "bmm", place_dependent)
    assert products.batched_product(12, 12, 128, 64, transposed=False) is products._product_by_tree


@pytest.mark.parametrize("inner", [(4, 8), (3, 7), (1, 1)], ids=str)
def test_sums_over_leaves_are_in_order(inner: tuple[int, int]) -> None:
    for leaves in [*range(1, 40), 100]:
        x = randn(2, 1, leaves, *inner)
        want = products.leaf_sum(leaves, math.prod(inner))(x)
        torch.testing.assert_close(want, x.sum(2), rtol=1e-5, atol=1e-5)
        for more in (1, 3, 21):
            padded = torch.cat([x, torch.zeros(2, 1, more, *inner)], 2)
            assert torch.equal(products.leaf_sum(leaves + more, math.prod(inner))(padded), want), (leaves, more)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_a_row_does_not_see_never_reaches_it(backend: str, value: float) -> None:
    q, k, v = torch.randn(2, 1, 64), torch.randn(2, 4, 1, 64), torch.randn(2, 4, 1, 64)
    table, lengths, start = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1]], [5], [0, 2]))
    with idlm_kernels.use_backend(backend):
        clean = idlm_kernels.strided_attention(q, k, v, table, lengths, start, max_query_len=2)
        v[1, 0] = value  # the second row's own slot
        got = idlm_kernels.strided_attention(q, k, v, table, lengths, start, max_query_len=2)
        k[1, 0] = value
        both = idlm_kernels.strided_attention(q, k, v, table, lengths, start, max_query_len=2)
    assert torch.equal(got[0], clean[0]) and torch.equal(both[0], clean[0])
    torch.testing.assert_close(got[1], torch.full_like(got[1], value), equal_nan=True)
    assert not both[1].isfinite().any()


def test_rows_beyond_max_query_len_are_padding() -> None:
    for tail in (False, True):
        r, other = request(SHAPES["tiny"], 40, 16), request(SHAPES["tiny"], 9, 3, seed=5)
        if tail:
            r.tree_mask, other.tree_mask = quadratic_masks(3, 3), [1, 3, 5]
        args, options = arguments([r, other], Paging())
        whole = strided_attention(*args, **options)
        for function in (strided_attention, python_ref.strided_attention):
            lse = torch.zeros(whole.shape[:2])
            got = function(*args, **{**options, "max_query_len": 5, "lse": lse})
            torch.testing.assert_close(got[:5], whole[:5])
            torch.testing.assert_close(got[16:], whole[16:])
            assert (got[5:16] == 0).all() and (lse[5:16] == -INF).all()
