"""The CUDA kernels on CPU tensors under softgpu, or on a GPU where there is one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from idlm_kernels import native
from idlm_kernels.testing.decided import REPORT
from tests.native.support import ROOT, Toolkit
from tests.softgpu_support import load_softgpu, missing

ON_GPU = torch.cuda.is_available()


@pytest.fixture(scope="session")
def softgpu() -> ModuleType:
    """softgpu as the CUDA runtime, for tests that count, reschedule or mutate."""
    if ON_GPU:
        pytest.skip("this machine has a GPU, whose runtime softgpu cannot stand in for")
    return load_softgpu()


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    """nvcc and what goes with it."""
    spec = importlib.util.spec_from_file_location("idlm_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = build
    spec.loader.exec_module(build)
    try:
        return Toolkit(build, build.find_toolchain())
    except build.CannotBuild as reason:
        missing(f"no CUDA compiler: {reason}")


@pytest.fixture(scope="session")
def module(request: pytest.FixtureRequest) -> ModuleType:
    """The native module, built if it has to be, on softgpu where there is no GPU."""
    if not ON_GPU:
        request.getfixturevalue("softgpu")  # before the module: it brings the CUDA runtime
    if not is_built():
        request.getfixturevalue("toolkit")
        command = [sys.executable, str(ROOT / "csrc" / "build.py")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"the native build failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return native.load()


def is_built() -> bool:
    """Is there a module of these sources for this Python? Without loading it, which cannot be undone."""
    folder, wanted = Path(native.__file__).parent, native.source_hash()
    files = [folder / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return wanted is not None and any(wanted.encode() in file.read_bytes() for file in files if file.is_file())


@pytest.fixture(scope="session")
def device(module: ModuleType) -> torch.device:
    """Where the tensors of a test live."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def clean_runtime(softgpu: ModuleType) -> Iterator[None]:
    """For tests that provoke a failing launch: its error sticks to the runtime."""
    yield
    softgpu.reset()


@pytest.fixture(scope="session")
def probe(softgpu: ModuleType, toolkit: Toolkit, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """probe.cu as a softgpu module."""
    ptx = tmp_path_factory.mktemp("probe") / "probe.ptx"
    toolkit.nvcc("-ptx", "-arch=compute_90a", str(Path(__file__).with_name("probe.cu")), "-o", str(ptx))
    return softgpu.PtxModule(str(ptx))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much the comparisons with the reference left out."""
    cases = [(name, counts) for tally in REPORT for name, counts in tally.cases.items()]
    if not cases:
        return
    compared, left_out = (sum(counts[i] for _, counts in cases) for i in (0, 1))
    worst = max(left / max(1, done + left) for _, (done, left) in cases)
    terminalreporter.write_line(
        f"CUDA sampling: {compared} results in {len(cases)} cases equal to the reference, {left_out} left out as "
        f"undecided ({left_out / (compared + left_out):.3%}; {worst:.2%} in the worst case)"
    )
