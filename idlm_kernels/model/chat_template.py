"""Chat templates: a program that comes with a model, rendered in a process of its own.

Nothing within a process can bound what such a program takes: jinja2's sandbox keeps it from the machine, not from
memory and time. So each template has a small process (see _render) with a limit on both, started at its first
conversation and kept for the next ones. It ends with the template or with this process, whatever happens to either.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _render
from .errors import CheckpointError

_WAIT_SECONDS = 120.0  # for the answer, which takes _render.SECONDS of a processor: beyond, the machine is at fault
_MAX_ANSWER_BYTES = 4 * _render.OUTPUT_CHARS + 1
_MAX_DEPTH = 200
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


class ChatTemplate:
    """A template and the process that renders it.

    Threads take turns. A child of fork gets a process of its own. Pickled and copied as the template alone.
    """

    def __init__(self, source: str, origin: str = "") -> None:
        """`origin`: the file that it comes from, which faults name."""
        self.source, self.origin = source, origin
        self._renew()
        _all.add(self)

    def _renew(self) -> None:
        """As new: without a process, and with a lock that nobody holds."""
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, self.origin)

    def render(self, names: Mapping[str, Any]) -> str:
        """The text for the names that the template may read, which hold plain data.

        Raises CheckpointError, which names the file, when the template fails, refuses what it was given, or takes more
        than it may; TypeError for names that are no plain data; OSError when the machine cannot run the process.
        """
        request = marshal.dumps((self.source, _plain(dict(names), "", 0)))
        with self._lock:
            if self._process is None:
                self._process = _Process(self)
            process = self._process
            try:
                kind, answer = process.ask(request)
            except BaseException:  # Ctrl-C too: what would come next belongs to this request
                self._end()
                raise
            if kind != _render.TEXT:
                if kind != _render.FAULT:
                    self._end()
                raise self._failed(answer.decode("utf-8", "replace"))
        return answer.decode("utf-8", "surrogatepass")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def _failed(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}{': ' if self.origin else ''}the chat template failed: {why}")


class _Process:
    """A running _render, which ends when `owner` does."""

    def __init__(self, owner: ChatTemplate) -> None:
        if not sys.executable:
            raise OSError("rendering a chat template needs a Python interpreter, and sys.executable names none")
        ours, theirs = (_above_stdio(end) for end in socket.socketpair())
        command = [sys.executable, "-I", "-S", _render.__file__, *_folders()]
        try:
            # A session of its own: signals of the terminal are for this process alone.
            null = subprocess.DEVNULL
            self._child = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=null, stderr=null, start_new_session=True
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(_WAIT_SECONDS)
        self._socket = ours
        self.end = weakref.finalize(owner, _end, self._child, ours, os.getpid())
        try:
            self._receive()
        except BaseException as error:
            self.end()
            if isinstance(error, (EOFError, ConnectionError)):
                raise OSError(
                    f"the process that renders chat templates did not start: {sys.executable} ended with status "
                    f"{self._child.returncode}"
                ) from None
            raise

    def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """What kind of answer, and the answer."""
        try:
            self._send(request)
            answer = self._receive()
            return answer[:1], answer[1:]
        except TimeoutError:
            raise TimeoutError(
                f"a chat template was not rendered within {_WAIT_SECONDS:.0f} s: is the machine overloaded?"
            ) from None
        except (EOFError, ConnectionError):
            return _render.LIMIT, self._death()

    def _death(self) -> bytes:
        """Why the process has ended, as far as that is the template's doing; OSError where it is not."""
        try:
            status = self._child.wait(1)
        except subprocess.TimeoutExpired:
            return b"it disturbed the process that renders it"
        if -status == signal.SIGXCPU:
            return f"it takes more than {_render.SECONDS} s".encode()
        if -status in _CRASHES:
            return f"it crashed the process that renders it ({signal.Signals(-status).name})".encode()
        raise OSError(f"the process that renders chat templates was ended from outside (status {status})")

    def _send(self, message: bytes) -> None:
        self._socket.sendall(len(message).to_bytes(8, "little"))
        self._socket.sendall(message)

    def _receive(self) -> bytes:
        size = int.from_bytes(self._read(8), "little")
        if not 1 <= size <= _MAX_ANSWER_BYTES:
            raise EOFError  # no answer that the process could give
        return self._read(size)

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._socket.recv(min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def _end(child: subprocess.Popen[bytes], connection: socket.socket, owner: int) -> None:
    connection.close()
    if os.getpid() == owner:  # and not in a child of fork, whose parent goes on
        child.kill()
        child.wait()


def _above_stdio(end: socket.socket) -> socket.socket:
    """Where standard streams are closed, a new socket gets their number, and what libraries print would go into it."""
    low = []
    while end.fileno() <= 2:
        low.append(end)
        end = end.dup()
    for closed in low:
        closed.close()
    return end


def _folders() -> list[str]:
    """Where jinja2 and the package that it needs are installed."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise OSError(f"rendering a chat template needs the package {name}, which is not installed as files")
        folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))


def _plain(value: Any, where: str, depth: int) -> Any:
    """The value as built-in types, which another process can read."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where.split('.')[1]} is nested too deeply for a chat template")
    if isinstance(value, Mapping):
        return {_plain(k, where, depth + 1): _plain(v, f"{where}.{k}"[:80], depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, where, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (set, frozenset)):
        return {_plain(item, where, depth + 1) for item in value}
    raise TypeError(
        f"{where.removeprefix('.')} holds a {type(value).__name__}; a chat template reads plain data: text, numbers, "
        "lists and dicts"
    )


_all: weakref.WeakSet[ChatTemplate] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """The processes are the parent's. A lock may be held by a thread that was not copied."""
    for template in list(_all):
        process = template._process
        if process is not None:
            process.end.detach()
            process._socket.close()
            process._child.returncode = 0  # not ours to wait for
        template._renew()


os.register_at_fork(after_in_child=_after_fork_in_child)
