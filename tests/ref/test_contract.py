"""python_ref.contract: its numbers are those of the C++ sources, and references and kernels have no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from python_ref import contract

ROOT = Path(__file__).resolve().parents[2]
FINISH = {"kRunning": contract.RUNNING, "kStopped": contract.STOPPED, "kLength": contract.LENGTH}
STEP = {
    "kFailed": contract.FAILED,
    "kNoDrafts": contract.NO_DRAFTS,
    "kMaskDrafts": contract.MASK_DRAFTS,
    "kSuffixDrafts": contract.SUFFIX_DRAFTS,
    "kFillMatch": contract.FILL_MATCH,
    "kOverrideMatch": contract.OVERRIDE_MATCH,
    "kNan": contract.FLAG_NAN,
    "kEmptyRow": contract.FLAG_EMPTY_ROW,
    "kStreamAccept": contract.STREAM_ACCEPT,
    "kStreamInput": contract.STREAM_INPUT,
    "kCandidates": contract.NUM_CANDIDATES,
}
# Of every C++ source that names them: the constants, as it must have them.
NUMBERS = {
    "include/idlm/sampling.h": {
        "kFlagNan": contract.FLAG_NAN,
        "kFlagInf": contract.FLAG_INF,
        "kFlagEmptyRow": contract.FLAG_EMPTY_ROW,
        "kFlagBadDraft": contract.FLAG_BAD_DRAFT,
        "kStreamTarget": contract.STREAM_TARGET,
        "kStreamDraft": contract.STREAM_DRAFT,
        "kStreamAccept": contract.STREAM_ACCEPT,
    },
    "sampling/sampler.cuh": {"kGreedyBelow": contract.GREEDY_BELOW},
    "sampling/advance.cu": FINISH,
    "cpu/step.cpp": FINISH | STEP,
}


@pytest.mark.parametrize("source", NUMBERS)
def test_cpp_sources_have_the_same_numbers(source: str) -> None:
    text = (ROOT / "csrc" / source).read_text()
    found = {name: float(value) for name, value in re.findall(r"\b(k[A-Z]\w*) = ([\d.e-]+)f?[,; }]", text)}
    assert {name: found.get(name) for name in NUMBERS[source]} == NUMBERS[source]


def test_every_error_flag_and_stream_of_the_header_is_in_the_contract() -> None:
    text = (ROOT / "csrc" / "include" / "idlm" / "sampling.h").read_text()
    named = set(re.findall(r"\b(k(?:Flag|Stream)[A-Z]\w*) = \d", text))
    assert named == set(NUMBERS["include/idlm/sampling.h"])


def test_the_numbers_stand_in_one_python_file() -> None:
    own = {name for name in vars(contract) if name.isupper()}
    assert own >= {"RUNNING", "FLAG_NAN", "STREAM_TARGET", "GREEDY_BELOW"}
    for folder in ("python_ref", "idlm_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == Path(contract.__file__):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                targets = node.targets if isinstance(node, ast.Assign) else []
                names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
                assert not names & own, f"{path.relative_to(ROOT)} gives {names & own} a value of its own"


def test_the_references_import_nothing_of_the_package() -> None:
    for path in (ROOT / "python_ref").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [module for module in modules if module.split(".")[0] == "idlm_kernels"], path
