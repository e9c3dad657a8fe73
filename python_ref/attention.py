"""Strided-causal attention over a paged KV cache: the attention of an introspective strided decoding step."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_slots(
    m: Tensor, seq_len: Tensor, max_query_len: int, num_slots: int, tree_mask: Tensor | None, window: int
) -> Tensor:
    """bool [B, max_query_len, num_slots]: may row i of request b see slot s? m, seq_len [B]; tree_mask [B, rows].

    Without tree_mask row i sees slots <= seq_len - m + i, and with `window` >= 0 only the last window + 1 of those.
    With it, row i sees every slot before the step's own (s < seq_len - m) and step slot j iff bit j is set.
    """
    device = seq_len.device
    s = torch.arange(num_slots, device=device)
    i = torch.arange(max_query_len, device=device)
    first = (seq_len - m).view(-1, 1, 1)  # slot of the step's row 0
    inside = (s < seq_len.view(-1, 1, 1)) & (i.view(1, -1, 1) < m.view(-1, 1, 1))
    if tree_mask is None:
        last = first + i.view(1, -1, 1)
        visible = s <= last
        if window >= 0:
            visible = visible & (s >= last - window)
    else:
        j = s - first
        bit = (tree_mask.unsqueeze(-1) >> j.clamp(0, 63)) & 1
        visible = (j < 0) | ((bit == 1) & (j < 64))
    return visible & inside


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
    """softmax(q K^T * sm_scale) V over the slots that each row may see; see `visible_slots` for which those are.

    q [T, Hq, D]; k_cache, v_cache [num_pages, page_size, Hkv, D]; page_table int32 [B, max_pages]; seq_lens int32
    [B] (this step's rows included; 0 = padded request); query_start_loc int32 [B + 1]; k_scale, v_scale fp32 [] or
    [Hkv]. Returns [T, Hq, D]; rows of
    no request are zero and their lse is -inf. lse fp32 [T, Hq] receives the natural log-sum-exp.
    """
    num_rows, num_heads, head_dim = q.shape
    if num_rows == 0:
        return torch.empty_like(q) if out is None else out
    batch = seq_lens.shape[0]
    num_kv_heads = k_cache.shape[2]
    acc = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale

    # Rows as [B, max_query_len], the padding pointing at row 0.
    start = query_start_loc[:-1].long()
    m = query_start_loc.diff().long()
    i = torch.arange(max_query_len, device=q.device)
    is_row = i < m.unsqueeze(1)
    row = torch.where(is_row, start.unsqueeze(1) + i, 0)
    padded_tail = None if tree_mask is None else tree_mask[row]

    # The cache in slot order, [B, S, Hkv, D].
    pages = page_table.long().clamp(0, k_cache.shape[0] - 1)
    k = k_cache[pages].flatten(1, 2).to(acc)
    v = v_cache[pages].flatten(1, 2).to(acc)
    if k_scale is not None:
        k = k * k_scale.to(acc).unsqueeze(-1)
    if v_scale is not None:
        v = v * v_scale.to(acc).unsqueeze(-1)
    visible = visible_slots(m, seq_lens.long(), max_query_len, k.shape[1], padded_tail, window)

    group = num_heads // num_kv_heads
    q_grouped = q.to(acc)[row].view(batch, max_query_len, num_kv_heads, group, head_dim)
    scores = torch.einsum("bihgd,bshd->bhgis", q_grouped, k) * scale
    scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    row_max = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(acc).min)  # a row that sees nothing stays finite
    p = torch.exp(scores - row_max)
    total = p.sum(-1, keepdim=True)
    # Slots that a row does not see may hold anything, and 0 * NaN is NaN: what is not finite stays out of the product
    # and is added to the rows that see it.
    o = torch.einsum("bhgis,bshd->bhgid", p, torch.where(v.isfinite(), v, 0.0))
    sees = visible.to(acc)
    for sign in (math.inf, -math.inf):
        found = torch.einsum("bis,bshd->bhid", sees, ((v == sign) | v.isnan()).to(acc)).unsqueeze(2)
        o = torch.where(found > 0, o + sign, o)
    o = o / total.clamp(min=torch.finfo(acc).tiny)
    o = o.permute(0, 3, 1, 2, 4).reshape(batch, max_query_len, num_heads, head_dim)
    row_lse = (row_max + total.log()).squeeze(-1).permute(0, 3, 1, 2).reshape(batch, max_query_len, num_heads)

    # Back to packed rows: every padding entry lands on one extra row that is dropped.
    target = torch.where(is_row, row, num_rows).flatten()
    packed = torch.zeros(num_rows + 1, num_heads, head_dim, dtype=acc, device=q.device)
    packed[target] = o.flatten(0, 1)
    if lse is not None:
        packed_lse = torch.full((num_rows + 1, num_heads), -math.inf, dtype=acc, device=q.device)
        packed_lse[target] = row_lse.flatten(0, 1)
        lse.copy_(packed_lse[:num_rows])
    y = packed[:num_rows].to(q.dtype)
    return y if out is None else out.copy_(y)
