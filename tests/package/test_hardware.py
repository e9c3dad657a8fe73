"""bench.hardware: what a GPU day found is kept, and the documents say no more than that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import hardware

ROOT = Path(__file__).parents[2]
NOTHING = "**Nothing has been run on a GPU yet**"
VERDICTS = """[70 s] facts (60 s, status 0): ok, 1 checks
[72 s] native: ok, the carried module loads
[160 s] rows (88 s, status 0): 7 of 7 pieces ok
[200 s] tiny (40 s, status 1): 1 of 2 pieces ok; auto: 3 | 4 differ
[201 s] kernels: NOT BEGUN, 3 s left
"""


def test_the_documents_follow_from_what_was_kept() -> None:
    runs = hardware.read_runs()
    assert (ROOT / "docs" / "hardware.md").read_text() == hardware.page(runs), "python -m bench.hardware write"
    readme = (ROOT / "README.md").read_text()
    assert readme == hardware.with_paragraph(readme, runs), "python -m bench.hardware write"
    assert (NOTHING in readme) == (not runs)


def test_claims_are_those_of_the_phases() -> None:
    script = (ROOT / "bench" / "gpu_day.sh").read_text()
    for phase in (*hardware.CLAIMS, "probe", "facts"):
        assert f"\nphase {phase} " in script, phase


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "verdicts.txt").write_text(VERDICTS)
    (out / "gpu-kernels.md").write_text("# GPU report\n")
    return tmp_path


def test_what_was_found_is_kept(tree: Path) -> None:
    facts = {"card": "NVIDIA H100 80GB HBM3", "triton": "3.6.0", "date": "2031-05-07"}
    (tree / "out" / "environment.json").write_text(json.dumps(facts))
    folder = hardware.keep(tree / "out", tree)
    assert folder == tree / "bench" / "results" / "2031-05-07-nvidia-h100-80gb-hbm3"
    names = {"verdicts.txt", "environment.json", "gpu-kernels.md"}
    assert {path.name for path in folder.iterdir()} == names
    page = (tree / "docs" / "hardware.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if "` |" in line]
    claims = {phase.strip("`"): word for _, phase, word in rows}
    assert claims["rows"] == "seen" and claims["tiny"] == "NOT SO"
    assert claims["kernels"] == claims["sanitizer"] == "not seen"
    assert "| triton | 3.6.0 |" in page and "3 ; 4 differ" in page and hardware.PROBE in page
    readme = (tree / "README.md").read_text()
    assert "not with success: the self-checks of the kernels, strided decoding of tiny models" in readme
    assert "the bits of rows" not in readme and "No speed" not in readme


def test_without_a_card_nothing_is_kept(tree: Path) -> None:
    with pytest.raises(SystemExit, match="card is not known"):
        hardware.keep(tree / "out", tree)
    assert not (tree / "bench").exists()
