"""bench.gpu_report without a GPU: everything but its clock, which is a stub, on a tiny model under softgpu."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import idlm_kernels.triton
from bench import gpu_cases, gpu_parts, gpu_report
from bench.gpu_cases import Case
from bench.gpu_parts import Setting
from bench.gpu_report import Report, run_pieces
from idlm_kernels.model import ModelConfig
from tests.tiny import tiny_config

pytestmark = [pytest.mark.compiled, pytest.mark.emulator]

CONFIG = tiny_config(
    architecture="qwen3", qk_norm=True, hidden_size=64, intermediate_size=96, head_dim=64, num_layers=1
)


def few_cases(config: ModelConfig, device: torch.device) -> Iterator[Case]:
    yield from gpu_cases.linear_cases(config, device, 4)
    yield gpu_cases.attention_case(config, device, 2, 4, 70, quadratic=True)
    yield gpu_cases.attention_case(config, device, 1, 1, 64, quadratic=False)
    yield gpu_cases.sampling_case(config, device, 1, 2, 0.9)
    yield gpu_cases.rerank_case(config, device, 1, 2)
    yield from gpu_cases.layer_cases(config, device, 3)


def setting(**changes: Any) -> Setting:
    arguments: dict[str, Any] = {
        "timer": lambda calls: [call() for call in calls[:1]] and 10.0,
        "config": CONFIG,
        "bandwidth": 2e8,
        "peers": {
            ("decode_attention_bf16", "1", "4", "2", "64"): ("someone", 5.0),
            ("gemm_bf16", "4", "96", "64", ""): ("someone", 5.0),
        },
        "backends": {"triton": idlm_kernels.triton},
        "decoders": ("triton",),
        "copy_bytes": 1000,
        "l2_bytes": 1_000_000,
        "cases": few_cases,
        "contexts": ((1, 20),),
        "tokens": 4,
    }
    return Setting(torch.device("cpu"), **{**arguments, **changes})


def report_of(*parts: str, **changes: Any) -> Report:
    report = Report()
    for part in parts:
        with torch.inference_mode():
            run_pieces(
                gpu_parts.PARTS[part](setting(**changes)), lambda f: f["kind"] in ("begin", "end") or report.add(f)
            )
    return report


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases, "RANK", 16)
    report = report_of("bandwidth", "kernels")
    assert report.left_out == [] and gpu_report.faults(report) == 0
    assert report.bandwidth == 2e8  # 2000 bytes in 10 us
    assert [(f["op"], f["right"]) for f in report.figures] == [
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
    assert report.figures[0]["shape"] == "qkv rows=4"
    assert report.figures[0]["floor_us"] == pytest.approx(2 * 8 * 64 * 64 / report.bandwidth * 1e6)
    attention = [f for f in report.figures if f["op"] == "strided_attention"]
    assert [f.get("peer_us") for f in attention] == [None, 5.0]
    # gate_up is twice as wide as the peer's gate.
    gate_up = next(f for f in report.figures if f["shape"] == "gate_up rows=4")
    ratio = (192 * 64 + 4 * (192 + 64)) / (96 * 64 + 4 * (96 + 64))
    assert gate_up["peer"] == "someone, its N=96 scaled by bytes" and gate_up["peer_us"] == pytest.approx(5 * ratio)
    text = gpu_report.page(report)
    assert "| strided_attention | batch=1 rows=1 context=64 | triton | 10.0" in text
    assert "5.0 (someone) | 2.00 |" in text and "its N=96 scaled by bytes" in text


def one_case(config: ModelConfig, device: torch.device) -> Iterator[Case]:
    yield next(gpu_cases.linear_cases(config, device, 1))


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"bandwidth": 0.0}, "begin, bandwidth, begin, figure, end"),
        ({"bandwidth": 1e9}, "begin, figure, end"),
        ({"bandwidth": 0.0, "timer": lambda calls: 1 / 0}, "begin, left out, left out, end"),
    ],
    ids=["first", "second", "without an answer"],
)
def test_the_first_process_measures_the_bandwidth(changes: dict[str, Any], wanted: str) -> None:
    found: list[str] = []
    arguments = setting(cases=one_case, **changes)
    gpu_report.measure_pieces(arguments, "kernels", lambda x: found.append(x["kind"]), 0, lambda: None)
    assert ", ".join(found) == wanted


def test_what_fits_the_l2_is_marked() -> None:
    size = 64 * 2 * 512 * 64  # of 64 calls
    for l2_bytes, marked in ((size, True), (size - 1, False)):
        report = report_of("kernels", cases=one_case, l2_bytes=l2_bytes)
        assert [f["in_l2"] for f in report.figures] == [marked]
        assert ("10.0 (L2) |" in gpu_report.page(report)) == marked


@pytest.mark.parametrize("part", ["decoding", "adapter"])
def test_decoding(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "RANK", 16)
    pieces = gpu_parts.decoding_pieces
    monkeypatch.setitem(gpu_parts.PARTS, "adapter", lambda s: pieces(s, 16))
    report = report_of(part)
    assert report.left_out == [] and gpu_report.faults(report) == 0
    assert [what.split(", ", 2)[2].rsplit(", ", 2)[0] for what, _ in report.exactness] == [
        "chain N=4",
        "quadratic N=4",
        "ar, eager",
        "quadratic N=4, eager",
    ] * 2
    assert [(s["plan"], s["how"], s["backend"]) for s in report.steps] == [
        (plan, "recorded", "triton") for plan in ("ar", "chain N=4", "quadratic N=4")
    ]
    assert [s["drafted"] for s in report.steps][::2] == [0.0, 1.0] and report.steps[1]["drafted"] < 1.0
    assert f"| {report.steps[0]['model']} | triton | ar | recorded | 1 | 20 | 0% |" in gpu_report.page(report)


def test_auto_is_decoded_and_compared_with_eager_steps() -> None:
    names = [name for name, _ in gpu_parts.decoding_pieces(setting(decoders=("triton", "auto")))]
    assert names[:2] == ["decoding without an adapter, triton", "decoding without an adapter, auto"]
    assert sum("auto" in name and "eager" in name for name in names) == 2


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        return linear(x, weight, **rest) * 1.5

    def fails(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    linear = idlm_kernels.triton.linear
    monkeypatch.setattr(idlm_kernels.triton, "linear", wrong)
    monkeypatch.setattr(idlm_kernels.triton, "rms_norm", fails)
    monkeypatch.setattr(
        gpu_parts.self_check, "self_check", lambda module, op, device: "bad" if op == "advance" else None
    )
    report = report_of("checks", "kernels")
    assert ("triton", "advance", "bad") in report.checks
    assert {f["shape"] for f in report.figures if f["right"].startswith("the result is off by 0.5")} == {
        f"{name} rows=4" for name in ("qkv", "o", "down", "lm_head")
    }
    assert gpu_report.faults(report) == 5
    assert "rms_norm rows=3 triton: RuntimeError: no such kernel" in report.left_out
    assert "## Not there" in gpu_report.page(report)
    assert gpu_report.verdict(report).startswith("see the page")


def test_a_text_that_differs_from_ar_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def generate(self, prompts: Any, params: Any, *, plan: str, stride: int) -> list[Any]:
            ids = [1, 2] if plan == "ar" else [1, 3]
            return [type("Result", (), {"finish_reason": "length", "token_ids": ids})() for _ in prompts]

    found = list(gpu_parts.check_decoding(Other(), "it", [[1], [2]], 2))  # type: ignore[arg-type]
    assert [f["verdict"] for f in found] == ["2 of 2 texts differ from AR"] * 2 + ["ok"] + [
        "2 of 2 texts differ from AR"
    ] + ["2 of 2 texts differ from AR"] * 2 + ["ok"] + ["2 of 2 texts differ from AR"]


def test_peers() -> None:
    peers = gpu_parts.read_peers(gpu_report.PEERS)
    assert peers["decode_attention_bf16", "1", "32", "8", "4096"] == ("sglang", 13.52)
    assert ("gemm_bf16", "7", "6144", "4096", "") in peers
    shapes = gpu_cases.linear_cases(gpu_parts.SHAPES["qwen3-8b"], torch.device("cpu"), 7)
    assert all(case.peer in peers for case in shapes), "every layer of Qwen3-8B has a peer"


def test_bits_that_depend_on_other_rows_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        y = linear(x, weight, **rest)
        return y * (1 + 2**-7) if len(x) > 1 else y

    linear = idlm_kernels.triton.linear
    monkeypatch.setattr(idlm_kernels.triton, "linear", wrong)
    case = next(gpu_cases.linear_cases(CONFIG, torch.device("cpu"), 4))
    figure = gpu_parts.measure(case, "triton", setting(timer=lambda calls: idlm_kernels.current_backend()))
    assert figure["microseconds"] == "triton", "another backend was timed"
    assert figure["right"].startswith("1 row alone and among 4: bits differ in")


# The process that collects

CHILD = """
import json, os, sys, time
part, skip, bandwidth = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
def say(**found): print("FOUND " + json.dumps(found), flush=True)
if not bandwidth:
    say(kind="begin", index=0, name="bandwidth"); say(kind="bandwidth", bytes_per_second=1e12)
