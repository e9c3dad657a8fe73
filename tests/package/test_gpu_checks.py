"""The logic of bench.gpu_checks on a CPU, at small shapes: what only a GPU can answer has to be asked rightly there."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu_checks
from idlm_kernels.ops import Backend, _dispatch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LAYERS = (
    ("o", 64, (48,)),
    ("qkv", 64, (64, 32, 32)),
    ("gate_up", 64, (40, 40)),
    ("down", 40, (64,)),
    ("lm_head", 64, (300,)),
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"LAYERS": LAYERS, "COUNTS": (1, 7, 65), "CONTEXTS": (37, 257), "REPEAT": 2, "HIDDEN": 96, "VOCAB": 500}
    heads = {"HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64, "TINY_TOKENS": 4}
    for name, value in {**sizes, **heads}.items():
        monkeypatch.setattr(gpu_checks, name, value)


def wrong(found: Any) -> list[str]:
    return [f"{name}: {verdict}" for name, verdict in found if verdict != "ok"]


@pytest.mark.parametrize("family", gpu_checks.FAMILIES)
def test_a_backend_that_keeps_its_bits_passes(family: str) -> None:
    found = list(gpu_checks.backend_rows(CPU, "cpu", family))
    assert len(found) > 3 and wrong(found) == []


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A backend of these functions, and of the CPU's for the rest."""
    import idlm_kernels.cpu as cpu

    functions: dict[str, Any] = {}
    module = type(sys)("planted_backend")
    module.__getattr__ = lambda name: functions.get(name) or getattr(cpu, name)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(_dispatch._backends, "planted", Backend("planted", module.__name__, ("cpu",), automatic=False))
    monkeypatch.setattr(_dispatch, "_chosen", {})
    return functions


def off_by_rows(function: Any) -> Any:
    def planted(x: Tensor, *rest: Any, **options: Any) -> Any:
        y = function(x, *rest, **options)
        return y * (1 + 2**-7) if len(x) == 7 else y

    return planted


def test_bits_that_depend_on_the_number_of_rows_are_found(planted: dict[str, Any]) -> None:
    import idlm_kernels.cpu as cpu

    for name in ("linear", "strided_attention", "rms_norm"):
        planted[name] = off_by_rows(getattr(cpu, name))
    found = {family: wrong(gpu_checks.backend_rows(CPU, "planted", family)) for family in ("o", "attention", "other")}
    for family, line in (
        ("o", "o: 7 rows: bits differ in 4 of 4 comparisons; the result: bits differ in"),
        ("attention", "context 37: 7 rows and a prefill of 512: bits differ in 2 of 2 comparisons"),
        ("other", "rms_norm: rows 3 to 10: bits differ in 2 of 3 comparisons"),
    ):
        assert any(word.startswith(line) for word in found[family]), family


def test_values_that_are_off_and_an_adapter_that_leaks_are_found(planted: dict[str, Any]) -> None:
    import idlm_kernels.cpu as cpu

    def everywhere(
        x: Tensor, weight: Tensor, a: Tensor, b: Tensor, lora_mask: Tensor, *rest: Any, **options: Any
    ) -> Tensor:
        return cpu.gated_lora_linear(x, weight, a, b, torch.ones_like(lora_mask), *rest, **options)

    planted["gated_lora_linear"] = everywhere
    planted["linear"] = lambda *args, **options: cpu.linear(*args, **options) * 1.5
    found = wrong(gpu_checks.backend_rows(CPU, "planted", "o"))
    assert found[0].startswith("o: values: the result is off by 0.5")
    assert any(word.startswith("o: clean rows beside NaN: bits differ in 1 of 1 comparisons") for word in found)


def test_tiny_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, (config, rank), _) = gpu_checks.TINY
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    monkeypatch.setattr(gpu_checks, "TINY", [(dataclasses.replace(config, **sizes, head_dim=16), rank)])
    found = list(gpu_checks.tiny_decodes(CPU, "cpu"))
    assert wrong(found) == [] and len(found) == 3 * 7 + 1


def test_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    def raises() -> Any:
        yield "one", "ok"
        raise RuntimeError("an illegal\nmemory access")

    for found, code, line in (
        (iter([("a", "ok"), ("b", "ok")]), 0, "VERDICT: ok, 2 checks"),
        (iter([("a", "ok"), ("b", "off")]), 1, "VERDICT: 1 of 2 wrong: b: off"),
        (raises(), 1, "VERDICT: 1 of 2 wrong: raised RuntimeError: an illegal memory access"),
    ):
        assert gpu_checks.told(found, lambda: None) == code
        assert capsys.readouterr().out.splitlines()[-1] == line


def test_kernels_that_spill_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_checks, "backend_rows", lambda *a: iter([("x", "ok")]))
    import idlm_kernels.triton

    monkeypatch.setattr(idlm_kernels.triton, "spills", lambda: {"_linear_kernel": 12})
    assert wrong(gpu_checks.found_by("rows", CPU, "triton")) == [
        "registers: kernels spill, in words per thread: {'_linear_kernel': 12}"
    ]


def test_pieces_run_apart_and_none_is_lost() -> None:
    """Without a GPU each says so, and the worst status is that of the whole."""
    command = [sys.executable, "-m", "bench.gpu_checks", "tiny", "--jobs", "2", "--seconds", "100"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "VERDICT: 0 of 2 pieces ok; triton: torch sees no CUDA device here" in done.stdout.splitlines()[-1]


def test_every_kernel_variant_is_named_without_compiling(tmp_path: Path) -> None:
    """bench.gpu_prewarm calls what the GPU day calls; a name or an argument that changed would fail here."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.gpu_prewarm", "--list", "--parts", "selfcheck,decode,tiny,report"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == [] and found["variants"] > 100, done.stderr
