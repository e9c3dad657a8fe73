"""The self-check on backend `cuda`: the kernels pass it, planted faults do not."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from idlm_kernels.native import backend, gemm
from idlm_kernels.ops import _dispatch
from idlm_kernels.ops.self_check import CHECKS, self_check

OWN = [op for op in CHECKS if hasattr(backend, op)]


@pytest.mark.parametrize("op", OWN)
def test_the_kernels_pass(op: str, module: ModuleType, device: torch.device) -> None:
    assert self_check(backend, op, device) is None


def test_it_has_what_it_is_asked_first_for() -> None:
    assert set(OWN) >= {"sample_rows", "verify_accept", "advance", "linear", "gated_lora_linear", "linear_silu_and_mul"}
    assert next(iter(_dispatch.checked_backends(torch.device("cuda")))).name == "cuda"


def faulty(module: ModuleType, op: str) -> ModuleType:
    """The compiled module, whose `op` is called with a wrong field."""
    right = getattr(module, op)

    def called(params: Any, options: Any) -> None:
        if op == "sample_rows":
            params.logits.mask_id = -1
        elif op == "verify_accept":
            params.quadratic = not params.quadratic  # the other kind of plan
        else:
            params.num_stop_ids = 0
        right(params, options)

    def linear(params: Any, *rest: Any) -> None:
        params.bias = 0
        right(params, *rest)

    wrong = ModuleType("faulty")
    vars(wrong).update(vars(module), **{op: linear if op == "linear" else called})
    return wrong


@pytest.mark.parametrize("op", ["sample_rows", "verify_accept", "advance", "linear"])
def test_faults_are_refused(op: str, module: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = faulty(module, op)
    for part in (backend, gemm):
        monkeypatch.setattr(part, "load", lambda: wrong)
    reason = self_check(backend, op, device)
    assert reason is not None and ("wanted" in reason or "off by" in reason)


def test_a_module_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from idlm_kernels import native

    def refuse() -> None:
        raise native.NativeUnavailable("the native module is not built")

    monkeypatch.setattr(native, "load", refuse)
    assert _dispatch._backends["cuda"].unusable(torch.device("cuda")) == "the native module is not built"


def test_another_architecture_is_told(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, here = _dispatch._backends["cuda"], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert cuda.unusable(here) == "the native module is compiled for sm_90a alone"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.unusable(here) is None
