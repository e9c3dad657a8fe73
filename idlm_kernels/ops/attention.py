"""Strided-causal paged attention.

Contract: design section 5.1. The bits of a row depend on its query and on the slots that it sees, in slot order, and
on nothing else: not on other rows or requests, page size, page placement, or how the work was split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idlm_kernels._deprecated import dropped, renamed
from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._dispatch import implementation, traced
from idlm_kernels.ops._register import register

MAX_TREE_ROWS = 64  # bits of a tree mask


@dropped("workspace")
@renamed(tail_mask="tree_mask")
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
    """Attention of the rows of a step over a paged KV cache that holds the step's own K and V already.

    A request with m rows and length seq_len has written them at slots seq_len - m .. seq_len - 1. Without `tree_mask`
    row i sees slots <= seq_len - m + i (chain plans, AR, prefill chunks of any length). With it, a row sees every
    slot < seq_len - m, and step slot seq_len - m + j iff bit j of its mask is set (quadratic plans, draft trees).

    Args:
        q: [T, Hq, D], fp16, bf16, fp32 or fp64; D of any size, by GPU kernels up to 256.
        k_cache, v_cache: [num_pages, page_size, Hkv, D], q's dtype (or fp8 e4m3), Hq a multiple of Hkv, any page
            size from 1, any strides with a unit inner one: views of other engines' caches pass unchanged.
        page_table: int32 [B, max_pages]; slot s of request b is in page page_table[b, s // page_size].
        seq_lens: int32 [B], tokens including this step's rows; 0 marks a padded request (a no-op).
        query_start_loc: int32 [B + 1], rising from 0; rows of request b are query_start_loc[b] : [b + 1].
            Rows from query_start_loc[B] on are padding: their output is 0, their lse -inf.
        tree_mask: int64 [T] read as 64 bits, for requests of at most 64 rows; excludes `window`.
        max_query_len: the largest number of rows of a request, known on the host. Rows of a request from this one on
            are treated as padding.
        sm_scale: factor of q K^T; 1 / sqrt(D) when None.
        window: with w >= 0 a row also sees nothing older than w slots before its own.
        k_scale, v_scale: fp32 [] or [Hkv], multiply K and V: all of it, or that of each KV head.
        out: [T, Hq, D], q's dtype; allocated when None.
        lse: fp32 [T, Hq], receives the natural log of the softmax denominator.

    Returns:
        [T, Hq, D] in q's dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Source: I-DLM, arXiv 2604.11035 (visibility: design section 3); paging: Kwon et al., arXiv 2309.06180.

    Example: two requests of 4 and 1 rows over one cache of ones; attention over equal values gives that value.

        >>> q, cache = torch.randn(5, 8, 64), torch.ones(32, 16, 2, 64)  # 8 heads, 2 KV heads, pages of 16 tokens
        >>> page_table = torch.arange(32, dtype=torch.int32).view(2, 16)
        >>> seq_lens, query_start_loc = torch.tensor([100, 37]).int(), torch.tensor([0, 4, 5]).int()
        >>> lse = torch.empty(5, 8)
        >>> out = strided_attention(
        ...     q, 0 * cache, cache, page_table, seq_lens, query_start_loc, max_query_len=4, lse=lse)
        >>> out.shape, bool((out == 1).all())
        (torch.Size([5, 8, 64]), True)
        >>> lse[:, 0].exp().round()  # keys of zeros: e^lse counts the slots that each row sees
        tensor([ 97.,  98.,  99., 100.,  37.])
    """
    op, device = "strided_attention", check.device_of("strided_attention", "q", q)
    check.tensor(op, "q", q, (None, None, None), check.FLOATS, device)
    num_rows, num_heads, head_dim = q.shape
    check.tensor(op, "k_cache", k_cache, (None, None, None, head_dim), (q.dtype, *check.FP8), device)
    check.like_k_cache(op, v_cache, k_cache, device)
    num_kv_heads = k_cache.shape[2]
    if min(k_cache.shape) == 0:
        raise ValueError(f"{op}: k_cache has shape {list(k_cache.shape)}, wanted no empty dimension")
    if num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: q has {num_heads} heads, wanted a positive multiple of the cache's {num_kv_heads}")
    check.tensor(op, "seq_lens", seq_lens, (None,), check.INT32, device)
    batch = seq_lens.shape[0]
    check.tensor(op, "query_start_loc", query_start_loc, (batch + 1,), check.INT32, device)
    check.tensor(op, "page_table", page_table, (batch, None), check.INT32, device)
    check.positive(op, "max_query_len", max_query_len)
    check.positive(op, "window", window, -1)
    if sm_scale is not None:
        check.number(op, "sm_scale", sm_scale)
    if tree_mask is not None:
        check.tensor(op, "tree_mask", tree_mask, (num_rows,), check.INT64, device)
        if window >= 0:
            raise ValueError(f"{op}: window = {window} with a tree_mask, wanted one of the two")
        if max_query_len > MAX_TREE_ROWS:
            raise ValueError(f"{op}: max_query_len is {max_query_len}, wanted at most {MAX_TREE_ROWS} with a tree_mask")
    check.kv_scale(op, "k_scale", k_scale, num_kv_heads, device)
    check.kv_scale(op, "v_scale", v_scale, num_kv_heads, device)
    if out is not None:
        check.tensor(op, "out", out, (num_rows, num_heads, head_dim), (q.dtype,), device)
    if lse is not None:
        check.tensor(op, "lse", lse, (num_rows, num_heads), (torch.float32,), device)
    check.all_writable(op, (("out", out), ("lse", lse)), q, k_cache, v_cache)
    if traced(q):
        args = (q, k_cache, v_cache, page_table, seq_lens, query_start_loc, tree_mask, max_query_len, sm_scale, window)
        if out is None and lse is None:
            return torch.ops.idlm.strided_attention(*args, k_scale, v_scale)[0]
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        torch.ops.idlm.strided_attention_out(*args, k_scale, v_scale, out, lse)
        return out
    return implementation(op, device.type)(
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


def _run(q: Tensor, *, out: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor] | None:
    """The backend, with an lse for the functional op."""
    function = implementation("strided_attention", q.device.type)
    if out is not None:
        function(q, out=out, **arguments)
        return None
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return function(q, lse=lse, **arguments), lse


register(
    "strided_attention",
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, Tensor query_start_loc, *, "
    "Tensor? tree_mask, SymInt max_query_len, float? sm_scale, SymInt window, Tensor? k_scale, Tensor? v_scale",
    lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)),
    out="Tensor! out, Tensor!? lse",
    returns="(Tensor, Tensor)",
    run=_run,
)
