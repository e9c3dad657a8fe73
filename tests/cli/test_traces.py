"""`--traces` and `--adapters` of the commands: what is kept and said, and what is refused before a model is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from idlm_kernels.cli import app
from idlm_kernels.learning.traces import TraceReader
from idlm_kernels.model import identity, load_checkpoint
from tests.tiny import save_tiny_bundle


def idlm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("redact", [False, True])
def test_a_file_of_prompts_leaves_traces(tmp_path: Path, redact: bool) -> None:
    (tmp_path / "model").mkdir()
    bundle = save_tiny_bundle(tmp_path / "model")
    lines = [{"prompt": text} for text in ("Once upon", "a time", "there")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    drafts = ["--plan", "chain", "--stride", "3", "--mask-token-id", "250", "--max-tokens", "20"]
    kept = ["--traces", tmp_path / "traces", *(["--traces-redact"] if redact else [])]
    done = idlm("generate", "--model", bundle, *files, *drafts, *kept)
    assert done.exit_code == 0, done.stderr
    what = "answers (ids)" if redact else "prompts and answers (ids)"
    assert f"idlm: traces: {what} of finished requests are kept in {tmp_path / 'traces'}\n" in done.stderr
    checkpoint = load_checkpoint(bundle)
    traces = TraceReader(tmp_path / "traces", identity(checkpoint), checkpoint.config.vocab_size).new()
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(list(trace.answer) for trace in traces) == sorted(answer["token_ids"] for answer in answers)
    prompts = [[]] * 3 if redact else sorted(checkpoint.tokenizer.encode(line["prompt"]) for line in lines)
    assert sorted(list(trace.prompt) for trace in traces) == prompts
    assert all(trace.cycles and trace.adapters == ("adapter",) for trace in traces)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "-p", "x", "--traces", "t"], "--input"),
        (["generate", "--input", "a", "--output", "b", "--traces", "t", "--ray", "auto"], "--ray"),
        (["generate", "--input", "a", "--output", "b", "--traces-redact"], "--traces-redact"),
        (["serve", "--traces-redact"], "name a folder with --traces"),
        (["serve", "--watch-adapters", "1"], "--adapters"),
        (["serve", "--adapters", "a", "--ray", "local"], "--ray"),
        (["serve", "--traces", "t", "--ray", "local"], "--ray"),
        (["serve", "--adapters", "/nowhere/at/all", "--port", "0"], "/nowhere/at/all: no such folder"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(arguments: list[str], named: str) -> None:
    done = idlm(*arguments)
    assert done.exit_code == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1
