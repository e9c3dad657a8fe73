"""Prompts from a JSON-lines file, results to another: any number of them in constant memory, resumable.

A line of input is an object with "prompt" (text) or "messages" (a chat), optionally "id" and any SamplingParams field
but logprobs. A line of output answers the line of input of the same number and holds only what does not depend on
the schedule, so that an interrupted and resumed run writes the same bytes as an undisturbed one. Lines are written
whole and in order; they are on disk (fsync) at the boundaries of windows. OUTPUT.run.json beside the output remembers
how it was started, and goes when all is done.

Only a line's own faults are its answer. A fault of the machine (no memory, a device that fails, a full disk) stops the
run: what was not answered is answered by the next run. One process writes an output at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from idlm_kernels.generate.engine import Engine, Request
from idlm_kernels.generate.params import SamplingParams, checked_seed, draw_seed, mixed_seed
from idlm_kernels.model.tokenizer import Tokenizer

_PARAMETERS = {f.name for f in dataclasses.fields(SamplingParams)} - {"logprobs"}
_FIRST = b'{"index": 0,'  # how every output begins
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}
_KEYS = _PARAMETERS | {"id", "prompt", "messages"}
_FAULTS_OF_A_LINE = (ValueError, TypeError, OverflowError, RecursionError)  # what the text of a line can cause


@dataclasses.dataclass
class Progress:
    """lines: answered so far, of total; failed: of them with an error; tokens: generated in this run."""

    lines: int
    total: int
    failed: int
    tokens: int


class RunStopped(RuntimeError):
    """A fault of the machine ended a run. Nothing is lost: the same call goes on where it was."""


class Answer(NamedTuple):
    """A line of output, and what of it is counted."""

    number: int
    line: bytes
    failed: bool
    tokens: int


class LineFailed(RuntimeError):
    """The machine failed a line, which so has no answer."""


# Number and text of each line, in order; and what answers them with a base seed, in order too and block by block.
Lines = Iterator[tuple[int, bytes]]
Answering = Callable[[Lines, int, Progress], Iterator[list[Answer]]]


def run_file(
    engine: Engine,
    source: Path,
    target: Path,
    params: SamplingParams,
    encode: Callable[[dict[str, Any]], list[int]],
    settings: dict[str, Any],
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Answer every line of `source` in `target`, from where an earlier run left off.

    params: for lines that do not say otherwise; its seed is mixed with the line's number. encode: a line -> prompt ids.
    settings: what the output depends on besides; a run is resumed only with the settings that it was started with.

    Raises: ValueError if the source is no regular file, or changes while it is read; if the target belongs to something
    else, or another process writes or changes it; OSError if it cannot be written, RunStopped if the machine failed
    (what is there stays whole, and the run can be resumed). A line that cannot run is answered with an "error", and the
    others go on.
    """

    def answering(lines: Lines, base_seed: int, progress: Progress) -> Iterator[list[Answer]]:
        def count(tokens: int) -> None:
            progress.tokens += tokens

        return answered(engine, lines, params, base_seed, encode, count)

    return answer_file(source, target, params.seed, settings, answering, report)


def answer_file(
    source: Path,
    target: Path,
    seed: int | None,
    settings: dict[str, Any],
    answering: Answering,
    report: Callable[[Progress], None],
) -> Progress:
    """`run_file` with lines that are answered elsewhere: answering gets those that are still open."""
    with _Input(source) as lines, _Output(target) as output:
        base_seed, done, failed = _open_run(output, {**settings, "input_sha256": lines.sha256}, seed)
        progress = Progress(done, lines.total, failed, 0)
        try:
            for answers in answering(lines.lines(skip=done), base_seed, progress):
                lines.check()
                _write_answers(output, answers, progress)
                report(progress)
        except LineFailed as error:
            raise RunStopped(
                f"{error}; {progress.lines} lines are answered and safe, run the same again for the others"
            ) from error.__cause__
        output.check()
        _run_path(target).unlink()
    return progress


def answered(
    engine: Engine,
    lines: Lines,
    params: SamplingParams,
    base_seed: int,
    encode: Callable[[dict[str, Any]], list[int]],
    count: Callable[[int], None] = lambda tokens: None,
) -> Iterator[list[Answer]]:
    """The answers to lines, in order; after each window those that are there, possibly none. count: of new tokens.

    Raises: LineFailed after the answers before that line; RunStopped where a prompt could not be made.
    """
    waiting: dict[int, Request | dict[str, Any]] = {}  # by line number: running, or answered with an error
    window = 4 * engine.options.max_num_seqs  # lines between the oldest unanswered one and the last one read
    exhausted = False
    while not exhausted or waiting:
        while not exhausted and len(waiting) < window:
            number, line = next(lines, (-1, b""))
            if number < 0:
                exhausted = True
            else:
                waiting[number] = _submit(engine, number, line, params, base_seed, encode)
        for _, event in engine.window():
            count(len(event.token_ids))
        yield _at_the_head(waiting)
        for number, request in sorted(waiting.items()):
            if isinstance(request, Request) and request.output.fault is not None:
                raise LineFailed(f"line {number}: {request.output.error}") from request.output.fault


