"""sample_rows and verify_accept (mode `match`).

    token of a row = argmax over kept ids of z + g,    z = logit / T,    g = Gumbel noise of (seed, position, id)

Three launches, none of them sorts:

1. _cut_kernel, one CTA per row, leaves at once where nothing is truncated. Else it lists the values near the largest
   and finds the k-th largest z and the smallest z of the top-p mass by bisection over the bits of z: each pass counts
   (or sums, in integers of 2^-44, so that no order of summation matters) what lies above the pivot, and moves the
   bounds to values that occur. Where the list turns out too short it bisects over the whole row, which is in L2.
2. _perturb_kernel, slices of a row side by side: each reads its logits once and keeps the best (z + g, id).
   Blocks of ids of which none is kept draw no noise.
3. _pick_kernel (sample_rows) or _decide_kernel (verify_accept), one CTA per row or request: the best over the slices,
   then drafts against tokens. In `match` the noise of a MASK row is known before acceptance is, so launch 2 samples
   every row of the step at once.

IEEE throughout: division is rounded, nothing is flushed to zero, and log is a polynomial of our own: lg2.approx, exact
to 2^-22, would allow the noise an error of 5e-6 at v = 2^-5, the contract 2e-6. Ties go to the lowest id everywhere.
Mode `rejection` and fp64 are left to the references.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

import python_ref
from idlm_kernels.triton.common import launch, next_power_of_2
from python_ref import STREAM_TARGET, QState

kGreedyBelow = tl.constexpr(1e-4)
kLargest = tl.constexpr(3.4028234663852886e38)
kNan, kInf, kEmptyRow, kBadDraft = (tl.constexpr(bit) for bit in (1, 2, 4, 8))  # bits of status
kFinite = tl.constexpr(1 << 30)  # inner bit: the slice has a finite logit
kNoId = tl.constexpr(0x7FFFFFFF)

kNear = tl.constexpr(12.0)  # below the largest z: where nearly always all of a truncated row's kept values lie
kMaxNear = 8192
kBlockCut = 4096
kBlockPerturb = 1024
kMinSliceIds = 4096
kMaxSlices = 32


@triton.jit
def _log(x):
    """Natural log of normal fp32, within an ulp (the polynomial of Cephes logf)."""
    bits = x.to(tl.int32, bitcast=True)
    # x = m 2^e with m in [sqrt(1/2), sqrt(2)): 0x3F3504F3 are the bits of sqrt(1/2).
    shifted = bits - 0x3F3504F3
    e = shifted >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    f = m - 1.0
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    square = f * f
    exponent = e.to(tl.float32)
    y = tl.fma(exponent, -2.12194440e-4, p * f * square)
    y = tl.fma(square, -0.5, y)
    return tl.fma(exponent, 0.693359375, f + y)


@triton.jit
def _uniform(word):
    """v in (0, 1) of 32-bit words: word * 2^-32 + 2^-33, at most 1 - 2^-24."""
    return tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355224609375)


@triton.jit
def _gumbel(v):
    """Standard Gumbel variables of uniform ones: -log(-log1p(-v)), finite for every v."""
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * (0.25 + v * 0.2))))
    exponential = tl.where(v < 0.03125, series, -_log(1.0 - v))
    return -_log(exponential)


@triton.jit
def _noise(seed, quad, position, stream, BLOCK_QUADS: tl.constexpr):
    """Noise of ids 4 quad .. 4 quad + 3, [4 * BLOCK_QUADS]."""
    zeros = tl.zeros([BLOCK_QUADS], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, quad, zeros + position, zeros + stream, zeros)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * BLOCK_QUADS])
    return _gumbel(_uniform(words))


@triton.jit
def _transformed(gLogits, gBias, id_, temperature, vocab_size, id_limit, mask_id, HAS_BIAS: tl.constexpr):
    """z of ids of one row, -inf where it cannot be sampled, and where a NaN and where a +inf stood."""
    # Loaded up to the width of the table, whose alignment the compiler knows; then cut down to what is allowed.
    inside = id_ < vocab_size
    x = tl.load(gLogits + id_, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(gBias + id_, mask=inside, other=0.0).to(tl.float32)
    x = tl.where((id_ < id_limit) & (id_ != mask_id), x, float("-inf"))
    is_nan, is_inf = x != x, x == float("inf")
    x = tl.where(is_nan, float("-inf"), tl.where(is_inf, kLargest, x))
    divisor = tl.where(temperature < kGreedyBelow, 1.0, temperature)
    z = tl.div_rn(x, tl.zeros_like(x) + divisor)
    z = tl.where(x == float("-inf"), x, tl.minimum(tl.maximum(z, -kLargest), kLargest))
    return tl.where(z == 0.0, 0.0, z), is_nan, is_inf  # -0.0 and 0.0 tie


@triton.jit
def _key(z):
    """Integers in the order of z."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The z of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(z, largest):
    """exp(z - largest) in units of 2^-44: 262,144 of them fit 63 bits, and integers add up in any order."""
    return (tl.exp(z - largest) * 17592186044416.0).to(tl.int64)


