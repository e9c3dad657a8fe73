"""What the documents say of the operations and of a step is what the code has."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import idlm_kernels
from idlm_kernels.generate.plan import StepPlan, plan_rows
from idlm_kernels.ops import OPS
from tests.tiny import tiny_state

ROOT = Path(__file__).resolve().parents[2]
OPS_PAGE, STEP_PAGE = ROOT / "docs" / "ops.md", ROOT / "docs" / "step.md"


def index() -> dict[str, list[list[Path]]]:
    """Of each op the files of its columns: contract, reference, kernels, tests, bench."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", OPS_PAGE.read_text(), re.MULTILINE)
    return {
        op: [
            [(OPS_PAGE.parent / path).resolve() for path in re.findall(r"\]\(([^)]+)\)", cell)]
            for cell in cells.split("|")
        ]
        for op, cells in rows
    }


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_index_has_every_op() -> None:
    assert sorted(index()) == sorted(OPS) and all(len(cells) == 5 for cells in index().values())


@pytest.mark.parametrize("op", OPS)
def test_the_index_leads_to_the_op(op: str) -> None:
    contract, reference, kernels, tests, bench = index()[op]
    assert len(contract) == len(reference) == 1 and tests
    assert op in functions(contract[0]) and op in functions(reference[0])
    for path in kernels:
        assert op in functions(path) if path.suffix == ".py" else re.search(rf"\b{op}\b", path.read_text()), path
    # Tests and benches may call it by the name of a module's family, so that naming it somewhere is all that is asked.
    for path in (*tests, *bench):
        assert re.search(rf"\b{op}\b|steps import|import sampling", path.read_text()), path
    for backend in ("cpu", "triton"):
        has = op in functions_of_backend(backend)
        assert any(path.parent.name == backend for path in kernels) == has, f"{backend} of {op}"


def functions_of_backend(backend: str) -> set[str]:
    return set().union(*(functions(path) for path in (ROOT / "idlm_kernels" / backend).glob("*.py")))


@pytest.mark.parametrize("op", OPS)
def test_the_example_of_the_docstring_gives_what_is_printed(op: str) -> None:
    function = getattr(idlm_kernels, op)
    names = {**vars(importlib.import_module(function.__module__)), "torch": torch}
    (test,) = doctest.DocTestFinder(recurse=False).find(function, op, globs=names)
    assert test.examples, f"{op} has no example"
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_examples_of_a_page_give_what_is_printed(page: Path) -> None:
    assert doctest.testfile(str(page), module_relative=False).failed == 0


def test_the_drawing_of_a_step_is_what_a_step_has() -> None:
    """Who sees whom in section 3, against the masks and positions of a quadratic step with n = K = 2."""
    drawn = re.findall(r"^    +(\d)  (\w+) +L([+-]\d)? +\|([^\n]*)$", STEP_PAGE.read_text(), re.MULTILINE)
    state = tiny_state([[3, 1, 4]], 4, num_drafts=2)
    state.drafts.copy_(torch.tensor([[1, 5]]))
    state.num_drafts.fill_(2)
    rows = plan_rows(StepPlan("quadratic", 3), state, page_size=16)
    assert rows.tree_mask is not None and [int(number) for number, *_ in drawn] == list(range(9))
    length = 3
    for r, (_, word, offset, cells) in enumerate(drawn):
        assert (word == "MASK") == bool(rows.is_mask[r])
        assert length + int(offset or 0) == int(rows.positions[r])
        seen = [cell == "x" for cell in cells if cell in "x."]
        assert seen == [bool(int(rows.tree_mask[r]) >> j & 1) for j in range(9)], f"row {r}"
