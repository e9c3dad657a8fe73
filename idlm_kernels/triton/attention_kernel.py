"""The kernels of strided_attention: o = softmax(q K^T * sm_scale) V over what a row may see of a paged cache.

A CTA takes one KV head of one request and packs the query heads that share it: row i, head g is packed row i * G + g
of tiles of 64, the M side of one wgmma, whatever the number of rows (16 rows x 4 heads fill it; padding is affordable).
Prefill chunks that fill the machine take tiles of 128: two such wgmmas by twice the warps, the same bits. KV is cut
into chunks of 256 slots at absolute multiples of 256. A chunk is an online softmax over its tiles of 32 or 64 slots;
the chunks are folded in order of slots (m: largest score, base 2; t: total of 2^(score - m)):

    m' = max(m, m_c);  t' = t 2^(m-m') + t_c 2^(m_c-m');  o' = o 2^(m-m') + o_c 2^(m_c-m')

Nothing of this depends on length, rows, batch or pages, and what a row does not see changes nothing in it: a tile that
is masked for a row multiplies by 1 and adds 0. Where tiles are many, a CTA folds its own chunks as it goes. Where they
are few, SPLITS CTAs share a tile: each takes every SPLITS-th chunk and stores the chunk's (m, t, o), and when the last
of them has arrived (`_rendezvous`), all fold, some rows each. Both run the same fold: the same bits.

In the product with V a slot that a row does not see has p = 0, and 0 * NaN is NaN. Any value of V that is not finite
shows in the o of all rows of its tile; then every row is computed again, alone, and reads only what it sees: the bits
of a step of that row. It takes a pass over the context per row, of requests that hold such a value alone.

Bytes: K and V of the visible slots once per tile (4096 B per slot and layer for Qwen3-8B: 5.0 us at 4096 slots and
3.35 TB/s); the chunks' (m, t, o), about 11 % of that at 7 rows, go through L2. fp32 runs on FMA and is there for tests;
fp64 is left to the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from idlm_kernels.triton.attention_fold import _fold, _fold_chunks, _rendezvous
from idlm_kernels.triton.common import follow_previous_launch


class Rows(NamedTuple):
    """q or the output."""

    data: Any  # [T, Hq, D]
    stride_row: Any
    stride_head: Any


class PagedCache(NamedTuple):
    k: Any  # [num_pages, PAGE_SIZE, HKV, D]
    v: Any
    k_scale: Any  # [K_SCALES] or None
    v_scale: Any  # [V_SCALES] or None
    stride_k_page: Any
    stride_k_slot: Any
    stride_k_head: Any
    stride_v_page: Any
    stride_v_slot: Any
    stride_v_head: Any


class Chunks(NamedTuple):
    """What the CTAs that share a tile found in each chunk."""

    o: Any  # fp32 [T, Hq, num_chunks, D]
    ml: Any  # fp32 [T, Hq, num_chunks, 2]
    num_chunks: Any


class Requests(NamedTuple):
    query_start: Any  # [B + 1]
    seq_lens: Any  # [B]
    max_rows: Any  # of a request; what lies beyond is padding
    max_slots: Any


class Output(NamedTuple):
    rows: Rows
    lse: Any  # fp32 [T, Hq] or None
    stride_lse: Any
    v_scale: Any  # of the tile's KV head, or None


class Context(NamedTuple):
    """What the rows of a tile look at."""

    cache: PagedCache
    pages: Any  # [max_pages] of the request
    num_pages: Any
    kv_head: Any
    scale_log2: Any  # of scores, base 2


class Extent(NamedTuple):
    """What a CTA's tile is about."""

    row_start: Any  # the request's first row in the batch
    m_rows: Any  # how many it has
    first_of_step: Any  # the slot of the first one
    end: Any  # one past the last slot that the tile sees
    first_chunk: Any
    end_chunk: Any


class Tile(NamedTuple):
    """The packed rows of a CTA."""

    q: Any  # [BLOCK_M, BLOCK_D]
    tail: Any  # int64 [BLOCK_M], bits of the step's slots
    i: Any  # [BLOCK_M], row of the step
    row: Any  # int64 [BLOCK_M], of the batch
    head: Any  # [BLOCK_M]
    is_row: Any  # [BLOCK_M]
    first_row: Any  # of the step


