"""The per-row ops of a transformer step: rms_norm, qk_norm_rope_append, silu_and_mul, embed.

Contract: design section 5.4. Every one is row-invariant: the bits of a row depend on that row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from idlm_kernels.ops import _checks as check
from idlm_kernels.ops._dispatch import implementation, traced


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
    if traced(x):
        if out is None:
            if residual is None:
                return torch.ops.idlm.rms_norm(x, weight, eps)
            return torch.ops.idlm.add_rms_norm(x, weight, eps, residual)
        torch.ops.idlm.rms_norm_out(x, weight, eps, residual, out)
        return out
    return implementation(op, device.type)(x, weight, eps, residual=residual, out=out)


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
    """
    op, device = "silu_and_mul", check.device_of("silu_and_mul", "x", x)
    check.tensor(op, "x", x, (None, None), check.FLOATS, device)
    if x.shape[1] % 2:
        raise ValueError(f"{op}: x has {x.shape[1]} columns, wanted an even number (gate and up)")
    if out is not None:
        check.tensor(op, "out", out, (x.shape[0], x.shape[1] // 2), (x.dtype,), device)
        check.writable(op, "out", out, x)
    if traced(x):
        if out is None:
            return torch.ops.idlm.silu_and_mul(x)
        torch.ops.idlm.silu_and_mul_out(x, out)
        return out
    return implementation(op, device.type)(x, out=out)


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
    if traced(ids):
        if out is None:
            return torch.ops.idlm.embed(ids, weight, is_mask, mask_embedding, dtype)
        torch.ops.idlm.embed_out(ids, weight, is_mask, mask_embedding, out)
        return out
    return implementation(op, device.type)(
        ids, weight, is_mask=is_mask, mask_embedding=mask_embedding, dtype=dtype, out=out
    )


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
    if traced(qkv):
        args = (qkv, positions, rotary, slot_mapping, k_cache, v_cache, q_weight, k_weight, eps)
        if out is None:
            return torch.ops.idlm.qk_norm_rope_append(*args)
        torch.ops.idlm.qk_norm_rope_append_out(*args, out)
        return out
    return implementation(op, device.type)(
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


# Registration. The functional ops allocate their result, the _out ops write into it and return nothing.


@torch.library.custom_op("idlm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return implementation("rms_norm", x.device.type)(x, weight, eps)


@torch.library.custom_op("idlm::add_rms_norm", mutates_args=("residual",))
def _add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    return implementation("rms_norm", x.device.type)(x, weight, eps, residual=residual)


@torch.library.custom_op("idlm::rms_norm_out", mutates_args=("residual", "out"))
def _rms_norm_out(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> None:
    implementation("rms_norm", x.device.type)(x, weight, eps, residual=residual, out=out)


@torch.library.custom_op("idlm::silu_and_mul", mutates_args=())
def _silu_and_mul(x: Tensor) -> Tensor:
    return implementation("silu_and_mul", x.device.type)(x)


@torch.library.custom_op("idlm::silu_and_mul_out", mutates_args=("out",))
def _silu_and_mul_out(x: Tensor, out: Tensor) -> None:
    implementation("silu_and_mul", x.device.type)(x, out=out)


@torch.library.custom_op("idlm::embed", mutates_args=())
def _embed(ids: Tensor, weight: Tensor, is_mask: Tensor, mask_embedding: Tensor | None, dtype: torch.dtype) -> Tensor:
    run = implementation("embed", ids.device.type)
    return run(ids, weight, is_mask=is_mask, mask_embedding=mask_embedding, dtype=dtype)


@torch.library.custom_op("idlm::embed_out", mutates_args=("out",))
def _embed_out(ids: Tensor, weight: Tensor, is_mask: Tensor, mask_embedding: Tensor | None, out: Tensor) -> None:
    run = implementation("embed", ids.device.type)
    run(ids, weight, is_mask=is_mask, mask_embedding=mask_embedding, dtype=out.dtype, out=out)


@torch.library.custom_op("idlm::qk_norm_rope_append", mutates_args=("k_cache", "v_cache"))
def _qk_norm_rope_append(
    qkv: Tensor,
    positions: Tensor,
    rotary: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    run = implementation("qk_norm_rope_append", qkv.device.type)
    return run(qkv, positions, rotary, slot_mapping, k_cache, v_cache, q_weight=q_weight, k_weight=k_weight, eps=eps)


@torch.library.custom_op("idlm::qk_norm_rope_append_out", mutates_args=("k_cache", "v_cache", "out"))
def _qk_norm_rope_append_out(
    qkv: Tensor,
    positions: Tensor,
    rotary: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    run = implementation("qk_norm_rope_append", qkv.device.type)
    run(qkv, positions, rotary, slot_mapping, k_cache, v_cache, q_weight=q_weight, k_weight=k_weight, eps=eps, out=out)


_rms_norm.register_fake(lambda x, weight, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device))
_add_rms_norm.register_fake(lambda x, weight, eps, residual: torch.empty(x.shape, dtype=x.dtype, device=x.device))
_silu_and_mul.register_fake(lambda x: x.new_empty(x.shape[0], x.shape[1] // 2))
_embed.register_fake(
    lambda ids, weight, is_mask, mask_embedding, dtype: weight.new_empty(ids.shape[0], weight.shape[1], dtype=dtype)
)


@_qk_norm_rope_append.register_fake
def _(qkv, positions, rotary, slot_mapping, k_cache, v_cache, q_weight, k_weight, eps):  # type: ignore[no-untyped-def]
    num_kv_heads, head_dim = k_cache.shape[2:]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim)


for _op in (_rms_norm_out, _silu_and_mul_out, _embed_out, _qk_norm_rope_append_out):
    _op.register_fake(lambda *args: None)
