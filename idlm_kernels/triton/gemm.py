"""linear, gated_lora_linear and linear_silu_and_mul: tiles and launches. The kernel, and what it computes how, is in
gemm_kernel.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

import python_ref
from idlm_kernels._semaphores import semaphores
from idlm_kernels.triton.common import launch, next_power_of_2
from idlm_kernels.triton.gemm_kernel import Adapter, Operands, Shape, _linear_kernel

kResidentCtas = 396  # 3 on each of the 132 SMs of an H100: what 4 stages of 16 KB leave room for
kMinBlocksPerSplit = 4
kMaxCtasApart = kResidentCtas  # launches with more CTAs compute the parts of a tile in one CTA


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of a GEMM: block_n weight rows x block_t tokens, block_k deep, K cut into `splits` parts."""

    block_n: int
    block_t: int
    block_k: int
    splits: int
    blocks_per_split: int
    num_stages: int
    num_warps: int


def gemm_config(n: int, k: int, dtype: torch.dtype) -> GemmConfig:
    """The tiles for a weight [n, k]. They decide the bits of a row, so nothing else may enter here.

    Weights of 16384 rows and more have enough 128-row tiles to fill the machine and then read x half as often;
    narrower ones take 64-row tiles and cut K until about `kResidentCtas` CTAs run. Counted, not measured.
    """
    if dtype == torch.float32:
        block_n, block_t, block_k, stages = 32, 16, 32, 2
    else:
        block_n, block_t, block_k, stages = (128 if n >= 16384 else 64), 64, 64, 4
    blocks = triton.cdiv(k, block_k)
    tiles = triton.cdiv(n, block_n)
    splits = 1
    if block_n == 64:
        splits = min(kResidentCtas // tiles, blocks // kMinBlocksPerSplit, 16)
    elif dtype == torch.float32:
        splits = blocks // kMinBlocksPerSplit  # for precision: one chain of FMA over all of K errs more than PyTorch
    blocks_per_split = triton.cdiv(blocks, max(splits, 1))
    # 8 warps: the sums of 128 x 128 values and of their adapter do not fit into the registers of 4.
    warps = 8 if block_n == 128 else 4
    return GemmConfig(block_n, block_t, block_k, triton.cdiv(blocks, blocks_per_split), blocks_per_split, stages, warps)


def _run(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    lora_mask: Tensor | None = None,
    h: Tensor | None = None,
    lora_b: Tensor | None = None,
    output_sizes: Sequence[int] = (),
    scale: float = 0.0,
    paired: bool = False,
) -> None:
    """One launch. `lora_mask` without `lora_b`: only the gated rows are computed, the others of `out` stay as they are.
    `paired`: the weight is gate rows, then up rows, and `out` takes their activation."""
    (num_rows, k), n = x.shape, weight.shape[0]
    config = gemm_config(n, k, x.dtype)
    row_tiles = 1 if num_rows <= config.block_t else 2
    weight_tiles = triton.cdiv(n // 2, config.block_n // 2) if paired else triton.cdiv(n, config.block_n)
    tiles = weight_tiles * triton.cdiv(num_rows, config.block_t * row_tiles)
    in_one_cta = config.splits > 1 and tiles * config.splits > kMaxCtasApart
    splits_apart = config.splits > 1 and not in_one_cta
    parts_n = weight_tiles * config.block_n if paired else n
    parts = x.new_empty(config.splits, num_rows, parts_n, dtype=torch.float32) if splits_apart else None
    rank = 1 if lora_b is None else lora_b.shape[1]
    ends = tuple(sum(output_sizes[: i + 1]) for i in range(len(output_sizes)))
    launch(
        _linear_kernel,
        (tiles, config.splits if splits_apart else 1),
        x,
        Operands(x, weight, bias, out, x.stride(0), weight.stride(0), out.stride(0)),
        parts,
        semaphores("arrivals", kResidentCtas, torch.int32, x.device) if splits_apart else None,
        Adapter(
            lora_mask,
            lora_b,
            h,
            stride_b=0 if lora_b is None else lora_b.stride(0),
            stride_h=0 if h is None else h.stride(0),
            scale=float(scale),
        ),
        num_rows,
        shape=Shape(
            N=n,
            K=k,
            PARTS_N=parts_n,
            BLOCK_N=config.block_n,
            BLOCK_T=config.block_t,
            BLOCK_K=config.block_k,
            ROW_TILES=row_tiles,
            SPLITS=config.splits,
            BLOCKS_PER_SPLIT=config.blocks_per_split,
            IN_ONE_CTA=in_one_cta,
            SLICE_ENDS=ends,
            RANK=rank,
            BLOCK_RANK=min(max(next_power_of_2(rank), 16), 32),
            HAS_BIAS=bias is not None,
            HAS_LORA=lora_b is not None,
            GATED_ONLY=lora_mask is not None and lora_b is None,
            PAIRED=paired,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
        # ptxas takes 138 for 8 warps with an adapter: one CTA on an SM. With 128, and no spills, there are two.
        maxnreg=128 if config.num_warps == 8 and lora_b is not None and row_tiles == 1 else None,
    )


def prepare_weight(weight: Tensor) -> Tensor:
    """The weight with contiguous rows, as `linear` reads it."""
    return weight.contiguous()


def _needs_reference(x: Tensor, *others: Tensor | None) -> bool:
    return x.shape[1] == 0 or torch.float64 in (x.dtype, *(t.dtype for t in others if t is not None))


def _run_with_adapter(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_mask: Tensor,
    scale: float,
    bias: Tensor | None,
    output_sizes: Sequence[int] | None,
    y: Tensor,
    paired: bool,
) -> None:
    """Two launches: h of the gated rows, then the layer."""
    h = x.new_empty(x.shape[0], lora_a.shape[0])
    _run(x, lora_a, h, lora_mask=lora_mask)
    widths = [weight.shape[0]] if output_sizes is None else output_sizes
    weight = prepare_weight(weight)
    _run(
        x,
        weight,
        y,
        bias=bias,
        lora_mask=lora_mask,
        h=h,
        lora_b=lora_b,
        output_sizes=widths,
        scale=scale,
        paired=paired,
    )


def linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """See `idlm_kernels.linear`."""
    if _needs_reference(x, bias):
        return python_ref.linear(x, weight, bias=bias, out=out)
    y = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    if y.numel():
        _run(x, prepare_weight(weight), y, bias=bias)
    return y


def gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_mask: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    output_sizes: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.gated_lora_linear`."""
    if _needs_reference(x, lora_b, bias):
        return python_ref.gated_lora_linear(
            x, weight, lora_a, lora_b, lora_mask, scale, bias=bias, output_sizes=output_sizes, out=out
        )
    y = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    if y.numel():
        _run_with_adapter(x, weight, lora_a, lora_b, lora_mask, scale, bias, output_sizes, y, paired=False)
    return y


def linear_silu_and_mul(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_mask: Tensor | None = None,
    scale: float = 1.0,
    output_sizes: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `idlm_kernels.linear_silu_and_mul`."""
    if _needs_reference(x, lora_b, bias):
        adapter: dict[str, Any] = {
            "lora_a": lora_a,
            "lora_b": lora_b,
            "lora_mask": lora_mask,
            "scale": scale,
            "output_sizes": output_sizes,
        }
        return python_ref.linear_silu_and_mul(x, weight, bias=bias, **adapter, out=out)
    y = x.new_empty(x.shape[0], weight.shape[0] // 2) if out is None else out
    if y.numel() == 0:
        return y
    if lora_a is None or lora_b is None or lora_mask is None:
        _run(x, prepare_weight(weight), y, bias=bias, paired=True)
    else:
        _run_with_adapter(x, weight, lora_a, lora_b, lora_mask, scale, bias, output_sizes, y, paired=True)
    return y
