"""advance of backend `cuda` against the reference."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

import python_ref
from idlm_kernels.native import backend
from tests.softgpu_support import SCHEDULES

STATE = ("text", "lengths", "drafts", "num_drafts", "length_limits", "stop_ids", "finish")


@pytest.fixture(autouse=True)
def built(module: ModuleType) -> None:
    """Every test here launches kernels."""


def problem(
    seed: int, batch: int, num_k: int, num_stops: int, max_len: int = 40
) -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    accepted = draw(0, num_k + 1, batch, dtype=torch.int32)
    tokens = draw(0, 12, batch, num_k + 1)
    tokens[torch.arange(num_k + 1) > accepted.unsqueeze(1)] = -1
    tokens[draw(0, 6, batch) == 0] = -1  # a request without rows
    results = [accepted, tokens, draw(-1, 12, batch, num_k), draw(0, num_k + 1, batch, dtype=torch.int32)]
    lengths = draw(1, max_len, batch, dtype=torch.int32)
    limits = (lengths + draw(-2, num_k + 3, batch, dtype=torch.int32)).clamp(max=max_len)
    state = {
        "text": draw(0, 12, batch, max_len),
        "lengths": lengths,
        "drafts": draw(0, 12, batch, num_k),
        "num_drafts": draw(0, num_k + 1, batch, dtype=torch.int32),
        "length_limits": limits,
        "stop_ids": draw(-1, 12, batch, num_stops),
        "finish": draw(0, 6, batch, dtype=torch.int32).clamp(min=3) - 3,
    }
    return results, state


def run(module: ModuleType, results: list[Tensor], state: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    moved = {name: x.clone().to(device) for name, x in state.items()}
    emitted = module.advance(*(x.to(device) for x in results), **moved)
    return [emitted.cpu(), *(moved[name].cpu() for name in STATE)]


@pytest.mark.parametrize("num_stops", [0, 1, 3])
@pytest.mark.parametrize("num_k", [0, 1, 3, 31])
def test_advance(num_k: int, num_stops: int, device: torch.device) -> None:
    for seed in range(20):
        results, state = problem(seed, 33, num_k, num_stops, max_len=70)
        got = run(backend, results, state, device)  # type: ignore[arg-type]
        wanted = run(python_ref, results, state, device)
        for name, x, y in zip(("emitted", *STATE), got, wanted, strict=True):
            assert torch.equal(x, y), f"{name}, seed {seed}"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType, device: torch.device) -> None:
    results, state = problem(1, 9, 3, 2)
    expected = run(backend, results, state, device)  # type: ignore[arg-type]
    with softgpu.configured(**SCHEDULES[schedule]):
        got = run(backend, results, state, device)  # type: ignore[arg-type]
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_strict_bounds(softgpu: ModuleType) -> None:
    results, state = problem(2, 7, 3, 2)
    written = {"text", "lengths", "drafts", "num_drafts", "finish"}
    out = torch.zeros(7, dtype=torch.int32)
    tensors = [*((x, False) for x in results), *((x, name in written) for name, x in state.items()), (out, True)]
    with softgpu.configured(strict=1):
        for x, writable in tensors:
            softgpu.register(x, writable=writable)
        backend.advance(*results, **state, out=out)
        for x, _ in tensors:
            softgpu.unregister(x)


def test_empty_batch_and_long_plans(device: torch.device) -> None:
    results, state = problem(0, 0, 3, 1)
    assert run(backend, results, state, device)[0].shape == (0,)  # type: ignore[arg-type]
    results, state = problem(0, 2, 32, 1, max_len=80)
    with pytest.raises(ValueError, match="32 columns"):
        run(backend, results, state, device)  # type: ignore[arg-type]
