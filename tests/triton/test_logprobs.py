"""top_logprobs on backends `triton` and `cpu` against the reference."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

import python_ref
from idlm_kernels.cpu import logprobs as on_cpu
from idlm_kernels.testing import TopLogprobs
from idlm_kernels.triton import logprobs
from tests.triton.support import caught, mutant

SHAPES = ({}, {"count": 1}, {"count": 32, "vocab_size": 300}, {"count": 5, "vocab_size": 20, "dtype": torch.float32})


def check(module: ModuleType, **shape: object) -> None:
    call = TopLogprobs(**shape).call()  # type: ignore[arg-type]
    got, want = module.top_logprobs(**call.arguments), python_ref.top_logprobs(**call.arguments)
    assert torch.equal(got[0], want[0]) and got[1].dtype == want[1].dtype
    exact = python_ref.top_logprobs(**call.widened().arguments)[1]
    torch.testing.assert_close(got[1].double(), exact, rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("module", [logprobs, on_cpu], ids=["triton", "cpu"])
def test_against_the_reference(module: ModuleType, shape: dict[str, object]) -> None:
    check(module, **shape)


def test_the_reference_against_plain_python() -> None:
    call = TopLogprobs(dtype=torch.float32, vocab_size=40, count=5).call()
    ids, logprobs = python_ref.top_logprobs(**call.arguments)
    x = call["logits"].double()
    for b, i in ((0, 0), (2, 0), (3, 1)):
        row = x[int(call["query_start_loc"][b]) + i].tolist()
        best = sorted(range(27), key=lambda token: (-row[token], token))[:5]
        assert ids[b, i].tolist() == best
        total = math.log(sum(math.exp(value) for value in row))
        wanted = [row[token] - total for token in best]
        assert logprobs[b, i].tolist() == pytest.approx(wanted, abs=1e-5)


MUTANTS = {
    "the highest of ties": ("_packed(x, id_)", "_packed(x, id_limit - id_)"),
    "ids that do not exist": ("mask=id_ < id_limit", "mask=id_ < vocab_size"),
    "a block alone": ("tl.topk(tl.cat(best, tl.topk(_packed(x, id_), kListed), can_reorder=True), kListed)",
                      "tl.topk(_packed(x, id_), kListed)"),
    "another row": ("+ i, num_rows - 1)", "+ 0, num_rows - 1)"),
    "no token": (">= 0:", ">= -1:"),
}  # fmt: skip


@pytest.mark.compiled
@pytest.mark.planted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    assert caught(check, mutant(logprobs, *MUTANTS[name], tmp_path))
