"""Traces: what a finished request leaves behind, in files that are only ever appended to.

A file holds one record a line: its CRC-32 in eight hexadecimal digits, a blank and JSON. The first record names the
format and the model; each other one is a `Trace`. A line is written in one piece, so a crash costs the last lines at
most; a damaged line is passed over by itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from idlm_kernels.model.errors import CheckpointError, short

logger = logging.getLogger(__name__)

FORMAT = "idlm-traces-1"
_SUFFIX = ".traces"
_QUEUE = 4096  # traces that wait for the disk; beyond, they are dropped and counted
_MAX_LINE = 64 << 20  # bytes; a longer one is no trace


@dataclass(frozen=True)
class Cycle:
    """A step that verified drafts. at: the index in the answer of the first one; drafts: their ids; accepted: how many
    of them, from the first, became text; source: `MASK_DRAFTS` or another one of the contract; adapter: of the
    trace's adapters, the index of the one that was in use.
    """

    at: int
    drafts: tuple[int, ...]
    accepted: int
    source: int
    adapter: int = 0


@dataclass(frozen=True)
class Trace:
    """prompt (empty where it was redacted) and answer: ids; cycles: the steps that verified drafts, in their order;
    adapters: the names of those in use; finish_reason: stop, length or cancelled."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cycles: tuple[Cycle, ...]
    adapters: tuple[str, ...]
    finish_reason: str

    def rejected(self) -> list[int]:
        """Indices in the answer at which a draft was refused and another token became text."""
        return [
            c.at + c.accepted
            for c in self.cycles
            if c.accepted < len(c.drafts) and c.at + c.accepted < len(self.answer)
        ]

    def counts(self, adapter: str | None = None) -> tuple[list[int], list[int]]:
        """(verified, accepted) by draft index, given that all drafts before it were accepted; of one adapter's steps,
        or of all."""
        width = max((len(c.drafts) for c in self.cycles), default=0)
        verified, accepted = [0] * width, [0] * width
        for cycle in self.cycles:
            if adapter is not None and self.adapters[cycle.adapter] != adapter:
                continue
            for j in range(min(len(cycle.drafts), cycle.accepted + 1, len(self.answer) - cycle.at)):
                verified[j] += 1
                accepted[j] += j < cycle.accepted
        return verified, accepted


