"""The tests of this folder put their tensors where a GPU would want them: seen without one (pretended.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from idlm_kernels.triton import layers
from tests.softgpu_support import ROOT
from tests.triton.pretended import PretendedCard, on_card, pretend
from tests.triton.support import PRETENDED

pytestmark = [pytest.mark.compiled, pytest.mark.emulator]

# The others do as well and take minutes: IDLM_PRETEND_CARD=1 python -m pytest tests/triton
QUICK = ("state", "end_to_end", "rerank", "sampling")


@pytest.mark.skipif(PRETENDED, reason="this is that run")
def test_the_tests_run_on_a_card() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"tests/triton/test_{name}.py" for name in QUICK]
    environment = {**os.environ, "IDLM_PRETEND_CARD": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "deselected" in run.stdout and "skipped" not in run.stdout.splitlines()[-1]


def test_what_a_gpu_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with PretendedCard():
        x, y = torch.ones(3), torch.ones(3, device="cpu")
        assert on_card(x + 1) and on_card(x[:2]) and on_card(torch.zeros(2, device=x.device)) and not on_card(y * 2)
        assert (
            not on_card(x.cpu())
            and on_card(x)
            and on_card(y.to(x.device))
            and on_card(x[torch.tensor([0], device="cpu")])
        )
        mixed = (lambda: x + y, lambda: torch.cat([x, y]), lambda: y[x.long()], lambda: torch.equal(x, y))
        for wrong in (*mixed, lambda: x.numpy()):
            with pytest.raises(RuntimeError, match="on the CPU"):
                wrong()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator())
    with pretend(monkeypatch, [layers]), pytest.raises(RuntimeError, match="are on the CPU"):
        layers.silu_and_mul(torch.ones(2, 8, device="cpu"))
