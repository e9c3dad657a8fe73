"""advance of backend `cuda` against the reference."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from idlm_kernels.native import backend
from idlm_kernels.testing import Advance, check
from tests.softgpu_support import SCHEDULES


@pytest.fixture(autouse=True)
def built(module: ModuleType) -> None:
    """Every test here launches kernels."""


@pytest.mark.parametrize("num_stops", [0, 1, 3])
@pytest.mark.parametrize("num_spec_tokens", [0, 1, 3, 31])
def test_advance(num_spec_tokens: int, num_stops: int, device: torch.device) -> None:
    problem = Advance(batch=33, num_spec_tokens=num_spec_tokens, num_stops=num_stops, max_len=70)
    for seed in range(20):
        check(problem.call("cpu", seed), backend.advance, device)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType, device: torch.device) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        check(Advance(batch=9).call("cpu", 1), backend.advance, device)


def test_strict_bounds(softgpu: ModuleType) -> None:
    arguments = Advance(batch=7).call("cpu", 2).arguments | {"out": torch.zeros(7, dtype=torch.int32)}
    written = {"text", "lengths", "drafts", "num_drafts", "finish_reason", "out"}
    with softgpu.configured(strict=1):
        for name, x in arguments.items():
            softgpu.register(x, writable=name in written)
        backend.advance(**arguments)
        for x in arguments.values():
            softgpu.unregister(x)


def test_empty_batch_and_long_plans(device: torch.device) -> None:
    assert Advance(batch=0).call("cpu").run(backend.advance, device).result.shape == (0,)
    with pytest.raises(ValueError, match="32 columns"):
        Advance(batch=2, num_spec_tokens=32, max_len=80).call("cpu").run(backend.advance, device)
