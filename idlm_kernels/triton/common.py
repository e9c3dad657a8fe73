"""What every Triton kernel family shares: the launch, and the alignment on which the shape of a reduction depends."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # the widest access of a thread


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **meta: Any) -> None:
    """Launch on the device of `like`.

    Without fusion of products and sums: the compilers may fuse differently in every specialisation of a kernel, and
    then the bits of a row would depend on how many rows there are.
    """
    with torch.cuda.device_of(like):
        kernel[grid](*args, **meta, enable_fp_fusion=False)


def is_aligned(*tensors: Tensor | None) -> bool:
    """Does every row of these tensors start at a multiple of 16 bytes?"""
    return all(
        t.data_ptr() % VECTOR_BYTES == 0 and all(s * t.element_size() % VECTOR_BYTES == 0 for s in t.stride()[:-1])
        for t in tensors
        if t is not None
    )


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in fp32; whoever computes it, it has these bits."""
    return tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
