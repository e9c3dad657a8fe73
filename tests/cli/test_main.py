"""The command as a program: help, version, doctor, a reader that leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import idlm_kernels
from idlm_kernels.ops import OPS


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
        "--rule",
        "--check",
        "--json",
        "--adapter",
        "--page-size",
    } <= shown
    assert "--grammar" not in shown and "--repetition-penalty" in shown


def test_doctor_as_json_says_what_the_tables_say() -> None:
    done = idlm("doctor", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["facts"]["idlm_kernels"] == idlm_kernels.__version__ and "torch" in record["facts"]
    assert set(record["ops"]["cpu"]) == set(OPS) and record["rows_keep_their_bits"]["float32"]["cpu"] in (True, False)
    assert isinstance(record["checks"], list)


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


@pytest.mark.parametrize(("closed", "status"), [("0<&-", 2), ("1>&-", 2), ("2>&-", 2)])
def test_a_closed_stream_is_no_traceback(closed: str, status: int, tmp_path: Path) -> None:
    """A prompt from a closed stdin is empty; text has nowhere to go; and nothing meant for stderr lands in a file."""
    code = "from idlm_kernels.cli import main; main()"
    command = f'exec "{sys.executable}" -c "{code}" generate --raw {closed}'
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(["sh", "-c", command], text=True, **streams)
    assert done.returncode == status
    assert "Traceback" not in done.stderr and done.stdout == ""
    if not closed.startswith("2"):
        assert ("prompt is empty" if closed.startswith("0") else "stdout is closed") in done.stderr