for index, name in enumerate(("good", "hangs", "dies", "last") if part == "checks" else ()):
    if index < skip: continue
    print("noise"); say(kind="begin", index=index, name=name)
    if name == "hangs": time.sleep(60)
    if name == "dies": os._exit(7)
    say(kind="check", backend="b", op=name, verdict="ok")
say(kind="end")
"""


def collected(tmp_path: Path, seconds: float, parts: list[str]) -> tuple[Report, list[str]]:
    report, pages = Report(), []

    def save() -> None:
        report.save(tmp_path / "page")
        pages.append((tmp_path / "page.md").read_text())

    def command(part: str, skip: int, bandwidth: float) -> list[str]:
        return [sys.executable, "-c", CHILD, part, str(skip), str(bandwidth)]

    gpu_report.collect(command, report, parts, seconds, save, piece_seconds=3.0)
    return report, pages


def test_a_piece_that_hangs_or_dies_takes_nothing_else_along(tmp_path: Path) -> None:
    report, pages = collected(tmp_path, 50.0, ["checks", "kernels"])
    assert [op for _, op, _ in report.checks] == ["good", "last"] and report.bandwidth == 1e12
    assert report.left_out == [
        "hangs: no answer for 3 s, a kernel that waits for ever?",
        "dies: its process ended with status 7",
    ]
    assert any("| b | good | ok |" in page and "last" not in page for page in pages), "saved after every figure"
    assert json.loads((tmp_path / "page.json").read_text())["checks"][1] == ["b", "last", "ok"]


def test_what_the_minutes_do_not_suffice_for_is_named(tmp_path: Path) -> None:
    report, _ = collected(tmp_path, 2.0, ["checks", "kernels"])
    assert report.left_out == ["hangs, and what comes after it: no time was left", "kernels: no time was left"]
    report, _ = collected(tmp_path, 0.0, ["kernels"])
    assert report.left_out == ["kernels: no time was left"]


def test_the_command_writes_both_files_and_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def child(peers: Path, part: str, skip: int, bandwidth: float) -> list[str]:
        return [sys.executable, "-c", CHILD, part, str(max(skip, 3)), str(bandwidth)]  # behind what hangs and dies

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_report, "measuring", child)
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--output", str(tmp_path / "x.y"), "--parts", "checks,kernels"])
    gpu_report.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "VERDICT: ok: bandwidth 1.00 TB/s; 1 self-checks, 0 wrong"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.y.json", "x.y.md"]
    monkeypatch.setenv("PHASE_SECONDS", "5")  # of gpu_day.sh: what is left of it is none
    with pytest.raises(SystemExit) as end:
        gpu_report.main()
    assert end.value.code == 1 and "checks: no time was left" in capsys.readouterr().out
