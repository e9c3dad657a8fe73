"""idlm_kernels.triton.loaded: cache keys do not depend on what runs first, kernels that spill are named."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from idlm_kernels.triton import layers, loaded, spills

pytestmark = pytest.mark.compiled


KEYS = """
import sys
import idlm_kernels.triton
from idlm_kernels.triton import layers, loaded, perturb, rows
kernels = [perturb._perturb_kernel, *loaded._functions()]
for kernel in kernels if sys.argv[1] == "kernel first" else kernels[::-1]:
    kernel.cache_key
print([kernel.cache_key for kernel in kernels])
"""


def test_cache_keys_do_not_depend_on_which_kernel_comes_first() -> None:
    found = {
        subprocess.run([sys.executable, "-c", KEYS, order], capture_output=True, text=True, check=True).stdout
        for order in ("kernel first", "functions first")
    }
    assert len(found) == 1


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