class Shape(NamedTuple):
    """What the compiler knows of a call."""

    HKV: int
    GROUP: int
    D: int
    PAGE_SIZE: int
    CHUNK: int
    BLOCK_M: int
    BLOCK_KV: int
    BLOCK_D: int
    SPLITS: int
    WINDOW: int
    HAS_TAIL: bool
    K_SCALES: int  # 0, 1 for all KV heads, or HKV
    V_SCALES: int
    HAS_LSE: bool
    SAME_STRIDES: bool
    NUM_STAGES: int
    THREADS: int
    INDEX_BITS: int  # of the slot within a page and of the head: 32 or 64


@triton.jit
def _store_rows(output, row, head, is_row, m, total, o, shape: tl.constexpr):
    """o / total, 0 for a row that saw nothing; row (int64), head, is_row, m, total are [rows], o is [rows, BLOCK_D].
    Zeros come out positive: masked tiles may turn a -0.0 into 0.0."""
    y = tl.div_rn(o, tl.where(total == 0.0, 1.0, total)[:, None])
    if shape.V_SCALES > 0:
        y = y * tl.load(output.v_scale)
    y = tl.where(y == 0.0, 0.0, y)
    out = output.rows
    d = tl.arange(0, shape.BLOCK_D)[None, :]
    pOut = out.data + (row * out.stride_row + head * out.stride_head)[:, None] + d
    tl.store(pOut, y.to(out.data.dtype.element_ty), mask=is_row[:, None] & (d < shape.D))
    if shape.HAS_LSE:
        tl.store(output.lse + row * output.stride_lse + head, (m + tl.log2(total)) * 0.6931471805599453, mask=is_row)


