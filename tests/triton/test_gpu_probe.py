"""bench.gpu_probe on the emulator, where all instructions agree by construction: it asks, and tells what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu_probe

pytestmark = [pytest.mark.compiled, pytest.mark.emulator]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_probe, "SIZE", 64)
    monkeypatch.setattr(gpu_probe, "DEPTHS", (128,))
    monkeypatch.setattr(gpu_probe, "DTYPES", (torch.bfloat16,))


def test_instructions_of_every_kind_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_probe.main() == 0
    text = capsys.readouterr().out
    for instruction in ("wgmma m64n16k16", "wgmma m64n32k16", "mma.sync m16n8k16"):
        assert instruction in text
    assert text.splitlines()[-1] == "VERDICT: every instruction shape gives the same bits"


def test_an_instruction_that_differs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    product = gpu_probe.product

    def other(*arguments: Any) -> tuple[Tensor, str]:
        c, name = product(*arguments)
        return (c.nextafter(torch.tensor(torch.inf)) if "mma.sync" in name else c), name

    monkeypatch.setattr(gpu_probe, "product", other)
    gpu_probe.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert "mma.sync m16n8k16 (16x64x64" in last and "wgmma" not in last


def test_nan_equals_nan_and_zero_is_not_minus_zero() -> None:
    x = torch.tensor([torch.nan, 0.0, 1.0])
    assert gpu_probe.bits(x, x.clone()) == "equal"
    assert gpu_probe.bits(x, torch.tensor([torch.nan, -0.0, 1.0])) == "1 of 3 differ"
