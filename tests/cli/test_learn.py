"""`idlm learn` from the traces that `idlm generate` left, and what it says where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from idlm_kernels.cli import app
from tests.tiny import save_tiny_bundle, save_tiny_model


def idlm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A bundle that has answered 40 prompts."""
    (tmp_path / "model").mkdir()
    bundle = save_tiny_bundle(tmp_path / "model")
    lines = [json.dumps({"prompt": f"{i} times {i + 1}"}) + "\n" for i in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--traces", tmp_path / "traces"]
    drafts = ["--plan", "chain", "--stride", "4", "--mask-token-id", "250", "--max-tokens", "20"]
    done = idlm("generate", "--model", bundle, *files, *drafts)
    assert done.exit_code == 0, done.stderr
    return tmp_path


def learn(served: Path, *flags: str) -> Result:
    where = ["--traces", served / "traces", "--output", served / "versions", "--model", served / "model"]
    return idlm("learn", *where, "--adapter", served / "model" / "adapter", "--nice", "0", *flags)


def test_a_round_is_said_in_a_line_and_its_version_drafts(served: Path) -> None:
    flags = ["--mask-token-id", "250", "--steps", "12", "--lr", "0.003"]
    done = learn(served, *flags)
    assert done.exit_code == 0, done.stderr
    (line,) = [
        line for line in done.stderr.splitlines() if line.startswith("round 1: 40 new texts, tokens per forward")
    ]
    if line.endswith("v000001 is written"):
        check = ["--plan", "quadratic", "--stride", "4", "--max-tokens", "12", "--check", "--json"]
        done = idlm(
            "generate", "-p", "x", "--model", served / "model", "--adapter", served / "versions" / "v000001", *check
        )
        assert done.exit_code == 0 and json.loads(done.stdout)["identical_to_ar"] is True
    else:
        assert line.endswith("not better than adapter") and not list((served / "versions").glob("v*"))


def test_what_cannot_be_learned_is_said_in_a_line(served: Path) -> None:
    for flags, named in (
        ((), "--mask-token-id"),
        (("--mask-token-id", "250", "--min-new", "41"), "40 new texts, wanted 41"),
        (("--mask-token-id", "999"), "999"),
    ):
        done = learn(served, *flags)
        assert done.exit_code == 2 and named in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    (served / "other").mkdir()
    other = save_tiny_model(served / "other")
    done = idlm("learn", "--traces", served / "traces", "-o", served / "o", "-m", other, "--nice", "0")
    assert done.exit_code == 2 and "--adapter" in done.stderr
    done = idlm("learn", "--traces", served / "none", "-o", served / "o", "--nice", "0")
    assert done.exit_code == 2 and "idlm serve --traces" in done.stderr
