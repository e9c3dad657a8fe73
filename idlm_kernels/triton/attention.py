"""strided_attention: tiles, splits and launches. The kernels, and what they compute how, are in attention_kernel.py."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

import python_ref
from idlm_kernels._semaphores import semaphores
from idlm_kernels.triton.attention_kernel import PagedCache, Rows, Shape, _attention_kernel
from idlm_kernels.triton.common import launch, next_power_of_2

kChunk = 256  # slots; frozen: it decides the bits
kTargetCtas = 264  # 2 on each of the 132 SMs of an H100, as many as registers admit up to head_dim 128
kMinLargeCtas = 66  # prefill chunks that leave at least half of the SMs a tile of 128 packed rows take such tiles
kMaxWorkspaceBytes = 256 << 20
kMaxSlots = 2**31 - 2 * kChunk  # of a request: ends of chunks are 32-bit numbers


@dataclass(frozen=True)
class AttentionConfig:
    """block_m packed rows by block_kv slots a tile."""

    block_m: int
    block_kv: int
    num_stages: int
    num_warps: int


def attention_config(head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """The tiles decide the bits of a row, so nothing else may enter here. Chosen for no spills in loops.

    The stages change no bit. Triton spends some on the page index, whose load feeds those of K and V: with 3 or 4 a
    tile is waited for as soon as it is requested, 5 leave one further tile under way at the wait, 7 two. Counted in
    the PTX (`copies_in_flight` in bench/budgets/triton.json), not timed. The shared memory of 7 costs no CTA on an SM.
    """
    if dtype == torch.float32:
        return AttentionConfig(block_m=16, block_kv=32, num_stages=2, num_warps=4)
    if head_dim <= 64:
        return AttentionConfig(block_m=64, block_kv=64, num_stages=7, num_warps=4)
    return AttentionConfig(block_m=64, block_kv=32, num_stages=7, num_warps=4 if head_dim <= 128 else 8)


def large_tiles(config: AttentionConfig) -> AttentionConfig | None:
    """Twice the rows by twice the warps, so that prefill reads K and V half as often. A warp computes 16 rows with the
    same instructions either way: the bits are the same. None where four warps are not enough for 64 rows."""
    if config.block_m != 64 or config.num_warps != 4:
        return None
    return dataclasses.replace(config, block_m=128, num_warps=8)


def num_splits(ctas: int, num_chunks: int, workspace_bytes: int) -> int:
    """How many CTAs share the chunks of one row tile, where there are tiles for `ctas` CTAs of 4 warps. No bit depends
    on it."""
    if num_chunks == 1 or 2 * ctas > kTargetCtas or workspace_bytes > kMaxWorkspaceBytes:
        return 1
    return min(num_chunks, kTargetCtas // ctas)


def index_bits(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> int:
    """Of the slot within a page and of the head. 64 bits only where a product with a stride needs them, since they take
    registers; rows and pages always have them."""
    strided = [(cache.shape[i], cache.stride(i)) for cache in (k_cache, v_cache) for i in (1, 2)]
    strided += [(x.shape[1], x.stride(1)) for x in (q, out)]
    return 64 if any((size - 1) * stride >= 2**31 for size, stride in strided) else 32


def strided_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    tree_mask: Tensor | None = None,
    max_query_len: int,
    sm_scale: float | None = None,
    window: int = -1,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.strided_attention`."""
    num_rows, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    group = num_heads // num_kv_heads
    config = attention_config(head_dim, q.dtype)
    if q.dtype == torch.float64 or head_dim > 256 or group > config.block_m:
        return python_ref.strided_attention(
            q,
            k_cache,
            v_cache,
            page_table,
            seq_lens,
            query_start_loc,
            tree_mask=tree_mask,
            max_query_len=max_query_len,
            sm_scale=sm_scale,
            window=window,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
            lse=lse,
        )
    y = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if num_rows == 0:
        return y
    batch, max_slots = seq_lens.shape[0], min(page_table.shape[1] * page_size, kMaxSlots)
    max_query_len = min(max_query_len, num_rows)
    window = -1 if window >= max_slots else window
    num_chunks = max(triton.cdiv(max_slots, kChunk), 1)
    large = large_tiles(config)
    if large and triton.cdiv(max_query_len * group, large.block_m) * batch * num_kv_heads >= kMinLargeCtas:
        config = large if max_query_len * group > config.block_m else config
    row_tiles = triton.cdiv(max_query_len * group, config.block_m)
    chunk_floats = num_rows * num_heads * num_chunks * (head_dim + 2)
    ctas = max(row_tiles * batch * num_kv_heads * config.num_warps // 4, 1)
    splits = num_splits(ctas, num_chunks, 4 * chunk_floats)
    scratch = (num_rows, num_heads, num_chunks) if splits > 1 else (0, 0, 0)
    chunk_o = q.new_empty(*scratch, head_dim, dtype=torch.float32)
    chunk_ml = q.new_empty(*scratch, 2, dtype=torch.float32)
    meetings = semaphores("meetings", kTargetCtas // 2, torch.int64, q.device) if splits > 1 else None
    launch(
        _attention_kernel,
        (row_tiles * (batch + 1) * num_kv_heads, splits),
        q,
        Rows(q, *q.stride()[:2]),
        PagedCache(k_cache, v_cache, k_scale, v_scale, *k_cache.stride()[:3], *v_cache.stride()[:3]),
        Rows(y, *y.stride()[:2]),
        chunk_o,
        chunk_ml,
        meetings,
        page_table,
        seq_lens,
        query_start_loc,
        tree_mask,
        lse,
        row_tiles,
        max_query_len,
        num_rows,
        batch,
        num_pages,
        max_slots,
        num_chunks,
        1 / math.sqrt(head_dim) if sm_scale is None else sm_scale,
        page_table.stride(0),
        0 if lse is None else lse.stride(0),
        shape=Shape(
            HKV=num_kv_heads,
            GROUP=group,
            D=head_dim,
            PAGE_SIZE=page_size,
            CHUNK=kChunk,
            BLOCK_M=config.block_m,
            BLOCK_KV=config.block_kv,
            BLOCK_D=max(next_power_of_2(head_dim), 16),
            SPLITS=splits,
            WINDOW=window,
            HAS_TAIL=tree_mask is not None,
            K_SCALES=0 if k_scale is None else k_scale.numel(),
            V_SCALES=0 if v_scale is None else v_scale.numel(),
            HAS_LSE=lse is not None,
            SAME_STRIDES=k_cache.stride() == v_cache.stride(),
            NUM_STAGES=config.num_stages,
            THREADS=32 * config.num_warps,
            INDEX_BITS=index_bits(q, k_cache, v_cache, y),
        ),
        num_warps=config.num_warps,
    )
    return y
