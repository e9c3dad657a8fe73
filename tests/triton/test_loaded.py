"""idlm_kernels.triton.loaded: kernels that spill are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from idlm_kernels.triton import layers, loaded, spills

pytestmark = pytest.mark.compiled


def test_kernels_that_were_loaded_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    layers.silu_and_mul(torch.ones(2, 8))
    name, compiled = next((name, compiled) for name, compiled in loaded._loaded() if "silu" in name)
    assert compiled.n_spills == 0 and name not in spills()
    monkeypatch.setattr(compiled, "n_spills", 12)
    assert spills()[name] == 12


def test_a_kernel_that_was_not_loaded_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        n_spills = None

    found: list[tuple[str, Any]] = [("_a", Compiled())]
    monkeypatch.setattr(loaded, "_loaded", lambda: found)
    assert spills() == {}
