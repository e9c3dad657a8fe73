"""The Triton kernels on the GPU where there is one, else on CPU tensors: compiled for sm_90 and run on softgpu, or,
where TRITON_INTERPRET=1 was set before Python started, in Triton's interpreter (test_interpreter.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from idlm_kernels.ops import _dispatch
from tests.softgpu_support import activate_triton
from tests.triton.pretended import pretend
from tests.triton.support import DEVICE, INTERPRETED, ON_GPU, PRETENDED

if importlib.util.find_spec("triton") is None:  # it exists for Linux only
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: needs the compiled kernel, the interpreter will not do")
    config.addinivalue_line("markers", "emulator: looks at the emulator itself, or needs no GPU; left out on one")
    config.addinivalue_line("markers", "planted: kernels with planted faults, which may hang a GPU; left out on one")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU leave out what is about the emulator, and faults that may hang it or leave a CUDA error behind. They
    are left out and not skipped: a suite of which all is skipped there is a failure (tests/conftest.py)."""
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in mine:
        if "softgpu" in getattr(item, "fixturenames", ()):
            item.add_marker("emulator")
    if ON_GPU or PRETENDED:
        left_out = [item for item in mine if any(map(item.get_closest_marker, ("emulator", "planted")))]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def run_on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same seed, with strict bounds, with DEVICE for its tensors, and with backend `triton`
    open to CPU tensors. Memory that nobody has written holds NaN, as if it had not been a right result before."""
    torch.manual_seed(0)
    backend = dataclasses.replace(_dispatch._backends["triton"], device_types=("cuda", "cpu"), automatic=False)
    monkeypatch.setitem(_dispatch._backends, "triton", backend)
    monkeypatch.setattr(_dispatch, "_chosen", {})
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    if INTERPRETED:
        if request.node.get_closest_marker("compiled"):
            pytest.skip("says something about compiled kernels only")
        yield
    elif ON_GPU:
        with DEVICE:
            yield
        torch.cuda.synchronize()  # an error that a kernel left is this test's
    else:
        softgpu = activate_triton()
        card = pretend(monkeypatch, _triton_modules()) if PRETENDED else contextlib.nullcontext()
        with softgpu.configured(strict=1), card:
            yield


def _triton_modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith("idlm_kernels.triton")]


@pytest.fixture
def softgpu(run_on_device: None) -> ModuleType:
    """For tests that count, reschedule or read PTX."""
    return activate_triton()


@pytest.fixture(autouse=True)
def own_semaphores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault leaves words behind that no later launch may meet."""
    monkeypatch.setattr("idlm_kernels._semaphores._words", {})
