"""What every Triton kernel family shares: the launch, and the alignment on which the shape of a reduction depends."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

VECTOR_BYTES = 16  # the widest access of a thread


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **meta: Any) -> None:
    """Launch on the device of `like`.

    Without fusion of products and sums: the compilers may fuse differently in every specialisation of a kernel, and
    then the bits of a row would depend on how many rows there are.

    From Hopper on its CTAs may start while the launch before still runs: every kernel begins with
    follow_previous_launch().
    """
    with torch.cuda.device_of(like):
        kernel[grid](*args, **meta, enable_fp_fusion=False, launch_pdl=overlaps(like.device))


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Does a launch on this device begin before the one before has ended (programmatic dependent launch)? On the CPU:
    what is emulated there is a Hopper."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def follow_previous_launch():
    """The first statement of every kernel: nothing of global memory is read or written before.

    Waits until the launch before has ended and what it wrote is seen; by then that launch has seen the end of its own
    predecessor. Every CTA waits, also one that has nothing to do: a launch whose CTAs had all left early would end,
    and let its successor run, beside its predecessor. Then the next launch may send its CTAs, which wait here in turn.
    So launches overlap by what they take to begin, two at a time; semaphores, which the next launch takes over, are not
    touched by two at once.
    """
    if cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


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