def _submit(
    engine: Engine,
    number: int,
    line: bytes,
    params: SamplingParams,
    base_seed: int,
    encode: Callable[[dict[str, Any]], list[int]],
) -> Request | dict[str, Any]:
    record: Any = None
    try:
        record = json.loads(line, parse_constant=_no_number)
        own = _own_parameters(record, params)
        seed = own.seed if record.get("seed") is not None and own.seed is not None else mixed_seed(base_seed, number)
        request = engine.submit(encode(record), own, seed)
        request.tag = record.get("id")
        return request
    except _FAULTS_OF_A_LINE as error:
        answer = {"id": record.get("id") if isinstance(record, dict) else None, "error": _told(error)}
        try:
            _encoded(answer)
        except (ValueError, RecursionError):
            answer["id"] = None
        return answer
    except OSError as error:  # of the machine, such as no process for the chat template
        raise RunStopped(f"line {number}: {error}; run the same again for it and the others") from error


def _own_parameters(record: Any, params: SamplingParams) -> SamplingParams:
    if not isinstance(record, dict):
        raise ValueError(f"a line must be an object, got {type(record).__name__}")
    _encoded({"id": record.get("id")})
    if unknown := sorted(set(record) - _KEYS):
        raise ValueError(f"unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    return dataclasses.replace(params, **{k: v for k, v in record.items() if k in _PARAMETERS})


def longest_request(
    source: Path, params: SamplingParams, encode: Callable[[dict[str, Any]], list[int]], limit: int
) -> int:
    """The most tokens, prompt and answer, that a line of `source` can come to, at most `limit`.

    An engine for so many gives what one for `limit` gives, and a model's own limit may be a number that nobody has the
    memory for. It costs a pass over the file, which is little beside its answers.
    """
    longest = 2
    with _Input(source) as file:
        for _, line in file.lines(skip=0):
            try:
                record = json.loads(line, parse_constant=_no_number)
                own = _own_parameters(record, params)
                longest = max(longest, len(encode(record)) + own.max_tokens)
            except _FAULTS_OF_A_LINE:  # its answer, later
                continue
            if longest >= limit:
                return limit
    return longest


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _told(error: Exception) -> str:
    return "the line is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _encoded(answer: dict[str, Any]) -> bytes:
    """A line of output. Half a surrogate pair, which UTF-8 has no bytes for, stays the escape that it was."""
    try:
        return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(answer, allow_nan=False).encode() + b"\n"


def _at_the_head(waiting: dict[int, Request | dict[str, Any]]) -> list[Answer]:
    """Take the answers from the head of the queue."""
    answers = []
    for number in sorted(waiting):
        request = waiting[number]
        answer = _answer(request) if isinstance(request, Request) else request
        if answer is None:
            break
        del waiting[number]
        line = _encoded({"index": number, **answer})
        answers.append(Answer(number, line, "error" in answer, answer.get("tokens", 0)))
    return answers


def _write_answers(output: _Output, answers: list[Answer], progress: Progress) -> None:
    """Write answers and see them to the disk."""
    try:
        output.append(b"".join(answer.line for answer in answers))
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}; {progress.lines} lines are safe: make room and run the same again",
            str(output.path),
        ) from None
    progress.lines += len(answers)
    progress.failed += sum(answer.failed for answer in answers)


