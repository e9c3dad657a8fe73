"""The process that renders a chat template: a stranger's program, kept where it can take neither time nor memory.

It is run as a script, isolated, with the parent's jinja2 and nothing else: `python -I -S _render.py FOLDER...`, where
the folders hold jinja2 and what it needs. Standard input is a socket to the parent. A message is its length (8 bytes,
little-endian) and its bytes. This process says that it is ready; for each conversation the parent then sends the
template and the names that it may read (marshal: plain data of one Python to another). An answer is a byte that says
what the rest is, text or a fault. The process ends when the parent does, since the socket does then.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

SECONDS = 3  # of a processor, for one conversation
MEMORY_BYTES = 256 << 20  # for one conversation, besides what the conversation itself takes
OUTPUT_CHARS = 1 << 24  # of the whole, and of any string or list that a template multiplies
READY, TEXT, FAULT, LIMIT = b"r", b"t", b"f", b"l"
_FAULT_CHARS = 2000
_COPIES = 16  # of the request, that a template may make: as objects, as pieces of text, as the text, as bytes


def main(folders: list[str]) -> None:
    sys.path += folders
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    _limit(resource.RLIMIT_CORE, 0)
    environment = _environment()
    _send(READY, b"")
    compiled: Any = None
    template: Any = None
    while (request := _receive()) is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + SECONDS)
        _limit(resource.RLIMIT_AS, _address_space() + MEMORY_BYTES + _COPIES * len(request))
        try:
            source, names = marshal.loads(request)
            if source != compiled:
                compiled, template = None, environment.from_string(source)
                compiled = source
            kind, text = TEXT, _bounded(template.generate(names))
        except MemoryError:
            kind, text = LIMIT, f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"
        except BaseException as error:
            kind, text = FAULT, _told(error)
        names = None
        _limit(resource.RLIMIT_CPU, -1)
        _limit(resource.RLIMIT_AS, -1)
        _send(kind, text.encode("utf-8", "surrogatepass"))
        if kind == LIMIT:
            return


def _told(error: BaseException) -> str:
    import jinja2

    try:
        text = str(error)[:_FAULT_CHARS]
    except BaseException:
        text = ""
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def _limit(what: int, wanted: int) -> None:
    """Set a soft limit, or the hard one if that is lower; -1 is none."""
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY and (wanted < 0 or wanted > hard):
        wanted = hard
    with contextlib.suppress(ValueError, OSError):  # a system that does not know this limit
        resource.setrlimit(what, (resource.RLIM_INFINITY if wanted < 0 else wanted, hard))


def _address_space() -> int:
    """Bytes of address space in use; where the system does not tell, what this process could at most need."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 1 << 30


def _receive() -> bytes | None:
    head = _read(8)
    return None if head is None else _read(int.from_bytes(head, "little"))


def _read(count: int) -> bytes | None:
    """So many bytes from the parent; None where it has ended."""
    parts = []
    while count:
        part = os.read(0, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _send(kind: bytes, answer: bytes) -> None:
    for part in ((len(answer) + 1).to_bytes(8, "little") + kind, answer):
        left = memoryview(part)
        while left:
            left = left[os.write(0, left) :]


def _bounded(pieces: Iterator[str]) -> str:
    """The pieces of a text, unless there are too many."""
    kept, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > OUTPUT_CHARS:
            raise ValueError(f"it writes more than {OUTPUT_CHARS} characters")
        kept.append(piece)
    return "".join(kept)


def _environment() -> Any:
    """Sandboxed, with the globals and filters that transformers gives to templates."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; for rendering it is transparent."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses at once, and by name, the products that would run into the limits of the process."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
            if operator == "**" and not (numbers and abs(right) <= 64 and abs(left) <= 2**64):
                raise SecurityError(f"{left!r:.40} ** {right!r:.40} is beyond what a chat template may compute")
            for one, times in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(times, int) and len(one) * times > OUTPUT_CHARS:
                    raise SecurityError(f"a {type(one).__name__} times {times} is longer than {OUTPUT_CHARS}")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.filters["tojson"] = tojson
    return environment


if __name__ == "__main__":
    main(sys.argv[1:])
