"""The self-check on backend `triton`: the kernels pass it, planted faults do not."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import idlm_kernels
from idlm_kernels import triton
from idlm_kernels.ops import _dispatch
from idlm_kernels.ops.self_check import CHECKS, self_check
from idlm_kernels.triton import attention, gemm, layers, sampling, state
from tests.triton.support import mutant

# The checks are in bf16. On a GPU `idlm doctor` runs them.
pytestmark = [pytest.mark.compiled, pytest.mark.emulator]

CPU = torch.device("cpu")


def test_auto_takes_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: `auto` checks them all, and uses them."""
    backend = dataclasses.replace(_dispatch._backends["triton"], automatic=True)
    monkeypatch.setitem(_dispatch._backends, "triton", backend)
    monkeypatch.setattr(_dispatch, "_verdicts", {})
    monkeypatch.delenv("IDLM_BACKEND", raising=False)
    chosen = idlm_kernels.backends("cpu")
    assert {op: why for (_, op, _), why in _dispatch._verdicts.items() if why is not None} == {}
    assert {op for op, name in chosen.items() if name == "triton"} == {op for op in CHECKS if hasattr(triton, op)}


# family: op, the fault
MUTANTS: dict[str, tuple[ModuleType, str, str, str]] = {
    "cut of K by row count": (
        gemm,
        "linear",
        "config = gemm_config(n, k, x.dtype)",
        "config = gemm_config(n if num_rows < 65 else n * 100, k, x.dtype)",
    ),
    "adapter added to every row": (
        gemm,
        "gated_lora_linear",
        "y = tl.where(gated[None, :] & in_slice[:, None], (sums",
        "y = tl.where(in_slice[:, None], (sums",
    ),
    "rotation by slot, not position": (
        layers,
        "qk_norm_rope_append",
        "tl.load(gPositions + row)",
        "tl.load(gSlots + row)",
    ),
    "scale of the row count": (
        attention,
        "strided_attention",
        "1 / math.sqrt(head_dim) if sm_scale is None else sm_scale",
        "(1 + 1e-3 * (num_rows == 1)) / math.sqrt(head_dim) if sm_scale is None else sm_scale",
    ),
    "noise keyed by the row": (
        sampling,
        "sample_rows",
        "position, stream, BLOCK // 4)",
        "position + tl.program_id(0), stream, BLOCK // 4)",
    ),
    "accepts past a refusal": (
        sampling,
        "verify_accept",
        "a = tl.min(tl.where(rejected, i, span.n), axis=0)",
        "a = span.n - tl.sum(rejected.to(tl.int32), axis=0)",
    ),
    "runs past the limit": (
        state,
        "advance",
        "tl.maximum(limit - length, 0)",
        "tl.maximum(limit - length + 1, 0)",
    ),
}


@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_refused(name: str, tmp_path: Path) -> None:
    module, op, old, new = MUTANTS[name]
    package = mutant(module, old, new, tmp_path).__name__.split(".")[0]
    reason = self_check(sys.modules[package], op, CPU)
    assert reason is not None and not reason.startswith("not checked")
