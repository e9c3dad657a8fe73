"""The kernel of linear, gated_lora_linear and linear_silu_and_mul.

    y[t, n] = sum_k x[t, k] W[n, k]  (+ bias)  (+ scale * sum_r h[t, r] B[n, r] where lora_mask[t], h = x A^T)

Swapped operands: weight rows fill the 64-row side of the matrix instruction, tokens its other side, so that a step of
7 or 16 rows reads each weight once. Every row count uses the same instruction, 64 x 64 x 16: beyond 64 rows a CTA runs
it twice per weight tile, beyond 128 further CTAs follow. K is cut at places that depend on (N, K) alone, each part is
summed on its own and the parts are added in order: by the last CTA to arrive, or, where rows alone fill the machine,
by one CTA that computes the parts one after the other. Either way a row has the same bits.

Bytes: the weight once per 128 rows; x once per weight tile and the parts (fp32, written and read once) out of L2.
A decode step is bound by the weight: 33.6 MB, 10.0 us for the o projection of Qwen3-8B at 3.35 TB/s; 64 padded rows
need 214 TFLOP/s at that rate, which the tensor cores have to spare.

The adapter is two launches: `h` (the same kernel with A for a weight, which skips all rows and tiles without a
lora_mask), then the layer, whose epilogue adds h B^T into accumulators of its own and selects per row. Its factors are
taken in x's dtype. linear_silu_and_mul is the same launch with the rows of the weight in another order, groups of 8
gate rows beside their 8 up rows, so that a tile holds both factors of what it writes: T x 2F values less to write and
to read. fp32 runs on FMA and is there for tests; fp64 is left to the references.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from idlm_kernels.triton.common import follow_previous_launch, silu_times


class Operands(NamedTuple):
    x: Any  # [T, K]
    weight: Any  # [N, K]
    bias: Any  # [N] or None
    out: Any  # [T, N], or [T, N / 2] with PAIRED
    stride_x: Any
    stride_weight: Any
    stride_out: Any


class Adapter(NamedTuple):
    """A LoRA pair, its first factor applied."""

    lora_mask: Any  # [T] or None
    b: Any  # [N, RANK] or None
    h: Any  # [T, slices * RANK] or None
    stride_b: Any
    stride_h: Any
    scale: Any  # a float: Triton does not specialise it


class Shape(NamedTuple):
    """What the compiler knows of a call."""

    N: int
    K: int
    PARTS_N: int
    BLOCK_N: int
    BLOCK_T: int
    BLOCK_K: int
    ROW_TILES: int
    SPLITS: int
    BLOCKS_PER_SPLIT: int
    IN_ONE_CTA: bool
    SLICE_ENDS: tuple[int, ...]
    RANK: int
    BLOCK_RANK: int
    HAS_BIAS: bool
    HAS_LORA: bool
    GATED_ONLY: bool
    PAIRED: bool
    NUM_STAGES: int


class Tile(NamedTuple):
    """Where a CTA reads: BLOCK_N rows of the weight, BLOCK_T rows of x, and as many more with ROW_TILES == 2."""

    pW: Any  # [BLOCK_N, 1]
    pX: Any  # [BLOCK_T, 1]
    pX2: Any
    has_n: Any  # [BLOCK_N, 1]
    has_t: Any  # [BLOCK_T, 1]
    has_t2: Any


@triton.jit
def _dot(w, x, accumulator):
    """accumulator + w x^T."""
    return tl.dot(w.to(x.dtype), tl.trans(x), accumulator, input_precision="ieee")


@triton.jit
def _multiply(
    accumulator,  # [BLOCK_N, BLOCK_T]
    second,  # the same for the next BLOCK_T rows, with ROW_TILES == 2
    tile,
    split,
    shape: tl.constexpr,
):
    """accumulator += W x^T over the K blocks of a split, in their order.

    All splits run the same number of blocks, which the compiler knows; those beyond K add 0. With a count that is known
    only at run time ptxas serialises the products (C7515)."""
    first = split * (shape.BLOCKS_PER_SPLIT * shape.BLOCK_K)
    for block in tl.range(0, shape.BLOCKS_PER_SPLIT, num_stages=shape.NUM_STAGES):
        k = first + block * shape.BLOCK_K + tl.arange(0, shape.BLOCK_K)[None, :]
        has_k = k < shape.K
        w = tl.load(tile.pW + k, mask=tile.has_n & has_k, other=0.0)
        x = tl.load(tile.pX + k, mask=tile.has_t & has_k, other=0.0)
        accumulator = _dot(w, x, accumulator)
        if shape.ROW_TILES == 2:
            x2 = tl.load(tile.pX2 + k, mask=tile.has_t2 & has_k, other=0.0)
            second = _dot(w, x2, second)
    return accumulator, second


@triton.jit
def _reduce_parts(gParts, place, t, num_rows, stride_part, N: tl.constexpr, SPLITS: tl.constexpr):
    """The sum of the parts of one tile, in their order."""
    inside = (place < N)[:, None] & (t < num_rows)[None, :]
    pPart = gParts + t[None, :].to(tl.int64) * N + place[:, None]
    total = tl.load(pPart, mask=inside, other=0.0, cache_modifier=".cg")
    for split in tl.range(1, SPLITS, num_stages=1):  # not unrolled: all parts at once would not fit into registers
        total += tl.load(pPart + split * stride_part, mask=inside, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _store_part(gParts, part, place, t, num_rows, N: tl.constexpr):
    pPart = gParts + t[:, None].to(tl.int64) * N + place[None, :]
    tl.store(pPart, tl.trans(part), mask=(t < num_rows)[:, None] & (place < N)[None, :])


@triton.jit
def _weight_rows(first, N: tl.constexpr, BLOCK_N: tl.constexpr, PAIRED: tl.constexpr):
    """Which rows of the weight a tile takes, [BLOCK_N], and which of them there are. Paired: of the BLOCK_N / 2
    columns from `first` on, by turns 8 gate rows and their 8 up rows."""
    i = tl.arange(0, BLOCK_N)
    if PAIRED:
        column = first + i // 16 * 8 + i % 8
        return column + i // 8 % 2 * (N // 2), column < N // 2
    return first + i, first + i < N


@triton.jit
def _activate(y, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """The activation [BLOCK_N / 2, BLOCK_T] of a paired tile y [BLOCK_N, BLOCK_T] that is rounded as in memory."""
    pairs = tl.permute(tl.reshape(y, [BLOCK_N // 16, 2, 8, BLOCK_T]), [0, 2, 3, 1])
    gate, up = tl.split(pairs)
    activation = silu_times(gate.to(tl.float32), up.to(tl.float32)).to(y.dtype)
    return tl.reshape(activation, [BLOCK_N // 2, BLOCK_T])


@triton.jit
def _with_adapter(
    y,  # [BLOCK_N, BLOCK_T]: sums, rounded
    sums,
    adapter,
    n,  # [BLOCK_N]
    t,  # [BLOCK_T]
    gated,  # [BLOCK_T]
    first,
    shape: tl.constexpr,
):
    """y with sums + scale * h B^T on gated rows. A tile may touch several slices: each takes its own columns of h."""
    SLICE_ENDS: tl.constexpr = shape.SLICE_ENDS
    N: tl.constexpr = shape.N
    RANK: tl.constexpr = shape.RANK
    BLOCK_RANK: tl.constexpr = shape.BLOCK_RANK
    BLOCK_N: tl.constexpr = shape.BLOCK_N
    BLOCK_T: tl.constexpr = shape.BLOCK_T
    for s in tl.static_range(len(SLICE_ENDS)):
        begin = 0 if s == 0 else SLICE_ENDS[s - 1]
        end = SLICE_ENDS[s]
        touches = (first < end) & (first + BLOCK_N > begin)
        if shape.PAIRED:
            column_end = first + BLOCK_N // 2
            touches = (first < end) & (column_end > begin) | (first + N // 2 < end) & (column_end + N // 2 > begin)
        if touches:
            in_slice = (n >= begin) & (n < end)
            update = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for r_first in tl.static_range(0, RANK, BLOCK_RANK):
                r = r_first + tl.arange(0, BLOCK_RANK)[None, :]
                pB = adapter.b + n[:, None].to(tl.int64) * adapter.stride_b + r
                b = tl.load(pB, mask=in_slice[:, None] & (r < RANK), other=0.0)
                pH = adapter.h + t[:, None].to(tl.int64) * adapter.stride_h + s * RANK + r
                h = tl.load(pH, mask=gated[:, None] & (r < RANK), other=0.0)
                update = _dot(b, h, update)
            # Rows without the adapter keep what they had: selected, never added to.
            y = tl.where(gated[None, :] & in_slice[:, None], (sums + adapter.scale * update).to(y.dtype), y)
    return y


@triton.jit
def _finish(
    sums,  # [BLOCK_N, BLOCK_T]
    operands,
    adapter,
    n,
    has_n,
    t,
    first,
    num_rows,
    shape: tl.constexpr,
):
    """Bias, adapter, the one rounding, the activation, and the store of a finished tile."""
    out = operands.out
    has_t = t < num_rows
    if shape.HAS_BIAS:
        sums += tl.load(operands.bias + n, mask=has_n, other=0.0).to(tl.float32)[:, None]
    y = sums.to(out.dtype.element_ty)
    if shape.HAS_LORA or shape.GATED_ONLY:
        gated = tl.load(adapter.lora_mask + t, mask=has_t, other=0) != 0
        if shape.HAS_LORA:
            if tl.max(gated.to(tl.int32), axis=0) != 0:
                y = _with_adapter(y, sums, adapter, n, t, gated, first, shape)
        else:
            has_t = has_t & gated
    width: tl.constexpr = shape.N // 2 if shape.PAIRED else shape.N
    if shape.PAIRED:
        y = _activate(y, shape.BLOCK_N, shape.BLOCK_T)
    column = first + tl.arange(0, y.shape[0])
    pOut = out + t[:, None].to(tl.int64) * operands.stride_out + column[None, :]
    tl.store(pOut, tl.trans(y), mask=has_t[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    operands,  # Operands
    gParts,  # fp32 [SPLITS, T, PARTS_N]
    gArrivals,  # int32, one per tile, zero between launches
    adapter,  # Adapter
    num_rows,
    shape: tl.constexpr,
):
    follow_previous_launch()
    BLOCK_N: tl.constexpr = shape.BLOCK_N
    BLOCK_T: tl.constexpr = shape.BLOCK_T
    ROW_TILES: tl.constexpr = shape.ROW_TILES
    SPLITS: tl.constexpr = shape.SPLITS
    PARTS_N: tl.constexpr = shape.PARTS_N
    # Row tiles of one weight tile follow each other, so that they find it in L2.
    row_groups = tl.cdiv(num_rows, BLOCK_T * ROW_TILES)
    tile = tl.program_id(0)
    weight_tile = tile // row_groups
    first = weight_tile * (BLOCK_N // 2 if shape.PAIRED else BLOCK_N)  # column of the result
    n, has_n = _weight_rows(first, shape.N, BLOCK_N, shape.PAIRED)
    t = (tile % row_groups) * (BLOCK_T * ROW_TILES) + tl.arange(0, BLOCK_T)
    t2 = t + BLOCK_T
    has_t, has_t2 = (t < num_rows)[:, None], (t2 < num_rows)[:, None]
    if shape.GATED_ONLY:
        gated = tl.load(adapter.lora_mask + t, mask=t < num_rows, other=0) != 0
        any_gated = tl.max(gated.to(tl.int32), axis=0)
        has_t = has_t & gated[:, None]
        if ROW_TILES == 2:
            gated2 = tl.load(adapter.lora_mask + t2, mask=t2 < num_rows, other=0) != 0
            any_gated = any_gated | tl.max(gated2.to(tl.int32), axis=0)
            has_t2 = has_t2 & gated2[:, None]
        if any_gated == 0:
            return
    read = Tile(
        pW=operands.weight + n[:, None].to(tl.int64) * operands.stride_weight,
        pX=operands.x + t[:, None].to(tl.int64) * operands.stride_x,
        pX2=operands.x + t2[:, None].to(tl.int64) * operands.stride_x,
        has_n=has_n[:, None],
        has_t=has_t,
        has_t2=has_t2,
    )

    zeros = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    split = tl.program_id(1)
    sums, sums2 = _multiply(zeros, zeros, read, split, shape)
    if SPLITS > 1:
        if shape.IN_ONE_CTA:
            for later in range(1, SPLITS):
                part, part2 = _multiply(zeros, zeros, read, later, shape)
                sums += part
                sums2 += part2
        else:
            # In the order of the tiles.
            place = weight_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            stride_part = num_rows.to(tl.int64) * PARTS_N
            gMine = gParts + split * stride_part
            _store_part(gMine, sums, place, t, num_rows, PARTS_N)
            if ROW_TILES == 2:
                _store_part(gMine, sums2, place, t2, num_rows, PARTS_N)
            # Releases the part that this CTA stored (the barrier: by all its threads) and, in the CTA that arrives
            # last, acquires the parts of the others.
            tl.debug_barrier()
            arrived = tl.atomic_add(gArrivals + tile, 1, sem="acq_rel", scope="gpu")
            if arrived != SPLITS - 1:
                return
            tl.store(gArrivals + tile, 0)
            sums = _reduce_parts(gParts, place, t, num_rows, stride_part, PARTS_N, SPLITS)
            if ROW_TILES == 2:
                sums2 = _reduce_parts(gParts, place, t2, num_rows, stride_part, PARTS_N, SPLITS)

    for row_tile in tl.static_range(ROW_TILES):
        sums_of, t_of = (sums, t) if row_tile == 0 else (sums2, t2)
        _finish(sums_of, operands, adapter, n, has_n, t_of, first, num_rows, shape)
