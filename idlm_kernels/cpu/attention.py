"""Row-invariant strided attention on a CPU: batched matrix products over KV leaves of a fixed length.

A request's pages are gathered into leaves of LEAF slots, [Hkv, leaves, LEAF, D]. The rows that share a KV head are the
rows of one matrix, and each leaf is one element of a batched product: scores = q K^T, then p = exp(scores - row max),
then p V, whose leaf results and sums are added in leaf order. The row maximum is taken over all leaves, so nothing is
rescaled. Why the bits of a row depend only on what it sees:

- every product is over D or LEAF, whatever the sequence length; that its result does not depend on the number of rows
  and leaves computed with it is checked per shape, and a slower way is taken where it does (`batched_product`);
- a hidden slot has p = 0 exactly, and adding the zeros of a leaf in which all slots are hidden changes nothing;
- maximum, exp and subtraction work element by element (torch's exp gives a number the same bits at any position), and
  the sum over leaves has a fixed order (`leaf_sum`).

Everything that the layers of a forward share (pages, masks, the split into items) is kept in `_plan`.
One core of an AMD EPYC (Zen 5), 9 heads over 3 KV heads, D = 64, 512 slots, 1 / 7 / 16 rows: 99 / 208 / 369 us, where
scaled_dot_product_attention on K and V in place takes 47 / 169 / 262 (`python -m bench.cpu_ops --threads 1`). Of the
99 us, some 50 are the overhead of 40 small torch calls.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import python_ref
from idlm_kernels.cpu.products import Product, batched_product, leaf_sum
from python_ref.attention import visible_slots

# Slots; the order of summation depends on it. At 64 slots, leaves of 64 / 128 / 256 take 46 / 59 / 72 us for one row
# and 83 / 130 / 213 for 16 (one core); from 200 slots on there is no difference.
LEAF = 64
MIN_ROWS = 4  # rows of a product: below, MKL computes a row in another way (measured for D = 64, 128, 256)
MAX_ROWS = 64  # rows of a request in one item
# Elements of the scores: 1 MiB, the second-level cache of a core. Four times as many were no faster for a prefill.
SCORES_PER_ITEM = 1 << 18


@dataclass(frozen=True)
class _Piece:
    """Neighbouring rows of one request that are computed together."""

    request: int
    first_row: int
    rows: int
    before: int  # rows of the request before these
    request_rows: int  # m of the request
    end: int  # slots from here on are seen by none of the rows
    leaves: int  # that hold the slots before `end`


@dataclass(frozen=True)
class _Item:
    """Work that is done in one go: neighbouring pieces of equal shape."""

    first_row: int
    count: int  # G, pieces
    rows: int  # m, of each piece
    leaves: int  # L, of each piece
    stacked: int  # m * group, the rows that share a KV head
    padded: int  # rows of the matrices: at least MIN_ROWS
    pages: Tensor  # int64 [G * pages of a piece]
    masked_leaf: int  # leaves before this one are seen whole by every row
    hidden: Tensor | None  # bool [G, L - masked_leaf, padded, LEAF]; None if all is seen
    visible: Tensor | None  # its complement as 0 and 1, fp32
    times_k: Product  # the products and sums over leaves that keep a row's bits
    times_v: Product
    sum_scores: Callable[[Tensor], Tensor]
    sum_values: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Plan:
    items: tuple[_Item, ...]
    idle_rows: tuple[slice, ...]  # rows of no request


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
    """softmax(q K^T * sm_scale) V over the slots that each row may see, in fp32; see `python_ref.strided_attention`."""
    if q.dtype == torch.float64:  # for judging the other dtypes
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
    num_rows, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    plan = _plan(
        seq_lens.numpy().tobytes(),
        query_start_loc.numpy().tobytes(),
        page_table.numpy().tobytes(),
        None if tree_mask is None else tree_mask.numpy().tobytes(),
        window,
        max_query_len,
        num_rows,
        num_heads,
        num_kv_heads,
        head_dim,
        num_pages,
        page_size,
        page_table.shape[1],
        torch.get_num_threads(),
    )
    scale: float | Tensor = head_dim**-0.5 if sm_scale is None else sm_scale
    if k_scale is not None:
        scale = (scale * k_scale).view(-1, 1, 1, 1, 1, 1)
    if v_scale is not None:
        v_scale = v_scale.view(-1, 1, 1, 1)
    out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    for rows in plan.idle_rows:
        out[rows] = 0
        if lse is not None:
            lse[rows] = -math.inf
    q = q.float()
    for item in plan.items:
        _attend(q, k_cache, v_cache, item, scale, v_scale, out, lse)
    return out


# A view costs about a microsecond, as much as a small kernel, and a layer has some 40 of both: hence the thrift below.


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    item: _Item,
    scale: float | Tensor,  # [Hkv or 1, 1, 1, 1, 1, 1]
    v_scale: Tensor | None,  # [Hkv or 1, 1, 1, 1]
    out: Tensor,
    lse: Tensor | None,
) -> None:
    count, leaves, rows, stacked, padded = item.count, item.leaves, item.rows, item.stacked, item.padded
    num_kv_heads, head_dim = k_cache.shape[2:]
    group = stacked // rows
    batch = num_kv_heads * count * leaves

    # The same rows for every leaf.
    source = _by_head(q, item, num_kv_heads, leaves)  # [Hkv, G, L, m, group, D]
    if padded == stacked:
        q_leaves = target = _scratch.take("q", (num_kv_heads, count, leaves, padded, head_dim))
    else:
        q_leaves = torch.zeros(num_kv_heads, count, leaves, padded, head_dim)
        target = q_leaves[:, :, :, :stacked]
    torch.mul(source, scale, out=target.view(num_kv_heads, count, leaves, rows, group, head_dim))

    k = _gather(k_cache, item, "k").view(batch, LEAF, head_dim)
    scores = _scratch.take("p", (batch, padded, LEAF))
    item.times_k(q_leaves.view(batch, padded, head_dim), k.transpose(1, 2), scores)
    p = scores.view(num_kv_heads, count, leaves, padded, LEAF)
    masked = p if item.masked_leaf == 0 else p[:, :, item.masked_leaf :]
    if item.hidden is not None:
        masked.masked_fill_(item.hidden, -math.inf)
    row_max = p.amax((2, 4), keepdim=True).clamp_(min=_LOWEST)  # finite for a row that sees nothing
    p.sub_(row_max).clamp_(min=_EXP_FLOOR).exp_()
    if item.visible is not None:
        masked.mul_(item.visible)
    total = item.sum_scores(p).sum(-1, keepdim=True)  # [Hkv, G, padded, 1]

    v = _gather(v_cache, item, "v")
    strays = None if item.hidden is None else _take_strays(v, item)
    o = _scratch.take("o", (batch, padded, head_dim))
    item.times_v(scores, v.view(batch, LEAF, head_dim), o)
    o = item.sum_values(o.view(num_kv_heads, count, leaves, padded, head_dim))
    if strays is not None:
        o = o + strays
    o = o.div_(total.clamp(min=_TINY))
    if v_scale is not None:
        o.mul_(v_scale)
    if padded != stacked:
        o = o[:, :, :stacked]
    _by_head(out, item, num_kv_heads).copy_(o.view(num_kv_heads, count, rows, group, head_dim))
    if lse is not None:
        row_lse = total.log_().add_(row_max[:, :, 0])[:, :, :stacked].view(num_kv_heads, count, rows, group, 1)
        _by_head(lse.unsqueeze(2), item, num_kv_heads).copy_(row_lse)


def _take_strays(v: Tensor, item: _Item) -> Tensor | None:
    """Put 0 for what is not finite in the leaves of V that hold hidden slots, since 0 * NaN would reach rows that do
    not see it. Returns what to add to o [Hkv, G, padded, D] for the rows that do, None if all is finite."""
    some = v[:, :, item.masked_leaf * LEAF :]
    if math.isfinite(float(some.sum())):
        return None
    assert item.visible is not None
    sees = item.visible.transpose(1, 2).flatten(2)  # [G, padded, slots]
    strays = torch.zeros(v.shape[0], item.count, item.padded, v.shape[3])
    for sign in (math.inf, -math.inf):
        found = torch.matmul(sees, ((some == sign) | some.isnan()).float())
        strays += torch.where(found > 0, sign, 0.0)
    some.masked_fill_(~some.isfinite(), 0.0)
    return strays


_LOWEST, _TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny
# exp(-87) is the last normal number; below, torch's exp takes 0.02 us per element instead of 0.0007, for -inf 0.003.
_EXP_FLOOR = -87.0


def _by_head(x: Tensor, item: _Item, num_kv_heads: int, leaves: int | None = None) -> Tensor:
    """The rows of an item in x [T, Hq, D] as a view [Hkv, G, m, group, D], or [Hkv, G, leaves, m, group, D]."""
    _, num_heads, width = x.shape
    row, head, inner = x.stride()
    group = num_heads // num_kv_heads
    offset = x.storage_offset() + item.first_row * row
    if leaves is None:
        return x.as_strided(
            (num_kv_heads, item.count, item.rows, group, width),
            (group * head, item.rows * row, row, head, inner),
            offset,
        )
    return x.as_strided(
        (num_kv_heads, item.count, leaves, item.rows, group, width),
        (group * head, item.rows * row, 0, row, head, inner),
        offset,
    )


def _gather(cache: Tensor, item: _Item, name: str) -> Tensor:
    """The slots of an item in order, [Hkv, G, L * LEAF, D] in fp32, contiguous, in scratch memory."""
    _, page_size, num_kv_heads, head_dim = cache.shape
    pages = cache.permute(2, 0, 1, 3)
    shape = (num_kv_heads, item.count, item.leaves * LEAF, head_dim)
    slots_of_pages = item.pages.shape[0] // item.count * page_size
    if slots_of_pages == shape[2] and cache.dtype == torch.float32:
        slots = _scratch.take(name, shape)
        torch.index_select(pages, 1, item.pages, out=slots.view(num_kv_heads, -1, page_size, head_dim))
        return slots
    some = pages.index_select(1, item.pages).view(num_kv_heads, item.count, slots_of_pages, head_dim)
    return _scratch.take(name, shape).copy_(some[:, :, : shape[2]])


class _Scratch(threading.local):
    """Memory that a thread uses again in every call.

    It is worth keeping: the C allocator gives large blocks back to the system, and to get them anew made calls at 2,000
    slots up to 6 times slower (1.8 ms instead of 0.28), depending on what the process had allocated before.
    """

    MOST = 1 << 24  # elements of a buffer; larger ones are not kept

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The memory of this name, fp32, with anything in it."""
        view = self._views.get((name, shape))
        return self._make(name, shape) if view is None else view

    def _make(self, name: str, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if size > self.MOST:
            return torch.empty(shape)
        with torch.inference_mode(False):  # it outlives any inference mode that is on
            if name not in self._buffers or self._buffers[name].numel() < size:
                self._buffers[name] = torch.empty(min(size + size // 2, self.MOST))  # contexts grow
                self._views.clear()
            view = self._buffers[name][:size].view(shape)
        if len(self._views) >= 64:
            self._views.clear()
        self._views[name, shape] = view
        return view


_scratch = _Scratch()


# The plan: what depends on lengths, pages and masks alone.


@functools.lru_cache(maxsize=16)
def _plan(
    seq_lens: bytes,
    query_start_loc: bytes,
    page_table: bytes,
    tree_mask: bytes | None,
    window: int,
    max_query_len: int,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_pages: int,
    page_size: int,
    max_pages: int,
    num_threads: int,  # part of the key: what was verified holds for this number
) -> _Plan:
    """Split the rows into items. Keyed by value: the layers of a forward share it, and nothing can go stale."""
    lengths = np.frombuffer(seq_lens, np.int32).tolist()
    # Rows out of range would be a fault of the data, which must not raise.
    starts = np.maximum.accumulate(np.frombuffer(query_start_loc, np.int32)).clip(0, num_rows).tolist()
    table = np.frombuffer(page_table, np.int32).reshape(len(lengths), max_pages).clip(0, num_pages - 1)
    capacity = table.shape[1] * page_size
    tails = None if tree_mask is None else torch.frombuffer(bytearray(tree_mask), dtype=torch.int64)

    def leaves_of(slots: int) -> int:
        return max(-(-min(slots, capacity) // LEAF), 1)

    pieces: list[_Piece] = []
    for b, length in enumerate(lengths):
        start, stop = starts[b], starts[b + 1]
        if length <= 0:
            continue
        most = min(MAX_ROWS, max(SCORES_PER_ITEM // (num_heads * leaves_of(length) * LEAF), 1))
        m = stop - start
        count = min(m, max_query_len)  # rows from there on are padding
        step = -(-count // -(-count // most)) if count else 1  # as even as can be
        for before in range(0, count, step):
            rows = min(step, count - before)
            end = length if tails is not None else length - m + before + rows
            pieces.append(_Piece(b, start + before, rows, before, m, end, leaves_of(end)))

    items, idle, done = [], [], 0
    while pieces:
        head = pieces[0]
        limit = SCORES_PER_ITEM // (num_heads * head.rows * head.leaves * LEAF)
        count = 1
        while count < min(limit, len(pieces)) and _follows(pieces[count], pieces[count - 1]):
            count += 1
        items.append(
            _item(pieces[:count], table, page_size, tails, window, num_heads // num_kv_heads, num_kv_heads, head_dim)
        )
        del pieces[:count]
        idle.append(slice(done, head.first_row))
        done = head.first_row + count * head.rows
    idle.append(slice(done, num_rows))
    return _Plan(tuple(items), tuple(rows for rows in idle if rows.start < rows.stop))


def _follows(piece: _Piece, previous: _Piece) -> bool:
    return piece.first_row == previous.first_row + previous.rows and (piece.rows, piece.leaves) == (
        previous.rows,
        previous.leaves,
    )


def _item(
    pieces: list[_Piece],
    table: np.ndarray,
    page_size: int,
    tails: Tensor | None,
    window: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
) -> _Item:
    rows, leaves, first_row = pieces[0].rows, pieces[0].leaves, pieces[0].first_row
    stacked = rows * group
    padded = max(stacked, MIN_ROWS)
    capacity = table.shape[1] * page_size
    # A last leaf may reach beyond the table: any page will do there, its slots are hidden.
    pages = np.zeros((len(pieces), -(-leaves * LEAF // page_size)), np.int64)
    known = min(pages.shape[1], table.shape[1])
    pages[:, :known] = table[[piece.request for piece in pieces], :known]

    # Slots before the first row's own, or before the step's rows with a tree mask, are seen by all rows (no window).
    own = min(p.end - rows + 1 if tails is None else p.end - p.request_rows for p in pieces)
    masked_leaf = 0 if window >= 0 else min(max(min(own, capacity), 0) // LEAF, leaves)
    origin, num_slots = masked_leaf * LEAF, (leaves - masked_leaf) * LEAF
    hidden = None
    if num_slots:
        visible = torch.cat([_visible(piece, origin, num_slots, tails, window) for piece in pieces])
        visible &= torch.arange(origin, origin + num_slots) < capacity
        stacked_hidden = ~visible.repeat_interleave(group, 1)  # [G, stacked, slots]
        if bool(stacked_hidden.any()):
            # The padding is hidden too, which leaves it finite.
            hidden = torch.ones(len(pieces), padded, num_slots, dtype=torch.bool)
            hidden[:, :stacked] = stacked_hidden
            hidden = hidden.unflatten(2, (-1, LEAF)).transpose(1, 2).contiguous()
    batch = num_kv_heads * len(pieces) * leaves
    return _Item(
        first_row=first_row,
        count=len(pieces),
        rows=rows,
        leaves=leaves,
        stacked=stacked,
        padded=padded,
        pages=torch.from_numpy(pages).flatten(),
        masked_leaf=masked_leaf,
        hidden=hidden,
        visible=None if hidden is None else (~hidden).float(),
        times_k=batched_product(batch, padded, head_dim, LEAF, transposed=True),
        times_v=batched_product(batch, padded, LEAF, head_dim, transposed=False),
        sum_scores=leaf_sum(leaves, padded * LEAF),
        sum_values=leaf_sum(leaves, padded * head_dim),
    )


def _visible(piece: _Piece, origin: int, num_slots: int, tails: Tensor | None, window: int) -> Tensor:
    """bool [1, rows, num_slots]: which of the slots from `origin` on may the rows of a piece see?"""
    if tails is None:  # the piece sees what a request of these rows alone would
        m, end = torch.tensor([piece.rows]), torch.tensor([piece.end - origin])
        return visible_slots(m, end, piece.rows, num_slots, None, window)
    m, end = torch.tensor([piece.request_rows]), torch.tensor([piece.end - origin])
    tail = tails[piece.first_row - piece.before :][: piece.request_rows].unsqueeze(0)
    visible = visible_slots(m, end, piece.request_rows, num_slots, tail, window)
    return visible[:, piece.before : piece.before + piece.rows]
