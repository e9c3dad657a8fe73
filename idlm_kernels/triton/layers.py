"""rms_norm, silu_and_mul, embed and qk_norm_rope_append: shapes and launches. The kernels, and what they compute how,
are in layers_kernel.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

import python_ref
from idlm_kernels.triton.common import VECTOR_BYTES, is_aligned, launch, next_power_of_2
from idlm_kernels.triton.layers_kernel import (
    _embed_kernel,
    _qk_norm_rope_append_kernel,
    _rms_norm_kernel,
    _silu_and_mul_kernel,
)

kBlockColumns = 1024  # of the elementwise kernels: 16 bytes per thread and access at 4 warps
kBlockHeads = 8


def _aligned_copy(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows start at multiples of 16 bytes as far as its width allows."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _fills_vectors(width: int, dtype: torch.dtype) -> bool:
    return width * dtype.itemsize % VECTOR_BYTES == 0


def _alignment(vectors: bool) -> int:
    """Bytes of which every row's address is a multiple, as kernels are told it.

    They do not leave it to Triton's own look at each argument: the layout of a reduction follows from it, so it has to
    be a function of width and dtype alone.
    """
    return VECTOR_BYTES if vectors else 1


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `idlm_kernels.rms_norm`."""
    if torch.float64 in (x.dtype, weight.dtype):
        return python_ref.rms_norm(x, weight, eps, residual=residual, out=out)
    num_rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if num_rows == 0 or width == 0:
        return y
    vectors = _fills_vectors(width, x.dtype) and _fills_vectors(width, weight.dtype)
    if vectors and not is_aligned(x, weight, residual, y):
        # An odd view of aligned data must give the bits of an aligned one: it is copied to where its layout is usual.
        sum_ = None if residual is None else _aligned_copy(residual)
        y.copy_(rms_norm(_aligned_copy(x), _aligned_copy(weight), eps, residual=sum_))
        if residual is not None and sum_ is not None:
            residual.copy_(sum_)
        return y
    block = next_power_of_2(width)
    launch(
        _rms_norm_kernel,
        (num_rows,),
        x,
        x,
        residual,
        weight,
        y,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        eps,
        H=width,
        BLOCK_H=block,
        HAS_RESIDUAL=residual is not None,
        ALIGNMENT=_alignment(vectors),
        num_warps=min(max(block // 512, 1), 16),
    )
    return y


def silu_and_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `idlm_kernels.silu_and_mul`."""
    if x.dtype == torch.float64:
        return python_ref.silu_and_mul(x, out=out)
    num_rows, width = x.shape[0], x.shape[1] // 2
    y = x.new_empty(num_rows, width) if out is None else out
    if num_rows == 0 or width == 0:
        return y
    launch(
        _silu_and_mul_kernel,
        (num_rows * triton.cdiv(width, kBlockColumns),),
        x,
        x,
        y,
        x.stride(0),
        y.stride(0),
        F=width,
        BLOCK_F=kBlockColumns,
        ALIGNMENT=_alignment(_fills_vectors(width, x.dtype) and is_aligned(x, y)),
        num_warps=4,
    )
    return y


def embed(
    ids: Tensor,
    weight: Tensor,
    *,
    is_mask: Tensor,
    mask_embedding: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.embed`."""
    dtype = weight.dtype if dtype is None else dtype
    if torch.float64 in (dtype, weight.dtype, None if mask_embedding is None else mask_embedding.dtype):
        return python_ref.embed(ids, weight, is_mask=is_mask, mask_embedding=mask_embedding, dtype=dtype, out=out)
    num_rows, width = ids.shape[0], weight.shape[1]
    y = weight.new_empty(num_rows, width, dtype=dtype) if out is None else out
    if num_rows == 0 or width == 0:
        return y
    launch(
        _embed_kernel,
        (num_rows * triton.cdiv(width, kBlockColumns),),
        weight,
        ids,
        weight,
        is_mask,
        mask_embedding,
        y,
        weight.shape[0],
        weight.stride(0),
        y.stride(0),
        H=width,
        BLOCK_H=kBlockColumns,
        HAS_MASK_EMBEDDING=mask_embedding is not None,
        ALIGNMENT=_alignment(is_aligned(weight, mask_embedding, y)),
        num_warps=4,
    )
    return y


def qk_norm_rope_append(
    qkv: Tensor,
    positions: Tensor,
    rotary: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.qk_norm_rope_append`."""
    if torch.float64 in (
        qkv.dtype,
        q_weight is not None and q_weight.dtype,
        k_weight is not None and k_weight.dtype,
    ):
        return python_ref.qk_norm_rope_append(
            qkv,
            positions,
            rotary,
            slot_mapping,
            k_cache,
            v_cache,
            q_weight=q_weight,
            k_weight=k_weight,
            eps=eps,
            out=out,
        )
    num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
    num_rows = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    y = qkv.new_empty(num_rows, num_heads, head_dim) if out is None else out
    if num_rows == 0:
        return y
    vectors = _fills_vectors(head_dim // 2, qkv.dtype)
    if vectors:
        qkv = _aligned_copy(qkv)
    block_half = next_power_of_2(head_dim // 2)
    launch(
        _qk_norm_rope_append_kernel,
        (num_rows * triton.cdiv(num_heads + 2 * num_kv_heads, kBlockHeads),),
        qkv,
        qkv,
        positions,
        rotary,
        slot_mapping,
        k_cache,
        v_cache,
        q_weight,
        k_weight,
        y,
        eps,
        rotary.shape[0],
        num_pages * page_size,
        page_size,
        qkv.stride(0),
        rotary.stride(0),
        y.stride(0),
        y.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        HQ=num_heads,
        HKV=num_kv_heads,
        D=head_dim,
        BLOCK_HEADS=kBlockHeads,
        BLOCK_HALF=block_half,
        HAS_NORM=q_weight is not None,
        ALIGNMENT=_alignment(vectors),
        STORE_ALIGNMENT=_alignment(vectors and is_aligned(y, k_cache, v_cache)),
        num_warps=max(kBlockHeads * block_half * qkv.element_size() // (32 * VECTOR_BYTES), 1),
    )
    return y