class TraceWriter:
    """Keeps traces in `folder`, from a thread of its own: no request waits for a disk.

    model: what `identity` of model/checkpoint.py says; vocab_size: of its ids. A file is closed and the next one begun
    at max_file_bytes, and the oldest go where all together pass max_bytes. redact: prompts are left out. A disk that
    fails costs traces and no request: it is said once in the log, `dropped` counts. Use `close`, or a `with`.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        vocab_size: int,
        *,
        redact: bool = False,
        max_bytes: int = 256 << 20,
        max_file_bytes: int = 8 << 20,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder}: no traces can be written there")
        self.folder, self.redact, self.dropped = folder, redact, 0
        self._header = {"format": FORMAT, "model": model, "vocab_size": vocab_size, "redacted": redact}
        self._max_bytes, self._max_file_bytes = max_bytes, max_file_bytes
        self._file: BinaryIO | None = None
        self._said = False
        self._queue: queue.Queue[Trace | threading.Event | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._run, name="idlm-traces", daemon=True)
        self._thread.start()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, trace: Trace) -> None:
        """Keep a trace, soon. It never waits: where the disk does not keep up, the trace is dropped."""
        try:
            self._queue.put_nowait(trace)
        except queue.Full:
            self.dropped += 1

    def flush(self) -> None:
        """Wait until all that was given is with the system."""
        if self._thread.is_alive():
            done = threading.Event()
            self._queue.put(done)
            done.wait()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (given := self._queue.get()) is not None:
            if isinstance(given, threading.Event):
                given.set()
                continue
            try:
                self._append(given)
            except OSError as error:
                self.dropped += 1
                self._end_file()
                if not self._said:
                    self._said = True
                    logger.error("%s: traces are lost, requests go on: %s", self.folder, error)
        self._end_file()

    def _append(self, trace: Trace) -> None:
        line = encoded(_record(trace, self.redact))
        if self._file is not None and self._file.tell() + len(line) > self._max_file_bytes:
            self._end_file()
        if self._file is None:
            self._file = self._new_file(len(line))
        self._file.write(line)  # unbuffered: it is the system's from here on

    def _new_file(self, needed: int) -> BinaryIO:
        """The next file, with its first record. The oldest ones make room for it."""
        files = trace_files(self.folder)
        total = sum(_size(file) for file in files)
        for old in files:
            if total + max(needed, self._max_file_bytes) <= self._max_bytes:
                break
            total -= _size(old)
            old.unlink(missing_ok=True)
        path = self.folder / f"{time.time_ns():020d}-{os.getpid()}{_SUFFIX}"
        file = path.open("xb", buffering=0)
        file.write(encoded(self._header))
        return file

    def _end_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


class TraceReader:
    """Reads the traces of a folder as it grows, each once.

    model, vocab_size: as of the writer; CheckpointError for a file of another model, with ids that the model does not
    have, or of an unknown format. damaged: lines that were passed over.
    """

    def __init__(self, folder: Path, model: str, vocab_size: int):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; `idlm serve --traces {folder}` fills one")
        self.folder, self.damaged = folder, 0
        self._model, self._vocab_size = model, vocab_size
        self._read: dict[Path, int] = {}  # bytes of each file
        self._known: set[Path] = set()  # files whose first record was looked at

    def new(self) -> list[Trace]:
        """What was added since the last call, oldest first."""
        found: list[Trace] = []
        for path in trace_files(self.folder):
            try:
                found += self._of(path)
            except FileNotFoundError:  # it made room for a newer one
                continue
        return found

    def _of(self, path: Path) -> Iterator[Trace]:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            while line := file.readline(_MAX_LINE):
                if not line.endswith(b"\n") and len(line) < _MAX_LINE:
                    break  # the rest of it is yet to come
                self._read[path] = file.tell()
                record = decoded(line)
                if path not in self._known:
                    self._check(path, record)
                    self._known.add(path)
                elif record is None or (trace := _trace(record)) is None:
                    self.damaged += 1
                else:
                    self._check_ids(path, trace)
                    yield trace

    def _check(self, path: Path, header: dict[str, Any] | None) -> None:
        if header is None or header.get("format") != FORMAT:
            raise CheckpointError(f"{path}: its first line is not that of a file of traces ({FORMAT})")
        if header.get("model") != self._model:
            raise CheckpointError(
                f"{path}: traces of another model ({short(header.get('model'))}, this one is {self._model}): an adapter"
                " can learn from its own base's texts alone"
            )

    def _check_ids(self, path: Path, trace: Trace) -> None:
        ids = (*trace.prompt, *trace.answer, *(i for cycle in trace.cycles for i in cycle.drafts))
        if max(ids, default=0) >= self._vocab_size:
            raise CheckpointError(f"{path}: holds the id {max(ids)}, outside the vocabulary of {self._vocab_size}")


def trace_files(folder: Path) -> list[Path]:
    """The files of traces in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"*{_SUFFIX}") if path.is_file())


def encoded(record: dict[str, Any]) -> bytes:
    """A line that says of itself whether it is whole."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decoded(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for a damaged one."""
    crc, _, text = line.rstrip(b"\n").partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _record(trace: Trace, redact: bool) -> dict[str, Any]:
    return {
        "prompt": [] if redact else list(trace.prompt),
        "answer": list(trace.answer),
        "cycles": [[c.at, c.accepted, c.source, c.adapter, *c.drafts] for c in trace.cycles],
        "adapters": list(trace.adapters),
        "finish_reason": trace.finish_reason,
    }


def _trace(record: dict[str, Any]) -> Trace | None:
    """None for a record that is none, whatever its checksum says."""
    prompt, answer, cycles = record.get("prompt"), record.get("answer"), record.get("cycles")
    adapters, reason = record.get("adapters"), record.get("finish_reason")
    if not (_are_ids(prompt) and _are_ids(answer) and isinstance(cycles, list) and isinstance(reason, str)):
        return None
    if not isinstance(adapters, list) or not all(isinstance(name, str) for name in adapters):
        return None
    found = []
    for row in cycles:
        if not _are_ids(row) or len(row) < 4:
            return None
        at, accepted, source, adapter, *drafts = row
        if accepted > len(drafts) or at + accepted > len(answer) or adapter >= len(adapters):
            return None
        found.append(Cycle(at, tuple(drafts), accepted, source, adapter))
    return Trace(tuple(prompt), tuple(answer), tuple(found), tuple(adapters), reason)


def _are_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def acceptance(traces: Sequence[Trace], adapter: str | None = None) -> list[float]:
    """By draft index, over many traces: the share accepted of those that were verified."""
    verified: list[int] = []
    accepted: list[int] = []
    for trace in traces:
        for j, (seen, kept) in enumerate(zip(*trace.counts(adapter), strict=True)):
            verified += [0] * (j + 1 - len(verified))
            accepted += [0] * (j + 1 - len(accepted))
            verified[j] += seen
            accepted[j] += kept
    return [kept / seen for kept, seen in zip(accepted, verified, strict=True) if seen]
