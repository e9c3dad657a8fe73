"""rms_norm, silu_and_mul, embed and qk_norm_rope_append on backend `triton`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import idlm_kernels
import python_ref
from idlm_kernels.testing import check_bits, check_close, same_bits
from idlm_kernels.triton import layers
from tests.softgpu_support import SCHEDULES
from tests.triton.support import DEVICE, INTERPRETED, caught, mutant

DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
BASE = DTYPES[0]


def to64(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


# rms_norm


def check_rms_norm(module: ModuleType, dtype: torch.dtype = BASE, rows: int = 7, width: int = 576) -> None:
    x, residual = (torch.randn(rows, width).to(dtype) * 3 for _ in range(2))
    x[0], residual[0] = 1e-3, 2e-3  # eps counts
    weight = torch.randn(width).to(dtype)
    check_close(
        module.rms_norm(x, weight, 1e-6),
        python_ref.rms_norm(x.double(), weight.double(), 1e-6),
        python_ref.rms_norm(x, weight, 1e-6),
    )
    got_sum, peer_sum = residual.clone(), residual.clone()
    out = torch.full_like(x, torch.nan)
    got = module.rms_norm(x, weight, 1e-6, residual=got_sum, out=out)
    peer = python_ref.rms_norm(x, weight, 1e-6, residual=peer_sum)
    assert got is out
    check_bits(got_sum, peer_sum)
    # The norm is of the sum as it was stored.
    check_close(got, python_ref.rms_norm(peer_sum.double(), weight.double(), 1e-6), peer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 577, 576, 4096, 5120])
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    check_rms_norm(layers, dtype, 5, width)


def test_rms_norm_without_rows() -> None:
    x = torch.empty(0, 64, dtype=BASE)
    assert layers.rms_norm(x, torch.ones(64, dtype=BASE), 1e-6).shape == (0, 64)


@pytest.mark.parametrize("width", [576, 577, 4096])
def test_rms_norm_row_bits_depend_on_the_row_alone(width: int) -> None:
    x = torch.randn(64, width).to(BASE)
    residual = torch.randn(64, width).to(BASE)
    weight = torch.randn(width).to(BASE)
    whole = layers.rms_norm(x, weight, 1e-6)
    sums = residual.clone()
    added = layers.rms_norm(x, weight, 1e-6, residual=sums)
    for rows in (slice(0, 1), slice(5, 12), slice(63, 64), slice(3, 35)):
        check_bits(layers.rms_norm(x[rows], weight, 1e-6), whole[rows])
        check_bits(layers.rms_norm(x[rows], weight, 1e-6, residual=residual[rows].clone()), added[rows])
    in_place = x.clone()
    check_bits(layers.rms_norm(in_place, weight, 1e-6, out=in_place), whole)


@pytest.mark.parametrize("width", [576, 577])
def test_rms_norm_row_bits_do_not_depend_on_placement(width: int) -> None:
    """Views at odd addresses and with odd row strides: the compiler must not choose another summation for them."""
    x, residual = torch.randn(9, width).to(BASE), torch.randn(9, width).to(BASE)
    weight = torch.randn(width).to(BASE)
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


def check_silu_and_mul(module: ModuleType, dtype: torch.dtype = BASE, rows: int = 3, width: int = 1030) -> None:
    x = (torch.randn(rows, 2 * width) * 4).to(dtype)
    x[0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, torch.inf, torch.nan]).to(dtype)[: 2 * width]
    exact = torch.nn.functional.silu(x[:, :width].double()) * x[:, width:].double()
    check_close(module.silu_and_mul(x), exact, python_ref.silu_and_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 1024, 1030, 3072])
def test_silu_and_mul(dtype: torch.dtype, width: int) -> None:
    check_silu_and_mul(layers, dtype, 3, width)


def test_silu_and_mul_row_bits_depend_on_the_row_alone() -> None:
    x = torch.randn(33, 2 * 1544).to(BASE)
    whole = layers.silu_and_mul(x)
    for rows in (slice(0, 1), slice(4, 11), slice(32, 33)):
        check_bits(layers.silu_and_mul(x[rows]), whole[rows])
    odd = torch.zeros(33, 2 * 1544 + 1, dtype=BASE)[:, 1:]
    odd.copy_(x)
    check_bits(layers.silu_and_mul(odd), whole)


# embed


def check_embed(module: ModuleType, dtype: torch.dtype = BASE, out_dtype: torch.dtype = torch.float32) -> None:
    ids = torch.tensor([0, 9, 3, -1, 10, 2**40, 5], dtype=torch.int64)
    weight, mask_embedding = torch.randn(10, 1100).to(dtype), torch.randn(1100)
    mask_embedding[7] = torch.nan  # stays where it is
    for is_mask in (
        torch.tensor([0, 0, 1, 0, 1, 0, 0], dtype=torch.bool),
        torch.tensor([0, 0, 2, 0, 0, 1, 256]),
    ):
        gate = is_mask if is_mask.dtype == torch.bool else is_mask.to(torch.int32)
        for mask in (None, mask_embedding):
            got = module.embed(ids, weight, is_mask=gate, mask_embedding=mask, dtype=out_dtype)
            peer = python_ref.embed(ids, weight, is_mask=gate, mask_embedding=mask, dtype=out_dtype)
            torch.testing.assert_close(got, peer, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_embed(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    check_embed(layers, dtype, out_dtype)


# qk_norm_rope_append


class Rope:
    """Arguments of qk_norm_rope_append; the cache starts full of NaN."""

    def __init__(
        self,
        rows: int = 5,
        heads: tuple[int, int] = (8, 2),
        head_dim: int = 128,
        page_size: int = 16,
        dtype: torch.dtype = BASE,
        norm: bool = True,
        cache_dtype: torch.dtype | None = None,
    ):
        num_heads, num_kv_heads = heads
        self.page_size, self.num_pages = page_size, 64 // page_size + 2
        self.qkv = torch.randn(rows, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        self.positions = torch.randint(0, 50, (rows,), dtype=torch.int32)
        frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 2)
        self.rotary = python_ref.rotary_table(frequencies, 50)
        self.slots = torch.randperm(self.num_pages * page_size)[:rows]
        if rows > 2:
            self.slots[2] = -1
        self.cache_shape = (self.num_pages, page_size, num_kv_heads, head_dim)
        self.cache_dtype = dtype if cache_dtype is None else cache_dtype
        self.weights = [torch.randn(head_dim).to(dtype) if norm else None for _ in range(2)]

    def cache(self) -> Tensor:
        return torch.full(self.cache_shape, torch.nan).to(self.cache_dtype)

    def run(
        self,
        function: Callable[..., Tensor],
        rows: slice = slice(None),
        k: Tensor | None = None,
        v: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        k = self.cache() if k is None else k
        v = self.cache() if v is None else v
        q_weight, k_weight = self.weights
        inputs = (self.qkv[rows], self.positions[rows], self.rotary, self.slots[rows])
        return function(*inputs, k, v, q_weight=q_weight, k_weight=k_weight, eps=1e-6), k, v

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.cache().double(), self.cache().double()
        q_weight, k_weight = to64(*self.weights)
        inputs = (self.qkv.double(), self.positions, self.rotary, self.slots)
        return (
            python_ref.qk_norm_rope_append(*inputs, k, v, q_weight=q_weight, k_weight=k_weight, eps=1e-6),
            k,
            v,
        )


def check_rope(module: ModuleType, problem: Rope | None = None) -> None:
    problem = Rope() if problem is None else problem
    got = problem.run(module.qk_norm_rope_append)
    peer = problem.run(python_ref.qk_norm_rope_append)
    for name, a, b, c in zip(("q", "k_cache", "v_cache"), got, problem.exact(), peer, strict=True):
        check_close(a, b, c, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "heads, head_dim, page_size", [((8, 2), 128, 16), ((9, 3), 64, 1), ((1, 1), 256, 3), ((3, 1), 80, 64)]
)
def test_rope(heads: tuple[int, int], head_dim: int, page_size: int, norm: bool, dtype: torch.dtype) -> None:
    check_rope(layers, Rope(5, heads, head_dim, page_size, dtype, norm))


def test_rope_at_the_width_of_qwen3_8b() -> None:
    check_rope(layers, Rope(3, (32, 8), 128))


@pytest.mark.compiled
def test_rope_writes_fp8() -> None:
    problem = Rope(cache_dtype=torch.float8_e4m3fn, norm=False)
    problem.qkv[1] *= 1000  # beyond the largest fp8
    got, peer = problem.run(layers.qk_norm_rope_append), problem.run(python_ref.qk_norm_rope_append)
    for a, b in zip(got[1:], peer[1:], strict=True):
        assert torch.equal(a.float().isnan(), b.float().isnan())
        assert torch.equal(a.float().nan_to_num(0.0), b.float().nan_to_num(0.0))


def test_rope_skips_slots_beyond_the_cache_and_clamps_positions() -> None:
    problem = Rope()
    problem.slots[0] = problem.num_pages * problem.page_size
    problem.positions[1] = 1000
    q, k, _ = problem.run(layers.qk_norm_rope_append)
    assert q[:2].isfinite().all()
    assert k.isfinite().flatten(0, 1).all(-1).all(-1).sum() == 3


def test_rope_row_bits_depend_on_the_row_alone() -> None:
    problem = Rope(40)
    q, k, v = problem.run(layers.qk_norm_rope_append)
    for rows in (slice(0, 1), slice(3, 10), slice(39, 40)):
        part_q, part_k, part_v = problem.run(layers.qk_norm_rope_append, rows)
        check_bits(part_q, q[rows])
        for slot in [s for s in problem.slots[rows].tolist() if s >= 0]:
            page, offset = divmod(slot, problem.page_size)
            check_bits(part_k[page, offset], k[page, offset])
            check_bits(part_v[page, offset], v[page, offset])


def test_rope_row_bits_do_not_depend_on_the_layout_of_cache_and_qkv() -> None:
    problem = Rope(9)
    q, k, v = problem.run(layers.qk_norm_rope_append)
    num_pages, page_size, num_kv_heads, head_dim = problem.cache_shape
    nan = problem.cache().flatten()[0]
    head_major = [nan.repeat(num_kv_heads, num_pages, page_size, head_dim) for _ in range(2)]
    odd = [nan.repeat(num_pages, page_size, num_kv_heads, head_dim + 1) for _ in range(2)]
    problem.qkv = torch.cat([problem.qkv, problem.qkv[:, :3]], 1)[:, : problem.qkv.shape[1]]
    for views in ([c.permute(1, 2, 0, 3) for c in head_major], [c[..., 1:] for c in odd]):
        other = problem.run(layers.qk_norm_rope_append, slice(None), *views)
        assert all(same_bits(a, b) for a, b in zip(other, (q, k, v), strict=True))


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
        for check in CHECKS:
            check(layers)


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
    check, old, new = MUTANTS[name]
    check(layers)
    torch.manual_seed(0)
    assert caught(check, mutant(layers, old, new, tmp_path))
