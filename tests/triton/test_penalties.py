"""apply_penalties on backend `triton`: the bits of the reference, whose arithmetic is the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

import python_ref
from idlm_kernels.testing import ApplyPenalties, check_bits
from idlm_kernels.triton import penalties
from tests.softgpu_support import SCHEDULES
from tests.triton.support import caught, mutant

SHAPES = (
    {"quadratic": True},
    {"quadratic": False, "num_biases": 0, "max_len": 200},
    {"quadratic": True, "num_biases": 130, "vocab_size": 1200, "max_len": 257},
    {"quadratic": False, "dtype": torch.float32},
    {"quadratic": True, "dtype": torch.float16},
)


def check(module: ModuleType, *, in_place: bool = False, **shape: object) -> None:
    call = ApplyPenalties(**shape).call()  # type: ignore[arg-type]
    want = python_ref.apply_penalties(**call.arguments)
    out = {"out": call["logits"]} if in_place else {}
    before = call["logits"].clone()
    got = module.apply_penalties(**call.arguments, **out)
    assert torch.equal(got.isnan(), want.isnan())  # of a NaN the sign may differ
    check_bits(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0), "penalised logits")
    if in_place:
        assert got is call["logits"]
    else:
        check_bits(call["logits"], before, "what was given")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_the_bits_of_the_reference(shape: dict[str, object], in_place: bool) -> None:
    check(penalties, in_place=in_place, **shape)


def test_fp64_and_no_requests() -> None:
    check(penalties, dtype=torch.float64)
    call = ApplyPenalties().call()
    names = ("num_drafts", "drafts", "text", "lengths")
    empty = {name: call[name][:0] for name in names} | {"query_start_loc": call["query_start_loc"][:1]}
    nobody = call.mapped(lambda x: x[:0])["penalties"]
    got = penalties.apply_penalties(**call.arguments | empty | {"penalties": nobody})
    check_bits(got, call["logits"], "logits of nobody")


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, softgpu: ModuleType) -> None:
    with softgpu.configured(**SCHEDULES[schedule]):
        check(penalties)
        check(penalties, in_place=True, quadratic=False)


@pytest.mark.compiled
def test_the_bits_of_a_request_alone() -> None:
    """Among others, and as the only one of its batch, whose text has more room."""
    call = ApplyPenalties(quadratic=False).call()
    whole = penalties.apply_penalties(**call.arguments)
    for b in range(5):
        start, end = call["query_start_loc"][b : b + 2].tolist()
        own = slice(b, b + 1)
        alone = call.changed(
            logits=call["logits"][start:end].contiguous(),
            query_start_loc=call["query_start_loc"].new_tensor([0, end - start]),
            text=torch.nn.functional.pad(call["text"][own], (0, 77), value=3),
            penalties=call.mapped(lambda x: x[own])["penalties"],  # noqa: B023 - called at once
            **{name: call[name][own] for name in ("num_drafts", "drafts", "lengths")},
        )
        check_bits(penalties.apply_penalties(**alone.arguments), whole[start:end], f"request {b} alone")


def check_all(module: ModuleType) -> None:
    check(module)
    check(module, quadratic=False, in_place=True)


MUTANTS = {
    "every entry of an id writes": ("(other[None, :] < i[:, None])", "(other[None, :] < 0)"),
    "biases are the prompt": ("is_prompt = (place >= 0)", "is_prompt = (place >= -num_biases)"),
    "the prompt counts": ("(place >= prompt_length)", "(place >= 0)"),
    "the text ends one early": ("(place < length) & (place >= prompt_length)", "(place < length - 1)"),
    "drafts after the row": ("for j in range(visible)", "for j in range(span.n)"),
    "no drafts": ("for j in range(visible)", "for j in range(0)"),
    "MASK rows of a chain": (
        "visible = tl.minimum((r - 1 - span.n) // tl.maximum(num_spec_tokens, 1), span.n)",
        "visible = 0",
    ),
    "presence of the prompt": ("presence * (count > 0)", "presence * is_seen"),
    "negative logits are divided": ("tl.where(x > 0, tl.div_rn", "tl.where(x < 1e9, tl.div_rn"),
    "the bias after the penalties": ("tl.where(is_biased, x + bias, x)", "x"),
    "ids beyond the vocabulary": ("return tl.where(token < history.vocab_size, token, -1)", "return token"),
    "requests without penalties but a bias": (" | (largest >= 0)", ""),
}


@pytest.mark.compiled
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    assert caught(check_all, mutant(penalties, *MUTANTS[name], tmp_path))
