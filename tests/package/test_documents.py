"""The documents: their examples run, their links lead somewhere, their commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "bench/README.md"),
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))),
)


def python_blocks() -> list[Any]:
    """Every Python example but those that show their result, which tests/package/test_index.py runs."""
    blocks = re.findall(r"```python\n(.*?)```", "".join((ROOT / d).read_text() for d in DOCUMENTS), re.DOTALL)
    needs_model = pytest.mark.default_model
    return [
        pytest.param(block, id=block.splitlines()[-1][:40], marks=[needs_model] if "LLM(" in block else [])
        for block in blocks
        if ">>>" not in block
    ]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", python_blocks())
def test_python_examples_run(block: str) -> None:
    run("-c", block)


@pytest.mark.default_model
def test_the_examples_with_a_model_run() -> None:
    assert "equal to ordinary decoding" in run("examples/quickstart.py")
    served = run("examples/engine.py")
    assert served.count("ended: length") == 3 and served.count("cancelled after") == 1


def test_a_row_keeps_its_bits_here_and_not_in_stock_torch() -> None:
    """What the example shows depends on the machine for stock torch, and on none for this library."""
    stock, ours = run("examples/exactness.py").splitlines()
    assert "torch.nn.functional.linear" in stock and "idlm_kernels.linear" in ours
    assert " 0 of 63 batches" in ours


def test_every_folder_of_tests_is_in_a_lane() -> None:
    lanes = re.findall(r"-m pytest ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())
    covered = set(re.findall(r"tests/(\w+)", "".join(lanes)))
    assert covered == {folder.name for folder in (ROOT / "tests").iterdir() if list(folder.glob("test_*.py"))}


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_folders_and_make_targets_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for path in re.findall(r"`((?:tests|idlm_kernels|python_ref|bench|docs|examples)/?[\w/]*)`", text):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in re.findall(r"^    make ([^#\n]*)|`make ([^`]*)`", text, re.MULTILINE):
        words = [word for word in "".join(line).split() if re.fullmatch("[a-z-]+", word)]
        assert words and set(words[:1]) <= targets, line