@triton.jit
def _amount_above(
    gLogits,
    gBias,
    gNear,
    is_near,
    count,
    pivot,
    largest,
    temperature,
    vocab_size,
    id_limit,
    mask_id,
    BY_MASS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many values, or what mass, have keys >= pivot; the least key >= pivot; the greatest key < pivot. The values
    are the `count` listed ones if is_near, else those of the row's ids."""
    amount = tl.zeros([BLOCK], tl.int64)
    above = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    below = tl.full([BLOCK], -0x80000000, tl.int32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        if is_near:
            z = tl.load(gNear + i, mask=i < count, other=float("-inf"))
        else:
            z, _, _ = _transformed(gLogits, gBias, i, temperature, vocab_size, id_limit, mask_id, HAS_BIAS)
        key = _key(z)
        is_above = key >= pivot
        if BY_MASS:
            amount += tl.where(is_above, _weight(z, largest), 0)
        else:
            amount += is_above.to(tl.int64)
        above = tl.minimum(above, tl.where(is_above, key, 0x7FFFFFFF))
        below = tl.maximum(below, tl.where(is_above, -0x80000000, key))
    return tl.sum(amount, axis=0), tl.min(above, axis=0), tl.max(below, axis=0)


@triton.jit
def _bisect(
    gLogits,
    gBias,
    gNear,
    is_near,
    count,
    low,
    high,
    wanted,
    largest,
    temperature,
    vocab_size,
    id_limit,
    mask_id,
    BY_MASS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The greatest key with at least the wanted amount from it on; `low` has that, `high` has not.

    Pivots are by turns the middle of the values, near which most steps are saved, and the middle of the keys, which
    bounds their number (64) for any row."""
    by_value = True
    while high - low > 1:
        pivot = low + (high - low) // 2
        if by_value:
            middle = 0.5 * _value(low.to(tl.int32)) + 0.5 * _value((high - 1).to(tl.int32))
            if middle > float("-inf"):
                pivot = tl.minimum(tl.maximum(_key(middle).to(tl.int64), low + 1), high - 1)
        by_value = not by_value
        amount, above, below = _amount_above(
            gLogits,
            gBias,
            gNear,
            is_near,
            count,
            pivot,
            largest,
            temperature,
            vocab_size,
            id_limit,
            mask_id,
            BY_MASS,
            HAS_BIAS,
            BLOCK,
        )
        if amount.to(tl.float64) >= wanted:
            low = above.to(tl.int64)
        else:
            high = below.to(tl.int64) + 1
    return low


@triton.jit
def _list_near(
    gLogits,
    gBias,
    gNear,
    largest,
    temperature,
    vocab_size,
    id_limit,
    mask_id,
    HAS_BIAS: tl.constexpr,
    MAX_NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the values from kNear below the largest on to gNear (as many as fit). Returns how many there are, their
    mass, and the mass of the row."""
    count = 0
    near_mass = tl.zeros([BLOCK], tl.int64)
    mass = tl.zeros([BLOCK], tl.int64)
    for first in range(0, id_limit, BLOCK):
        id_ = first + tl.arange(0, BLOCK)
        z, _, _ = _transformed(gLogits, gBias, id_, temperature, vocab_size, id_limit, mask_id, HAS_BIAS)
        is_near = z >= largest - kNear
        place = count + tl.cumsum(is_near.to(tl.int32), axis=0) - 1
        tl.store(gNear + place, z, mask=is_near & (place < MAX_NEAR))
        count += tl.sum(is_near.to(tl.int32), axis=0)
        weight = _weight(z, largest)
        mass += weight
        near_mass += tl.where(is_near, weight, 0)
    tl.debug_barrier()  # the list is read by other threads of this CTA than wrote it
    return count, tl.sum(near_mass, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _request_of(gQueryStart, row, batch, BLOCK_BATCH: tl.constexpr):
    """The request that a row belongs to, `batch` for a row of none."""
    b = tl.arange(0, BLOCK_BATCH)
    ends = tl.load(gQueryStart + 1 + b, mask=b < batch, other=0x7FFFFFFF)
    return tl.sum((ends <= row).to(tl.int32), axis=0)


@triton.jit
def _draft_count(gNumDrafts, request, m_rows, num_k):
    return tl.minimum(tl.maximum(tl.load(gNumDrafts + request), 0), tl.minimum(tl.maximum(m_rows - 1, 0), num_k))


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize=["batch", "id_limit", "mask_id"])
def _cut_kernel(
    gLogits,  # [T, V]
    gBias,  # [T, V]
    gTemperature,  # by row, or by request with BY_REQUEST; so the next three
    gTopK,
    gTopP,
    gMinP,
    gQueryStart,  # [B + 1]
    gCut,  # int32 [T]: the least kept key
    gLargest,  # fp32 [T]: the largest z
    gNear,  # fp32 [T, MAX_NEAR], scratch
    batch,
    stride_logits,
    stride_bias,
    vocab_size,
    id_limit,
    mask_id,
    BY_REQUEST: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MAX_NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    owner = row
    if BY_REQUEST:
        owner = _request_of(gQueryStart, row, batch, BLOCK_BATCH).to(tl.int64)
        if owner >= batch:
            return
    temperature = tl.load(gTemperature + owner)
    top_k, top_p, min_p = tl.load(gTopK + owner), tl.load(gTopP + owner), tl.load(gMinP + owner)
    by_count = (top_k > 0) & (top_k < id_limit)
    if (temperature < kGreedyBelow) | ((not by_count) & (top_p >= 1.0) & (min_p <= 0.0)):
        tl.store(gCut + row, -0x80000000)
        tl.store(gLargest + row, 0.0)
        return

    gRow = gLogits + row * stride_logits
    gRowBias = gBias + row * stride_bias if HAS_BIAS else gBias
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, id_limit, BLOCK):
        id_ = first + tl.arange(0, BLOCK)
        z, _, _ = _transformed(gRow, gRowBias, id_, temperature, vocab_size, id_limit, mask_id, HAS_BIAS)
        best = tl.maximum(best, z)
    largest = tl.max(best, axis=0)
    tl.store(gLargest + row, largest)
    cut = tl.full([], -0x7F800001, tl.int64)  # the key of -inf
    if (largest > float("-inf")) & (by_count | (top_p < 1.0)):
        gMine = gNear + row * MAX_NEAR
        num_near, near_mass, mass = _list_near(
            gRow, gRowBias, gMine, largest, temperature, vocab_size, id_limit, mask_id, HAS_BIAS, MAX_NEAR, BLOCK
        )
        share = top_p.to(tl.float64)
        is_enough = tl.where(by_count, num_near >= top_k, near_mass.to(tl.float64) >= share * mass.to(tl.float64))
        if is_enough:
            cut = _key(largest - kNear).to(tl.int64)
        is_near = is_enough & (num_near <= MAX_NEAR)
        count = tl.where(is_near, num_near, id_limit)
        beyond = _key(largest).to(tl.int64) + 1
        if by_count:
            cut = _bisect(
                gRow,
                gRowBias,
                gMine,
                is_near,
                count,
                cut,
                beyond,
                top_k.to(tl.float64),
                largest,
                temperature,
                vocab_size,
                id_limit,
                mask_id,
                False,
                HAS_BIAS,
                BLOCK,
            )
            mass, _, _ = _amount_above(
                gRow,
                gRowBias,
                gMine,
                is_near,
                count,
                cut,
                largest,
                temperature,
                vocab_size,
                id_limit,
                mask_id,
                True,
                HAS_BIAS,
                BLOCK,
            )
        if top_p < 1.0:
            cut = _bisect(
                gRow,
                gRowBias,
                gMine,
                is_near,
                count,
                cut,
                beyond,
                share * mass.to(tl.float64),
                largest,
                temperature,
                vocab_size,
                id_limit,
                mask_id,
                True,
                HAS_BIAS,
                BLOCK,
            )
            cut = tl.minimum(cut, beyond - 1)
    tl.store(gCut + row, cut.to(tl.int32))


@triton.jit(do_not_specialize=["batch", "num_k", "id_limit", "mask_id", "slice_ids", "stream"])
def _perturb_kernel(
    gLogits,  # [T, V]
    gBias,  # [T, V]
    gTemperature,  # by row, or by request with BY_REQUEST; so the next three
    gMinP,
    gSeed,
    gPositions,  # of the predicted tokens; with BY_REQUEST of the pending ones
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gCut,  # [T]
    gLargest,  # [T]
    gScore,  # fp32 [T, slices]
    gId,  # int32 [T, slices]
    gFlags,  # int32 [T, slices]
    batch,
    num_k,
    stride_logits,
    stride_bias,
    vocab_size,
    id_limit,
    mask_id,
    slice_ids,
    stream,
    BY_REQUEST: tl.constexpr,
    BRANCHED: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    owner = row
    if BY_REQUEST:
        owner = _request_of(gQueryStart, row, batch, BLOCK_BATCH).to(tl.int64)
        if owner >= batch:
            return
    position = tl.load(gPositions + owner).to(tl.int32)
    if BY_REQUEST:
        # Clean row i predicts position L + i; MASK row j of branch b predicts L + b + 1 + j (a chain has branch n).
        start = tl.load(gQueryStart + owner)
        n = _draft_count(gNumDrafts, owner, tl.load(gQueryStart + owner + 1) - start, num_k)
        i = tl.program_id(0) - start
        k = tl.maximum(num_k, 1)
        ahead = i
        if i > n:
            branch = n
            if BRANCHED:
                branch = (i - n - 1) // k
            ahead = branch + 1 + (i - n - 1) % k
        position += 1 + ahead
    temperature, min_p = tl.load(gTemperature + owner), tl.load(gMinP + owner)
    is_greedy = temperature < kGreedyBelow
    least_share = tl.where(is_greedy, 0.0, min_p)
    seed = tl.load(gSeed + owner)
    cut, largest = tl.load(gCut + row), tl.load(gLargest + row)
    gRow = gLogits + row * stride_logits
    gRowBias = gBias + row * stride_bias if HAS_BIAS else gBias

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], kNoId, tl.int32)
    flags = tl.zeros([BLOCK], tl.int32)
    begin = tl.program_id(1) * slice_ids
    for first in range(begin, tl.minimum(begin + slice_ids, id_limit), BLOCK):
        id_ = first + tl.arange(0, BLOCK)
        z, is_nan, is_inf = _transformed(gRow, gRowBias, id_, temperature, vocab_size, id_limit, mask_id, HAS_BIAS)
        flags |= tl.where(is_nan, kNan, 0) | tl.where(is_inf, kInf, 0) | tl.where(z > float("-inf"), kFinite, 0)
        kept = (z > float("-inf")) & (_key(z) >= cut)
        if least_share > 0.0:
            kept = kept & ((tl.exp(z - largest) >= least_share) | (z == largest))
        if tl.max(kept.to(tl.int32), axis=0) != 0:
            score = z
            if not is_greedy:
                score = z + _noise(seed, first // 4 + tl.arange(0, BLOCK // 4), position, stream, BLOCK // 4)
            is_better = kept & (score > best)
            best = tl.where(is_better, score, best)
            best_id = tl.where(is_better, id_, best_id)
    score = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == score, best_id, kNoId), axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(gScore + place, score)
    tl.store(gId + place, winner)
    tl.store(gFlags + place, tl.reduce(flags, 0, _or))


@triton.jit
def _best_of_slices(gScore, gId, gFlags, row, has_row, mask_id, SLICES: tl.constexpr, BLOCK_SLICES: tl.constexpr):
    """Token and status bits of rows [n], from their slices."""
    s = tl.arange(0, BLOCK_SLICES)[None, :]
    place = row.to(tl.int64)[:, None] * SLICES + s
    inside = has_row[:, None] & (s < SLICES)
    score = tl.load(gScore + place, mask=inside, other=float("-inf"))
    id_ = tl.load(gId + place, mask=inside, other=kNoId)
    flags = tl.reduce(tl.load(gFlags + place, mask=inside, other=0), 1, _or)
    token = tl.min(tl.where(score == tl.max(score, axis=1)[:, None], id_, kNoId), axis=1)
    is_empty = (flags & kFinite) == 0
    lowest = tl.where(mask_id == 0, 1, 0)
    token = tl.where(is_empty, lowest, token)
    status = (flags & (kNan | kInf)) | tl.where(is_empty, kEmptyRow, 0)
    return token, tl.where(has_row, status, 0)


@triton.jit(do_not_specialize=["num_rows", "mask_id"])
def _pick_kernel(
    gScore,  # [T, SLICES]
    gId,
    gFlags,
    gOut,  # int64 [T]
    gStatus,  # int32 [T]
    num_rows,
    mask_id,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_STATUS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_row = row < num_rows
    token, status = _best_of_slices(gScore, gId, gFlags, row, has_row, mask_id, SLICES, BLOCK_SLICES)
    tl.store(gOut + row, token.to(tl.int64), mask=has_row)
    if HAS_STATUS:
        tl.store(gStatus + row, tl.load(gStatus + row, mask=has_row, other=0) | status, mask=has_row)


@triton.jit(do_not_specialize=["vocab_size", "mask_id", "stride_drafts", "stride_tokens", "stride_next"])
def _decide_kernel(
    gScore,  # [T, SLICES]
    gId,
    gFlags,
    gQueryStart,  # [B + 1]
    gNumDrafts,  # [B]
    gDrafts,  # [B, K]
    gNumAccepted,  # [B]
    gTokens,  # [B, K + 1]
    gNextDrafts,  # [B, K]
    gNextNumDrafts,  # [B]
    gStatus,  # [B]
    vocab_size,
    mask_id,
    stride_drafts,
    stride_tokens,
    stride_next,
    K: tl.constexpr,
    BRANCHED: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_STATUS: tl.constexpr,
):
    request = tl.program_id(0)
    start = tl.load(gQueryStart + request)
    m_rows = tl.load(gQueryStart + request + 1) - start
    is_present = m_rows > 0
    n = _draft_count(gNumDrafts, request, m_rows, K)
    i = tl.arange(0, BLOCK_K)

    is_clean = (i <= n) & (i < m_rows)
    y, status = _best_of_slices(gScore, gId, gFlags, start + i, is_clean, mask_id, SLICES, BLOCK_SLICES)
    draft = tl.load(gDrafts + request.to(tl.int64) * stride_drafts + i, mask=i < K, other=-1)
    is_draft = (i < n) & is_clean
    is_bad = is_draft & ((draft < 0) | (draft >= vocab_size))
    refused = is_draft & (is_bad | (draft != y.to(tl.int64)))
    a = tl.min(tl.where(refused, i, n), axis=0)
    token = tl.where(i < a, draft, y.to(tl.int64))
    token = tl.where((i <= a) & (i < m_rows), token, -1)
    tl.store(gTokens + request.to(tl.int64) * stride_tokens + i, token, mask=i <= K)
    tl.store(gNumAccepted + request, tl.where(is_present, a, 0))

    # New drafts: MASK row j of branch a; a chain has branch n only.
    first_mask = 1 + n
    if BRANCHED:
        first_mask += a * K
    is_proposed = is_present & (first_mask + K <= m_rows) & (K > 0)
    if not BRANCHED:
        is_proposed = is_proposed & (a == n)
    num_proposed = tl.where(is_proposed, K, 0)
    new, new_status = _best_of_slices(
        gScore, gId, gFlags, start + first_mask + i, i < num_proposed, mask_id, SLICES, BLOCK_SLICES
    )
    new = tl.where(i < num_proposed, new, -1).to(tl.int64)
    tl.store(gNextDrafts + request.to(tl.int64) * stride_next + i, new, mask=i < K)
    tl.store(gNextNumDrafts + request, num_proposed)
    if HAS_STATUS:
        bits = tl.reduce(status | new_status | tl.where(is_bad, kBadDraft, 0), 0, _or)
        if is_present:
            if tl.load(gNumDrafts + request) != n:
                bits = bits | kBadDraft
            tl.store(gStatus + request, tl.load(gStatus + request) | bits)


def _sampled_slices(
    logits: Tensor,
    positions: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    id_limit: int,
    mask_id: int,
    stream: int,
    logit_bias: Tensor | None,
    query_start_loc: Tensor | None = None,
    num_drafts: Tensor | None = None,
    num_k: int = 0,
    branched: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches 1 and 2: the best score, its id and the flags of every slice of every row, [T, slices] each.

    Parameters (temperature, top_k, top_p, min_p, seed) and positions are by row, or, with query_start_loc, by request.
    """
    num_rows = logits.shape[0]
    slices = min(triton.cdiv(id_limit, kMinSliceIds), kMaxSlices)
    slice_ids = triton.cdiv(triton.cdiv(id_limit, slices), kBlockPerturb) * kBlockPerturb
    slices = triton.cdiv(id_limit, slice_ids)
    score = logits.new_empty(num_rows, slices, dtype=torch.float32)
    ids, flags = (logits.new_empty(num_rows, slices, dtype=torch.int32) for _ in range(2))
    cut = logits.new_empty(num_rows, dtype=torch.int32)
    largest = logits.new_empty(num_rows, dtype=torch.float32)
    near = logits.new_empty(num_rows, kMaxNear, dtype=torch.float32)
    temperature, top_k, top_p, min_p, seed = parameters
    batch = temperature.shape[0]
    by_request = query_start_loc is not None
    block = min(kBlockCut, max(next_power_of_2(id_limit), 256))
    common = {
        "BY_REQUEST": by_request,
        "BLOCK_BATCH": next_power_of_2(batch) if by_request else 1,
        "HAS_BIAS": logit_bias is not None,
    }
    strides = (logits.stride(0), 0 if logit_bias is None else logit_bias.stride(0))
    launch(
        _cut_kernel,
        (num_rows,),
        logits,
        logits,
        logit_bias,
        temperature,
        top_k,
        top_p,
        min_p,
        query_start_loc,
        cut,
        largest,
        near,
        batch,
        *strides,
        logits.shape[1],
        id_limit,
        mask_id,
        MAX_NEAR=kMaxNear,
        BLOCK=block,
        num_warps=block // 256,  # 16 bytes of bf16 per lane, and no lane without any
        **common,
    )
    launch(
        _perturb_kernel,
        (num_rows, slices),
        logits,
        logits,
        logit_bias,
        temperature,
        min_p,
        seed,
        positions,
        query_start_loc,
        num_drafts,
        cut,
        largest,
        score,
        ids,
        flags,
        batch,
        num_k,
        *strides,
        logits.shape[1],
        id_limit,
        mask_id,
        slice_ids,
        stream,
        BRANCHED=branched,
        BLOCK=kBlockPerturb,
        num_warps=4,
        **common,
    )
    return score, ids, flags


def sample_rows(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    stream: int = STREAM_TARGET,
    logit_bias: Tensor | None = None,
    status: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.sample_rows`."""
    parameters = (temperature, top_k, top_p, min_p, seed)
    if logits.dtype == torch.float64 or (logit_bias is not None and logit_bias.dtype == torch.float64):
        return python_ref.sample_rows(
            logits,
            positions,
            *parameters,
            id_limit,
            mask_id,
            stream=stream,
            logit_bias=logit_bias,
            status=status,
            out=out,
        )
    num_rows = logits.shape[0]
    y = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    if num_rows == 0:
        return y
    score, ids, flags = _sampled_slices(logits, positions, parameters, id_limit, mask_id, stream, logit_bias)
    block_rows = 32
    launch(
        _pick_kernel,
        (triton.cdiv(num_rows, block_rows),),
        logits,
        score,
        ids,
        flags,
        y,
        status,
        num_rows,
        mask_id,
        SLICES=score.shape[1],
        BLOCK_SLICES=next_power_of_2(score.shape[1]),
        BLOCK_ROWS=block_rows,
        HAS_STATUS=status is not None,
        num_warps=4,
    )
    return y


def verify_accept(
    logits: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    drafts: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    id_limit: int,
    mask_id: int,
    *,
    branched: bool,
    mode: str,
    q_state: QState | None = None,
    logit_bias: Tensor | None = None,
    status: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `idlm_kernels.verify_accept`."""
    parameters = (temperature, top_k, top_p, min_p, seed)
    batch, num_k = drafts.shape
    is_fp64 = logits.dtype == torch.float64 or (logit_bias is not None and logit_bias.dtype == torch.float64)
    if mode != "match" or is_fp64 or batch == 0:
        return python_ref.verify_accept(
            logits,
            query_start_loc,
            num_drafts,
            drafts,
            positions,
            *parameters,
            id_limit,
            mask_id,
            branched=branched,
            mode=mode,
            q_state=q_state,
            logit_bias=logit_bias,
            status=status,
            out=out,
        )
    if out is None:
        a, count = (torch.empty(batch, dtype=torch.int32, device=logits.device) for _ in range(2))
        tokens = drafts.new_empty(batch, num_k + 1)
        out = (a, tokens, drafts.new_empty(batch, num_k), count)
    score, ids, flags = _sampled_slices(
        logits,
        positions,
        parameters,
        id_limit,
        mask_id,
        STREAM_TARGET,
        logit_bias,
        query_start_loc,
        num_drafts,
        num_k,
        branched,
    )
    num_accepted, tokens, next_drafts, next_num_drafts = out
    launch(
        _decide_kernel,
        (batch,),
        logits,
        score,
        ids,
        flags,
        query_start_loc,
        num_drafts,
        drafts,
        num_accepted,
        tokens,
        next_drafts,
        next_num_drafts,
        status,
        logits.shape[1],
        mask_id,
        drafts.stride(0),
        tokens.stride(0),
        next_drafts.stride(0),
        K=num_k,
        BRANCHED=branched,
        SLICES=score.shape[1],
        BLOCK_SLICES=next_power_of_2(score.shape[1]),
        BLOCK_K=next_power_of_2(num_k + 1),
        HAS_STATUS=status is not None,
        num_warps=4,
    )
    return out
