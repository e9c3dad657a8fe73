"""What top-k and top-p keep of a row: one launch, one CTA per row, which leaves at once where nothing is truncated.

It lists the values near the largest and finds the k-th largest z and the smallest z of the top-p mass by cutting the
range of z in four, again and again: a pass counts (or sums, in integers of 2^-44, so that no order of summation
matters) what lies above each of three pivots. Where the list turns out too short the passes go over the whole row,
which is in L2, until what is left of it fits into the list: the row is read some seven times then (`bench.counters`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from idlm_kernels.triton.common import follow_previous_launch
from idlm_kernels.triton.rows import key_of, kGreedyBelow, request_of, transformed, value_of
from idlm_kernels.triton.structs import LogitsRow

kNear = tl.constexpr(12.0)  # below the largest z: where nearly always all of a truncated row's kept values lie


class SampleShape(NamedTuple):
    """Of the kernels that go over all rows."""

    BY_REQUEST: bool  # parameters and positions are those of requests
    WITH_DISTRIBUTION: bool
    BLOCK_BATCH: int


@triton.jit
def _weight(z, largest):
    """exp(z - largest) in units of 2^-44: 262,144 of them fit 63 bits, and integers add up in any order."""
    return (tl.exp(z - largest) * 17592186044416.0).to(tl.int64)


class Values(NamedTuple):
    """What a pass goes over."""

    row: LogitsRow
    near: Any  # fp32 [MAX_NEAR]
    is_near: Any  # the listed values, or else all of the row's
    count: Any


@triton.jit
def _at(values, i):
    """z of the listed values i if is_near, else of the row's ids i."""
    if values.is_near:
        z = tl.load(values.near + i, mask=i < values.count, other=float("-inf"))
    else:
        z, _, _ = transformed(values.row, i)
    return z


