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


# Stands for the Python of a machine with a GPU: tells what it was asked to do, and what it is said to have found.
PYTHON_THERE = """#!/bin/sh
echo "$*" | head -n 1 >> "$CALLS"
case "$*" in
  *"assert torch.cuda"*) exit 0 ;;  # it has a GPU, so there is no reason against it
  *"bench.gpu_checks rows"*) echo "VERDICT: $ROWS"; case "$ROWS" in ok*) exit 0 ;; esac; exit 1 ;;
  *"bench.gpu_checks tiny"*) echo "no verdict, for it died"; exit $TINY ;;
  *native.load*) echo "VERDICT: ok, it loads"; exit 0 ;;
  *) echo "VERDICT: ok"; exit 0 ;;
esac
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script is one for bash")
@pytest.mark.parametrize("rows, tiny, status", [("ok, 7", "0", 0), ("2 of 7 wrong", "0", 1), ("ok, 7", "139", 1)])
def test_a_phase_that_fails_stops_nothing_and_is_told(tmp_path: Path, rows: str, tiny: str, status: int) -> None:
    stub = tmp_path / "python"
    stub.write_text(PYTHON_THERE)
    stub.chmod(0o755)
    settings = {"PYTHON": str(stub), "CALLS": str(tmp_path / "calls"), "ROWS": rows, "TINY": tiny}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    names = [name for name in PHASES if name != "sanitizer"]  # which wants a program of its own
    done = gpu_day(tmp_path / "out", *names, **settings)
    assert done.returncode == status, done.stdout + done.stderr
    verdicts = (tmp_path / "out" / "verdicts.txt").read_text()
    found = dict(re.findall(r"\] (\w+) \(\d+ s, (status \d+: .*)", verdicts.replace("): ", ": ")))
    assert list(found) == names
    assert found["rows"] == f"status {int(rows != 'ok, 7')}: {rows}" and found["kernels"] == "status 0: ok"
    assert found["tiny"] == f"status {tiny}: no verdict; its last line: no verdict, for it died"
    assert (tmp_path / "out" / "logs.tgz").is_file()
    calls = (tmp_path / "calls").read_text()
    assert f"-m bench.hardware keep {tmp_path / 'out'}" in calls.splitlines()[-1]
    for module in set(re.findall(r"-m (bench\.\w+)", calls)):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


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