@triton.jit
def _store_zeros(output, first, end, step, kv_head, shape: tl.constexpr):
    """The output of rows first .. end - 1 of the batch that nothing is computed for, BLOCK_M // GROUP every `step`."""
    GROUP: tl.constexpr = shape.GROUP
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    out = output.rows
    zeros = tl.zeros([BLOCK_M, BLOCK_D], out.data.dtype.element_ty)
    d = tl.arange(0, BLOCK_D)[None, :]
    lane = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + lane % GROUP
    for at in range(first, end, step):
        row = (at + lane // GROUP).to(tl.int64)
        is_row = (row < end) & (lane < BLOCK_M // GROUP * GROUP)
        pOut = out.data + (row * out.stride_row + head * out.stride_head)[:, None] + d
        tl.store(pOut, zeros, mask=is_row[:, None] & (d < shape.D))
        if shape.HAS_LSE:
            tl.store(output.lse + row * output.stride_lse + head, float("-inf"), mask=is_row)


@triton.jit
def _extent(requests, request, row_tile, shape: tl.constexpr):
    """The Extent of a tile."""
    row_start = tl.load(requests.query_start + request)
    m_rows = tl.load(requests.query_start + request + 1) - row_start
    seq_len = tl.minimum(tl.load(requests.seq_lens + request), requests.max_slots)
    first_of_step = seq_len - m_rows
    m_rows = tl.minimum(m_rows, requests.max_rows)
    first_row = row_tile * shape.BLOCK_M // shape.GROUP
    last_row = tl.minimum((row_tile * shape.BLOCK_M + shape.BLOCK_M - 1) // shape.GROUP, m_rows - 1)
    end = seq_len if shape.HAS_TAIL else tl.minimum(first_of_step + last_row + 1, seq_len)
    first_chunk = tl.maximum(first_of_step + first_row - shape.WINDOW, 0) // shape.CHUNK if shape.WINDOW >= 0 else 0
    end_chunk = tl.cdiv(end, shape.CHUNK)
    return Extent(
        row_start=row_start,
        m_rows=m_rows,
        first_of_step=first_of_step,
        end=end,
        first_chunk=first_chunk,
        end_chunk=end_chunk,
    )


@triton.jit
def _attend_chunk(
    tile,
    context,
    first_slot,
    end_slot,
    low,  # slots before are not read, with WINDOW
    seen,  # nor those of the step whose bit is 0, with HAS_TAIL and ALONE
    first_of_step,
    shape: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Online softmax over slots first_slot .. end_slot - 1: m, total [BLOCK_M], o [BLOCK_M, BLOCK_D] unnormalised."""
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    q, cache, kv_head = tile.q, context.cache, context.kv_head
    d = tl.arange(0, BLOCK_D)
    has_d = (d < shape.D)[None, :]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(first_slot, end_slot, shape.BLOCK_KV, num_stages=NUM_STAGES):
        slot = first + tl.arange(0, shape.BLOCK_KV)
        inside = slot < end_slot
        if shape.WINDOW >= 0:  # both ends in one comparison
            inside = (slot - low).to(tl.uint32, bitcast=True) < end_slot - low
        if shape.HAS_TAIL and ALONE:
            bit = (seen >> tl.minimum(tl.maximum(slot - first_of_step, 0), 63).to(tl.int64)) & 1
            inside = inside & ((slot < first_of_step) | (bit == 1))
        page = tl.load(context.pages + slot // shape.PAGE_SIZE, mask=inside, other=0)
        page = tl.minimum(tl.maximum(page, 0), context.num_pages - 1).to(tl.int64)
        offset = (slot % shape.PAGE_SIZE).to(tl.int64 if shape.INDEX_BITS == 64 else tl.int32)
        place = page * cache.stride_k_page + offset * cache.stride_k_slot + kv_head * cache.stride_k_head
        pK = cache.k + (place[:, None] + d[None, :])
        if not shape.SAME_STRIDES:
            place = page * cache.stride_v_page + offset * cache.stride_v_slot + kv_head * cache.stride_v_head
        pV = cache.v + (place[:, None] + d[None, :])
        # What no row of the tile sees is not read; slots that nobody wrote may hold NaN.
        k = tl.load(pK, mask=inside[:, None] & has_d, other=0.0).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * context.scale_log2
        step_slot = slot[None, :] - first_of_step
        if shape.HAS_TAIL:
            bit = (tile.tail[:, None] >> tl.minimum(tl.maximum(step_slot, 0), 63).to(tl.int64)) & 1
            visible = (step_slot < 0) | ((bit == 1) & (step_slot < 64))
        elif shape.WINDOW >= 0:  # 0 <= i - step_slot <= WINDOW in one comparison: fewer registers than two
            visible = (tile.i[:, None] - step_slot).to(tl.uint32, bitcast=True) <= shape.WINDOW
        else:
            visible = step_slot <= tile.i[:, None]
        s = tl.where(visible & inside[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - finite[:, None])
        old_share = tl.exp2(m - finite)
        total = total * old_share + tl.sum(p, axis=1)
        v = tl.load(pV, mask=inside[:, None] & has_d, other=0.0).to(q.dtype)
        o = tl.dot(p.to(q.dtype), v, o * old_share[:, None], input_precision="ieee")
        m = new
    return m, total, o


@triton.jit
def _attend_share(
    only,  # the row of the step that is computed, -1: all of the tile
    tile,
    extent,
    context,
    gTail,
    chunks,
    output,
    shape: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ALONE: tl.constexpr,
):
    """This CTA's chunks: rows stored where it has all chunks, else what it found in each. Returns whether all of it is
    finite. With `only` no more is read than that row sees."""
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    d = tl.arange(0, BLOCK_D)
    has_d = (d < shape.D)[None, :]
    first_of_step, end = extent.first_of_step, extent.end
    low = 0
    seen = tl.full([], -1, tl.int64)
    if shape.WINDOW >= 0:
        low = first_of_step + tile.first_row - shape.WINDOW
    if only >= 0:
        if shape.HAS_TAIL:
            seen = tl.load(gTail + extent.row_start + only)
        else:
            end = first_of_step + only + 1
        if shape.WINDOW >= 0:
            low = first_of_step + only - shape.WINDOW
    is_row = tile.is_row & ((only < 0) | (tile.i == only))
    faults = tl.zeros([BLOCK_M], tl.float32)  # NaN for what is not finite
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for chunk in range(extent.first_chunk + tl.program_id(1), extent.end_chunk, shape.SPLITS):
        m_chunk, total_chunk, o_chunk = _attend_chunk(
            tile,
            context,
            chunk * shape.CHUNK,
            tl.minimum((chunk + 1) * shape.CHUNK, end),
            low,
            seen,
            first_of_step,
            shape,
            NUM_STAGES,
            ALONE,
        )
        if shape.SPLITS == 1:
            m, total, o = _fold(m, total, o, m_chunk, total_chunk, o_chunk)
        else:
            place = (tile.row * (shape.HKV * shape.GROUP) + tile.head) * chunks.num_chunks + chunk
            tl.store(chunks.o + place[:, None] * shape.D + d[None, :], o_chunk, mask=is_row[:, None] & has_d)
            tl.store(chunks.ml + place * 2, m_chunk, mask=is_row)
            tl.store(chunks.ml + place * 2 + 1, total_chunk, mask=is_row)
            faults += tl.sum(o_chunk * 0.0, axis=1)
    if shape.SPLITS == 1:
        _store_rows(output, tile.row, tile.head, is_row, m, total, o, shape)
        faults = tl.sum(o * 0.0, axis=1)
    return tl.sum(faults, axis=0) == 0.0


# Flat are the integers that must not be compiled for the value 1, and the pointers that must not be compiled for where
# they begin: Triton specialises what a tuple holds.
@triton.jit(
    do_not_specialize=[
        "row_tiles",
        "max_rows",
        "num_rows",
        "batch",
        "num_pages",
        "max_slots",
        "num_chunks",
        "sm_scale",
    ],
    do_not_specialize_on_alignment=["gPageTable", "gSeqLens", "gQueryStart", "gTail", "gLse"],
)
def _attention_kernel(
    query,  # Rows
    cache,  # PagedCache
    out,  # Rows
    gChunkO,  # fp32 [T, Hq, num_chunks, D]
    gChunkML,  # fp32 [T, Hq, num_chunks, 2]
    gMeetings,  # int64 [row tiles * B * HKV]
    gPageTable,  # [B, max_pages]
    gSeqLens,  # [B]
    gQueryStart,  # [B + 1]
    gTail,  # [T]
    gLse,  # [T, Hq]
    row_tiles,
    max_rows,
    num_rows,
    batch,
    num_pages,
    max_slots,
    num_chunks,
    sm_scale,
    stride_table,
    stride_lse,
    shape: tl.constexpr,
):
    follow_previous_launch()
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    GROUP: tl.constexpr = shape.GROUP
    HKV: tl.constexpr = shape.HKV
    D: tl.constexpr = shape.D
    chunks = Chunks(o=gChunkO, ml=gChunkML, num_chunks=num_chunks)
    requests = Requests(query_start=gQueryStart, seq_lens=gSeqLens, max_rows=max_rows, max_slots=max_slots)
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    request = tile // HKV
    kv_head = (tile % HKV).to(tl.int64 if shape.INDEX_BITS == 64 else tl.int32)
    packed = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + packed % GROUP
    v_scale = cache.v_scale
    if shape.V_SCALES > 1:
        v_scale += kv_head
    output = Output(rows=out, lse=gLse, stride_lse=stride_lse, v_scale=v_scale)
    d = tl.arange(0, BLOCK_D)
    has_d = (d < D)[None, :]

    if request == batch:  # rows of no request: zeros
        if tl.program_id(1) == 0:
            first = tl.load(gQueryStart + request) + row_tile * (BLOCK_M // GROUP)
            _store_zeros(output, first, num_rows, BLOCK_M // GROUP * row_tiles, kv_head, shape)
        return

    extent = _extent(requests, request, row_tile, shape)
    row_start, m_rows, first_chunk, end_chunk = extent.row_start, extent.m_rows, extent.first_chunk, extent.end_chunk
    i = packed // GROUP
    is_row = i < m_rows
    if row_tile * BLOCK_M // GROUP >= m_rows:
        return
    if (row_tile == row_tiles - 1) & (tl.program_id(1) == 0):
        end_of_request = tl.load(gQueryStart + request + 1)
        _store_zeros(output, row_start + m_rows, end_of_request, BLOCK_M // GROUP, kv_head, shape)
    if shape.SPLITS > 1:
        num_ctas = tl.maximum(tl.minimum(end_chunk - first_chunk, shape.SPLITS), 1)
        if tl.program_id(1) >= num_ctas:
            return
        gMeeting = gMeetings + (row_tile * batch + request) * HKV + kv_head
        # By one thread of a tensor of pointers: with a scalar, all threads would wait for the result here.
        thread = tl.arange(0, shape.THREADS)
        started = tl.atomic_add(gMeeting + thread * 0, 1, mask=thread < (num_ctas > 1), sem="relaxed")

    row = (row_start + i).to(tl.int64)
    pQ = query.data + (row * query.stride_row + head * query.stride_head)[:, None] + d[None, :]
    q = tl.load(pQ, mask=is_row[:, None] & has_d, other=0.0)
    tail = i.to(tl.int64)
    if shape.HAS_TAIL:
        tail = tl.load(gTail + row, mask=is_row, other=0)
    scale_log2 = sm_scale * 1.4426950408889634
    if shape.K_SCALES > 0:
        scale_log2 = scale_log2 * tl.load(cache.k_scale + (kv_head if shape.K_SCALES > 1 else 0))
    gPages = gPageTable + request.to(tl.int64) * stride_table
    first_row = row_tile * BLOCK_M // GROUP
    mine = Tile(q=q, tail=tail, i=i, row=row, head=head, is_row=is_row, first_row=first_row)
    context = Context(cache=cache, pages=gPages, num_pages=num_pages, kv_head=kv_head, scale_log2=scale_log2)

    # Two forms, for the registers: the mask of a row's slots has none to spare in the loop that all calls take.
    STAGES: tl.constexpr = shape.NUM_STAGES
    end_row = tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, m_rows)
    if shape.HAS_TAIL:
        all_finite = _attend_share(-1, mine, extent, context, gTail, chunks, output, shape, STAGES, False)
        if not all_finite:
            for only in range(first_row, end_row):
                _attend_share(only, mine, extent, context, gTail, chunks, output, shape, 2, True)
    else:
        only = -1
        while only < end_row:
            all_finite = _attend_share(only, mine, extent, context, gTail, chunks, output, shape, STAGES, False)
            if only >= 0:
                only += 1
            else:
                only = tl.where(all_finite, 0x7FFFFFFF, first_row)
    if shape.SPLITS > 1:
        tl.debug_barrier()  # all threads have stored their part of the chunks before one tells the other CTAs
        first, step = 0, 1
        if num_ctas > 1:
            word = tl.sum(tl.where(thread == 0, started, 0))
            first, step = _rendezvous(gMeeting, word, tl.program_id(1), num_ctas)
        # Read again: kept since the start, these would take registers of the loop.
        again = _extent(requests, request, row_tile, shape)
        # Shares of 4 fp32 values per thread: with more, a read would take half of each sector.
        SHARE: tl.constexpr = min(BLOCK_M, 4 * shape.THREADS // BLOCK_D)
        num_packed = tl.minimum(again.m_rows * GROUP - row_tile * BLOCK_M, BLOCK_M)
        for share in range(first, tl.cdiv(num_packed, SHARE), step):
            packed_share = row_tile * BLOCK_M + share * SHARE + tl.arange(0, SHARE)
            row_share = (again.row_start + packed_share // GROUP).to(tl.int64)
            head_share = kv_head * GROUP + packed_share % GROUP
            is_row_share = packed_share // GROUP < again.m_rows
            place = (row_share * (HKV * GROUP) + head_share) * num_chunks
            m, total, o = _fold_chunks(
                gChunkO, gChunkML, place, is_row_share, again.first_chunk, again.end_chunk, SHARE, D, BLOCK_D
            )
            _store_rows(output, row_share, head_share, is_row_share, m, total, o, shape)
