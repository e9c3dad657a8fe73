"""Traces on a disk: all that was written is read, once, and nothing else is."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from idlm_kernels.learning.traces import Cycle, Trace, TraceReader, TraceWriter, acceptance, encoded, trace_files
from idlm_kernels.model.errors import CheckpointError

VOCABULARY = 100


def a_trace(seed: int = 0, length: int = 12) -> Trace:
    random = Random(seed)
    answer = tuple(random.randrange(VOCABULARY) for _ in range(length))
    cycles = []
    at = 1
    while at < length:
        accepted = random.randrange(4)
        drafts = tuple(random.randrange(VOCABULARY) for _ in range(3))
        accepted = min(accepted, 3, length - at)
        cycles.append(Cycle(at, drafts, accepted, 1, random.randrange(2)))
        at += accepted + 1
    return Trace((1, 2, seed % VOCABULARY), answer, tuple(cycles), ("a", "b"), "stop")


def writer(folder: Path, **how: Any) -> TraceWriter:
    return TraceWriter(folder, "model", VOCABULARY, **how)


def reader(folder: Path) -> TraceReader:
    return TraceReader(folder, "model", VOCABULARY)


def test_what_is_written_is_read_once_and_in_order(tmp_path: Path) -> None:
    traces = [a_trace(i) for i in range(20)]
    with writer(tmp_path) as out:
        for trace in traces[:11]:
            out.write(trace)
        out.flush()
        found = reader(tmp_path)
        assert found.new() == traces[:11] and found.new() == []
        for trace in traces[11:]:
            out.write(trace)
    assert found.new() == traces[11:] and found.new() == [] and found.damaged == out.dropped == 0


def test_a_crash_costs_the_line_that_was_being_written(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        for i in range(4):
            out.write(a_trace(i))
    (file,) = trace_files(tmp_path)
    whole = file.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        file.write_bytes(whole[:cut])
        found = reader(tmp_path)
        assert found.new() == [a_trace(i) for i in range(3)] and found.damaged == 0
    found = reader(tmp_path)
    found.new()
    file.write_bytes(whole)  # the rest came after all
    assert found.new() == [a_trace(3)]


def test_a_damaged_line_is_passed_over_by_itself(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        for i in range(5):
            out.write(a_trace(i))
    (file,) = trace_files(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    random = Random(1)
    for _ in range(200):
        damaged = bytearray(lines[3])
        where = random.randrange(len(damaged) - 1)
        damaged[where] ^= 1 << random.randrange(8)
        if b"\n" in damaged[:-1]:
            continue
        file.write_bytes(b"".join((*lines[:3], bytes(damaged), *lines[4:])))
        found = reader(tmp_path)
        assert found.new() == [a_trace(i) for i in (0, 1, 3, 4)] and found.damaged == 1


@pytest.mark.parametrize(
    "change",
    [
        {"cycles": [[0, 4, 1, 0, 5, 6, 7]]},  # more accepted than drafted
        {"cycles": [[11, 3, 1, 0, 5, 6, 7]]},  # more than the answer holds
        {"cycles": [[0, 0, 1, 2, 5]]},  # an adapter that is not named
        {"cycles": [[0, 0, 1]]},
        {"cycles": [[0, -1, 1, 0, 5]]},
        {"answer": [1, 2, -3]},
        {"answer": [1, True]},
        {"prompt": None},
        {"adapters": "ab"},
        {"adapters": [1]},
        {"finish_reason": None},
    ],
)
def test_a_lying_record_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    with writer(tmp_path) as out:
        out.write(a_trace())
    (file,) = trace_files(tmp_path)
    record = json.loads(file.read_bytes().splitlines()[1][9:]) | change
    with file.open("ab") as end:
        end.write(encoded(record))
    found = reader(tmp_path)
    assert found.new() == [a_trace()] and found.damaged == 1


def test_files_are_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    size = len(encoded({"x": 1})) + 250
    with writer(tmp_path, max_file_bytes=4 * size, max_bytes=20 * size) as out:
        found, read = reader(tmp_path), []
        for i in range(300):
            out.write(a_trace(i))
            if i % 7 == 0:
                out.flush()
                read += found.new()
                assert sum(file.stat().st_size for file in trace_files(tmp_path)) <= 20 * size
    read += found.new()
    assert read == [a_trace(i) for i in range(300)]  # who reads along loses none
    late = reader(tmp_path).new()
    assert 0 < len(late) < 300 and late == [a_trace(i) for i in range(300 - len(late), 300)]


def test_redacted_traces_hold_no_prompt(tmp_path: Path) -> None:
    with writer(tmp_path, redact=True) as out:
        out.write(a_trace(7))
    (trace,) = reader(tmp_path).new()
    assert trace.prompt == () and trace.answer == a_trace(7).answer and trace.cycles == a_trace(7).cycles


def test_foreign_traces_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(a_trace())
    with pytest.raises(CheckpointError, match="another model"):
        TraceReader(tmp_path, "another", VOCABULARY).new()
    with pytest.raises(CheckpointError, match="outside the vocabulary of 5"):
        TraceReader(tmp_path, "model", 5).new()
    (tmp_path / "00-1.traces").write_bytes(b"no traces\n")
    with pytest.raises(CheckpointError, match="first line"):
        reader(tmp_path).new()
    with pytest.raises(FileNotFoundError, match="idlm serve --traces"):
        reader(tmp_path / "none")


class _FullDisk:
    """A file whose disk is full for a while."""

    def __init__(self, file: Any):
        self.file, self.is_full = file, True

    def write(self, line: bytes) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(line))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_costs_traces_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with writer(tmp_path) as out:
        out.write(a_trace(0))
        out.flush()
        out._file = _FullDisk(out._file)  # type: ignore[assignment]
        out.write(a_trace(1))
        out.flush()  # the failed file is closed, and the next trace begins another
        out.write(a_trace(2))
    assert out.dropped == 1 and reader(tmp_path).new() == [a_trace(0), a_trace(2)]
    assert [r.message for r in caplog.records] == [
        f"{tmp_path}: traces are lost, requests go on: [Errno 28] No space left on device"
    ]


def test_a_writer_that_is_closed_takes_and_flushes_nothing(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.close()
    out.close()
    out.write(a_trace())
    out.flush()
    assert reader(tmp_path).new() == []


def test_what_a_trace_tells() -> None:
    trace = Trace(
        (1,), (5, 6, 7, 8, 9), (Cycle(1, (6, 0, 0), 1, 1, 0), Cycle(3, (8, 9, 4), 2, 1, 1)), ("a", "b"), "length"
    )
    assert trace.rejected() == [2]  # of the second cycle all that there is room for became text
    assert trace.counts() == ([2, 2, 0], [2, 1, 0])
    assert trace.counts("a") == ([1, 1, 0], [1, 0, 0])
    assert acceptance([trace, trace]) == [1.0, 0.5] and acceptance([]) == []
