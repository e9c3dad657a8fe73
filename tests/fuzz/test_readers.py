"""Files of strangers, spoiled at random: accepted, or refused with an error that names the file. Nothing else: no other
exception, no crash, no hang, no memory that the file does not justify."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .targets import TARGETS

WATCHDOG_SECONDS = 60  # for one file; a second is much
ROOT = Path(__file__).parents[2]


class Child:
    """A tests.fuzz.child, started again after each death."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, target: str, first: int, end: int) -> tuple[Counter[str], list[str]]:
        """How often files were accepted and refused, and the faults by seed."""
        counts: Counter[str] = Counter()
        faults: list[str] = []
        while first < end:
            process = self.started()
            assert process.stdin is not None
            process.stdin.write(json.dumps([target, first, end]).encode() + b"\n")
            process.stdin.flush()
            at = first
            while first < end:
                message = self.next_message(process)
                if isinstance(message, str):
                    faults.append(f"seed {at}: {message}")
                    first = at + 1
                    self.close()
                    break
                at, found = message["seed"], message.get("outcome")
                if found is not None:
                    first = at + 1
                    counts[found] += found in ("accepted", "refused")
                    if found not in ("accepted", "refused"):
                        faults.append(f"seed {at}: {found}")
        return counts, faults

    def started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            self.rest = b""
        return self.process

    def next_message(self, process: subprocess.Popen[bytes]) -> dict[str, object] | str:
        """What the child tells, or how it has ended."""
        assert process.stdout is not None
        while b"\n" not in self.rest:
            if not select.select([process.stdout], [], [], WATCHDOG_SECONDS)[0]:
                return f"no answer within {WATCHDOG_SECONDS} s"
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return f"the process ended with status {process.wait()}"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        message: dict[str, object] = json.loads(line)
        return message

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


@pytest.mark.parametrize(
    "count", [2000, pytest.param(50_000, marks=pytest.mark.slow)], ids=["2000 seeds", "50000 seeds"]
)
@pytest.mark.parametrize("target", TARGETS)
def test_spoiled_files_are_accepted_or_refused_by_name(child: Child, target: str, count: int) -> None:
    counts, faults = child.run(target, 0, count)
    listed = "\n".join(faults[:5])
    assert not faults, f"{len(faults)} faults; repeat one with python -m tests.fuzz.child {target} SEED\n{listed}"
    assert counts["accepted"] + counts["refused"] == count
    assert counts["accepted"] >= count // 50 and counts["refused"] >= count // 10, f"these show little: {counts}"
