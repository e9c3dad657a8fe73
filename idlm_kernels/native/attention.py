"""strided_attention of backend `cuda`. The kernel: csrc/attention/kernel.cuh.

It takes bf16 and fp16, head_dim up to 256, and caches of the same dtype or of fp8 whose rows are whole vectors of 16
bytes (`refusal`). Every other problem goes to the next backend in line, or is refused where backend `cuda` is forced.
The rule looks at what a model's calls have in common alone, so the rows of a layer never change between the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from idlm_kernels._semaphores import semaphores
from idlm_kernels.native import load
from idlm_kernels.native.gemm import stream_of

_DTYPES = {torch.bfloat16: 0, torch.float16: 1}
_MAX_HEAD_DIM = 256
_VECTOR = 8  # values of 16 bits in 16 bytes
_MIN_FLAGS = 4096  # one for each tile of 64 packed rows

LIMITS = {"strided_attention": "bf16, fp16, caches of fp8 too, head_dim up to 256, rows and strides of whole 16 bytes"}

# CTAs of a launch (0: one on every SM), for tests and tuning. No result depends on it.
max_ctas = 0


def refusal(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """Why the CUDA kernel does not compute attention over these caches; None if it does."""
    if q.dtype not in _DTYPES:
        return f"it takes bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}"
    if k_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        return f"it takes a cache of q's dtype or of float8_e4m3fn, not {str(k_cache.dtype).removeprefix('torch.')}"
    vector = 16 // k_cache.element_size()
    if q.shape[2] > _MAX_HEAD_DIM or q.shape[2] % vector:
        return f"it takes a head_dim that is a multiple of {vector} and at most {_MAX_HEAD_DIM}, not {q.shape[2]}"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.data_ptr() % 16 or any(stride * cache.element_size() % 16 for stride in cache.stride()[:3]):
            return f"it takes a {name} whose address and strides are multiples of 16 bytes"
    return None


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
    """As `idlm_kernels.strided_attention`."""
    if reason := refusal(q, k_cache, v_cache):
        return _next(reason, q)(
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
    stream = stream_of("strided_attention", q.device)
    y = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    num_rows, num_heads, head_dim = q.shape
    if num_rows == 0:
        return y
    if q.data_ptr() % 16 or any(stride % _VECTOR for stride in q.stride()[:2]):
        q = q.clone(memory_format=torch.contiguous_format)
    module = load()
    params = module.AttentionParams(
        dtype=_DTYPES[q.dtype],
        cache_is_fp8=k_cache.dtype != q.dtype,
        q=q.data_ptr(),
        q_stride_row=q.stride(0),
        q_stride_head=q.stride(1),
        page_table=page_table.data_ptr(),
        page_table_stride=page_table.stride(0),
        seq_lens=seq_lens.data_ptr(),
        query_start_loc=query_start_loc.data_ptr(),
        tree_mask=_address(tree_mask),
        k_scale=_address(k_scale),
        k_scale_stride=_stride(k_scale),
        v_scale=_address(v_scale),
        v_scale_stride=_stride(v_scale),
        out=y.data_ptr(),
        out_stride_row=y.stride(0),
        out_stride_head=y.stride(1),
        lse=_address(lse),
        lse_stride=0 if lse is None else lse.stride(0),
        num_rows=num_rows,
        num_heads=num_heads,
        num_kv_heads=k_cache.shape[2],
        head_dim=head_dim,
        batch=seq_lens.shape[0],
        num_pages=k_cache.shape[0],
        page_size=k_cache.shape[1],
        max_pages=page_table.shape[1],
        max_query_len=min(max_query_len, num_rows),
        window=min(window, 2**31 - 1),
        sm_scale=1 / math.sqrt(head_dim) if sm_scale is None else sm_scale,
        max_ctas=max_ctas,
    )
    params.k_cache, params.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
    params.k_stride_page, params.k_stride_slot, params.k_stride_head, _ = k_cache.stride()
    params.v_stride_page, params.v_stride_slot, params.v_stride_head, _ = v_cache.stride()
    scratch = torch.empty(module.attention_scratch_bytes(params), dtype=torch.uint8, device=q.device)
    flags = _flags(module.attention_flag_words(params), q.device)
    params.scratch, params.flags = scratch.data_ptr(), flags.data_ptr()
    module.strided_attention(params, stream, True)
    return y


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _stride(scale: Tensor | None) -> int:
    """Between the scales of KV heads; 0 where there is one for all."""
    return 0 if scale is None or scale.dim() == 0 else 1


def _flags(count: int, device: torch.device) -> Tensor:
    """`count` words that are 0 between launches, and a few more: one set serves most launches."""
    return semaphores("attention", max(_MIN_FLAGS, 1 << max(count - 1, 0).bit_length()), torch.int32, device)


def _next(reason: str, q: Tensor):  # type: ignore[no-untyped-def]
    """The next backend in line. Raises ValueError where this one is forced."""
    from idlm_kernels.ops._dispatch import current_backend, next_implementation

    if current_backend() == "cuda":
        raise ValueError(f"strided_attention: backend 'cuda' does not compute this: {reason}; use backend 'triton'")
    return next_implementation("cuda", "strided_attention", q.device.type)
