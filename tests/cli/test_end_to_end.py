"""The command on a tiny checkpoint: the real loader, tokenizer and generator behind it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from idlm_kernels.cli import app
from idlm_kernels.generate import memory
from tests.tiny import save_tiny_bundle, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def idlm(model: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["generate", "--model", str(model), "--prompt", "Once upon", *arguments])


@pytest.mark.parametrize("plan", ["chain", "quadratic"])
def test_check_passes_on_a_sampled_text(model: Path, plan: str) -> None:
    flags = f"--plan {plan} --stride 3 --temperature 0.9 --seed 7 --max-tokens 40 --check --json --dtype fp32"
    done = idlm(model, *flags.split())
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["identical_to_ar"] is True and record["ar_token_ids"] == record["token_ids"]
    assert record["tokens"] == len(record["token_ids"]) == 40 and record["finish_reason"] == "length"
    assert record["forwards"] <= 40 and len(record["acceptance"]) == 2
    assert record["prompt_tokens"] == len("Once upon")


def test_a_bundle_needs_one_command(tmp_path: Path) -> None:
    """Base at the root, adapter inside, MASK rows of random ids."""
    bundle = save_tiny_bundle(tmp_path, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    flags = ["--max-tokens", "20", "--plan", "quadratic", "--stride", "4", "--json", "--check"]
    done = idlm(bundle, *flags, "--mask-input", "uniform", "--mask-token-id", "250")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["identical_to_ar"] is True
    done = idlm(bundle, *flags)
    assert done.exit_code == 2 and "--mask-token-id" in done.stderr and len(done.stderr.splitlines()) == 1


def test_streamed_text_is_the_text_of_json(model: Path) -> None:
    flags = ["--max-tokens", "30", "--temperature", "1", "--seed", "3", "--stop", "e"]
    streamed, recorded = idlm(model, *flags), idlm(model, *flags, "--json")
    assert streamed.exit_code == 0, streamed.stderr
    assert streamed.stdout_bytes.decode() == json.loads(recorded.stdout)["text"] + "\n"
    assert f"{json.loads(recorded.stdout)['tokens']} tokens in " in streamed.stderr


def test_a_file_of_prompts_reserves_what_they_need_and_not_what_a_config_claims(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config of one line may claim ten million positions, for which tables and pages took 12 GB."""
    vast, seen = tmp_path / "vast", []
    shutil.copytree(model, vast)
    config = json.loads((vast / "config.json").read_text())
    (vast / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10_000_000}))
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "Once"}\n{"prompt": "Once upon a time", "max_tokens": 5}\nno json\n')
    measured = memory.pages_in_memory

    def pages_in_memory(model: Any, options: Any, *more: Any) -> int:
        seen.append(options.max_model_len)
        return measured(model, options, *more)

    monkeypatch.setattr(memory, "pages_in_memory", pages_in_memory)
    answers = []
    for folder in (model, vast):
        target = tmp_path / f"{folder.name}.jsonl"
        flags = ["--model", str(folder), "--input", str(prompts), "--output", str(target)]
        done = CliRunner().invoke(app, ["generate", *flags, "--max-tokens", "9", "--plan", "ar", "--seed", "1"])
        assert done.exit_code == 1, done.stderr  # one line is no JSON
        answers.append(target.read_bytes())
    assert seen == [21, 21] and answers[0] == answers[1]
    flags = ["--input", str(prompts), "--output", str(tmp_path / "own"), "--max-model-len", "40", "--max-tokens", "9"]
    CliRunner().invoke(app, ["generate", "--model", str(vast), *flags])
    assert seen[2:] == [40], "what the user asks for stays"


def test_bad_input_is_one_line(model: Path) -> None:
    for flags, named in (
        (["--chat"], "chat template"),
        (["--max-model-len", "9"], "context"),
        (["--seed", str(1 << 64)], "seed"),
        (["--adapter", str(model / "none")], "none"),
        (["--model", str(model / "none")], "none"),
    ):
        done = idlm(model, *flags)
        assert done.exit_code == 2 and done.stdout == "", done.stderr
        assert done.stderr.startswith("idlm: error: ") and done.stderr.count("\n") == 1 and named in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_with_the_text_so_far(model: Path) -> None:
    program = [sys.executable, "-c", "from idlm_kernels.cli import main; main()"]
    flags = ["generate", "--model", str(model), "--prompt", "Once upon", "--max-tokens", "90000"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell ignores Ctrl-C for what it runs in the background, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*program, *flags], **pipes, preexec_fn=heed) as process:
        assert process.stdout is not None
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    assert process.returncode == 130, errors
    assert begun and rest.endswith(b"\n")
    assert b"ended by cancelled" in errors and errors.count(b"\n") == 1
