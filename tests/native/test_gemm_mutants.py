"""Planted faults in the linear layers: each must be caught by the checks that the kernel passes.

A mutant is the bf16 kernels of up to 64 rows, compiled (PTX only) from a changed kernel.cuh, linked with the objects
of the build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from idlm_kernels import _semaphores
from idlm_kernels.native import gemm
from tests.native.gemm_support import (
    Problem,
    check_activation,
    check_adapter,
    check_chain,
    check_isolation,
    check_linear,
    check_slices,
)
from tests.native.mutants import mutant
from tests.native.support import Toolkit

SOURCE = """#include "gemm/kernel.cuh"
namespace idlm::gemm {
Kernel kernel_bf16(int32_t, bool adapter) {
  return adapter ? linear_kernel<__nv_bfloat16, 1, true> : linear_kernel<__nv_bfloat16, 1, false>;
}
}
"""


def values(softgpu: ModuleType) -> None:
    check_linear(Problem(7, 1024, (100,), 8))
    check_adapter(Problem(9, 1024, (70, 90), 136))
    check_activation(Problem(9, 512, (51, 61), 40))


def isolation(softgpu: ModuleType) -> None:
    check_isolation(Problem(9, 320, (70, 40, 90), 40))
    check_slices(Problem(9, 320, (70, 40, 90), 40))


def schedules(softgpu: ModuleType) -> None:
    for seed in range(4):
        with softgpu.configured(sched="random", seed=seed, quantum=40):
            check_linear(Problem(7, 1024, (100,), 8))
            check_adapter(Problem(9, 1024, (70, 90), 136))
            many = Problem(64, 512, (64,), 72)
            many.lora_mask[:] = True
            check_adapter(many)


def asynchrony(softgpu: ModuleType) -> None:
    """K so long that every stage is filled twice."""
    for mode in ("late", "war"):
        with softgpu.configured(async_=mode):
            check_linear(Problem(7, 8192, (60,), 8))
            check_adapter(Problem(9, 8192, (30, 34), 72))


MUTANTS: dict[str, tuple[Callable[[ModuleType], None], str, str]] = {
    "a block of K falls between two parts": (
        values,
        "p.blocks * (part + 1) / parts - first_block",
        "p.blocks * (part + 1) / parts - first_block - (part == 1)",
    ),
    "the last part is left out": (
        values,
        "    if (part < w.parts) {\n      x[0].x",
        "    if (part + 1 < w.parts) {\n      x[0].x",
    ),
    "parts are read before they are there": (
        schedules,
        "    __syncthreads();\n  } else {\n    cluster_arrive();\n    cluster_wait();\n",
        "    __syncthreads();\n  } else {\n    __syncthreads();\n",
    ),
    "the lora_mask is off by one": (values, "(e / 4 * 8 + e % 2) & 1)", "(e / 4 * 8 + e % 2 + 1) & 1)"),
    "the adapter is added to every row": (
        isolation,
        "(mine >> (e / 4 * 8 + e % 2) & 1) && inside[e / 2 % 2]",
        "inside[e / 2 % 2]",
    ),
    "the adapter is multiplied by the lora_mask": (
        isolation,
        "const bool wanted = (mine >> (e / 4 * 8 + e % 2) & 1) && inside[e / 2 % 2];\n"
        "        sums[tile][e] = wanted ? __fmaf_rn(p.scale,",
        "sums[tile][e] = inside[e / 2 % 2] ? __fmaf_rn(p.scale * (mine >> (e / 4 * 8 + e % 2) & 1),",
    ),
    "a slice ends one row late": (isolation, "n >= begin && n < end,", "n >= begin && n <= end,"),
    "every slice takes the first h": (
        values,
        "w.first_token,\n                   updates.slice_of(i)",
        "w.first_token, 0",
    ),
    "the scale is forgotten": (values, "__fmaf_rn(p.scale,", "__fmaf_rn(1.0f,"),
    "the activation of sums that are not rounded": (
        values,
        "column + p.second_half, true)",
        "column + p.second_half, false)",
    ),
    "x is read before it is written": (check_chain, "        wait_for_previous_kernel,\n", "        [] {},\n"),
    "a weight is read before it is written": (
        check_chain,
        "  if (!p.weight_is_constant) wait_for_previous_kernel();\n",
        "",
    ),
    "the flags are not set back": (values, "arrived[0] = arrived[1] = 0;", ";"),
    "h of the launch before": (schedules, "while (load_acquire(arrived) != wanted) __nanosleep(64);", ""),
    "a stage is filled while it is read": (
        asynchrony,
        "    barrier_wait(ring.empty(at.stage), at.parity ^ 1);\n",
        "",
    ),
    "a stage is given back before its products are done": (asynchrony, "    products_wait<1>();", "    //"),
}


# Faults of values, which many tests see.
BREADTH = {
    "the last part is left out",
    "a slice ends one row late",
    "every slice takes the first h",
    "the scale is forgotten",
    "the activation of sums that are not rounded",
    "the lora_mask is off by one",
}


@pytest.fixture
def build_mutant(
    module: ModuleType, softgpu: ModuleType, toolkit: Toolkit, tmp_path: Path
) -> Callable[[str, str], ModuleType]:
    return lambda old, new: mutant("gemm/kernel.cuh", old, new, SOURCE, softgpu, toolkit, tmp_path)


@pytest.fixture
def fresh_flags(monkeypatch: pytest.MonkeyPatch, softgpu: ModuleType) -> Iterator[None]:
    """Flags of its own, and a short patience with CTAs that wait for one another."""
    monkeypatch.setattr(_semaphores, "_words", {})
    with softgpu.configured(livelock=200_000):
        yield


@pytest.mark.usefixtures("fresh_flags")
@pytest.mark.parametrize("check", [values, isolation, schedules, asynchrony, check_chain])
def test_the_kernel_passes(check: Callable[[ModuleType], None], module: ModuleType, softgpu: ModuleType) -> None:
    check(softgpu)


@pytest.mark.usefixtures("clean_runtime", "fresh_flags")
@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.slow] * (m in BREADTH)) for m in MUTANTS])
def test_mutants_are_caught(
    name: str, build_mutant: Callable[[str, str], ModuleType], softgpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, old, new = MUTANTS[name]
    changed = build_mutant(old, new)
    monkeypatch.setattr(gemm, "load", lambda: changed)
    torch.manual_seed(0)
    with pytest.raises((AssertionError, RuntimeError)):
        check(softgpu)
