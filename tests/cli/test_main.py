"""The command as a program: help, version, doctor, a reader that leaves."""

from __future__ import annotations

import re
import subprocess
import sys

import idlm_kernels


def idlm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the console script's function in a process of its own."""
    code = "from idlm_kernels.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_version() -> None:
    assert idlm("--version").stdout == f"idlm_kernels {idlm_kernels.__version__}\n"


def test_help_names_every_command_and_flag_and_hides_the_refused_ones() -> None:
    assert {"generate", "doctor"} <= set(re.findall(r"^  (\w+)  ", idlm("--help").stdout, re.MULTILINE))
    shown = set(re.findall(r"--[a-z-]+", idlm("generate", "--help").stdout))
    assert {
        "--prompt",
        "--raw",
        "--plan",
        "--verify",
        "--check",
        "--json",
        "--adapter",
        "--page-size",
    } <= shown
    assert "--grammar" not in shown and "--repetition-penalty" not in shown


def test_doctor_names_versions_and_the_backend_of_each_op() -> None:
    done = idlm("doctor")
    assert done.returncode == 0, done.stderr
    assert idlm_kernels.__version__ in done.stdout
    for op, backend in idlm_kernels.backends("cpu").items():
        assert re.search(rf"\b{op}\b.*\b{backend}\b", done.stdout), op


def test_the_reader_of_stdout_may_leave() -> None:
    code = """
from idlm_kernels import cli
cli.generate._prompt_text = lambda prompt: print("x" * 10_000_000, flush=True)
cli.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, "generate"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
