"""The documents: their examples run, their links lead somewhere, their commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def python_blocks() -> list[str]:
    """Every Python example, except those that need a model's weights."""
    blocks = re.findall(r"```python\n(.*?)```", "".join((ROOT / d).read_text() for d in DOCUMENTS), re.DOTALL)
    return [block for block in blocks if "from_pretrained" not in block]


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.splitlines()[-1][:40])
def test_python_examples_run(block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_folders_and_make_targets_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for path in re.findall(r"`((?:tests|idlm_kernels|python_ref|bench)/?[\w/]*)`", text):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in re.findall(r"^    make ([^#\n]*)|`make ([^`]*)`", text, re.MULTILINE):
        words = [word for word in "".join(line).split() if re.fullmatch("[a-z-]+", word)]
        assert words and set(words[:1]) <= targets, line
