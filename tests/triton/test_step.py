"""plan_rows and commit_step on backend `triton`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch

import python_ref
from idlm_kernels.triton import step
from tests.ref.steps import random_commit, random_places
from tests.softgpu_support import SCHEDULES
from tests.triton.support import DEVICE, caught, mutant

PLANS = [(0, False), (1, False), (3, False), (31, False), (1, True), (3, True), (7, True)]


def check_plan(module: ModuleType, num_spec_tokens: int, quadratic: bool, seeds: range = range(2)) -> None:
    for seed in seeds:
        state = random_places(seed, num_spec_tokens, (16, 5)[seed % 2], DEVICE)
        size = (16, 5)[seed % 2]
        how = {"quadratic": quadratic, "noise_below": (0, 151_669)[seed % 2]}
        got = module.plan_rows(state, 60, size, **how)
        for i, (x, y) in enumerate(zip(got, python_ref.plan_rows(state, 60, size, **how), strict=True)):
            assert x.dtype == y.dtype and torch.equal(x, y), i


@pytest.mark.parametrize(("num_spec_tokens", "quadratic"), PLANS)
def test_plan_rows(num_spec_tokens: int, quadratic: bool) -> None:
    check_plan(step, num_spec_tokens, quadratic)


def check_commit(module: ModuleType, num_spec_tokens: int, seeds: range, **options: object) -> None:
    for seed in seeds:
        mine, other = (random_commit(seed, num_spec_tokens, DEVICE, **options) for _ in range(2))
        assert torch.equal(module.commit_step(**mine), python_ref.commit_step(**other)), seed
        for field in dataclasses.fields(python_ref.StepState):
            assert torch.equal(getattr(mine["state"], field.name), getattr(other["state"], field.name)), field.name


@pytest.mark.parametrize("acceptance", [None, 0.5])
@pytest.mark.parametrize("suffix", [False, True])
@pytest.mark.parametrize("num_spec_tokens", [0, 1, 4])
def test_commit_step(num_spec_tokens: int, suffix: bool, acceptance: float | None) -> None:
    check_commit(step, num_spec_tokens, range(3), suffix=suffix, acceptance=acceptance, quadratic=False)
    check_commit(step, num_spec_tokens, range(3, 5), suffix=suffix, acceptance=acceptance, quadratic=True)


def check_search(module: ModuleType) -> None:
    """A text longer than what a CTA looks at at once, whose end occurred once before, in any part of it."""
    places = (3, 1017, 1019, 1020, 1021, 1023, 1500, 1800, 2030, 2034, 2040, 2046)
    args = random_commit(1, 4, DEVICE, suffix=True, acceptance=None)
    text = torch.arange(12 * 2100).view(12, 2100)
    for b, at in enumerate(places):
        text[b, at : at + 4] = text[b, 2050:2054]
    # The last text begins with its last token, and what lies before it in memory is what came before that.
    text[11, 0], text[10, -6:] = text[11, 2053], text[11, 2047:2053]
    state = args["state"]
    zeros = torch.zeros_like(state.finish_reason)
    none = {name: zeros.clone() for name in ("finish_reason", "error_flags", "num_drafts")}
    state = dataclasses.replace(state, text=text, lengths=zeros + 2054, length_limits=zeros + 2100, **none)
    module.commit_step(**args | {"state": state, "tokens": torch.full_like(args["tokens"], -1)})
    assert state.num_drafts.tolist() == [4] * 12 and state.draft_source.tolist() == [2] * 12
    assert state.drafts[:, 0].tolist() == [int(text[b, at + 4]) for b, at in enumerate(places)]


def test_the_text_is_searched_to_its_end() -> None:
    check_search(step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logprobs(dtype: torch.dtype) -> None:
    args, other = (random_commit(3, 3, DEVICE, acceptance=None, suffix=False) for _ in range(2))
    logits = (torch.randn(48, 4099) * 4).to(dtype)
    logits[5] = -torch.inf
    logits[5, 1] = 0.0
    starts = torch.arange(13, dtype=torch.int32) * 4
    more = {"logits": logits, "query_start_loc": starts}
    got, want = step.commit_step(**args, **more), python_ref.commit_step(**other, **more)
    assert torch.equal(got[:, :10], want[:, :10])
    exact = python_ref.step.token_logprobs(logits.double(), starts, want[:, 6:10])
    torch.testing.assert_close(got[:, 10:].view(torch.float64), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        check_plan(step, 3, True, range(1))
        check_commit(step, 4, range(2), suffix=True, acceptance=None)


def check_all(module: ModuleType) -> None:
    check_plan(module, 3, True)
    check_plan(module, 3, False)
    check_commit(module, 3, range(4), suffix=True, acceptance=None)
    check_commit(module, 3, range(4), suffix=False, acceptance=0.5, quadratic=False)
    check_search(module)


MUTANTS = {
    "rows of the request itself before it": ("tl.where(request < b, rows, 0)", "tl.where(request <= b, rows, 0)"),
    "padding over the rows of others": ("total + b * shape.R - start + r - m", "start + r"),
    "branches see each other": ("((two << branch) - 1) | own", "seen"),
    "a page that is not there": ("has_page = is_row & (page < max_pages)", "has_page = is_row"),
    "drafts of a request that ended": ("tl.where(new_reason == kRunning, num_next, 0)", "num_next"),
    "what NaN decided is committed": ("token = tl.where(failed, -1, token)", "token = token"),
    "a chain drafts after a rejection": ("drafts_again & (a == n)", "drafts_again"),
    "the first of equal occurrences": ("(match << 32) + end", "(match << 32) + 4096 - end"),
    "a match within the first tokens": ("goes_on & (end >= back)", "goes_on"),
    "the source of the next drafts": ("tl.store(gOutcome + 5, source", "tl.store(gOutcome + 5, new_source"),
}


@pytest.mark.compiled
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    assert caught(check_all, mutant(step, *MUTANTS[name], tmp_path))
