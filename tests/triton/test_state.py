"""advance on backend `triton`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from idlm_kernels.testing import Advance, check
from idlm_kernels.triton import state
from tests.softgpu_support import SCHEDULES
from tests.triton.support import caught, mutant


def check_advance(module: ModuleType, seed: int = 0) -> None:
    check(Advance().call(seed=seed), module.advance)


def test_advance() -> None:
    for seed in range(5):
        check_advance(state, seed)


def test_advance_of_plain_decoding() -> None:
    """AR: one token a step, no drafts and no stop ids."""
    empty = torch.empty(2, 0, dtype=torch.int64)
    zeros = torch.zeros(2, dtype=torch.int32)
    text, lengths = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([1, 4], dtype=torch.int32)
    finish_reason = zeros.clone()
    emitted = state.advance(
        zeros,
        torch.tensor([[7], [8]]),
        empty,
        zeros,
        text=text,
        lengths=lengths,
        drafts=empty.clone(),
        num_drafts=zeros.clone(),
        length_limits=torch.full((2,), 5, dtype=torch.int32),
        stop_ids=empty,
        finish_reason=finish_reason,
    )
    assert emitted.tolist() == [1, 1] and lengths.tolist() == [2, 5] and finish_reason.tolist() == [0, 2]
    assert text.tolist() == [[0, 7, 0, 0, 0], [0, 0, 0, 0, 8]]


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        check_advance(state)


MUTANTS = {
    "tokens after a stop": ("tl.where(is_stop, i + 1, WIDTH + 1)", "tl.where(is_stop, i + 2, WIDTH + 1)"),
    "drafts after the end": ("tl.where(finish_reason == kRunning, num_next, 0)", "num_next"),
    "stop id before its place": (
        "committed = tl.load(gNumAccepted + b) + 1",
        "committed = tl.load(gNumAccepted + b) + 2",
    ),
    "runs past the limit": ("tl.maximum(limit - length, 0)", "tl.maximum(limit - length + 1, 0)"),
    "finished requests go on": ("(finish_reason != kRunning) | ", "(finish_reason == kStopped) | "),
}


@pytest.mark.compiled
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    assert caught(check_advance, mutant(state, *MUTANTS[name], tmp_path))
