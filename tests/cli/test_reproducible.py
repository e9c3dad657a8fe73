"""An adapter from nothing by one command is the same to the byte in every process, killed on the way or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from idlm_kernels.cli.train_adapter import WORK
from tests.tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--prompts", "40", "--held-out", "3", "--max-tokens", "12", "--steps", "60", "--batch", "3", "--rank", "2"]
DEFAULT = ["--prompts", "12", "--held-out", "2", "--max-tokens", "10", "--steps", "5", "--batch", "2", "--rank", "4"]


def begin(output: Path, *arguments: str, hash_seed: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "idlm_kernels", "train-adapter", "--output", str(output), *arguments]
    command += ["--loss", "ce-tv", "--threads", "1"]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=output.parent, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def kill_when(process: subprocess.Popen[str], is_time: Callable[[], bool]) -> None:
    """SIGKILL, which no program can prepare for."""
    end = time.monotonic() + 200
    while not is_time():
        assert process.poll() is None, f"ended before it was killed: {process.communicate()[1]}"
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was still at work"


def contents(folder: Path) -> dict[str, bytes]:
    """All files, those of the work on the way included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_same(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_killed_twice_and_begun_again(tmp_path: Path) -> None:
    """Once among the samples, once among the steps."""
    model = str(save_tiny_model(tmp_path))
    finish(begin(tmp_path / "calm", "--model", model, *TINY))
    cut, work = tmp_path / "cut", tmp_path / "cut" / WORK
    data, checkpoint = work / "data.jsonl", work / "checkpoint.safetensors"
    kill_when(begin(cut, "--model", model, *TINY, hash_seed=1), lambda: data.exists() and data.stat().st_size > 1000)
    assert not checkpoint.exists()
    kill_when(begin(cut, "--model", model, *TINY, hash_seed=2), checkpoint.exists)
    assert not (cut / "adapter_config.json").exists() or "60 steps" not in (cut / "README.md").read_text()
    finish(begin(cut, "--model", model, *TINY, hash_seed=3))
    require_same(contents(tmp_path / "calm"), contents(cut))


@pytest.mark.default_model
def test_the_default_model(tmp_path: Path) -> None:
    """In the dtype that the processor is fast in, at shapes for which libraries have kernels of their own."""
    for name in ("one", "other"):
        finish(begin(tmp_path / name, *DEFAULT, hash_seed=len(name)))
    require_same(contents(tmp_path / "one"), contents(tmp_path / "other"))
