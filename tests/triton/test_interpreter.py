"""Each family's tests once more in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.softgpu_support import ROOT
from tests.triton.support import INTERPRETED

FAMILIES = ("attention", "gemm", "layers", "rejection", "rerank", "sampling", "state", "step")


@pytest.mark.emulator
@pytest.mark.skipif(INTERPRETED, reason="this is that run")
@pytest.mark.parametrize("family", FAMILIES)
def test_family_passes_in_the_interpreter(family: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/triton/test_{family}.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
