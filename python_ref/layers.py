"""The small per-row ops of a transformer step: norms, rotary embedding with the KV write, gated SiLU, embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, in the accumulator dtype."""
    acc = x.to(_accumulator(x.dtype))
    return acc * torch.rsqrt(acc.square().mean(-1, keepdim=True) + eps) * weight.to(acc.dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """RMS norm of x [T, H] with weight [H]. With `residual` [T, H]: residual += x in place, then norm(residual)."""
    h = x if residual is None else residual.add_(x)
    y = _normalise(h, weight, eps).to(x.dtype)
    return y if out is None else out.copy_(y)


def rotary_table(inv_freq: Tensor, num_positions: int) -> Tensor:
    """cos and sin of position * inv_freq, fp32 [num_positions, 2 * len(inv_freq)]: the cosines, then the sines."""
    angles = torch.arange(num_positions, device=inv_freq.device, dtype=torch.float32).outer(inv_freq.float())
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention: the pairs are (x_i, x_{i + D/2})."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


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
    """Split qkv, norm q and k per head (if weights are given), rotate them, write k and v to the cache, return q.

    qkv [T, (Hq + 2 Hkv) * D]; positions [T] choose the row of `rotary` [P, D]; slot_mapping int64 [T] is the slot
    page * page_size + offset, -1 to skip; k_cache, v_cache [num_pages, page_size, Hkv, D]. Returns q [T, Hq, D].
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    acc = _accumulator(qkv.dtype)
    q_acc = q.to(acc) if q_weight is None else _normalise(q, q_weight, eps)
    k_acc = k.to(acc) if k_weight is None else _normalise(k, k_weight, eps)
    cos, sin = rotary[positions.long()].to(acc).unsqueeze(1).chunk(2, dim=-1)
    _write(k_cache, slot_mapping, _rotate(k_acc, cos, sin))
    _write(v_cache, slot_mapping, v)
    y = _rotate(q_acc, cos, sin).to(qkv.dtype)
    return y if out is None else out.copy_(y)


def _write(cache: Tensor, slot_mapping: Tensor, rows: Tensor) -> None:
    """cache[slot] = row wherever slot >= 0, with no shape that depends on data.

    A skipped row writes what its target already holds; should that target be the slot of another row, both carry
    that row's value, so the order of the writes does not matter.
    """
    if rows.shape[0] == 0:
        return
    page_size = cache.shape[1]
    skipped = slot_mapping < 0
    # All skipped rows act as copies of the first written one (or rewrite slot 0 with its own value if none is).
    first = (~skipped).to(torch.int64).argmax()
    source = torch.where(skipped, first, torch.arange(rows.shape[0], device=rows.device))
    slots = slot_mapping[source].clamp(min=0)
    page, offset = slots // page_size, slots % page_size
    keep = skipped.all()
    values = torch.where(keep, cache[page, offset], rows[source].to(cache.dtype))
    cache.index_put_((page, offset), values)


def silu_and_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(x[:, :F]) * x[:, F:] for x [T, 2F] -> [T, F]."""
    gate, up = x.to(_accumulator(x.dtype)).chunk(2, dim=1)
    y = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return y if out is None else out.copy_(y)


def embed(
    ids: Tensor,
    weight: Tensor,
    *,
    is_mask: Tensor,
    mask_embedding: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """weight[ids], but `mask_embedding` [H] on rows with is_mask != 0 (if given). ids int64 [T], weight [V, H].

    Ids outside [0, V) give a row of zeros. `dtype` is the dtype of the result (default: of `weight`).
    """
    dtype = weight.dtype if dtype is None else dtype
    valid = (ids >= 0) & (ids < weight.shape[0])
    rows = weight[ids.clamp(0, weight.shape[0] - 1)].to(dtype)
    rows = torch.where(valid.unsqueeze(1), rows, torch.zeros((), dtype=dtype, device=rows.device))
    if mask_embedding is not None:
        rows = torch.where((is_mask != 0).unsqueeze(1), mask_embedding.to(dtype), rows)
    return rows if out is None else out.copy_(rows)
