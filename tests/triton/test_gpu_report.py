"""bench.gpu_report without a GPU: everything but its clock, which is a stub, on a tiny model under softgpu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import idlm_kernels.triton
from bench import gpu_cases, gpu_report
from bench.gpu_cases import Case
from bench.gpu_report import Report
from idlm_kernels.model import ModelConfig
from tests.tiny import tiny_config

pytestmark = pytest.mark.compiled

CONFIG = tiny_config(
    architecture="qwen3", qk_norm=True, hidden_size=64, intermediate_size=96, head_dim=64, num_layers=1
)


def few_cases(config: ModelConfig, device: torch.device) -> Iterator[Case]:
    yield from gpu_cases.linear_cases(config, device, 4)
    yield gpu_cases.attention_case(config, device, 2, 4, 70, branched=True)
    yield gpu_cases.attention_case(config, device, 1, 1, 64, branched=False)
    yield gpu_cases.sampling_case(config, device, 1, 2, 0.9)
    yield gpu_cases.rerank_case(config, device, 1, 2)
    yield from gpu_cases.layer_cases(config, device, 3)


def report_of(minutes: float = 60.0, **changes: Any) -> Report:
    report = Report(minutes)
    arguments = {
        "timer": lambda calls: [call() for call in calls[:1]] and 10.0,
        "backends": {"triton": idlm_kernels.triton},
        "peers": {("decode_attention_bf16", "1", "4", "2", "64"): ("someone", 5.0)},
        "copy_bytes": 1000,
        "wanted": few_cases,
        "contexts": ((2, 20),),
        "tokens": 4,
    }
    with torch.inference_mode():
        gpu_report.run(report, torch.device("cpu"), CONFIG, **{**arguments, **changes})
    return report


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "self_check", lambda *_: None)  # has tests of its own
    monkeypatch.setattr(gpu_report, "RANK", 16)
    monkeypatch.setattr(gpu_cases, "RANK", 16)
    report = report_of()
    assert report.left_out == [] and gpu_report.faults(report) == 0
    assert report.bandwidth == 2e8  # 2000 bytes in 10 us
    assert [(f.op, f.right) for f in report.figures] == [
        *[(op, "ok") for op in ("linear", "gated_lora_linear") * 2],
        ("linear_silu_and_mul", "ok"),
        ("linear_silu_and_mul", "ok"),
        *[(op, "ok") for op in ("linear", "gated_lora_linear", "linear")],
        ("strided_attention", "ok"),
        ("strided_attention", "ok"),
        ("verify_accept", "ok"),
        ("rerank_drafts", "ok"),
        ("rms_norm", "ok"),
        ("qk_norm_rope_append", "ok"),
    ]
    # q, k and v of 4 + 2 + 2 heads out of 64 numbers in bf16.
    assert report.figures[0].shape == "qkv rows=4"
    assert report.figures[0].floor_us == pytest.approx(2 * 8 * 64 * 64 / report.bandwidth * 1e6)
    assert [(f.peer, f.peer_us) for f in report.figures if f.op == "strided_attention"] == [
        ("", None),
        ("someone", 5.0),
    ]
    assert len(report.exactness) == 8 and len(report.steps) == 6
    assert [step["plan"] for step in report.steps[:3]] == ["ar", "chain N=4", "branched N=4"]
    text = gpu_report.page(report)
    assert (
        "| strided_attention | batch=1 rows=1 context=64 | triton | 10.0 |" in text and "5.0 (someone) | 2.00 |" in text
    )


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        return linear(x, weight, **rest) * 1.5

    def fails(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    linear = idlm_kernels.triton.linear
    monkeypatch.setattr(idlm_kernels.triton, "linear", wrong)
    monkeypatch.setattr(idlm_kernels.triton, "rms_norm", fails)
    monkeypatch.setattr(gpu_report, "self_check", lambda module, op, device: "bad" if op == "advance" else None)
    report = report_of(contexts=())
    assert ("triton", "advance", "bad") in report.checks
    assert {f.shape for f in report.figures if f.right.startswith("off by 0.5")} == {
        f"{name} rows=4" for name in ("qkv", "o", "down", "lm_head")
    }
    assert gpu_report.faults(report) == 5
    assert "rms_norm rows=3 with a copy of the residual: RuntimeError: no such kernel" in report.left_out
    assert any(what.startswith("decoding: RuntimeError") for what in report.left_out)
    assert "## Not there" in gpu_report.page(report)


def test_what_the_minutes_do_not_suffice_for_is_named() -> None:
    report = report_of(minutes=0.0)
    assert report.left_out == [
        f"{part}: no time was left" for part in ("bandwidth", "self-checks", "decoding", "decoding with an adapter")
    ]


def test_peers() -> None:
    peers = gpu_report.read_peers(gpu_report.PEERS)
    assert peers["decode_attention_bf16", "1", "32", "8", "4096"] == ("sglang", 13.52)
    assert ("gemm_bf16", "7", "6144", "4096", "") in peers


def test_differences() -> None:
    ones, ids = torch.ones(4), torch.ones(4).long()
    assert gpu_report.difference((ones, ids), (ones * 1.001, ids)) == "ok"
    assert gpu_report.difference(ones * torch.nan, ones).startswith("off by nan")
    assert gpu_report.difference((ids, ids), (ids, torch.tensor([1, 1, 2, 1]))) == "1 of 4 differ"


def test_bits_that_depend_on_other_rows_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        y = linear(x, weight, **rest)
        return y * (1 + 2**-7) if len(x) > 1 else y

    linear = idlm_kernels.triton.linear
    monkeypatch.setattr(idlm_kernels.triton, "linear", wrong)
    case = next(gpu_cases.linear_cases(CONFIG, torch.device("cpu"), 4))
    figure = gpu_report.measure(case, "triton", 1e9, lambda calls: 1.0, {})
    assert figure.right == "bits of rows alone differ"
