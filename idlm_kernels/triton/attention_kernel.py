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

import triton
import triton.language as tl

from idlm_kernels.triton.attention_fold import _fold, _fold_chunks, _rendezvous


@triton.jit
def _store_rows(
    gOut,
    gLse,
    gVScale,
    row,  # int64 [rows]
    head,  # [rows]
    is_row,
    m,
    total,
    o,  # [rows, BLOCK_D]
    stride_out_row,
    stride_out_head,
    stride_lse,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """o / total, 0 for a row that saw nothing. Zeros come out positive: masked tiles may turn a -0.0 into 0.0."""
    y = tl.div_rn(o, tl.where(total == 0.0, 1.0, total)[:, None])
    if HAS_V_SCALE:
        y = y * tl.load(gVScale)
    y = tl.where(y == 0.0, 0.0, y)
    d = tl.arange(0, BLOCK_D)[None, :]
    pOut = gOut + (row * stride_out_row + head * stride_out_head)[:, None] + d
    tl.store(pOut, y.to(gOut.dtype.element_ty), mask=is_row[:, None] & (d < D))
    if HAS_LSE:
        tl.store(gLse + row * stride_lse + head, (m + tl.log2(total)) * 0.6931471805599453, mask=is_row)


@triton.jit
def _store_zeros(
    gOut,
    gLse,
    first,
    end,
    step,
    kv_head,
    stride_out_row,
    stride_out_head,
    stride_lse,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """The output of rows first .. end - 1 of the batch that nothing is computed for, BLOCK_M // GROUP every `step`."""
    zeros = tl.zeros([BLOCK_M, BLOCK_D], gOut.dtype.element_ty)
    d = tl.arange(0, BLOCK_D)[None, :]
    head = kv_head * GROUP + tl.arange(0, BLOCK_M) % GROUP
    for at in range(first, end, step):
        row = (at + tl.arange(0, BLOCK_M) // GROUP).to(tl.int64)
        is_row = (row < end) & (tl.arange(0, BLOCK_M) < BLOCK_M // GROUP * GROUP)
        pOut = gOut + (row * stride_out_row + head * stride_out_head)[:, None] + d
        tl.store(pOut, zeros, mask=is_row[:, None] & (d < D))
        if HAS_LSE:
            tl.store(gLse + row * stride_lse + head, float("-inf"), mask=is_row)


@triton.jit
def _extent(
    gQueryStart,
    gSeqLens,
    request,
    row_tile,
    max_rows,
    max_slots,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """What this CTA's tile is about: (row_start, m_rows, first_of_step, end, first_chunk, end_chunk); the request's
    rows and the first slot of its step, one past the last slot that the tile sees, and its chunks."""
    row_start = tl.load(gQueryStart + request)
    m_rows = tl.load(gQueryStart + request + 1) - row_start
    seq_len = tl.minimum(tl.load(gSeqLens + request), max_slots)
    first_of_step = seq_len - m_rows
    m_rows = tl.minimum(m_rows, max_rows)
    first_row = row_tile * BLOCK_M // GROUP
    last_row = tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // GROUP, m_rows - 1)
    end = seq_len if HAS_TAIL else tl.minimum(first_of_step + last_row + 1, seq_len)
    first_chunk = tl.maximum(first_of_step + first_row - WINDOW, 0) // CHUNK if WINDOW >= 0 else 0
    end_chunk = tl.cdiv(end, CHUNK)
    return row_start, m_rows, first_of_step, end, first_chunk, end_chunk


@triton.jit
def _attend_chunk(
    q,  # [BLOCK_M, BLOCK_D]
    tail,  # int64 [BLOCK_M], bits of the step's slots
    i,  # [BLOCK_M], row of the step
    gK,
    gV,
    gPages,  # [max_pages] of this request
    kv_head,
    num_pages,
    first_slot,
    end_slot,
    low,  # slots before are not read, with WINDOW
    seen,  # nor those of the step whose bit is 0, with HAS_TAIL and ALONE
    first_of_step,
    scale_log2,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    INDEX: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Online softmax over slots first_slot .. end_slot - 1: m, total [BLOCK_M], o [BLOCK_M, BLOCK_D] unnormalised."""
    d = tl.arange(0, BLOCK_D)
    has_d = (d < D)[None, :]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in tl.range(first_slot, end_slot, BLOCK_KV, num_stages=NUM_STAGES):
        slot = tile + tl.arange(0, BLOCK_KV)
        inside = slot < end_slot
        if WINDOW >= 0:  # both ends in one comparison
            inside = (slot - low).to(tl.uint32, bitcast=True) < end_slot - low
        if HAS_TAIL and ALONE:
            bit = (seen >> tl.minimum(tl.maximum(slot - first_of_step, 0), 63).to(tl.int64)) & 1
            inside = inside & ((slot < first_of_step) | (bit == 1))
        page = tl.load(gPages + slot // PAGE_SIZE, mask=inside, other=0)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)
        offset = (slot % PAGE_SIZE).to(INDEX)
        place = (page * stride_k_page + offset * stride_k_slot + kv_head * stride_k_head)[:, None] + d[None, :]
        pK = gK + place
        if not SAME_STRIDES:
            place = (page * stride_v_page + offset * stride_v_slot + kv_head * stride_v_head)[:, None] + d[None, :]
        pV = gV + place
        # What no row of the tile sees is not read; slots that nobody wrote may hold NaN.
        k = tl.load(pK, mask=inside[:, None] & has_d, other=0.0).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        step_slot = slot[None, :] - first_of_step
        if HAS_TAIL:
            bit = (tail[:, None] >> tl.minimum(tl.maximum(step_slot, 0), 63).to(tl.int64)) & 1
            visible = (step_slot < 0) | ((bit == 1) & (step_slot < 64))
        elif WINDOW >= 0:  # 0 <= i - step_slot <= WINDOW in one comparison, which takes fewer registers than two
            visible = (i[:, None] - step_slot).to(tl.uint32, bitcast=True) <= WINDOW
        else:
            visible = step_slot <= i[:, None]
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
    gQ,
    gK,
    gV,
    gPages,  # [max_pages] of this request
    gTail,
    gVScale,
    gOut,
    gLse,
    gChunkO,
    gChunkML,
    only,  # the row of the step that is computed, -1: all of the tile
    q,  # [BLOCK_M, BLOCK_D]
    tail,  # [BLOCK_M]
    i,  # [BLOCK_M]
    row,  # int64 [BLOCK_M]
    head,  # [BLOCK_M]
    is_row,
    row_tile,
    kv_head,
    row_start,
    first_of_step,
    first_chunk,
    end,
    end_chunk,
    num_pages,
    num_chunks,
    scale_log2,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    stride_out_row,
    stride_out_head,
    stride_lse,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    INDEX: tl.constexpr,
    ALONE: tl.constexpr,
):
    """This CTA's chunks: rows stored where it has all chunks, else what it found in each. Returns whether all of it is
    finite. With `only` no more is read than that row sees."""
    d = tl.arange(0, BLOCK_D)
    has_d = (d < D)[None, :]
    low = 0
    seen = tl.full([], -1, tl.int64)
    if WINDOW >= 0:
        low = first_of_step + row_tile * BLOCK_M // GROUP - WINDOW
    if only >= 0:
        if HAS_TAIL:
            seen = tl.load(gTail + row_start + only)
        else:
            end = first_of_step + only + 1
        if WINDOW >= 0:
            low = first_of_step + only - WINDOW
    is_row = is_row & ((only < 0) | (i == only))
    faults = tl.zeros([BLOCK_M], tl.float32)  # NaN for what is not finite
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for chunk in range(first_chunk + tl.program_id(1), end_chunk, SPLITS):
        m_chunk, total_chunk, o_chunk = _attend_chunk(
            q,
            tail,
            i,
            gK,
            gV,
            gPages,
            kv_head,
            num_pages,
            chunk * CHUNK,
            tl.minimum((chunk + 1) * CHUNK, end),
            low,
            seen,
            first_of_step,
            scale_log2,
            stride_k_page,
            stride_k_slot,
            stride_k_head,
            stride_v_page,
            stride_v_slot,
            stride_v_head,
            PAGE_SIZE,
            D,
            BLOCK_M,
            BLOCK_KV,
            BLOCK_D,
            HAS_TAIL,
            WINDOW,
            SAME_STRIDES,
            NUM_STAGES,
            INDEX,
            ALONE,
        )
        if SPLITS == 1:
            m, total, o = _fold(m, total, o, m_chunk, total_chunk, o_chunk)
        else:
            place = (row * (HKV * GROUP) + head) * num_chunks + chunk
            tl.store(gChunkO + place[:, None] * D + d[None, :], o_chunk, mask=is_row[:, None] & has_d)
            tl.store(gChunkML + place * 2, m_chunk, mask=is_row)
            tl.store(gChunkML + place * 2 + 1, total_chunk, mask=is_row)
            faults += tl.sum(o_chunk * 0.0, axis=1)
    if SPLITS == 1:
        _store_rows(
            gOut,
            gLse,
            gVScale,
            row,
            head,
            is_row,
            m,
            total,
            o,
            stride_out_row,
            stride_out_head,
            stride_lse,
            D,
            BLOCK_D,
            HAS_V_SCALE,
            HAS_LSE,
        )
    if SPLITS == 1:
        faults = tl.sum(o * 0.0, axis=1)
    return tl.sum(faults, axis=0) == 0.0


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
    gQ,  # [T, Hq, D]
    gK,  # [num_pages, PAGE_SIZE, HKV, D]
    gV,
    gPageTable,  # [B, max_pages]
    gSeqLens,  # [B]
    gQueryStart,  # [B + 1]
    gTail,  # [T]
    gKScale,
    gVScale,
    gOut,  # [T, Hq, D]
    gLse,  # [T, Hq]
    gChunkO,  # fp32 [T, Hq, num_chunks, D]
    gChunkML,  # fp32 [T, Hq, num_chunks, 2]
    gMeetings,  # int64 [row tiles * B * HKV]
    row_tiles,
    max_rows,  # of a request; what lies beyond is padding
    num_rows,
    batch,
    num_pages,
    max_slots,
    num_chunks,
    sm_scale,
    stride_q_row,
    stride_q_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    stride_table,
    stride_out_row,
    stride_out_head,
    stride_lse,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    INDEX: tl.constexpr,
):
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    request = tile // HKV
    kv_head = (tile % HKV).to(INDEX)
    packed = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + packed % GROUP
    d = tl.arange(0, BLOCK_D)
    has_d = (d < D)[None, :]

    if request == batch:  # rows of no request: zeros
        if tl.program_id(1) == 0:
            first = tl.load(gQueryStart + request) + row_tile * (BLOCK_M // GROUP)
            _store_zeros(
                gOut,
                gLse,
                first,
                num_rows,
                BLOCK_M // GROUP * row_tiles,
                kv_head,
                stride_out_row,
                stride_out_head,
                stride_lse,
                GROUP,
                D,
                BLOCK_M,
                BLOCK_D,
                HAS_LSE,
            )
        return

    row_start, m_rows, first_of_step, end, first_chunk, end_chunk = _extent(
        gQueryStart, gSeqLens, request, row_tile, max_rows, max_slots, GROUP, CHUNK, BLOCK_M, HAS_TAIL, WINDOW
    )
    i = packed // GROUP
    is_row = i < m_rows
    if row_tile * BLOCK_M // GROUP >= m_rows:
        return
    if (row_tile == row_tiles - 1) & (tl.program_id(1) == 0):
        _store_zeros(
            gOut,
            gLse,
            row_start + m_rows,
            tl.load(gQueryStart + request + 1),
            BLOCK_M // GROUP,
            kv_head,
            stride_out_row,
            stride_out_head,
            stride_lse,
            GROUP,
            D,
            BLOCK_M,
            BLOCK_D,
            HAS_LSE,
        )
    if SPLITS > 1:
        num_ctas = tl.maximum(tl.minimum(end_chunk - first_chunk, SPLITS), 1)
        if tl.program_id(1) >= num_ctas:
            return
        gMeeting = gMeetings + (row_tile * batch + request) * HKV + kv_head
        # By one thread of a tensor of pointers: with a scalar, all threads would wait for the result here.
        thread = tl.arange(0, THREADS)
        started = tl.atomic_add(gMeeting + thread * 0, 1, mask=thread < (num_ctas > 1), sem="relaxed")

    row = (row_start + i).to(tl.int64)
    pQ = gQ + (row * stride_q_row + head * stride_q_head)[:, None] + d[None, :]
    q = tl.load(pQ, mask=is_row[:, None] & has_d, other=0.0)
    tail = i.to(tl.int64)
    if HAS_TAIL:
        tail = tl.load(gTail + row, mask=is_row, other=0)
    scale_log2 = sm_scale * 1.4426950408889634
    if HAS_K_SCALE:
        scale_log2 = scale_log2 * tl.load(gKScale)
    gPages = gPageTable + request.to(tl.int64) * stride_table

    # Two forms, for the registers: the mask of a row's slots has none to spare in the loop that all calls take.
    end_row = tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, m_rows)
    if HAS_TAIL:
        all_finite = _attend_share(
            gQ,
            gK,
            gV,
            gPages,
            gTail,
            gVScale,
            gOut,
            gLse,
            gChunkO,
            gChunkML,
            -1,
            q,
            tail,
            i,
            row,
            head,
            is_row,
            row_tile,
            kv_head,
            row_start,
            first_of_step,
            first_chunk,
            end,
            end_chunk,
            num_pages,
            num_chunks,
            scale_log2,
            stride_k_page,
            stride_k_slot,
            stride_k_head,
            stride_v_page,
            stride_v_slot,
            stride_v_head,
            stride_out_row,
            stride_out_head,
            stride_lse,
            HKV,
            GROUP,
            D,
            PAGE_SIZE,
            CHUNK,
            BLOCK_M,
            BLOCK_KV,
            BLOCK_D,
            SPLITS,
            WINDOW,
            HAS_TAIL,
            HAS_V_SCALE,
            HAS_LSE,
            SAME_STRIDES,
            NUM_STAGES,
            INDEX,
            False,
        )
        if not all_finite:
            for only in range(row_tile * BLOCK_M // GROUP, end_row):
                _attend_share(
                    gQ,
                    gK,
                    gV,
                    gPages,
                    gTail,
                    gVScale,
                    gOut,
                    gLse,
                    gChunkO,
                    gChunkML,
                    only,
                    q,
                    tail,
                    i,
                    row,
                    head,
                    is_row,
                    row_tile,
                    kv_head,
                    row_start,
                    first_of_step,
                    first_chunk,
                    end,
                    end_chunk,
                    num_pages,
                    num_chunks,
                    scale_log2,
                    stride_k_page,
                    stride_k_slot,
                    stride_k_head,
                    stride_v_page,
                    stride_v_slot,
                    stride_v_head,
                    stride_out_row,
                    stride_out_head,
                    stride_lse,
                    HKV,
                    GROUP,
                    D,
                    PAGE_SIZE,
                    CHUNK,
                    BLOCK_M,
                    BLOCK_KV,
                    BLOCK_D,
                    SPLITS,
                    WINDOW,
                    HAS_TAIL,
                    HAS_V_SCALE,
                    HAS_LSE,
                    SAME_STRIDES,
                    2,
                    INDEX,
                    True,
                )
    else:
        only = -1
        while only < end_row:
            all_finite = _attend_share(
                gQ,
                gK,
                gV,
                gPages,
                gTail,
                gVScale,
                gOut,
                gLse,
                gChunkO,
                gChunkML,
                only,
                q,
                tail,
                i,
                row,
                head,
                is_row,
                row_tile,
                kv_head,
                row_start,
                first_of_step,
                first_chunk,
                end,
                end_chunk,
                num_pages,
                num_chunks,
                scale_log2,
                stride_k_page,
                stride_k_slot,
                stride_k_head,
                stride_v_page,
                stride_v_slot,
                stride_v_head,
                stride_out_row,
                stride_out_head,
                stride_lse,
                HKV,
                GROUP,
                D,
                PAGE_SIZE,
                CHUNK,
                BLOCK_M,
                BLOCK_KV,
                BLOCK_D,
                SPLITS,
                WINDOW,
                HAS_TAIL,
                HAS_V_SCALE,
                HAS_LSE,
                SAME_STRIDES,
                NUM_STAGES,
                INDEX,
                False,
            )
            if only >= 0:
                only += 1
            else:
                only = tl.where(all_finite, 0x7FFFFFFF, row_tile * BLOCK_M // GROUP)
    if SPLITS > 1:
        tl.debug_barrier()  # all threads have stored their part of the chunks before one tells the other CTAs
        first, step = 0, 1
        if num_ctas > 1:
            word = tl.sum(tl.where(thread == 0, started, 0))
            first, step = _rendezvous(gMeeting, word, tl.program_id(1), num_ctas)
        # Read again: kept since the start, these would take registers of the loop.
        row_start, m_rows, _, _, first_chunk, end_chunk = _extent(
            gQueryStart, gSeqLens, request, row_tile, max_rows, max_slots, GROUP, CHUNK, BLOCK_M, HAS_TAIL, WINDOW
        )
        # Shares of 4 fp32 values per thread: with more, a read would take half of each sector.
        SHARE: tl.constexpr = min(BLOCK_M, 4 * THREADS // BLOCK_D)
        num_packed = tl.minimum(m_rows * GROUP - row_tile * BLOCK_M, BLOCK_M)
        for share in range(first, tl.cdiv(num_packed, SHARE), step):
            packed_share = row_tile * BLOCK_M + share * SHARE + tl.arange(0, SHARE)
            row_share = (row_start + packed_share // GROUP).to(tl.int64)
            head_share = kv_head * GROUP + packed_share % GROUP
            is_row_share = packed_share // GROUP < m_rows
            m_share, total_share, o_share = _fold_chunks(
                gChunkO,
                gChunkML,
                (row_share * (HKV * GROUP) + head_share) * num_chunks,
                is_row_share,
                first_chunk,
                end_chunk,
                SHARE,
                D,
                BLOCK_D,
            )
            _store_rows(
                gOut,
                gLse,
                gVScale,
                row_share,
                head_share,
                is_row_share,
                m_share,
                total_share,
                o_share,
                stride_out_row,
                stride_out_head,
                stride_lse,
                D,
                BLOCK_D,
                HAS_V_SCALE,
                HAS_LSE,
            )
