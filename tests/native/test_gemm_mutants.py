"""Planted faults in the linear layers: each must be caught by the checks that the kernel passes.

A mutant is the bf16 kernels of up to 64 rows, or of 65 to 128, compiled (PTX only) from a changed source, linked with
the objects of the build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from idlm_kernels import _semaphores
from idlm_kernels.native import gemm
from idlm_kernels.testing.numerics import check_close
from tests.native.gemm_support import (
    Problem,
    check_activation,
    check_adapter,
    check_chain,
    check_flags,
    check_isolation,
    check_linear,
    check_slices,
)
from tests.native.mutants import mutant
from tests.native.support import ROOT, Toolkit

SOURCE = """#include "gemm/kernel.cuh"
namespace idlm::gemm {
Kernel kernel_bf16(const Tile& tile) {
  return tile.adapter ? linear_kernel<__nv_bfloat16, TOKENS, true> : linear_kernel<__nv_bfloat16, TOKENS, false>;
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


def sharing(softgpu: ModuleType) -> None:
    """Tiles that load tokens for one another, with one part of K and with four."""
    for seed, k, n in ((0, 512, 8500), (1, 2048, 2200)):
        problem = Problem(66, k, (n,), 264, seed=seed)
        with softgpu.configured(sched="random", seed=seed, async_="war" if seed == 1 else "random", race=1):
            plain, got = problem.linear(), problem.gated()
            softgpu.synchronize()
        check_close(plain, problem.exact_linear(), problem.peer_linear())
        check_close(got, problem.exact(), problem.peer())
        check_flags()


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
    "a stage is given back to one of two who load into it": (
        sharing,
        "lane == 0 ? cluster_rank() : w.partner",
        "cluster_rank()",
    ),
    "tokens are sent to a partner who is not ready": (
        sharing,
        "    __syncwarp();\n    cluster_arrive();\n    cluster_wait();\n  } else {\n    __syncthreads();\n  }\n\n  if",
        "  }\n  __syncthreads();\n\n  if",
    ),
    "both partners load the same half of the tokens": (sharing, "w.half == half", "half == 0"),
    "stages of updates are given back to one of two": (
        sharing,
        "if (lane < w.sharers) barrier_arrive(ring",
        "if (lane == 0) barrier_arrive(ring",
    ),
    "a tile without a neighbour shares its tokens": (sharing, " && tile - half + 1 < p.tiles", ""),
}


# Faults of values, which many tests see.
BREADTH = {
    "both partners load the same half of the tokens",
    "a tile without a neighbour shares its tokens",
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
) -> Callable[[str, str, int], ModuleType]:
    def build(old: str, new: str, token_tiles: int) -> ModuleType:
        source, files = SOURCE.replace("TOKENS", str(token_tiles)), ("gemm/kernel.cuh", "gemm/ring.cuh")
        changed = next((file for file in files if old in (ROOT / "csrc" / file).read_text()), files[0])
        return mutant(changed, old, new, source, softgpu, toolkit, tmp_path)

    return build


@pytest.fixture
def fresh_flags(monkeypatch: pytest.MonkeyPatch, softgpu: ModuleType) -> Iterator[None]:
    """Flags of its own, and a short patience with CTAs that wait for one another."""
    monkeypatch.setattr(_semaphores, "_words", {})
    with softgpu.configured(livelock=200_000):
        yield


@pytest.mark.usefixtures("fresh_flags")
@pytest.mark.parametrize("check", [values, isolation, schedules, asynchrony, sharing, check_chain])
def test_the_kernel_passes(check: Callable[[ModuleType], None], module: ModuleType, softgpu: ModuleType) -> None:
    check(softgpu)


@pytest.mark.usefixtures("clean_runtime", "fresh_flags")
@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.slow] * (m in BREADTH)) for m in MUTANTS])
def test_mutants_are_caught(
    name: str, build_mutant: Callable[[str, str, int], ModuleType], softgpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, old, new = MUTANTS[name]
    changed = build_mutant(old, new, 2 if check is sharing else 1)
    monkeypatch.setattr(gemm, "load", lambda: changed)
    torch.manual_seed(0)
    with pytest.raises((AssertionError, RuntimeError)):
        check(softgpu)
