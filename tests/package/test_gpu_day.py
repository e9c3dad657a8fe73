"""`make gpu-day` where there is no GPU: every phase is named with its reason, and nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHASES = ("facts", "selfcheck", "rows", "probe", "tiny", "decoding", "kernels", "tests", "sanitizer")


def gpu_day(out: Path, *phases: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "CUDA_VISIBLE_DEVICES": "", **environment}
    command = ["bash", "bench/gpu_day.sh", *phases]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script is one for bash")
def test_every_phase_says_why_it_did_not_begin(tmp_path: Path) -> None:
    before = sorted((ROOT / "bench").rglob("*"))
    done = gpu_day(tmp_path / "out")
    verdicts = (tmp_path / "out" / "verdicts.txt").read_text().splitlines()
    assert done.returncode == 3, done.stderr
    assert [line.split("] ")[1].split(":")[0] for line in verdicts] == list(PHASES)
    assert all(re.search(": NOT BEGUN, .{8}", line) for line in verdicts), "a reason, whatever is missing here"
    assert sorted(p for p in (ROOT / "bench").rglob("*") if "__pycache__" not in p.parts) == [
        p for p in before if "__pycache__" not in p.parts
    ]


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script is one for bash")
def test_the_phases_that_are_named_are_the_ones_that_run(tmp_path: Path) -> None:
    assert gpu_day(tmp_path, "rows", "tiny").returncode == 3
    assert len((tmp_path / "verdicts.txt").read_text().splitlines()) == 2


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("bash") is None, reason="about make and bash")
def test_make_tells_the_status_of_the_script(tmp_path: Path) -> None:
    """Make itself has no status but 2 for a recipe that fails, so it has to be read there."""
    env = {**os.environ, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = ["make", "gpu-day", f"PYTHON={sys.executable}", "ARGS=facts"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Error 3" in done.stderr and "exit status 3" in done.stdout
    assert "facts: NOT BEGUN, " in (tmp_path / "verdicts.txt").read_text()


def test_models_and_generation_need_no_gguf() -> None:
    block = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'")
sys.meta_path.insert(0, Block())
import idlm_kernels.model, idlm_kernels.generate, idlm_kernels.cli.generate
"""
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reading_a_gguf_without_the_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from idlm_kernels.model import CheckpointError, load_checkpoint

    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"pip install 'idlm_kernels\[gguf\]'"):
        load_checkpoint(str(tmp_path / "x.gguf"))


def test_the_checks_import_without_a_gpu() -> None:
    """They are what a GPU day runs; a name that has gone would cost the day."""
    names = "bench.gpu_checks, bench.gpu_report, bench.gpu_probe, bench.gpu_prewarm"
    done = subprocess.run([sys.executable, "-c", f"import {names}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_installed_goes_before_bench_and_tests(tmp_path: Path) -> None:
    for name in ("bench", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('an installed package')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-c", "import bench.ptx, tests.tiny"]
    done = subprocess.run(command, cwd=tmp_path.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
