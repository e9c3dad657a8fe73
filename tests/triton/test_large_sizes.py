"""Offsets and grids beyond 32 and 16 bits: strides of 2^31 elements, and more requests than an axis of a grid takes.

The memory is reserved and hardly touched: a few MB of it are ever there.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from idlm_kernels.testing import Call, check_bits, same_bits
from idlm_kernels.triton import attention, gemm, layers, rerank, sampling
from python_ref import DraftDistributions
from tests.ref.test_rerank import distributions_for
from tests.triton.test_attention import attend
from tests.triton.test_rejection import Chain
from tests.triton.test_rerank import mixed

pytestmark = pytest.mark.compiled

FAR = 2**30  # elements: two of these strides do not fit 32 bits
MAP_NORESERVE = 0x4000


def sparse(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A bf16 tensor of zeros with these strides, in memory that is there once it is written."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * reach, flags=flags)
    return torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(shape, strides)


def like(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    return sparse(tuple(values.shape), strides).copy_(values)


def check_far(call: Call, **far: Tensor) -> None:
    """The bits of the call with some of its tensors replaced: by the same values far apart."""
    wanted, left = call.run(attention.strided_attention)
    check_bits(attention.strided_attention(**{**call.arguments, **far}), wanted)
    check_bits(call["lse"], left["lse"])


def test_slots_of_a_page_that_are_far_apart() -> None:
    call = attend((259, 40), (7, 3), page_size=260)
    caches = {name: call[name] for name in ("k_cache", "v_cache")}
    # 259 * 2^23 > 2^31
    check_far(call, **{name: like(x, (64, 2**23, 64 * x.shape[0], 1)) for name, x in caches.items()})


@pytest.mark.parametrize("which", ["k_cache", "v_cache", "q", "out"])
def test_heads_that_are_far_apart(which: str) -> None:
    call = attend((40,), (4,), heads=(3, 3, 64))
    strides = (16 * 64, 64, FAR, 1) if "cache" in which else (64, FAR, 1)
    if which == "out":
        check_far(call, out=sparse(tuple(call["q"].shape), strides))
    else:
        check_far(call, **{which: like(call[which], strides)})


@pytest.mark.parametrize("which", ["k", "v", "out"])
def test_append_to_heads_that_are_far_apart(which: str) -> None:
    where = torch.tensor([1, 3])
    qkv = torch.randn(2, 9 * 64).bfloat16()
    table = torch.randn(8, 64)
    near = [torch.zeros(2, 2, 3, 64, dtype=torch.bfloat16) for _ in range(2)]
    wanted = layers.qk_norm_rope_append(qkv, where, table, where, *near)
    far = [sparse((2, 2, 3, 64), (128, 64, FAR, 1)) if which == name else torch.zeros_like(near[0]) for name in "kv"]
    out = sparse((2, 3, 64), (64, FAR, 1)) if which == "out" else None
    got = layers.qk_norm_rope_append(qkv, where, table, where, *far, out=out)
    assert same_bits(got, wanted) and all(same_bits(a, b) for a, b in zip(far, near, strict=True))


def test_distribution_that_are_far_apart() -> None:
    """Drafts outermost, as of a state [K, B, V]."""
    chain = Chain(batch=2)
    for _ in range(2):
        arguments = chain.arguments()
        near = copy.deepcopy(chain.q)
        far = DraftDistributions(like(near.logits, (chain.vocab, FAR, 1)), near.cut.clone(), near.log_norm.clone())
        wanted = sampling.verify_accept(**arguments, draft_dists=near)
        got = sampling.verify_accept(**arguments, draft_dists=far)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        check_bits(far.logits, near.logits)
        chain.follow(arguments, wanted, near)


def test_distribution_of_reranked_drafts_that_are_far_apart() -> None:
    args = mixed(num_spec_tokens=3, batch=2)
    near = distributions_for(args)
    far = DraftDistributions(like(near.logits, (near.logits.shape[2], FAR, 1)), near.cut.clone(), near.log_norm.clone())
    wanted = rerank.rerank_drafts(**args, draft_dists=near)
    assert torch.equal(rerank.rerank_drafts(**args, draft_dists=far), wanted)
    check_bits(far.logits, near.logits)


def test_more_requests_than_an_axis_of_a_grid_takes() -> None:
    """8192 x 8 CTAs in the axis of requests and KV heads."""
    batch = 8192
    q, cache = torch.randn(2, 8, 64).bfloat16(), torch.randn(2, 4, 8, 64).bfloat16()
    lengths = torch.zeros(batch, dtype=torch.int32)
    start = torch.zeros(batch + 1, dtype=torch.int32)
    lengths[5], lengths[-1] = 3, 4
    start[6:], start[-1] = 1, 2
    table = torch.ones(batch, 1, dtype=torch.int32)
    got = attention.strided_attention(q, cache, cache, table, lengths, start, max_query_len=1)
    few = (cache, cache, table[:2], torch.tensor([3, 4]).int(), torch.tensor([0, 1, 2]).int())
    check_bits(got, attention.strided_attention(q, *few, max_query_len=1))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[tuple[int, ...]]:
    grids: list[tuple[int, ...]] = []
    for module in (attention, gemm, layers, rerank, sampling):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *rest, **kwargs: grids.append(grid))
    monkeypatch.setattr("idlm_kernels.triton.perturb.launch", lambda kernel, grid, *rest, **kwargs: grids.append(grid))
    run()
    return grids


def _attend(rows: int, heads: int, batch: int) -> Any:
    cache, ints = meta(1, 16, heads, 64), meta(batch, 1, dtype=torch.int32)
    q = meta(rows, heads, 64)
    start = meta(batch + 1, dtype=torch.int32)
    return attention.strided_attention(q, cache, cache, ints, ints[:, 0], start, max_query_len=rows)


def _append(heads: int) -> Any:
    cache, ints = meta(1, 16, heads, 64), meta(1, dtype=torch.int64)
    return layers.qk_norm_rope_append(
        meta(1, 3 * heads * 64), ints, meta(8, 64, dtype=torch.float32), ints, cache, cache
    )


def _rerank(batch: int) -> Any:
    ints, longs = meta(batch, dtype=torch.int32), meta(batch, dtype=torch.int64)
    floats, drafts = meta(batch, dtype=torch.float32), meta(batch, 1, dtype=torch.int64)
    request = (ints, longs, ints, drafts, ints, floats, ints, floats, floats, longs)
    weights = (meta(99, 64), meta(99, 64), meta(4, 64), meta(4, 64), meta(4, 4), meta(64, 4))
    return rerank.rerank_drafts(meta(batch, 99), meta(batch, 64), *request, *weights, 99, -1)


HUGE: dict[str, Callable[[], Any]] = {
    "attention, requests": lambda: _attend(1, 8, 10_000),
    "attention, rows": lambda: _attend(5_000_000, 1, 1),
    "attention, heads": lambda: _attend(1, 70_000, 1),
    "silu_and_mul": lambda: layers.silu_and_mul(meta(1, 2**28)),
    "embed": lambda: layers.embed(
        meta(1, dtype=torch.int64), meta(9, 2**27), is_mask=meta(1, dtype=torch.bool), mask_embedding=meta(2**27)
    ),
    "qk_norm_rope_append": lambda: _append(200_000),
    "linear": lambda: gemm.linear(meta(10_000_000, 64), meta(64, 64)),
    "linear, wide": lambda: gemm.linear(meta(1, 64), meta(10_000_000, 64)),
    "rerank_drafts": lambda: _rerank(1_000_000),
    "sample_rows": lambda: sampling.sample_rows(
        meta(100_000, 64),
        meta(100_000, dtype=torch.int64),
        *(meta(100_000, dtype=d) for d in (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)),
        64,
        -1,
    ),
}


@pytest.mark.parametrize("op", HUGE)
def test_the_axes_of_a_grid_that_take_16_bits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = launches_of(monkeypatch, HUGE[op])
    assert grids and max(math.prod(grid) for grid in grids) > 65_535, "no large grid: the case checks nothing"
    for grid in grids:
        assert grid[0] < 2**31 and all(axis <= 65_535 for axis in grid[1:]), grid
