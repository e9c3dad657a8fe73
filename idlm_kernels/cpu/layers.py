"""The small per-row ops of a transformer step on a CPU, in as few torch calls as they take: a call costs 1 to 4 us,
and a step of 30 layers runs some 120 of these ops. `embed` runs once per step; the reference computes it.

Row invariance. Additions, products, divisions and square roots are correctly rounded, so one element's bits cannot
depend on where it sits; torch's reduction over a contiguous last dimension takes each row by itself; its exp is the
same at every position. Its silu is not: the last elements of a block of memory, those that do not fill a vector, are
computed by other code (seen in the last bit for widths that are no multiple of 32, and where threads split a row).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

import python_ref


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension of x [T, H]; with `residual`, of residual += x."""
    if x.dtype == torch.float64:
        return python_ref.rms_norm(x, weight, eps, residual=residual, out=out)
    h = x if residual is None else residual.add_(x)
    y = torch.nn.functional.rms_norm(h.float(), h.shape[-1:], weight.float(), eps)
    return y.to(x.dtype) if out is None else out.copy_(y)


_WHOLE_VECTORS = 32  # fp32 elements: torch's loops take two vectors of at most 16 at a time
_UNSPLIT = 1 << 15  # elements that torch leaves to one thread (at::internal::GRAIN_SIZE)


def silu_and_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(x[:, :F]) * x[:, F:] for x [T, 2F] -> [T, F]."""
    if x.dtype == torch.float64:
        return python_ref.silu_and_mul(x, out=out)
    gate, up = x.float().chunk(2, dim=1)
    rows, width = gate.shape
    if width % _WHOLE_VECTORS or width >= _UNSPLIT:
        y = gate * up
        y.div_(torch.neg(gate).exp_().add_(1))
    elif rows * width < _UNSPLIT:
        y = torch.nn.functional.silu(gate).mul_(up)
    else:
        y = torch.empty(rows, width)
        for block, part in zip(gate.split((_UNSPLIT - 1) // width), y.split((_UNSPLIT - 1) // width), strict=True):
            torch.ops.aten.silu.out(block, out=part)
        y.mul_(up)
    return y.to(x.dtype) if out is None else out.copy_(y)


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
    """Norm q and k per head, rotate them, write k and v to the cache, return q [T, Hq, D]."""
    if qkv.dtype == torch.float64:
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
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    v = heads[:, num_heads + num_kv_heads :]
    qk = heads[:, : num_heads + num_kv_heads].float()
    if q_weight is not None and k_weight is not None:
        qk = torch.nn.functional.rms_norm(qk, (head_dim,), None, eps)
        qk[:, :num_heads].mul_(q_weight)
        qk[:, num_heads:].mul_(k_weight)
    cos, sin = _rotation(rotary, positions)
    # (x1 cos - x2 sin, x2 cos + x1 sin) = x * (cos, cos) + swapped halves of x * (-sin, sin)
    rotated = (qk * cos).add_(qk.roll(head_dim // 2, -1).mul_(sin))

    rows, page, offset = _targets(slot_mapping.numpy().tobytes(), num_pages, page_size)
    k = rotated[:, num_heads:]
    if rows is not None:
        k, v = k[rows], v[rows]
    k_cache.index_put_((page, offset), k.to(k_cache.dtype))
    v_cache.index_put_((page, offset), v.to(v_cache.dtype))
    q = rotated[:, :num_heads]
    return q.contiguous().to(qkv.dtype) if out is None else out.copy_(q)


@functools.lru_cache(maxsize=16)
def _targets(slot_mapping: bytes, num_pages: int, page_size: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Rows to write (None: all), their pages and offsets. Keyed by value: the layers of a forward share it."""
    slots = torch.from_numpy(np.frombuffer(slot_mapping, np.int64).copy())
    written = (slots >= 0) & (slots < num_pages * page_size)
    rows = None if bool(written.all()) else written.nonzero().squeeze(1)
    slots = slots if rows is None else slots[rows]
    return rows, slots // page_size, slots % page_size


_ROTATION = "_idlm_rotation"  # attribute of a rotary table: the rotation of the last positions asked for


def _rotation(rotary: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (-sin, sin) [T, 1, D] at the positions; the layers of a forward share them."""
    version = None if rotary.is_inference() else rotary._version
    key = (version, positions.dtype, positions.numpy().tobytes())
    kept: tuple[object, tuple[Tensor, Tensor]] | None = getattr(rotary, _ROTATION, None)
    if kept is not None and version is not None and kept[0] == key:
        return kept[1]
    cos, sin = rotary.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    rotation = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    if version is not None:
        setattr(rotary, _ROTATION, (key, rotation))
    return rotation
