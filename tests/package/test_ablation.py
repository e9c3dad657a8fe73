"""bench.ablation on a tiny model: its runs differ in one setting each, and a second call goes on."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import ablation
from idlm_kernels.training.train import TrainSettings
from tests.tiny import save_tiny_model


def test_each_run_differs_in_one_choice() -> None:
    first = TrainSettings(rank=4, alpha=4.0, rerank_width=0)
    runs = ablation.variants(first, noise_below=99)
    plain, *others = runs.values()
    assert plain == first and len(set(runs.values())) == len(runs)
    for settings in others:
        one, other = dataclasses.asdict(first), dataclasses.asdict(settings)
        changed = {name for name in one if one[name] != other[name]}
        assert len(changed) == 1 or changed <= {"loss", "kl", "hard", "soft"} or changed == {"rank", "alpha"}
        assert changed.isdisjoint(("steps", "batch", "stride", "learning_rate"))
    assert [runs[f"alpha/r {ratio}"].alpha for ratio in (4, 16, 64)] == [16.0, 64.0, 256.0]
    assert runs["twice the rank"].alpha / runs["twice the rank"].rank == 1
    assert runs["uniform noise"].noise_below == 99


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path)
    small = {"steps": 3, "batch": 2, "prompts": 8, "tokens": 8, "rank": 2, "held-out": 3, "held-out-tokens": 8}
    flags = ["--json", *(f"--{name}={value}" for name, value in small.items())]

    def rows(*more: str) -> list[dict[str, Any]]:
        arguments = ["ablation", "--model", str(model), "--output", str(tmp_path / "runs"), *flags, *more]
        monkeypatch.setattr(sys, "argv", arguments)
        ablation.main()
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
        return found

    names = list(ablation.variants(TrainSettings(), 2))
    some = rows("--only", names[0], "uniform noise")
    assert [row["run"] for row in some] == [names[0], "uniform noise"]
    every = rows()
    assert [row["run"] for row in every] == names
    assert every[0] == some[0], "what is done is read, time and all"
    for row in every:
        assert 0 <= row["draft 1"] <= 1 and 1 <= row["chain"] <= row["quadratic"] <= 4
    with pytest.raises(SystemExit):
        rows("--only", "nothing")
    assert "no run is named nothing" in capsys.readouterr().err
