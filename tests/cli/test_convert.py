"""`idlm convert` on a tiny checkpoint: a model that generates, runs that go on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from idlm_kernels.cli import app
from idlm_kernels.training import convert as conversion
from tests.tiny import save_tiny_model

SMALL = [
    *("--prompts", "12", "--held-out", "3", "--max-tokens", "12"),
    *("--strides", "2,3", "--steps", "2", "--batch", "3", "--lr", "1e-3"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), vocab_size=260)


def run(model: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["convert", "--model", str(model), "--output", str(output), *SMALL, *more])


def test_the_new_model_generates_and_the_paper_trains_another(model: Path, tmp_path: Path) -> None:
    done = run(model, tmp_path / "a", "--mask-token-id", "258")
    assert done.exit_code == 0, done.stderr
    assert "step 2: N=2, masked" in done.stderr and "step 4: N=3, masked" in done.stderr
    assert json.loads((tmp_path / "a" / "config.json").read_text())["mask_token_id"] == 258
    flags = ["generate", "--model", str(tmp_path / "a"), "-p", "Once", "--max-tokens", "9", "--plan", "quadratic"]
    check = CliRunner().invoke(app, [*flags, "--stride", "3", "--check"])
    assert check.exit_code == 0 and "identical to AR" in check.stderr
    assert run(model, tmp_path / "b", "--mask-token-id", "258", "--recipe", "paper").exit_code == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one != other


def test_an_interrupted_run_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_of, calls = conversion.loss_of, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return loss_of(*args)

    assert run(model, tmp_path / "whole", "--mask-token-id", "258").exit_code == 0
    monkeypatch.setattr(conversion, "loss_of", interrupted)
    assert run(model, tmp_path / "cut", "--mask-token-id", "258").exit_code == 130
    assert run(model, tmp_path / "cut", "--mask-token-id", "258").exit_code == 0
    assert calls[0] == 5, "two steps, the one that was cut, and the two that were left"
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the model names no MASK token; give --mask-token-id"),
        (["--mask-token-id", "260"], "mask_token_id is 260"),
        (["--mask-token-id", "258", "--strides", "2,x"], "--strides is '2,x', wanted numbers such as 2,3,4"),
        (["--mask-token-id", "258", "--strides", "1,2"], "wanted one or more of at least 2"),
        (["--mask-token-id", "258", "--held-out", "12"], "nothing is left to train on"),
    ],
)
def test_what_is_refused(flags: list[str], message: str, model: Path, tmp_path: Path) -> None:
    done = run(model, tmp_path / "a", *flags)
    assert done.exit_code == 2 and message in done.stderr, done.stderr


def test_the_base_is_never_overwritten(model: Path) -> None:
    done = run(model, model, "--mask-token-id", "258")
    assert done.exit_code == 2 and "--output is the base's own folder" in done.stderr
