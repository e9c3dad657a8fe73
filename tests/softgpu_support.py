"""softgpu, the PTX emulator, for tests: where it is, and the schedules under which every kernel has to pass.

SOFTGPU_DIR names its folder (default ../shared/softgpu beside the checkout), SOFTGPU_LIB its built library (default
build/libcudart.so.13 in that folder). Where it is missing a test is skipped with the reason, unless
IDLM_REQUIRE_SOFTGPU=1: then it fails.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]

# late, war: asynchronous copies land at the last legal moment, reads of shared memory happen as late as they may.
# random: anywhere between, with warps and CTAs in random order. checks: races, uninitialised and unfenced reads.
SCHEDULES: dict[str, dict[str, Any]] = {
    "late": {"async_": "late"},
    "war": {"async_": "war"},
    "random-1": {"async_": "random", "sched": "random", "seed": 1},
    "random-2": {"async_": "random", "sched": "random", "seed": 2},
    "random-3": {"async_": "random", "sched": "random", "seed": 3},
    "checks": {"race": 1, "uninit": 1, "proxy": 1},
}


def missing(reason: str) -> NoReturn:
    """End the running test: a failure where softgpu is required, else a skip."""
    if os.environ.get("IDLM_REQUIRE_SOFTGPU") == "1":
        pytest.fail(f"{reason}; IDLM_REQUIRE_SOFTGPU=1 asks for it")
    pytest.skip(reason)


@functools.cache
def _load() -> ModuleType | str:
    """The module, or the reason why there is none."""
    root = Path(os.environ.get("SOFTGPU_DIR") or ROOT.parent / "shared" / "softgpu")
    if not (root / "python" / "softgpu" / "__init__.py").is_file():
        return f"softgpu is not at {root} (set SOFTGPU_DIR)"
    sys.path.insert(0, str(root / "python"))
    try:
        return importlib.import_module("softgpu")
    except (ImportError, OSError) as error:
        return f"softgpu does not load: {error} (build it, or set SOFTGPU_LIB)"


def load_softgpu() -> ModuleType:
    """The `softgpu` module; ends the test where there is none."""
    found = _load()
    if isinstance(found, str):
        missing(found)
    return found


def activate_triton() -> ModuleType:
    """Make softgpu Triton's driver, so that launches take CPU tensors; returns the `softgpu` module."""
    softgpu = load_softgpu()
    try:
        importlib.import_module("softgpu.triton_driver").activate()
    except ImportError as error:
        missing(f"softgpu cannot drive Triton: {error}")
    return softgpu