class _Output:
    """The file of answers: locked against other processes, and written in whole blocks without a buffer.

    Raises: ValueError if it is no regular file, if another process writes it, if it was removed, replaced or changed.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is not a regular file, which a run that can be resumed needs")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:  # another process that writes is noticed when it has
                warnings.warn(
                    f"{path}: its file system has no locks; see to it that no other run writes it", stacklevel=3
                )
            else:
                os.close(self._fd)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise ValueError(f"{path} is being written by another process{_writer(path)}; wait for it") from None
        self._size = self.size  # as this process left it

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)  # and the lock with it

    def check(self) -> None:
        """That the path still leads to what is written."""
        mine = os.fstat(self._fd)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            what = "removed" if there is None else "replaced"
        elif mine.st_size != self._size:
            what = "changed"
        else:
            return
        raise ValueError(f"{self.path} was {what} while it was being written: run the same again for its answers")

    def append(self, block: bytes) -> None:
        """Write all of it and see it to the disk, or leave the file as it was."""
        self.check()
        size = self._size
        try:
            left = memoryview(block)
            while left:
                left = left[os.write(self._fd, left) :]
            os.fsync(self._fd)
            self._size += len(block)
        except BaseException:
            with contextlib.suppress(OSError):  # a resumed run cuts half a line off as well
                self.cut(size)
            raise

    def lines(self) -> Iterator[bytes]:
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            yield from file

    def begins_with(self, text: bytes) -> bool:
        """Or with as much of it as was written; what was lost of a block is zeros."""
        head = os.pread(self._fd, len(text), 0)
        return head.strip(b"\0") == b"" or text.startswith(head.rstrip(b"\0"))

    def cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        self._size = size

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size


def _writer(target: Path) -> str:
    """Who it is, as far as its run.json says so."""
    try:
        return f" ({int(json.loads(_run_path(target).read_bytes())['pid'])})"
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _answer(request: Request) -> dict[str, Any] | None:
    """None while there is none: the request runs, or the machine failed it."""
    if not request.ended or request.output.fault is not None:
        return None
    output = request.output
    answer: dict[str, Any] = {"id": request.tag}
    if output.error is not None:
        answer["error"] = output.error
    result = output.result("", 0)
    answer |= {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
    }
    return answer


class _Input:
    """The file of lines, read once for its digest and once for its lines: sha256, and how many are not blank.

    Raises: ValueError if it is no regular file, or was changed in between.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is not a regular file; it is read twice: write the lines to a file first")
        self._file = path.open("rb")
        self.sha256, self.total = self._digest()
        self._seen = self._state()

    def __enter__(self) -> _Input:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _digest(self) -> tuple[str, int]:
        digest, count, place, has_text = hashlib.sha256(), 0, 0, False
        while block := os.pread(self._file.fileno(), 1 << 20, place):
            digest.update(block)
            place += len(block)
            *ends, rest = block.split(b"\n")
            for part in ends:
                count += has_text or bool(part.strip())
                has_text = False
            has_text = has_text or bool(rest.strip())
        return digest.hexdigest(), count + has_text

    def _state(self) -> tuple[int, int]:
        now = os.fstat(self._file.fileno())
        return now.st_size, now.st_mtime_ns

    def check(self) -> None:
        """That the lines are still those of the digest, before anything is answered for them."""
        if self._state() == self._seen:
            return
        self._seen = self._state()
        if self._digest()[0] != self.sha256:
            raise ValueError(
                f"{self.path} was changed while its lines were being answered: put it back and run the same again, or "
                "remove the output and its run.json and start again"
            )

    def lines(self, skip: int) -> Iterator[tuple[int, bytes]]:
        number = 0
        self._file.seek(0)
        while line := self._file.readline():
            if line.strip():
                if number >= skip:
                    yield number, line
                number += 1


def _run_path(target: Path) -> Path:
    return target.with_name(target.name + ".run.json")


def _open_run(output: _Output, settings: dict[str, Any], seed: int | None) -> tuple[int, int, int]:
    """Start or resume: (base seed, lines that are answered, those of them with an error)."""
    target, path = output.path, _run_path(output.path)
    if not path.exists():
        if output.size:
            raise ValueError(f"{target} exists and is not an interrupted run; remove it or write elsewhere")
        base_seed = draw_seed() if seed is None else seed
        _remember(path, base_seed, settings)
        return base_seed, 0, 0
    base_seed, started = _remembered(path, target)
    changed = sorted(k for k in {*started, *settings} if started.get(k) != settings.get(k))
    if changed or seed not in (None, base_seed):
        what = ", ".join(changed) or "seed"
        raise ValueError(f"{target} was started with another {what}; finish it as it was, or remove it and {path.name}")
    _remember(path, base_seed, settings)
    lines = failed = whole = 0
    for line in output.lines():
        answer = _parsed(line)
        if answer is None or answer.get("index") != lines:  # what a power cut left; it is answered again
            break
        whole += len(line)
        lines += 1
        failed += "error" in answer
    if not lines and not output.begins_with(_FIRST):
        raise ValueError(
            f"{target} is not the interrupted run that {path.name} tells of: put that back, or remove {path.name} and "
            "write elsewhere"
        )
    output.cut(whole)
    return base_seed, lines, failed


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An answer; None for half a line, and for what no run has written."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return answer if line.endswith(b"\n") and isinstance(answer, dict) else None


def _remember(path: Path, base_seed: int, settings: dict[str, Any]) -> None:
    """Write run.json in one piece. pid: who writes the output, told to others who want to."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(json.dumps({"base_seed": base_seed, "pid": os.getpid(), **settings}).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _remembered(path: Path, target: Path) -> tuple[int, dict[str, Any]]:
    """The base seed and the settings of an interrupted run."""
    try:
        started = json.loads(path.read_bytes())
        base_seed = checked_seed(started.pop("base_seed"))
        started.pop("pid", None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"{path} is damaged, and with it how the run was started: remove it and {target.name}, and start again"
        ) from None
    return base_seed, started


def encoder(tokenizer: Tokenizer, chat: bool, system: str | None) -> Callable[[dict[str, Any]], list[int]]:
    """Prompt ids of a line: "messages" through the chat template, "prompt" as a user message or, raw, as it is."""

    def encode(record: dict[str, Any]) -> list[int]:
        if ("prompt" in record) == ("messages" in record):
            raise ValueError('a line needs "prompt" or "messages", one of the two')
        messages = record.get("messages")
        if messages is None:
            prompt = record["prompt"]
            if not isinstance(prompt, str) or not prompt:
                raise ValueError('"prompt" must be text that is not empty')
            if not chat:
                return tokenizer.encode(prompt)
            messages = [{"role": "user", "content": prompt}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
        return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)

    return encode
