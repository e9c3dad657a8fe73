"""The per-row ops of a transformer step: rms_norm, qk_norm_rope_append, silu_and_mul, embed.

Contract: design section 5.4. Every one is row-invariant: the bits of a row depend on that row alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._register import register, run_op


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """RMS norm over the last dimension, optionally after a residual add: one pass over x.

    Without `residual`: out = x * rsqrt(mean(x^2) + eps) * weight. With it: residual += x **in place**, then
    out = norm(residual). Sums run in fp32, each result is rounded once.

    Args:
        x: [T, H], fp16, bf16, fp32 or fp64.
        weight: [H], any of these dtypes.
        eps: added to the mean square.
        residual: [T, H], x's dtype; updated.
        out: [T, H], x's dtype; allocated when None. May be x itself.

    Returns:
        [T, H] in x's dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.

    Example:

        >>> rms_norm(torch.tensor([[3.0, -3.0], [0.5, 0.5]]), torch.tensor([1.0, 2.0]), 0.0)
        tensor([[ 1., -2.],
                [ 1.,  2.]])
    """
    op, device = "rms_norm", check.device_of("rms_norm", "x", x)
    check.tensor(op, "x", x, (None, None), check.FLOATS, device)
    check.tensor(op, "weight", weight, (x.shape[1],), check.FLOATS, device)
    check.number(op, "eps", eps)
    if residual is not None:
        check.tensor(op, "residual", residual, tuple(x.shape), (x.dtype,), device)
    if out is not None:
        check.tensor(op, "out", out, tuple(x.shape), (x.dtype,), device)
        check.writable(op, "out", out, weight)
    if residual is not None:
        check.writable(op, "residual", residual, x, weight, out)
    return run_op(op, (x, weight, eps), {"residual": residual}, out)


def silu_and_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(x[:, :F]) * x[:, F:], the gated activation of the feed-forward block, in fp32 with one rounding.

    Args:
        x: [T, 2F], fp16, bf16, fp32 or fp64.
        out: [T, F], x's dtype; allocated when None.

    Returns:
        [T, F] in x's dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.

    Example:

        >>> silu_and_mul(torch.tensor([[0.0, 2.0, 5.0, 3.0]]))
        tensor([[0.0000, 5.2848]])
    """
    op, device = "silu_and_mul", check.device_of("silu_and_mul", "x", x)
    check.tensor(op, "x", x, (None, None), check.FLOATS, device)
    if x.shape[1] % 2:
        raise ValueError(f"{op}: x has {x.shape[1]} columns, wanted an even number (gate and up)")
    if out is not None:
        check.tensor(op, "out", out, (x.shape[0], x.shape[1] // 2), (x.dtype,), device)
        check.writable(op, "out", out, x)
    return run_op(op, (x,), {}, out)


def embed(
    ids: Tensor,
    weight: Tensor,
    *,
    is_mask: Tensor,
    mask_embedding: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of the embedding table; `mask_embedding` on MASK rows, for which no token id has to stand.

    Args:
        ids: int64 [T]. Ids outside [0, V) give a row of zeros.
        weight: [V, H], fp16, bf16, fp32 or fp64.
        is_mask: bool, uint8 or int32 [T]; not 0 marks a MASK row.
        mask_embedding: [H] in a float dtype; None: MASK rows are looked up by their id as all others.
        dtype: of the result; weight's when None.
        out: [T, H] in `dtype`; allocated when None.

    Returns:
        [T, H] in `dtype`.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Example: the second row is a MASK row, whatever its id.

        >>> table = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        >>> is_mask, mask_embedding = torch.tensor([False, True]), torch.tensor([7.0, 8.0])
        >>> embed(torch.tensor([1, 1]), table, is_mask=is_mask, mask_embedding=mask_embedding)
        tensor([[2., 2.],
                [7., 8.]])
    """
    op, device = "embed", check.device_of("embed", "ids", ids)
    check.tensor(op, "ids", ids, (None,), check.INT64, device)
    check.tensor(op, "weight", weight, (None, None), check.FLOATS, device)
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight has no rows")
    check.tensor(op, "is_mask", is_mask, (ids.shape[0],), check.GATES, device)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in check.FLOATS:
        raise TypeError(f"{op}: dtype is {dtype}, wanted a float dtype")
    if mask_embedding is not None:
        check.tensor(op, "mask_embedding", mask_embedding, (weight.shape[1],), check.FLOATS, device)
    if out is not None:
        check.tensor(op, "out", out, (ids.shape[0], weight.shape[1]), (dtype,), device)
        check.writable(op, "out", out, ids, weight, mask_embedding)
    return run_op(op, (ids, weight), {"is_mask": is_mask, "mask_embedding": mask_embedding, "dtype": dtype}, out)


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
    """Norm q and k per head, rotate them, write k and v to the paged cache: all between qkv and attention.

    The rotation takes pairs (x_i, x_{i + D/2}) (the half-split convention of Hugging Face checkpoints) by the angle
    of the row's *position*; the cache is written at the row's *slot*. The two differ on MASK rows.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], fp16, bf16, fp32 or fp64: q heads, k heads, v heads.
        positions: int32 or int64 [T], rows of `rotary`.
        rotary: fp32 [P, D], cosines then sines (`rotary_table`).
        slot_mapping: int64 [T], page * page_size + offset; -1: the row is not written. No slot twice.
        k_cache, v_cache: [num_pages, page_size, Hkv, D], any strides with a unit inner one; updated.
        q_weight, k_weight: [D], RMS norm per head before the rotation; both or neither.
        eps: of these norms.
        out: [T, Hq, D], qkv's dtype; allocated when None.

    Returns:
        The rotated q, [T, Hq, D] in qkv's dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, stride or device is not the one above.

    Source: Su et al., "RoFormer", arXiv 2104.09864; per-head QK norm as in Qwen3, arXiv 2505.09388.

    Example: one query head and one KV head of width 2, at positions 0 and 1; the second row is written to slot 5.

        >>> from idlm_kernels import rotary_table
        >>> qkv = torch.tensor([[1.0, 0.0, 3.0, 4.0, 5.0, 6.0]]).repeat(2, 1)  # q, k, v
        >>> k_cache, v_cache = torch.zeros(2, 4, 1, 2), torch.zeros(2, 4, 1, 2)  # pages of 4 tokens
        >>> qk_norm_rope_append(
        ...     qkv, torch.tensor([0, 1]), rotary_table(torch.ones(1), 8), torch.tensor([0, 5]), k_cache, v_cache)
        tensor([[[1.0000, 0.0000]],
        <BLANKLINE>
                [[0.5403, 0.8415]]])
        >>> k_cache[0, 0], v_cache[1, 1]
        (tensor([[3., 4.]]), tensor([[5., 6.]]))
    """
    op, device = "qk_norm_rope_append", check.device_of("qk_norm_rope_append", "qkv", qkv)
    check.tensor(op, "qkv", qkv, (None, None), check.FLOATS, device)
    num_rows, width = qkv.shape
    cache_dtypes = (qkv.dtype, *check.FP8)
    check.tensor(op, "k_cache", k_cache, (None, None, None, None), cache_dtypes, device)
    check.like_k_cache(op, v_cache, k_cache, device)
    num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
    if min(num_pages, page_size, num_kv_heads, head_dim) == 0 or head_dim % 2:
        raise ValueError(f"{op}: k_cache has shape {list(k_cache.shape)}, wanted no empty dimension and an even D")
    if width % head_dim or width // head_dim <= 2 * num_kv_heads:
        raise ValueError(
            f"{op}: qkv has {width} columns, wanted (Hq + 2 * {num_kv_heads}) * {head_dim} with Hq >= 1 for this cache"
        )
    num_heads = width // head_dim - 2 * num_kv_heads
    check.tensor(op, "positions", positions, (num_rows,), (torch.int32, torch.int64), device)
    check.tensor(op, "rotary", rotary, (None, head_dim), (torch.float32,), device)
    check.tensor(op, "slot_mapping", slot_mapping, (num_rows,), check.INT64, device)
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: give q_weight and k_weight both or neither")
    if q_weight is not None and k_weight is not None:
        check.tensor(op, "q_weight", q_weight, (head_dim,), check.FLOATS, device)
        check.tensor(op, "k_weight", k_weight, (head_dim,), check.FLOATS, device)
    check.number(op, "eps", eps)
    if out is not None:
        check.tensor(op, "out", out, (num_rows, num_heads, head_dim), (qkv.dtype,), device)
    inputs = (qkv, positions, rotary, slot_mapping, q_weight, k_weight)
    check.all_writable(op, (("k_cache", k_cache), ("v_cache", v_cache), ("out", out)), *inputs)
    args = (qkv, positions, rotary, slot_mapping, k_cache, v_cache)
    return run_op(op, args, {"q_weight": q_weight, "k_weight": k_weight, "eps": eps}, out)


register(
    "rms_norm",
    "Tensor x, Tensor weight, float eps, *, Tensor!? residual",
    lambda x, *rest: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
register("silu_and_mul", "Tensor x", lambda x: x.new_empty(x.shape[0], x.shape[1] // 2))
register(
    "embed",
    "Tensor ids, Tensor weight, *, Tensor is_mask, Tensor? mask_embedding, ScalarType dtype",
    lambda ids, weight, is_mask, mask_embedding, dtype: weight.new_empty(ids.shape[0], weight.shape[1], dtype=dtype),
)


def _fake_query(qkv: Tensor, positions: Tensor, rotary: Tensor, slots: Tensor, k_cache: Tensor, *rest: Any) -> Tensor:
    num_kv_heads, head_dim = k_cache.shape[2:]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim)


register(
    "qk_norm_rope_append",
    "Tensor qkv, Tensor positions, Tensor rotary, Tensor slot_mapping, Tensor! k_cache, Tensor! v_cache, *, "
    "Tensor? q_weight, Tensor? k_weight, float eps",
    _fake_query,
)
