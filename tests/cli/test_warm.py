"""`idlm warm`: what it says, and that no fault of a worker is lost. The workers: tests/triton/test_dry_run.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from idlm_kernels.cli import app, warm
from tests.tiny import save_tiny_model

pytest.importorskip("triton")

WORKER = """
import json, os, sys
wanted = json.loads(sys.argv[1])
def tell(**found): print(json.dumps(found), flush=True)
if wanted.get("listing"):
    tell(kernel="_a", form="1"); tell(kernel="_a", form="2")
else:
    print("noise of a compiler")
    try:
        os.close(os.open(wanted["claims"] + "/first", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if wanted["stride"] == 5:
            sys.exit("no room left")
    else:
        tell(kernel="_a", cached=False, seconds=1.5); tell(kernel="_a", cached=True, seconds=0.0)
        if wanted["stride"] == 3:
            tell(failed="a step: CompilationError: no")
tell(end=1.0)
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(warm, "worker", lambda wanted: [sys.executable, "-c", WORKER, json.dumps(wanted)])
    return str(save_tiny_model(tmp_path))


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["warm", *args])


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = run("--model", "qwen3-8b")
    assert found.exit_code == 2 and "--target cuda:90" in found.stderr and found.stdout == ""


def test_a_target_that_is_none() -> None:
    found = run("--model", "qwen3-8b", "--target", "h100")
    assert found.exit_code == 2 and "'h100', wanted cuda:90" in found.stderr


def test_a_model_that_is_not_there_is_said_once(model: str) -> None:
    found = run("--model", "/no/such/model", "--target", "cuda:90")
    assert found.exit_code == 2 and found.stderr.count("/no/such/model") == 1


def test_what_was_compiled_is_counted(model: str) -> None:
    found = run("--model", model, "--target", "cuda:90", "--jobs", "2")
    assert found.exit_code == 0, found.output
    assert found.stdout == "1 kernels compiled, 1 were there, 2 s of compilers\n"
    found = run("--model", model, "--target", "cuda:90", "--jobs", "1", "--json")
    wanted = {"target": "cuda:90", "compiled": 1, "cached": 1, "seconds": 1.5, "failed": []}
    assert json.loads(found.stdout) == wanted


def test_the_gpu_of_this_machine_is_the_target(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert json.loads(run("--model", model, "--json").stdout)["target"] == "cuda:90"


@pytest.mark.parametrize(
    "stride, words", [("3", "a step: CompilationError: no"), ("5", "a compiler ended with status 1: no room left")]
)
def test_what_failed_is_told(model: str, stride: str, words: str) -> None:
    found = run("--model", model, "--target", "cuda:90", "--jobs", "2", "--stride", stride)
    assert found.exit_code == 1 and f"failed: {words}" in found.stderr