@triton.jit
def _survey(
    values,
    low,
    high,
    pivot1,
    pivot2,
    pivot3,
    largest,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the keys low <= key < high: the amount and the number from each pivot on; the least and the greatest key."""
    zeros = tl.zeros([BLOCK], tl.int64)
    amount1, amount2, amount3 = zeros, zeros, zeros
    none = tl.zeros([BLOCK], tl.int32)
    num1, num2, num3 = none, none, none
    least = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    greatest = tl.full([BLOCK], -0x80000000, tl.int32)
    for first in range(0, values.count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        z = _at(values, i)
        key = key_of(z)
        inside = (key >= low) & (key < high)
        above1, above2, above3 = inside & (key >= pivot1), inside & (key >= pivot2), inside & (key >= pivot3)
        if BY_MASS:
            weight = _weight(z, largest)
            amount1 += tl.where(above1, weight, 0)
            amount2 += tl.where(above2, weight, 0)
            amount3 += tl.where(above3, weight, 0)
        num1 += above1.to(tl.int32)
        num2 += above2.to(tl.int32)
        num3 += above3.to(tl.int32)
        least = tl.minimum(least, tl.where(inside, key, 0x7FFFFFFF))
        greatest = tl.maximum(greatest, tl.where(inside, key, -0x80000000))
    n1, n2, n3 = tl.sum(num1, axis=0), tl.sum(num2, axis=0), tl.sum(num3, axis=0)
    a1, a2, a3 = n1.to(tl.int64), n2.to(tl.int64), n3.to(tl.int64)
    if BY_MASS:
        a1, a2, a3 = tl.sum(amount1, axis=0), tl.sum(amount2, axis=0), tl.sum(amount3, axis=0)
    return a1, a2, a3, n1, n2, n3, tl.min(least, axis=0), tl.max(greatest, axis=0)


@triton.jit
def _pivot(low, high, quarter: tl.constexpr, by_value):
    """A key in low + 1 .. high - 1: so many quarters of the way between the values, or between the keys."""
    pivot = low + ((high - low) * quarter + 3) // 4
    if by_value:
        lowest, most = value_of(low.to(tl.int32)), value_of((high - 1).to(tl.int32))
        between = lowest * (1.0 - 0.25 * quarter) + most * (0.25 * quarter)
        if between > float("-inf"):
            pivot = key_of(between).to(tl.int64)
    return tl.minimum(tl.maximum(pivot, low + 1), high - 1)


@triton.jit
def _find(
    row,
    gNear,
    is_near,
    count,
    left,
    low,
    high,
    wanted,
    largest,
    BY_MASS: tl.constexpr,
    MAX_NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The greatest key with at least the wanted amount (a number, or mass) from it on; `low` has that, `high` has not.
    `left`: how many keys lie between the two, or more.

    Pivots lie between the values, where passes are few; every fourth time between the keys, which bounds the number of
    passes (64) for any row."""
    turn = 0
    beyond = tl.zeros([], tl.int64)  # the amount from high on
    while high - low > 1:
        if (is_near == 0) & (left <= MAX_NEAR):
            count = _list_range(row, gNear, low, high, BLOCK)
            is_near = True
        by_value = turn % 4 != 3
        turn += 1
        pivot1, pivot2 = _pivot(low, high, 1, by_value), _pivot(low, high, 2, by_value)
        pivot3 = _pivot(low, high, 3, by_value)
        values = Values(row=row, near=gNear, is_near=is_near, count=count)
        a1, a2, a3, n1, n2, n3, least, greatest = _survey(
            values, low, high, pivot1, pivot2, pivot3, largest, BY_MASS, BLOCK
        )
        if (beyond + a3).to(tl.float64) >= wanted:
            low, left = pivot3, n3
        elif (beyond + a2).to(tl.float64) >= wanted:
            low, high, left, beyond = pivot2, pivot3, n2 - n3, beyond + a3
        elif (beyond + a1).to(tl.float64) >= wanted:
            low, high, left, beyond = pivot1, pivot2, n1 - n2, beyond + a2
        else:
            high, left, beyond = pivot1, left - n1, beyond + a1
        low = tl.maximum(low, least.to(tl.int64))
        high = tl.minimum(high, greatest.to(tl.int64) + 1)
    return low


@triton.jit
def _list_range(row, gNear, low, high, BLOCK: tl.constexpr):
    """Write the values with keys low <= key < high to gNear. Returns how many there are."""
    tl.debug_barrier()  # what stands there may still be read
    count = 0
    for first in range(0, row.id_limit, BLOCK):
        id_ = first + tl.arange(0, BLOCK)
        z, _, _ = transformed(row, id_)
        key = key_of(z)
        inside = (key >= low) & (key < high)
        tl.store(gNear + count + tl.cumsum(inside.to(tl.int32), axis=0) - 1, z, mask=inside)
        count += tl.sum(inside.to(tl.int32), axis=0)
    tl.debug_barrier()  # the list is read by other threads of this CTA than wrote it
    return count


@triton.jit
def _kept(values, cut, largest, BLOCK: tl.constexpr):
    """Mass and number of the values from the cut on."""
    mass = tl.zeros([BLOCK], tl.int64)
    num = tl.zeros([BLOCK], tl.int32)
    for first in range(0, values.count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        z = _at(values, i)
        is_kept = key_of(z) >= cut
        mass += tl.where(is_kept, _weight(z, largest), 0)
        num += is_kept.to(tl.int32)
    return tl.sum(mass, axis=0), tl.sum(num, axis=0)


@triton.jit
def _list_near(row, gNear, largest, MAX_NEAR: tl.constexpr, BLOCK: tl.constexpr):
    """Write the values from kNear below the largest on to gNear (as many as fit). Returns how many there are, their
    mass, and the mass of the row."""
    count = 0
    near_mass = tl.zeros([BLOCK], tl.int64)
    mass = tl.zeros([BLOCK], tl.int64)
    for first in range(0, row.id_limit, BLOCK):
        id_ = first + tl.arange(0, BLOCK)
        z, _, _ = transformed(row, id_)
        is_near = z >= largest - kNear
        place = count + tl.cumsum(is_near.to(tl.int32), axis=0) - 1
        tl.store(gNear + place, z, mask=is_near & (place < MAX_NEAR))
        count += tl.sum(is_near.to(tl.int32), axis=0)
        weight = _weight(z, largest)
        mass += weight
        near_mass += tl.where(is_near, weight, 0)
    tl.debug_barrier()  # the list is read by other threads of this CTA than wrote it
    return count, tl.sum(near_mass, axis=0), tl.sum(mass, axis=0)


@triton.jit(
    do_not_specialize=["batch", "id_limit", "mask_id"],
    do_not_specialize_on_alignment=["gTemperature", "gTopK", "gTopP", "gMinP", "gQueryStart"],
)
def _cut_kernel(
    logits,  # Logits
    gTemperature,  # by row, or by request with BY_REQUEST; so the next three
    gTopK,
    gTopP,
    gMinP,
    gQueryStart,  # [B + 1]
    gCut,  # int32 [T]: the least kept key
    gLargest,  # fp32 [T]: the largest z
    gNear,  # fp32 [T, MAX_NEAR], scratch
    batch,
    id_limit,
    mask_id,
    shape: tl.constexpr,
    MAX_NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    follow_previous_launch()
    t = tl.program_id(0).to(tl.int64)
    owner = t
    if shape.BY_REQUEST:
        owner = request_of(gQueryStart, t, batch, shape.BLOCK_BATCH).to(tl.int64)
        if owner >= batch:
            return
    temperature = tl.load(gTemperature + owner)
    top_k, top_p, min_p = tl.load(gTopK + owner), tl.load(gTopP + owner), tl.load(gMinP + owner)
    by_count = (top_k > 0) & (top_k < id_limit)
    is_whole = (not by_count) & (top_p >= 1.0) & (min_p <= 0.0)
    if not shape.WITH_DISTRIBUTION:  # that of a greedy row is cut as any other, its argmax needs no cut
        is_whole = is_whole | (temperature < kGreedyBelow)
    if is_whole:
        tl.store(gCut + t, -0x80000000)
        tl.store(gLargest + t, 0.0)
        return

    row = LogitsRow(logits=logits, row=t, temperature=temperature, id_limit=id_limit, mask_id=mask_id)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, id_limit, BLOCK):
        id_ = first + tl.arange(0, BLOCK)
        z, _, _ = transformed(row, id_)
        best = tl.maximum(best, z)
    largest = tl.max(best, axis=0)
    tl.store(gLargest + t, largest)
    cut = tl.full([], -0x7F800001, tl.int64)  # the key of -inf
    if (largest > float("-inf")) & (by_count | (top_p < 1.0)):
        gMine = gNear + t * MAX_NEAR
        num_near, near_mass, mass = _list_near(row, gMine, largest, MAX_NEAR, BLOCK)
        share = top_p.to(tl.float64)
        is_enough = tl.where(by_count, num_near >= top_k, near_mass.to(tl.float64) >= share * mass.to(tl.float64))
        if is_enough:
            cut = key_of(largest - kNear).to(tl.int64)
        is_near = is_enough & (num_near <= MAX_NEAR)
        count = tl.where(is_near, num_near, id_limit)
        left = tl.where(is_enough, num_near, id_limit)
        beyond = key_of(largest).to(tl.int64) + 1
        if by_count:
            wanted = top_k.to(tl.float64)
            cut = _find(row, gMine, is_near, count, left, cut, beyond, wanted, largest, False, MAX_NEAR, BLOCK)
            values = Values(row=row, near=gMine, is_near=is_near, count=count)
            mass, left = _kept(values, cut, largest, BLOCK)
        if top_p < 1.0:
            wanted = share * mass.to(tl.float64)
            cut = _find(row, gMine, is_near, count, left, cut, beyond, wanted, largest, True, MAX_NEAR, BLOCK)
            cut = tl.minimum(cut, beyond - 1)
    tl.store(gCut + t, cut.to(tl.int32))
