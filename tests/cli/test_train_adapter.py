"""`idlm train-adapter` on a tiny checkpoint: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from idlm_kernels.cli import app
from idlm_kernels.cli.train_adapter import WORK
from idlm_kernels.generate import Generator
from idlm_kernels.model.mask_input import MaskInput
from idlm_kernels.training import train as training
from idlm_kernels.training.export import file_sha256
from tests.tiny import save_tiny_model

SMALL = [
    "--prompts",
    "14",
    "--held-out",
    "3",
    "--max-tokens",
    "12",
    "--steps",
    "4",
    "--batch",
    "3",
    "--rank",
    "2",
    "--dtype",
    "fp32",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(model: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["train-adapter", "--model", str(model), "--output", str(output), *SMALL, *more])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_writes_an_adapter_that_generates(model: Path, tmp_path: Path) -> None:
    done = run(model, tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    assert "step 0: acceptance" in done.stderr and "step 4: loss" in done.stderr
    record = json.loads((tmp_path / "a" / "idlm_training.json").read_text())
    assert record["samples"] == 11 and record["steps"] == 4 and len(record["acceptance"]) == 3
    arguments = [
        "generate",
        "--model",
        str(model),
        "--adapter",
        str(tmp_path / "a"),
        "-p",
        "Once",
        "--max-tokens",
        "12",
    ]
    for plan in ("auto", "quadratic"):
        check = CliRunner().invoke(app, [*arguments, "--check", "--plan", plan])
        assert check.exit_code == 0 and "identical to AR" in check.stderr
    assert run(model, tmp_path / "b").exit_code == 0
    assert files(tmp_path / "b") == files(tmp_path / "a"), "the same seed gives the same adapter"
    assert run(model, tmp_path / "c", "--seed", "1").exit_code == 0
    assert files(tmp_path / "c")["adapter_model.safetensors"] != files(tmp_path / "a")["adapter_model.safetensors"]


def test_an_interrupted_run_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(model, tmp_path / "whole", "--no-rerank").exit_code == 0
    steps, loss_of = [0], training.loss_of

    def interrupted(*args: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3:
            raise KeyboardInterrupt
        return loss_of(*args)

    monkeypatch.setattr(training, "loss_of", interrupted)
    assert run(model, tmp_path / "cut", "--no-rerank").exit_code == 130
    assert run(model, tmp_path / "cut", "--no-rerank").exit_code == 0
    assert steps[0] == 5, "two steps, the one that was cut, and the two that were left"
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert "rerank_head.safetensors" not in files(tmp_path / "cut")


def test_total_variation_from_an_adapter(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "a", "--alpha", "8").exit_code == 0
    more = ["--loss", "tv", "--from", str(tmp_path / "a")]
    for name in ("b", "c"):
        done = run(model, tmp_path / name, *more)
        assert done.exit_code == 0, done.stderr
    assert files(tmp_path / "b") == files(tmp_path / "c") != files(tmp_path / "a")
    record = json.loads((tmp_path / "b" / "idlm_training.json").read_text())["settings"]
    assert (record["loss"], record["kl"], record["alpha"]) == ("tv", 0.01, 8.0), "rank and alpha are those of the start"
    assert record["start"] == file_sha256(tmp_path / "a")


def test_uniform_noise_is_written_into_the_adapter_and_drawn_when_it_decodes(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "a").exit_code == 0  # whose vector must not stay
    (tmp_path / "a" / WORK / "checkpoint.safetensors").unlink()
    done = run(model, tmp_path / "a", "--mask-input", "uniform")
    assert done.exit_code == 0, done.stderr
    record = json.loads((tmp_path / "a" / "idlm_training.json").read_text())
    assert record["mask_input"] == {"kind": "uniform", "mask_token_id": 256}
    assert "mask_embedding.safetensors" not in files(tmp_path / "a")
    generator = Generator.from_pretrained(model, adapter=tmp_path / "a")
    assert generator.model.mask_input == MaskInput("uniform", 256)
    done = run(model, tmp_path / "c", "--from", str(tmp_path / "a"))
    assert json.loads((tmp_path / "c" / "idlm_training.json").read_text())["mask_input"] == record["mask_input"]
    done = run(model, tmp_path / "b", "--mask-input", "uniform")
    assert files(tmp_path / "a") == files(tmp_path / "b"), "the same seed gives the same noise"


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines({"prompt": "x"}, [1]), "line 2: wanted an object"),
        (lines({"text": "x"}), 'line 1: a line needs "prompt" or "messages"'),
        ("{", "line 1"),
        (lines(*({"prompt": f"p{i}"} for i in range(3))), "nothing is left to train on"),
    ],
)
def test_data_that_cannot_be_used(text: str, message: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    done = run(model, tmp_path / "a", "--data", str(tmp_path / "data.jsonl"))
    assert done.exit_code == 2 and message in done.stderr


def test_own_prompts_and_other_settings(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(lines(*({"prompt": f"Say {i}.", "domain": "counting"} for i in range(9))))
    assert run(model, tmp_path / "a", "--data", str(data)).exit_code == 0
    samples = (tmp_path / "a" / WORK / "data.jsonl").read_text().splitlines()[1:]
    assert len(samples) == 6 and all(json.loads(line)["domain"] == "counting" for line in samples)
    for flags, message in ((["--rank", "3"], "other settings"), (["--max-tokens", "9"], "max_tokens")):
        done = run(model, tmp_path / "a", "--data", str(data), *flags)
        assert done.exit_code == 2 and message in done.stderr


def test_help_teaches() -> None:
    text = " ".join(CliRunner().invoke(app, ["train-adapter", "--help"]).stdout.split())
    assert "--data" in text and "run the same command again after an interruption" in text
