"""The kernels of rms_norm (+ residual add), silu_and_mul, embed and qk_norm_rope_append.

All CTAs stand on axis x of their grids, the only one that takes more than 65,535.

Each is one launch that reads its input once and writes its result once, in fp32 with one rounding at the end:

    rms_norm              h = x (or residual += x); out = h / sqrt(mean(h^2) + eps) * weight    one CTA per row
    silu_and_mul          out = x1 / (1 + exp(-x1)) * x2                                        1024 columns per CTA
    embed                 out = weight[id], or the MASK embedding                               1024 columns per CTA
    qk_norm_rope_append   q, k: norm per head, rotation; k, v to their cache slot               8 heads per CTA

A decode step has few rows (7 x 8 KB for one request of Qwen3-8B): all four are bound by launch latency, not by
bytes. The shape of each reduction is a function of width and dtype, so a row's bits depend on that row alone.
fp64, the dtype of reference results, is left to the references.
"""

from __future__ import annotations

import triton
import triton.language as tl

from idlm_kernels.triton.common import follow_previous_launch, silu_times


@triton.jit(do_not_specialize=["stride_x", "stride_residual", "stride_out"])
def _rms_norm_kernel(
    gX,  # [T, H]
    gResidual,  # [T, H]
    gWeight,  # [H]
    gOut,  # [T, H]
    stride_x,
    stride_residual,
    stride_out,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    follow_previous_launch()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    inside = column < H
    x = tl.load(tl.multiple_of(gX + row * stride_x + column, ALIGNMENT), mask=inside, other=0.0)
    weight = tl.load(tl.multiple_of(gWeight + column, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        pResidual = tl.multiple_of(gResidual + row * stride_residual + column, ALIGNMENT)
        residual = tl.load(pResidual, mask=inside, other=0.0)
        # The norm sees the sum as it was stored, rounded.
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(pResidual, x, mask=inside)
    h = x.to(tl.float32)
    mean_square = tl.div_rn(tl.sum(h * h, axis=0), H * 1.0)
    inverse_rms = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    y = h * inverse_rms * weight
    tl.store(tl.multiple_of(gOut + row * stride_out + column, ALIGNMENT), y.to(gOut.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stride_x", "stride_out"])
def _silu_and_mul_kernel(
    gX,  # [T, 2F]
    gOut,  # [T, F]
    stride_x,
    stride_out,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    follow_previous_launch()
    BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    pGate = gX + row * stride_x + column
    gate = tl.load(tl.multiple_of(pGate, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
    up = tl.load(tl.multiple_of(pGate + F, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
    y = silu_times(gate, up)
    tl.store(tl.multiple_of(gOut + row * stride_out + column, ALIGNMENT), y.to(gOut.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_ids", "stride_weight", "stride_out"], do_not_specialize_on_alignment=["gIds", "gIsMask"]
)
def _embed_kernel(
    gIds,  # [T]
    gWeight,  # [V, H]
    gIsMask,  # [T]
    gMaskEmbedding,  # [H]
    gOut,  # [T, H]
    num_ids,
    stride_weight,
    stride_out,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_MASK_EMBEDDING: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    follow_previous_launch()
    BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < H
    token = tl.load(gIds + row)
    is_valid = (token >= 0) & (token < num_ids)
    y = tl.zeros([BLOCK_H], gOut.dtype.element_ty)
    is_mask = False
    if HAS_MASK_EMBEDDING:
        is_mask = tl.load(gIsMask + row) != 0
    if is_mask:
        if HAS_MASK_EMBEDDING:
            y = tl.load(tl.multiple_of(gMaskEmbedding + column, ALIGNMENT), mask=inside, other=0.0).to(
                gOut.dtype.element_ty
            )
    elif is_valid:
        pWeight = tl.multiple_of(gWeight + token * stride_weight + column, ALIGNMENT)
        y = tl.load(pWeight, mask=inside, other=0.0).to(gOut.dtype.element_ty)
    tl.store(tl.multiple_of(gOut + row * stride_out + column, ALIGNMENT), y, mask=inside)


@triton.jit
def _rms_scale(x1, x2, eps, D: tl.constexpr):
    """1 / rms of each head, [heads, 1]; x1, x2 are its halves."""
    mean_square = tl.div_rn(tl.sum(x1 * x1 + x2 * x2, axis=1), D * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]


@triton.jit(
    do_not_specialize=[
        "num_positions",
        "num_slots",
        "page_size",
        "stride_qkv",
        "stride_rotary",
        "stride_out_row",
        "stride_out_head",
        "stride_k_page",
        "stride_k_slot",
        "stride_k_head",
        "stride_v_page",
        "stride_v_slot",
        "stride_v_head",
    ],
    do_not_specialize_on_alignment=["gPositions", "gSlots"],
)
def _qk_norm_rope_append_kernel(
    gQkv,  # [T, (Hq + 2 Hkv) * D]
    gPositions,  # [T]
    gRotary,  # [P, D]
    gSlots,  # [T]
    gK,  # [num_pages, page_size, Hkv, D]
    gV,
    gQWeight,  # [D]
    gKWeight,
    gOut,  # [T, Hq, D]
    eps,
    num_positions,
    num_slots,
    page_size,
    stride_qkv,
    stride_rotary,
    stride_out_row,
    stride_out_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    STORE_ALIGNMENT: tl.constexpr,
):
    follow_previous_launch()
    HALF: tl.constexpr = D // 2
    BLOCKS: tl.constexpr = (HQ + 2 * HKV + BLOCK_HEADS - 1) // BLOCK_HEADS
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    # 64 bits: strides of heads are free, and the heads of a cache may lie further apart than 32 bits count.
    head = (tl.program_id(0) % BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    inside = (head < HQ + 2 * HKV) & (i < HALF)[None, :]
    is_q = head < HQ
    is_v = head >= HQ + HKV

    # Half-split pairs: x1 [heads, HALF] with x2 [heads, HALF].
    pX = gQkv + row * stride_qkv + head * D + i[None, :]
    x1 = tl.load(tl.multiple_of(pX, [1, ALIGNMENT]), mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(tl.multiple_of(pX + HALF, [1, ALIGNMENT]), mask=inside, other=0.0).to(tl.float32)
    y1, y2 = x1, x2
    if HAS_NORM:
        q1 = tl.load(gQWeight + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        q2 = tl.load(gQWeight + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        k1 = tl.load(gKWeight + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        k2 = tl.load(gKWeight + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        inverse_rms = _rms_scale(x1, x2, eps, D)
        y1 = x1 * inverse_rms * tl.where(is_q, q1, k1)
        y2 = x2 * inverse_rms * tl.where(is_q, q2, k2)

    # A position beyond the table would read foreign memory: it takes the nearest row of the table.
    position = tl.minimum(tl.maximum(tl.load(gPositions + row).to(tl.int64), 0), num_positions - 1)
    pRotary = gRotary + position * stride_rotary + i
    cos = tl.load(pRotary, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(pRotary + HALF, mask=i < HALF, other=0.0)[None, :]
    r1 = y1 * cos - y2 * sin
    r2 = y2 * cos + y1 * sin

    pOut = gOut + row * stride_out_row + head * stride_out_head + i[None, :]
    tl.store(tl.multiple_of(pOut, [1, STORE_ALIGNMENT]), r1.to(gOut.dtype.element_ty), mask=inside & is_q)
    tl.store(tl.multiple_of(pOut + HALF, [1, STORE_ALIGNMENT]), r2.to(gOut.dtype.element_ty), mask=inside & is_q)

    slot = tl.load(gSlots + row)
    written_half = tl.where((slot >= 0) & (slot < num_slots), HALF, 0)
    written = inside & (i < written_half)[None, :]
    page, offset = slot // page_size, slot % page_size
    pK = gK + page * stride_k_page + offset * stride_k_slot + (head - HQ) * stride_k_head + i[None, :]
    is_k = written & (head >= HQ) & (head < HQ + HKV)
    tl.store(tl.multiple_of(pK, [1, STORE_ALIGNMENT]), r1.to(gK.dtype.element_ty), mask=is_k)
    tl.store(tl.multiple_of(pK + HALF, [1, STORE_ALIGNMENT]), r2.to(gK.dtype.element_ty), mask=is_k)
    pV = gV + page * stride_v_page + offset * stride_v_slot + (head - HQ - HKV) * stride_v_head + i[None, :]
    tl.store(tl.multiple_of(pV, [1, STORE_ALIGNMENT]), x1.to(gV.dtype.element_ty), mask=written & is_v)
    tl.store(tl.multiple_of(pV + HALF, [1, STORE_ALIGNMENT]), x2.to(gV.dtype.element_ty), mask=written & is_v)
