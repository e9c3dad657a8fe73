"""On a machine with a GPU a suite for it that was skipped as a whole is a failure (tests/suites.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import sys, pytest, torch
torch.cuda.is_available = lambda: sys.argv[1] == "gpu"
sys.exit(pytest.main(["-q", "-p", "tests.suites", "-p", "no:cacheprovider", "-c", "empty.ini", "tests"]))
"""
SKIPPED = "import pytest\n\n\ndef test():\n    pytest.skip('no emulator')\n"
PASSED = "def test():\n    pass\n"


@pytest.mark.parametrize(
    "machine, triton, native, status",
    [
        ("gpu", SKIPPED, PASSED, 1),
        ("gpu", PASSED, SKIPPED, 1),
        ("gpu", PASSED + SKIPPED.replace("def test", "def test_2"), PASSED, 0),
        ("cpu", SKIPPED, SKIPPED, 0),
    ],
    ids=["triton was", "native was", "only a test was", "without a GPU"],
)
def test_a_suite_that_was_skipped(tmp_path: Path, machine: str, triton: str, native: str, status: int) -> None:
    (tmp_path / "empty.ini").write_text("[pytest]\npythonpath = " + str(ROOT) + "\n")
    for name, text in (("triton", triton), ("native", native)):
        (tmp_path / "tests" / name).mkdir(parents=True)
        (tmp_path / "tests" / name / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-c", RUN, machine]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("SKIPPED SUITE tests/" in done.stdout) == bool(status)
