"""The linear layers and the per-row ops against fp64 loops, and what must hold bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm_kernels import (
    embed,
    gated_lora_linear,
    linear,
    linear_silu_and_mul,
    prepare_weight,
    qk_norm_rope_append,
    rms_norm,
    rotary_table,
    silu_and_mul,
    use_backend,
)
from idlm_kernels.testing import check_bits, same_bits

FP64 = {"rtol": 1e-12, "atol": 1e-13}
HALF_ULP = {torch.float64: 2.0**-50, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(HALF_ULP)
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _references():
    with use_backend("torch"):
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """got is the fp64 result rounded once to its dtype, give or take the error of the fp32 accumulator."""
    if got.element_size() == 2:  # fp32 is so much finer that the rounded values are the same, but for a rare near-tie
        assert (got != exact.to(got.dtype)).double().mean() <= 0.01
    tolerance = HALF_ULP[got.dtype]
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * tolerance, atol=max(2e-6, tolerance / 8))


# linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(dtype, has_bias):
    x, weight, bias = randn(5, 24, dtype=dtype), randn(7, 24, seed=1, dtype=dtype), randn(7, seed=2, dtype=dtype)
    exact = torch.zeros(5, 7, dtype=torch.float64)
    for t in range(5):
        for n in range(7):
            exact[t, n] = math.fsum((x[t].double() * weight[n].double()).tolist())
            exact[t, n] += float(bias[n]) if has_bias else 0.0
    out = torch.full((5, 7), NAN, dtype=dtype)
    got = linear(x, weight, bias=bias if has_bias else None, out=out)
    assert got is out
    assert_rounded(got, exact)
    check_bits(linear(x, weight, bias=bias if has_bias else None), got)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_with_narrower_weights(weight_dtype):
    x, weight = randn(3, 16, dtype=torch.float32), randn(5, 16, seed=1, dtype=weight_dtype)
    bias = randn(5, seed=2, dtype=torch.float64)
    assert_rounded(linear(x, weight, bias=bias), x.double() @ weight.double().T + bias)
    assert linear(x, weight).dtype == torch.float32


def test_linear_accumulates_in_fp32():
    """A bf16 sum of ones stops at 256; an fp16 one overflows at 65,504 on the way."""
    ones = torch.ones(1, 1000, dtype=torch.bfloat16)
    assert linear(ones, ones).item() == 1000
    x = torch.tensor([[300.0, 300.0, 1.0]], dtype=torch.float16)
    weight = torch.tensor([[300.0, -300.0, 1.0]], dtype=torch.float16)
    assert linear(x, weight).item() == 1


def test_linear_rounds_after_the_bias():
    """256 + 1 + 1 is 258; rounded to bf16 before the bias it would be 256."""
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    weight, bias = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)
    assert linear(x, weight, bias=bias).item() == 258


def test_linear_with_strided_rows():
    wide = randn(4, 20)
    x, weight = wide[::2, 3:9], randn(9, 6, seed=1)[::3]
    out = torch.zeros(2, 10, dtype=torch.float64)[:, 2:5]
    assert linear(x, weight, out=out) is out
    torch.testing.assert_close(out, x.contiguous() @ weight.contiguous().T, **FP64)


def test_prepare_weight_of_the_references_is_the_weight():
    weight = randn(3, 4)
    assert prepare_weight(weight) is weight


# gated_lora_linear


def lora_loop(x, weight, lora_a, lora_b, lora_mask, scale, bias, widths) -> Tensor:
    """Row by row and slice by slice, in fp64."""
    rank, out = lora_b.shape[1], torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for t, row in enumerate(x.double()):
        out[t] = weight.double() @ row + (0 if bias is None else bias.double())
        if int(lora_mask[t]) != 0:
            start = 0
            for s, width in enumerate(widths):
                a = lora_a[s * rank : (s + 1) * rank].double()
                out[t, start : start + width] += scale * (lora_b[start : start + width].double() @ (a @ row))
                start += width
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output_sizes", [None, [9], [4, 3, 2], [1, 8]])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_lora_linear(dtype, output_sizes, has_bias):
    rank, widths = 2, output_sizes or [9]
    x, weight = randn(6, 16, dtype=dtype), randn(9, 16, seed=1, dtype=dtype)
    lora_a, lora_b = randn(rank * len(widths), 16, seed=2, dtype=dtype), randn(9, rank, seed=3, dtype=dtype)
    bias = randn(9, seed=4, dtype=dtype) if has_bias else None
    lora_mask = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.bool)
    exact = lora_loop(x, weight, lora_a, lora_b, lora_mask, 0.5, bias, widths)
    out = torch.full((6, 9), NAN, dtype=dtype)
    got = gated_lora_linear(x, weight, lora_a, lora_b, lora_mask, 0.5, bias=bias, output_sizes=output_sizes, out=out)
    assert got is out
    assert_rounded(got, exact)
    check_bits(got[lora_mask == 0], linear(x, weight, bias=bias)[lora_mask == 0])


@pytest.mark.parametrize(
    "lora_mask",
    [
        torch.tensor([True, False, True]),
        torch.tensor([2, 0, 255], dtype=torch.uint8),
        torch.tensor([-1, 0, 2**31 - 1], dtype=torch.int32),
    ],
)
def test_any_gate_but_0_is_on(lora_mask):
    """And its value is no factor."""
    x, weight, lora_a, lora_b = randn(3, 4), randn(5, 4, seed=1), randn(1, 4, seed=2), randn(5, 1, seed=3)
    want = x @ weight.T
    want[[0, 2]] += 3.0 * (x @ lora_a.T @ lora_b.T)[[0, 2]]
    torch.testing.assert_close(gated_lora_linear(x, weight, lora_a, lora_b, lora_mask, 3.0), want, **FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 0.0])
def test_rows_with_gate_0_keep_the_bits_of_linear(dtype, poison):
    """Whatever the adapter, the scale and the other rows hold. -0.0 stays: tiny negative sums underflow to it."""
    x, weight = randn(6, 16, dtype=dtype), randn(8, 16, seed=1, dtype=dtype)
    if dtype == torch.float16:
        x[0] = 2.0**-14
        weight[0] = -(2.0**-20)
    lora_mask = torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.uint8)
    off, on = lora_mask == 0, lora_mask != 0
    plain = linear(x, weight)
    if dtype == torch.float16:
        assert plain[0, 0] == 0 and plain[0, 0].signbit()
    lora_a, lora_b = randn(4, 16, seed=2, dtype=dtype), randn(8, 2, seed=3, dtype=dtype)
    lora_a[1, 2] = poison
    lora_b[3, 1] = poison
    got = gated_lora_linear(x, weight, lora_a, lora_b, lora_mask, 0.25, output_sizes=[5, 3])
    check_bits(got[off], plain[off])
    assert not same_bits(got[on], plain[on])
    if poison != 0:
        assert not got[on].isfinite().all()
    check_bits(gated_lora_linear(x, weight, lora_a, lora_b, lora_mask, poison, output_sizes=[5, 3])[off], plain[off])
    x[on] = poison
    got = gated_lora_linear(x, weight, lora_a, lora_b, lora_mask, 0.25, output_sizes=[5, 3])
    check_bits(got[off], plain[off])


def test_a_slice_has_its_own_adapter():
    """Poison in the A of one slice stays in its columns."""
    x, weight, lora_a, lora_b = randn(2, 4), randn(6, 4, seed=1), randn(4, 4, seed=2), randn(6, 2, seed=3)
    lora_a[:2] = NAN
    got = gated_lora_linear(x, weight, lora_a, lora_b, torch.ones(2, dtype=torch.bool), 1.0, output_sizes=[2, 4])
    assert got[:, :2].isnan().all() and got[:, 2:].isfinite().all()


def test_the_update_is_added_before_the_one_rounding():
    """257 is not a bf16 number: 257 + 1 must give 258, not 256."""
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    one = torch.ones(1, dtype=torch.bool)
    lora_a, lora_b = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    assert gated_lora_linear(x, weight, lora_a, lora_b, one, 1.0).item() == 258


# rms_norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64])
def test_rms_norm(dtype, width):
    x, weight, eps = randn(4, width, dtype=dtype), randn(width, seed=1, dtype=dtype), 1e-5
    exact = torch.stack(
        [row * weight.double() / math.sqrt(math.fsum((row**2).tolist()) / width + eps) for row in x.double()]
    )
    out = torch.full_like(x, NAN)
    assert rms_norm(x, weight, eps, out=out) is out
    assert_rounded(out, exact)
    check_bits(rms_norm(x, weight, eps), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_residual(dtype):
    """residual += x in place with one rounding; the norm is that of the rounded sum."""
    x, residual = randn(4, 32, dtype=dtype), randn(4, 32, seed=5, dtype=dtype)
    weight, x_before = randn(32, seed=1, dtype=dtype), randn(4, 32, dtype=dtype)
    total = (x.double() + residual.double()).to(dtype)
    got = rms_norm(x, weight, 1e-6, residual=residual)
    check_bits(residual, total)
    check_bits(x, x_before)
    check_bits(got, rms_norm(total, weight, 1e-6))


def test_rms_norm_into_x():
    x, residual, weight = randn(4, 8), randn(4, 8, seed=1), randn(8, seed=2)
    want = rms_norm(x, weight, 1e-6)
    in_place = x.clone()
    assert rms_norm(in_place, weight, 1e-6, out=in_place) is in_place
    check_bits(in_place, want)
    total = x + residual
    rms_norm(x, weight, 1e-6, residual=residual, out=x)
    check_bits(x, rms_norm(total, weight, 1e-6))
    check_bits(residual, total)


def test_rms_norm_extremes():
    weight = torch.ones(4, dtype=torch.float16)
    assert (rms_norm(torch.zeros(1, 4, dtype=torch.float16), weight, 1e-6) == 0).all()
    large = torch.full((1, 4), 60000.0, dtype=torch.float16)  # the square is beyond fp16
    assert (rms_norm(large, weight, 1e-6) == 1).all()
    rows = torch.tensor([[NAN, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.float16)
    assert rms_norm(rows, weight, 0.0).isnan().sum(1).tolist() == [4, 0]


def test_rms_norm_weight_of_another_dtype_and_strided_rows():
    x, weight = randn(6, 10, dtype=torch.bfloat16)[::2, 1:9], randn(8, seed=1, dtype=torch.float32)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    rows = x.double()
    assert_rounded(got, rows / (rows.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double())


# silu_and_mul


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype):
    x = randn(30, 14, dtype=dtype) * 4
    rows = [[g / (1 + math.exp(-g)) * u for g, u in zip(r[:7], r[7:], strict=True)] for r in x.double().tolist()]
    exact = torch.tensor(rows, dtype=torch.float64)
    out = torch.full((30, 7), NAN, dtype=dtype)
    assert silu_and_mul(x, out=out) is out
    assert_rounded(out, exact)
    check_bits(silu_and_mul(x), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_linear_silu_and_mul_is_the_one_after_the_other(dtype):
    x, weight, bias = torch.randn(5, 12).to(dtype), torch.randn(8, 12).to(dtype), torch.randn(8).to(dtype)
    a, b, lora_mask = (
        torch.randn(6, 12).to(dtype),
        torch.randn(8, 3).to(dtype),
        torch.tensor([1, 0, 0, 1, 0], dtype=torch.int32),
    )
    plain = silu_and_mul(linear(x, weight, bias=bias))
    check_bits(linear_silu_and_mul(x, weight, bias=bias), plain)
    out = torch.empty_like(plain)
    adapter = {"lora_a": a, "lora_b": b, "lora_mask": lora_mask, "scale": 0.5, "output_sizes": [5, 3]}
    assert linear_silu_and_mul(x, weight, bias=bias, **adapter, out=out) is out
    wanted = silu_and_mul(gated_lora_linear(x, weight, a, b, lora_mask, 0.5, bias=bias, output_sizes=[5, 3]))
    assert (
        same_bits(out, wanted) and same_bits(out[lora_mask == 0], plain[lora_mask == 0]) and not same_bits(out, plain)
    )


def test_silu_and_mul_extremes():
    x = torch.tensor([[-1e30, 1e30, 0.0, 88.0, -100.0, 2.0, 1.0, 3.0, 1.0, 1.0]])
    got = silu_and_mul(x)
    assert got.isfinite().all()
    assert got[0].tolist() == pytest.approx([0.0, 1e30, 0.0, 88.0, -100 * math.exp(-100)], rel=1e-6)
    assert silu_and_mul(torch.zeros(3, 0)).shape == (3, 0)


# embed


@pytest.mark.parametrize("is_mask_dtype", [torch.bool, torch.uint8, torch.int32])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_embed(is_mask_dtype, dtype):
    weight = randn(5, 4, dtype=torch.float16)
    weight[0] = NAN  # the row that ids out of range must not read
    weight[4] = INF
    ids = torch.tensor([1, -1, 5, 3, 2**40, 2, -(2**40), 7])
    is_mask = torch.tensor([0, 0, 0, 255, 0, 0, 0, 1]).to(is_mask_dtype)  # any value but 0
    mask_embedding = randn(4, seed=1, dtype=torch.float32)
    wanted_dtype = dtype or torch.float16
    zero = torch.zeros(4, dtype=wanted_dtype)
    rows = [weight[1], zero, zero, mask_embedding, zero, weight[2], zero, mask_embedding]
    want = torch.stack([row.to(wanted_dtype) for row in rows])
    out = torch.full((8, 4), NAN, dtype=wanted_dtype)
    assert embed(ids, weight, is_mask=is_mask, mask_embedding=mask_embedding, dtype=dtype, out=out) is out
    check_bits(out, want)
    check_bits(embed(ids, weight, is_mask=is_mask, mask_embedding=mask_embedding, dtype=dtype), want)


def test_embed_without_a_mask_embedding_looks_mask_rows_up():
    weight = randn(5, 4)
    is_mask = torch.tensor([True, False, True])
    got = embed(torch.tensor([4, 0, 9]), weight, is_mask=is_mask)
    check_bits(got, torch.stack([weight[4], weight[0], torch.zeros(4, dtype=torch.float64)]))


def test_embed_keeps_the_bits_of_a_row():
    weight = torch.tensor([[-0.0, NAN, INF, 1e-45]])
    got = embed(torch.tensor([0]), weight, is_mask=torch.zeros(1, dtype=torch.bool))
    check_bits(got, weight)


# rotary_table and qk_norm_rope_append


def inv_freq(head_dim: int, base: float = 10_000.0) -> Tensor:
    return base ** -(torch.arange(0, head_dim, 2).float() / head_dim)


def test_rotary_table():
    table = rotary_table(inv_freq(8), 3000)
    assert table.shape == (3000, 8) and table.dtype == torch.float32
    for position in (0, 1, 17, 2999):
        angles = [float(torch.tensor(position, dtype=torch.float32) * f) for f in inv_freq(8)]  # rounded to fp32
        want = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert table[position].tolist() == pytest.approx(want, abs=1e-6)
    assert table[0].tolist() == [1.0] * 4 + [0.0] * 4
    assert torch.equal(rotary_table(inv_freq(8), 10), table[:10])


def complex_rotation(head: Tensor, table_row: Tensor) -> Tensor:
    """(x_i + j x_{i + D/2}) * e^{j angle}, in fp64."""
    half = head.shape[-1] // 2
    rotated = torch.complex(head[:half], head[half:]) * torch.complex(table_row[:half], table_row[half:])
    return torch.cat([rotated.real, rotated.imag])


def norm_rope_loop(
    qkv: Tensor, positions: Tensor, rotary: Tensor, heads: tuple[int, int], weights: tuple[Tensor, Tensor] | None, eps
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of every row, in fp64, one head at a time."""
    num_heads, num_kv_heads = heads
    rows = qkv.double().view(len(qkv), num_heads + 2 * num_kv_heads, -1).clone()
    for t in range(len(rows)):
        for h in range(num_heads + num_kv_heads):
            head = rows[t, h]
            if weights is not None:
                mean_square = math.fsum((head**2).tolist()) / len(head)
                head = head / math.sqrt(mean_square + eps) * weights[int(h >= num_heads)].double()
            rows[t, h] = complex_rotation(head, rotary[int(positions[t])].double())
    q, k, v = rows.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 1)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_qk_norm_rope_append(dtype, heads, has_norm):
    """Positions differ from slots; entries of the cache that are not written keep their bits."""
    head_dim, page_size, eps = 8, 3, 1e-5
    rotary = rotary_table(inv_freq(head_dim), 50)
    qkv = randn(5, (heads[0] + 2 * heads[1]) * head_dim, dtype=dtype)
    weights = (randn(head_dim, seed=1, dtype=dtype), randn(head_dim, seed=2, dtype=dtype)) if has_norm else None
    positions = torch.tensor([49, 3, 3, 0, 20], dtype=torch.int32)
    slots = torch.tensor([7, 0, 11, 8, 2])
    k_cache = torch.full((4, page_size, heads[1], head_dim), NAN, dtype=dtype)
    v_cache = torch.full_like(k_cache, -INF)
    q, k, v = norm_rope_loop(qkv, positions, rotary, heads, weights, eps)
    out = torch.full((5, heads[0], head_dim), NAN, dtype=dtype)
    options = {"q_weight": weights[0], "k_weight": weights[1]} if weights else {}
    got = qk_norm_rope_append(qkv, positions, rotary, slots, k_cache, v_cache, **options, eps=eps, out=out)
    assert got is out
    assert_rounded(out, q)
    assert_rounded(k_cache.flatten(0, 1)[slots], k)
    check_bits(v_cache.flatten(0, 1)[slots], v.to(dtype))
    others = [s for s in range(12) if s not in slots.tolist()]
    assert k_cache.flatten(0, 1)[others].isnan().all()
    assert (v_cache.flatten(0, 1)[others] == -INF).all()
    again = qk_norm_rope_append(qkv, positions.long(), rotary, slots, k_cache, v_cache, **options, eps=eps)
    check_bits(again, out)


