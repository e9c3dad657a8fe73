"""bench.serve runs: a figure for each number of clients, from the engine and over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_of_the_server_runs(folder: Path) -> None:
    flags = f"--model {folder} --tokens 4 --clients 1 3 --rounds 1 --plan chain --stride 2 --json"
    command = [sys.executable, "-m", "bench.serve", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert [record["clients"] for record in records] == [1, 3]
    assert all(value > 0 for record in records for value in record.values())
