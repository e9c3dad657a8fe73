"""Fold of the chunks of strided_attention, and how the CTAs that share a tile meet for it. See attention_kernel.py.

A rendezvous costs one atomic that nobody waits for, one that is waited for, and a poll: some 2 us at the end of the
launch, where a launch of its own would wait for this one to drain, start, and look up the same lengths again. All CTAs
fold because one would take 5 us for the 570 KB that 64 packed rows have at 4096 slots, at the 110 GB/s of an SM.
Reckoned, not yet run on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

kNoShare = tl.constexpr(1 << 16)  # beyond all shares


@triton.jit
def _fold(m, total, o, m_chunk, total_chunk, o_chunk):
    """One more chunk. m, total [rows]; o [rows, D]. A chunk that shows a row nothing (m_chunk -inf) is a no-op."""
    new = tl.maximum(m, m_chunk)
    finite = tl.where(new == float("-inf"), 0.0, new)
    old_share, chunk_share = tl.exp2(m - finite), tl.exp2(m_chunk - finite)
    total = total * old_share + total_chunk * chunk_share
    o = o * old_share[:, None] + o_chunk * chunk_share[:, None]
    return new, total, o


@triton.jit
def _load_chunk(gChunkO, gChunkML, row_head, is_row, chunk, end_chunk, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(m, total, o) of a chunk of rows whose chunk 0 is at row_head [rows]; chunks from end_chunk on show nothing.

    From L2: other CTAs wrote it.
    """
    place = row_head + chunk
    inside = is_row & (place < row_head + end_chunk)
    d = tl.arange(0, BLOCK_D)[None, :]
    m_chunk = tl.load(gChunkML + place * 2, mask=inside, other=float("-inf"), cache_modifier=".cg")
    total_chunk = tl.load(gChunkML + place * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
    inside = inside[:, None] & (d < D)
    o_chunk = tl.load(gChunkO + place[:, None] * D + d, mask=inside, other=0.0, cache_modifier=".cg")
    return m_chunk, total_chunk, o_chunk


@triton.jit
def _fold_chunks(
    gChunkO,
    gChunkML,
    row_head,
    is_row,
    first_chunk,
    end_chunk,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Chunks first_chunk .. end_chunk - 1 of these rows in order, four at a time so that four loads are under way."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for c in range(first_chunk, end_chunk, 4):
        m0, total0, o0 = _load_chunk(gChunkO, gChunkML, row_head, is_row, c, end_chunk, D, BLOCK_D)
        m1, total1, o1 = _load_chunk(gChunkO, gChunkML, row_head, is_row, c + 1, end_chunk, D, BLOCK_D)
        m2, total2, o2 = _load_chunk(gChunkO, gChunkML, row_head, is_row, c + 2, end_chunk, D, BLOCK_D)
        m3, total3, o3 = _load_chunk(gChunkO, gChunkML, row_head, is_row, c + 3, end_chunk, D, BLOCK_D)
        m, total, o = _fold(m, total, o, m0, total0, o0)
        m, total, o = _fold(m, total, o, m1, total1, o1)
        m, total, o = _fold(m, total, o, m2, total2, o2)
        m, total, o = _fold(m, total, o, m3, total3, o3)
    return m, total, o


@triton.jit
def _rendezvous(gMeeting, started, z, num_ctas):
    """Meet the other CTAs of this tile, so that all chunks can be read: (first, step) of the shares of rows that this
    CTA folds; first = kNoShare if it folds none.

    Nothing makes the CTAs of a grid run side by side, so a CTA waits only when all of its tile have started; those
    will arrive. One that arrives before leaves. The last one to arrive folds alone if any started too late to be
    waited for, else all do. Bits of a tile's word in gMeeting: how many CTAs have started (0-15), have arrived (16-31),
    and of these, had started when another had arrived already (32-47); of the last meeting, whether all took part (48)
    and its number (49-63), which the last one moves on as it zeroes the counts. started: the word as this CTA began.
    Every thread has passed a barrier since it stored its part of the chunks.
    """
    is_late = ((started >> 16) & 0xFFFF) != 0
    word = tl.atomic_add(gMeeting, (is_late.to(tl.int64) << 32) + 0x10000, sem="acq_rel")
    number = word >> 49
    is_together = (((word >> 32) & 0xFFFF) == 0) & (is_late == 0)
    first, step = kNoShare, 1
    if ((word >> 16) & 0xFFFF) == num_ctas - 1:
        tl.atomic_xchg(gMeeting, ((number + 1) << 49) | (is_together.to(tl.int64) << 48), sem="release")
        if is_together:
            first, step = z, num_ctas
        else:
            first = 0
    elif is_together & ((word & 0xFFFF) == num_ctas):
        while (word >> 49) == number:
            word = tl.atomic_add(gMeeting, 0, sem="acquire")
        if ((word >> 48) & 1) != 0:
            first, step = z, num_ctas
    return first, step