def test_rotation_by_known_angles():
    """A quarter turn takes (x, y) to (-y, x); the pairs are (x_i, x_{i + D/2})."""
    quarter = torch.tensor([[0.0, 0.0, 1.0, 1.0]])  # cos, cos, sin, sin
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]])
    k_cache, v_cache = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    zero = torch.zeros(1, dtype=torch.int64)
    q = qk_norm_rope_append(qkv, zero, quarter, zero, k_cache, v_cache)
    assert q.flatten().tolist() == [-3, -4, 1, 2]
    assert k_cache.flatten().tolist() == [-7, -8, 5, 6]
    assert v_cache.flatten().tolist() == [9, 10, 11, 12]


def append(slots: list[int], page_size: int = 2, num_pages: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Values written for row t are t + 1 (k, position 0) and -(t + 1) (v); untouched entries hold 99."""
    rows = torch.arange(1, len(slots) + 1).double()
    qkv = torch.stack([rows, rows, rows, rows, -rows, -rows], dim=1)
    k_cache, v_cache = (torch.full((num_pages, page_size, 1, 2), 99.0, dtype=torch.float64) for _ in range(2))
    positions = torch.zeros(len(slots), dtype=torch.int64)
    rotary = torch.tensor([[1.0, 0.0]])
    q = qk_norm_rope_append(qkv, positions, rotary, torch.tensor(slots, dtype=torch.int64), k_cache, v_cache)
    return q[:, 0, 0], k_cache[..., 0, 0].flatten(), v_cache[..., 0, 1].flatten()


@pytest.mark.parametrize("page_size", [1, 3, 8])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_skipped_rows_write_nothing(page_size, data):
    """Any mixture of skipped and written rows: all, none, first, last, slot 0 among the written ones or not."""
    num_pages = -(-8 // page_size)
    order = data.draw(st.permutations(range(num_pages * page_size)))
    is_skipped = data.draw(st.lists(st.booleans(), max_size=8))
    slots = [-1 if skip else slot for skip, slot in zip(is_skipped, order, strict=False)]
    q, k, v = append(slots, page_size, num_pages)
    want = [99.0] * (num_pages * page_size)
    for t, slot in enumerate(slots):
        if slot >= 0:
            want[slot] = t + 1.0
    assert k.tolist() == want
    assert v.tolist() == [-x if x != 99 else x for x in want]
    assert q.tolist() == [t + 1.0 for t in range(len(slots))]  # q is returned for skipped rows too


@pytest.mark.parametrize(
    ("slots", "want"),
    [
        ([-1, -1, -1], {}),
        ([-1, 0, -1], {0: 2}),
        ([0, -1, -1], {0: 1}),
        ([-1, -1, 5], {5: 3}),
        ([3, -1, 0], {3: 1, 0: 3}),
        ([], {}),
    ],
)
def test_skipped_rows_and_slot_0(slots, want):
    _, k, _ = append(slots)
    assert k.tolist() == [want.get(s, 99) for s in range(8)]


def test_skipped_rows_with_bad_values():
    """A skipped row of NaN does not reach the cache."""
    qkv = torch.full((2, 6), NAN)
    qkv[1] = 1.0
    k_cache, v_cache = torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2)
    slots, positions = torch.tensor([-1, 3]), torch.zeros(2, dtype=torch.int64)
    qk_norm_rope_append(qkv, positions, torch.tensor([[1.0, 0.0]]), slots, k_cache, v_cache)
    assert k_cache.isfinite().all() and v_cache.isfinite().all()
    assert k_cache.flatten(0, 1)[:, 0, 0].tolist() == [0, 0, 0, 1]


def _interleaved(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    kv = torch.zeros(shape[0], 2, *shape[1:])
    return kv[:, 0], kv[:, 1]


def _heads_first(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    k, v = (torch.zeros(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2) for _ in range(2))
    return k, v


def _padded_pages(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    wide = torch.zeros(shape[0] + 1, shape[1] + 3, 2 * shape[2], shape[3] + 1)
    return wide[1:, 2:-1, ::2, :-1], wide[1:, 2:-1, 1::2, 1:]


@pytest.mark.parametrize("layout", [_interleaved, _heads_first, _padded_pages])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_strided_caches(layout, page_size):
    shape = (5, page_size, 2, 4)
    rotary, qkv = rotary_table(inv_freq(4), 9), randn(4, 6 * 4, dtype=torch.float32)
    positions, slots = torch.tensor([1, 2, 3, 4]), torch.tensor([3, -1, 0, 4])
    plain = torch.zeros(shape), torch.zeros(shape)
    strided = layout(shape)
    want = qk_norm_rope_append(qkv, positions, rotary, slots, *plain)
    check_bits(qk_norm_rope_append(qkv, positions, rotary, slots, *strided), want)
    for a, b in zip(plain, strided, strict=True):
        assert b.stride() != a.stride()
        assert torch.equal(a, b)


def test_strided_qkv():
    rotary, wide = rotary_table(inv_freq(4), 9), randn(4, 30, dtype=torch.float32)
    qkv, slots = wide[:, 3:27], torch.arange(4)
    caches = [torch.zeros(5, 1, 2, 4) for _ in range(4)]
    want = qk_norm_rope_append(qkv.contiguous(), slots, rotary, slots, *caches[:2])
    check_bits(qk_norm_rope_append(qkv, slots, rotary, slots, *caches[2:]), want)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


def test_fp8_cache():
    rotary, qkv, slots = rotary_table(inv_freq(4), 9), randn(3, 12, dtype=torch.float32), torch.tensor([2, -1, 0])
    wide = [torch.zeros(2, 2, 1, 4) for _ in range(2)]
    narrow = [torch.zeros(2, 2, 1, 4).to(torch.float8_e4m3fn) for _ in range(2)]
    positions = torch.tensor([1, 2, 3])
    want = qk_norm_rope_append(qkv, positions, rotary, slots, *wide)
    check_bits(qk_norm_rope_append(qkv, positions, rotary, slots, *narrow), want)
    for a, b in zip(wide, narrow, strict=True):
        check_bits(a.to(torch.float8_e4m3fn), b)


# A row knows only itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_ops_do_not_depend_on_other_rows(dtype):
    x, weight, residual = randn(9, 32, dtype=dtype), randn(32, seed=1, dtype=dtype), randn(9, 32, seed=2, dtype=dtype)
    together = rms_norm(x, weight, 1e-6, residual=residual.clone()), silu_and_mul(x)
    for t in range(9):
        row = slice(t, t + 1)
        alone = rms_norm(x[row], weight, 1e-6, residual=residual[row].clone()), silu_and_mul(x[row])
        check_bits(alone[0], together[0][row])
        check_bits(alone[1], together[1][row])
