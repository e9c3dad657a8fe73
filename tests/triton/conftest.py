"""The Triton kernels on CPU tensors: compiled for sm_90 and run on softgpu, or, where TRITON_INTERPRET=1 was set before
Python started, in Triton's interpreter (test_interpreter.py starts that run)."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from idlm_kernels.ops import _dispatch
from tests.softgpu_support import activate_triton
from tests.triton.support import INTERPRETED

if importlib.util.find_spec("triton") is None:  # it exists for Linux only
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: needs the compiled kernel, the interpreter will not do")
    config.addinivalue_line("markers", "emulator: looks at the emulator itself, or needs no GPU; left out on one")
    config.addinivalue_line("markers", "planted: kernels with planted faults, which may hang a GPU; left out on one")


@pytest.fixture(autouse=True)
def run_on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same seed, with strict bounds, and with backend `triton` open to CPU tensors. Memory
    that nobody has written holds NaN, as if it had not been a right result before."""
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
    else:
        softgpu = activate_triton()
        with softgpu.configured(strict=1):
            yield


@pytest.fixture
def softgpu(run_on_cpu: None) -> ModuleType:
    return activate_triton()
